//! To come.

use super::{Failure, Position};
use crate::domain::time::UnixMillis;
use crate::visits::batch::Batch;
use crate::visits::spool::Epoch;

#[derive(Debug)]
pub struct Postgres;

impl Postgres {
    pub async fn positions(&mut self, _epochs: &[Epoch]) -> Result<Vec<Position>, Failure> {
        todo!()
    }

    pub async fn store(&mut self, _batch: &Batch) -> Result<(), Failure> {
        todo!()
    }

    pub async fn housekeep(&mut self, _now: UnixMillis) -> Result<(), Failure> {
        todo!()
    }
}
