//! TBD

pub mod machine {
    #[derive(Debug)]
    pub struct Machine {}

    impl Machine {
        #[must_use]
        pub fn begin() -> Self {
            Self {}
        }
        pub fn end(&mut self) {}
    }
}
