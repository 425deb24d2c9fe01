//! Visitor keys: where the key comes from that tells visitors apart.
//!
//! In: `privacy.visitor`, the store, `DATA/visitor.key`. Out: keys in [`Keys`], the same on every instance of a store.
//! Never: uses a key that the store does not have; keeps the key of a day in a file of its own; shows a key.
//! At its limit: while the store does not answer it is asked again each [`RETRY`]; visits of a day without a key carry no
//! visitor.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::visitor::{EVERY_DAY, Keys};
use crate::config::VisitorKey;
use crate::domain::time::{self, UnixMillis};
use crate::stats::rollup::{Day, day};
use crate::store::{Error, Result, Store};

const FILE: &str = "visitor.key";
/// The setting with the deployment's key; those of days have their number behind it.
const SETTING: &str = "visitor.key";
/// How long before its day a key is settled: so long may the store be away at midnight.
const AHEAD_MS: i64 = 6 * 3_600_000;
const RETRY: Duration = Duration::from_secs(5);
/// How often the day is looked at.
const TICK: Duration = Duration::from_secs(60);

/// Sets the deployment's key as `DATA/visitor.key` has it, so that a start does not need the store for it. A file that is
/// none of ours counts as none: the store has the key.
pub fn start(keys: &Keys, which: VisitorKey, data: &Path) {
    if which == VisitorKey::Deployment
        && let Some(key) = cached(&data.join(FILE))
    {
        keys.set(EVERY_DAY, halves(key));
    }
}

