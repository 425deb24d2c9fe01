#[derive(Debug)]
pub struct Happened {}
pub fn run(_: &[crate::scenario::Event], _: u64, _: &std::sync::atomic::AtomicBool) -> Vec<Happened> {
    vec![]
}
