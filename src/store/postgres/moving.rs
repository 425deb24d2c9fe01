//! What moves out of an embedded store into Postgres.

use super::Postgres;
use crate::domain::link::{Link, LinkId};
use crate::store::row::Rest;
use crate::store::{Error, Result};

impl Postgres {
    pub async fn adopt(&self, _: &[Link]) -> Result<LinkId> {
        Err(Error::Broken("being built".into()))
    }

    pub async fn adopt_rest(&self, _: &Rest, _: bool) -> Result<LinkId> {
        Err(Error::Broken("being built".into()))
    }
}