/// Keeps the keys as the store has them: the deployment's once, a day's for ever. One task in back runs it.
pub async fn run(keys: Arc<Keys>, store: Store, which: VisitorKey, data: PathBuf) {
    let mut days = Days::default();
    let mut warned = false;
    loop {
        let settled = match which {
            VisitorKey::Deployment => deployment(&store, &data.join(FILE), rand::random()).await,
            VisitorKey::Daily => days.settle(&store, time::now(), rand::random).await,
        };
        match settled {
            Ok(settled) => {
                for (day, key) in settled {
                    keys.set(day, halves(key));
                }
                warned = false;
                if which == VisitorKey::Deployment {
                    return;
                }
                tokio::time::sleep(TICK).await;
            }
            Err(error) => {
                if !warned {
                    tracing::warn!(%error, "the store gives no key of visitors: until it does, new ones may not be told apart");
                }
                warned = true;
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// The key of the deployment, which the file has from now on. A store without one gets the file's, or else `random`.
async fn deployment(store: &Store, file: &Path, random: u128) -> Result<Vec<(i64, u128)>> {
    let cached = cached(file);
    let key = settle(store, SETTING, cached.unwrap_or(random)).await?;
    if cached != Some(key)
        && let Err(error) = write(file, key)
    {
        let file = file.display();
        tracing::warn!(%file, %error, "the key of visitors cannot be kept: a start without the store would not have it");
    }
    Ok(vec![(EVERY_DAY, key)])
}

/// Which days are done.
#[derive(Debug, Default)]
struct Days {
    /// The last one with a key.
    settled: Day,
    /// Keys of days before it are gone.
    forgotten: Day,
}

impl Days {
    /// The keys that are due and were not given yet: today's, and a while before midnight tomorrow's. Those of the days
    /// before are deleted from the store.
    async fn settle(&mut self, store: &Store, now: UnixMillis, random: impl Fn() -> u128) -> Result<Vec<(i64, u128)>> {
        let today = day(now);
        let mut settled = Vec::new();
        for day in today.max(self.settled + 1)..=day(UnixMillis(now.0.saturating_add(AHEAD_MS))) {
            settled.push((i64::from(day), settle(store, &setting(day), random()).await?));
        }
        if self.forgotten < today {
            store.forget(setting(0), setting(today)).await?;
            self.forgotten = today;
        }
        if let Some((last, _)) = settled.last() {
            self.settled = Day::try_from(*last).unwrap_or(self.settled);
        }
        Ok(settled)
    }
}

/// In the order of the days.
fn setting(day: Day) -> String {
    format!("{SETTING}.{day:010}")
}

async fn settle(store: &Store, name: &str, key: u128) -> Result<u128> {
    let stored = store.settle(name, key.to_be_bytes().to_vec()).await?;
    let key = stored.try_into().map_err(|_| Error::Broken(format!("the setting {name} is no key of 16 bytes")))?;
    Ok(u128::from_be_bytes(key))
}

fn halves(key: u128) -> [u64; 2] {
    [(key >> 64) as u64, key as u64]
}

/// 32 hexadecimal digits and the end of the line.
fn cached(file: &Path) -> Option<u128> {
    let text = fs::read_to_string(file).ok()?;
    let digits = text.strip_suffix('\n').filter(|digits| digits.len() == 32)?;
    u128::from_str_radix(digits, 16).ok()
}

/// Whole or not at all, for its owner alone.
fn write(file: &Path, key: u128) -> io::Result<()> {
    let part = file.with_extension("key.part");
    // A mode counts when a file is made, so one that a crash has left is not used.
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    writeln!(out, "{key:032x}")?;
    out.sync_all()?;
    fs::rename(&part, file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::stats::rollup::DAY_MS;
    use crate::store::sqlite::{self, Sqlite};

    const HOUR_MS: i64 = 3_600_000;

    fn store(folder: &Path) -> Store {
        let path = folder.join("waypost.db");
        sqlite::migrate(&path).unwrap();
        Store::Sqlite(Sqlite::open(&path).unwrap())
    }

    #[tokio::test]
    async fn the_deployments_key_is_the_stores() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path());
        let (one, two) = (folder.path().join("one.key"), folder.path().join("two.key"));
        fs::write(one.with_extension("key.part"), "of a crash").unwrap();
        for (file, random) in [(&one, 0xabc), (&two, 2), (&one, 3)] {
            assert_eq!(deployment(&store, file, random).await.unwrap(), [(EVERY_DAY, 0xabc)]);
            assert_eq!(cached(file), Some(0xabc));
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
        fs::write(&two, "0000000000000000000000000000000d\n").unwrap();
        assert_eq!(deployment(&store, &two, 4).await.unwrap(), [(EVERY_DAY, 0xabc)], "not the file's");
        assert_eq!(cached(&two), Some(0xabc));

        // A new store takes over what the file has: days before and after are true unions.
        let other = tempfile::tempdir().unwrap();
        assert_eq!(deployment(&self::store(other.path()), &one, 5).await.unwrap(), [(EVERY_DAY, 0xabc)]);
        // A file that cannot be written costs nothing but itself.
        assert_eq!(deployment(&store, &folder.path().join("no/folder.key"), 6).await.unwrap(), [(EVERY_DAY, 0xabc)]);
    }

    #[test]
    fn what_is_no_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        assert_eq!(cached(&file), None);
        let digits = "0123456789abcdef0123456789abcdef";
        for (text, key) in [
            (format!("{digits}\n"), Some(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef)),
            (digits.to_owned(), None),
            (format!("{}\n", &digits[1..]), None),
            (format!("{}g\n", &digits[1..]), None),
            (String::new(), None),
        ] {
            fs::write(&file, &text).unwrap();
            assert_eq!(cached(&file), key, "{text:?}");
        }
        assert_eq!(halves(0x0123_4567_89ab_cdef_fedc_ba98_7654_3210), [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
    }

    #[tokio::test]
    async fn a_key_for_each_day() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path());
        let at = |day: i64, hours: i64| UnixMillis(day * DAY_MS + hours * HOUR_MS);
        let (mut one, mut two) = (Days::default(), Days::default());
        assert_eq!(one.settle(&store, at(20_000, 3), || 1).await.unwrap(), [(20_000, 1)]);
        assert_eq!(one.settle(&store, at(20_000, 17), || 2).await.unwrap(), []);
        assert_eq!(two.settle(&store, at(20_000, 17), || 3).await.unwrap(), [(20_000, 1)], "the same for all");
        assert_eq!(two.settle(&store, at(20_000, 18), || 4).await.unwrap(), [(20_001, 4)], "ahead of its day");
        assert_eq!(one.settle(&store, at(20_000, 23), || 5).await.unwrap(), [(20_001, 4)]);
        assert_eq!(one.settle(&store, at(20_001, 0), || 6).await.unwrap(), [], "it was there in time");
        assert_eq!(one.settle(&store, at(20_000, 23), || 6).await.unwrap(), [], "the clock stepped back");
        // Yesterday's was deleted, and so a new one would be settled; today's is there.
        let mut late = Days::default();
        assert_eq!(late.settle(&store, at(20_000, 20), || 7).await.unwrap(), [(20_000, 7), (20_001, 4)]);
        // After days without any instance.
        let mut later = Days::default();
        assert_eq!(later.settle(&store, at(20_009, 1), || 8).await.unwrap(), [(20_009, 8)]);
        for old in [20_000, 20_001] {
            assert_eq!(super::settle(&store, &setting(old), 9).await.unwrap(), 9, "nothing is left");
        }
        // Nothing but days is deleted.
        assert_eq!(super::settle(&store, SETTING, 10).await.unwrap(), 10);
        assert_eq!(Days::default().settle(&store, at(20_010, 1), || 11).await.unwrap(), [(20_010, 11)]);
        assert_eq!(super::settle(&store, SETTING, 12).await.unwrap(), 10);
    }

    #[tokio::test]
    async fn a_setting_that_is_no_key() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path());
        store.settle(SETTING, b"short".to_vec()).await.unwrap();
        let error = deployment(&store, &folder.path().join(FILE), 1).await.unwrap_err();
        assert_eq!(error.to_string(), "the store failed: the setting visitor.key is no key of 16 bytes");
    }
}
