//! The store of many instances: Postgres. (Being built.)

use super::row::{
    Change, ChangeRow, Filter, Found, Inserted, InstanceRow, NewLink, Position, Reading, Rest, WarmReport, WarmRequest,
    WarmWhat, WorkerLease,
};
use super::schema::Migration;
use super::{Error, Result};
use crate::domain::key::{DomainId, Key};
use crate::domain::link::{Link, LinkId};
use crate::domain::time::UnixMillis;
use crate::guard::keys::KeyRecord;

#[derive(Clone, Debug)]
pub struct Postgres;

fn unbuilt<T>() -> Result<T> {
    Err(Error::Broken("being built".into()))
}

pub const MIGRATIONS: [Migration; 0] = [];

pub async fn migrate(_: &crate::config::Postgres) -> Result<Vec<&'static Migration>> {
    unbuilt()
}

pub async fn pending(_: &crate::config::Postgres) -> Result<Vec<&'static Migration>> {
    unbuilt()
}

pub async fn grants(_: &crate::config::Postgres, _: &str) -> Result<()> {
    unbuilt()
}

impl Postgres {
    pub fn open(_: &crate::config::Postgres) -> Result<Self> {
        Ok(Self)
    }

    pub async fn check_schema(&self) -> Result<()> {
        unbuilt()
    }
    #[must_use]
    pub fn describe(&self) -> String {
        String::new()
    }

    pub async fn look_up(&self, _: &[Key]) -> Result<Vec<Found>> {
        unbuilt()
    }

    pub async fn insert(&self, _: Vec<NewLink>, _: UnixMillis) -> Result<Vec<Inserted>> {
        unbuilt()
    }

    pub async fn change(&self, _: Key, _: Change, _: UnixMillis) -> Result<Option<Link>> {
        unbuilt()
    }

    pub async fn take_visit(&self, _: Key, _: LinkId, _: UnixMillis) -> Result<bool> {
        unbuilt()
    }

    pub async fn link(&self, _: Key) -> Result<Option<Link>> {
        unbuilt()
    }

    pub async fn page(&self, _: &Filter, _: Option<LinkId>, _: u32, _: Reading) -> Result<Vec<Link>> {
        unbuilt()
    }

    pub async fn count(&self, _: &Filter, _: Reading) -> Result<u64> {
        unbuilt()
    }

    pub async fn position(&self) -> Result<Position> {
        unbuilt()
    }

    pub async fn changes(&self, _: u64, _: u32) -> Result<Vec<ChangeRow>> {
        unbuilt()
    }

    pub async fn edits(&self, _: u32) -> Result<Vec<ChangeRow>> {
        unbuilt()
    }

    pub async fn begin_generation(&self, _: u64) -> Result<u64> {
        unbuilt()
    }

    pub async fn lease(&self, _: &'static str, _: u64, _: u64) -> Result<u64> {
        unbuilt()
    }

    pub async fn settle(&self, _: &'static str, _: &[u8]) -> Result<Vec<u8>> {
        unbuilt()
    }

    pub async fn number_domains(&self, _: &[String]) -> Result<Vec<DomainId>> {
        unbuilt()
    }

    pub async fn domains(&self) -> Result<Vec<(DomainId, String)>> {
        unbuilt()
    }

    pub async fn add_key(&self, _: &KeyRecord) -> Result<()> {
        unbuilt()
    }

    pub async fn keys(&self, _: Option<&str>) -> Result<Vec<KeyRecord>> {
        unbuilt()
    }

    pub async fn revoke_key(&self, _: &str, _: UnixMillis) -> Result<bool> {
        unbuilt()
    }

    pub async fn touch_key(&self, _: &str, _: UnixMillis) -> Result<()> {
        unbuilt()
    }

    pub async fn lease_worker(&self, _: &str, _: Option<u16>, _: u64, _: u64) -> Result<Option<WorkerLease>> {
        unbuilt()
    }

    pub async fn renew_worker(&self, _: &WorkerLease, _: u64, _: u64) -> Result<Option<WorkerLease>> {
        unbuilt()
    }

    pub async fn release_worker(&self, _: &WorkerLease, _: u64) -> Result<()> {
        unbuilt()
    }

    pub async fn ask_warm(&self, _: &WarmWhat, _: UnixMillis) -> Result<u64> {
        unbuilt()
    }

    pub async fn warm_requests(&self, _: u64) -> Result<Vec<WarmRequest>> {
        unbuilt()
    }

    pub async fn keys_of(&self, _: &WarmWhat, _: u32) -> Result<Vec<Key>> {
        unbuilt()
    }

    pub async fn report_warm(&self, _: u64, _: &WarmReport, _: UnixMillis) -> Result<()> {
        unbuilt()
    }

    pub async fn warm_reports(&self, _: u64) -> Result<Vec<WarmReport>> {
        unbuilt()
    }

    pub async fn pin(&self, _: &[Key], _: bool, _: UnixMillis) -> Result<u64> {
        unbuilt()
    }

    pub async fn pins(&self) -> Result<Vec<Key>> {
        unbuilt()
    }

    pub async fn present(&self, _: &str, _: bool, _: UnixMillis) -> Result<()> {
        unbuilt()
    }

    pub async fn instances(&self) -> Result<Vec<InstanceRow>> {
        unbuilt()
    }

    pub async fn adopt(&self, _: &[Link]) -> Result<LinkId> {
        unbuilt()
    }

    pub async fn adopt_rest(&self, _: &Rest, _: bool) -> Result<LinkId> {
        unbuilt()
    }
}
