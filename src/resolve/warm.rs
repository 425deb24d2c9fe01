//! The warm file: the most asked for links, for a start without stores.
//!
//! In: the shards, and what they are true of. Out: a file, and from one the entries to begin with.
//! Never: panics over a file; returns a part of one; leaves half of one in the place of a whole; holds a link that has
//! a limit of visits. Whether a file may be used (the same store, no older than is allowed) is the reader's to judge.
//! At its limit: [`ENTRIES_MAX`] entries and [`ENTRY_BYTES_MAX`] bytes of them; those less asked for are left out. A
//! file of more than [`FILE_BYTES_MAX`] bytes is not read.
//!
//! The most asked for are those of the greatest heat (see `shards`): asked for in the latest periods. Of two of the same
//! heat the one that came into its shard later goes first, and the one whose shard is looked through later stays.
//!
//! A file, little-endian; texts are a length u32 and bytes, entries as in `value`:
//!
//! ```text
//! "wp-warm\n" | version u8: 1 | store text | generation u64 | position u64 | followed at i64 | codes text
//!   | domains: count u32, then each: number u16, host text
//!   | entries: count u32, then each: domain u16, code text, entry's length u32, entry; the most asked for first
//!   | checksum u64: FNV-1a over everything before it
//! ```

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::shards::{HEATS, Shards};
use super::value::{self, FNV_BASIS, Reader, StoredAsOf, fnv1a};
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::Entry;
use crate::domain::time::UnixMillis;

/// The most entries of a file.
pub const ENTRIES_MAX: usize = 100_000;
/// The most bytes that they take, keys and lengths included.
pub const ENTRY_BYTES_MAX: usize = 32 << 20;
/// The most bytes of a file that is read: entries, and as much again for the domains.
pub const FILE_BYTES_MAX: u64 = 64 << 20;

const MAGIC: [u8; 8] = *b"wp-warm\n";
const VERSION: u8 = 1;

/// What the entries of a file are true of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Names the store: positions and numbers of domains mean nothing in another.
    pub store: String,
    /// How far memory had followed the feed when the entries were gathered; before that, not after.
    pub as_of: StoredAsOf,
    /// When that was: what is older than is allowed is not served.
    pub followed_at: UnixMillis,
    /// How codes are written (alphabet, case): a key means another link where that differs.
    pub codes: String,
    /// Numbers and hosts, so that a start without the store knows its domains.
    pub domains: Vec<(DomainId, String)>,
}

/// A file as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warm {
    pub about: About,
    /// The most asked for first. Put back in the reverse order, they are what a smaller memory keeps.
    pub entries: Vec<(Key, Entry)>,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the warm file cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("the warm file has more than {FILE_BYTES_MAX} bytes, so this program has not written it: remove it")]
    TooLong,
    #[error("the warm file is no file of this program: remove it")]
    Foreign,
    #[error("the warm file is of version {0} and this program reads {VERSION}: it will be replaced")]
    Version(u8),
    #[error("the warm file is cut or damaged: it will be replaced")]
    Damaged,
}

/// The most asked for entries of those that were offered, as they go into a file.
#[derive(Debug)]
pub struct Warmest {
    /// By heat; in each the oldest first.
    by_heat: [VecDeque<Vec<u8>>; HEATS],
    count: usize,
    bytes: usize,
    /// Something was left out.
    full: bool,
}

impl Warmest {
    /// Looks through the shards, which ends their period: see [`Shards::for_each`]. If the generation of the store
    /// changes meanwhile, throw away what this returns.
    #[must_use]
    pub fn of(shards: &Shards, hash_of: impl Fn(&Key) -> u64) -> Self {
        let mut warmest = Self::none();
        shards.for_each(hash_of, |kept| {
            if !warmest.full || usize::from(kept.heat) >= warmest.coldest() {
                let (key, entry) = kept.decode();
                // Without the store there is no visit of a limited one.
                if !entry.rules.limited {
                    warmest.offer(kept.heat, &key, &entry);
                }
            }
        });
        warmest
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    fn none() -> Self {
        Self { by_heat: std::array::from_fn(|_| VecDeque::new()), count: 0, bytes: 0, full: false }
    }

    fn coldest(&self) -> usize {
        self.by_heat.iter().position(|of_heat| !of_heat.is_empty()).unwrap_or(0)
    }

    fn offer(&mut self, heat: u8, key: &Key, entry: &Entry) {
        let record = encode(key, entry);
        self.count += 1;
        self.bytes += record.len();
        self.by_heat[usize::from(heat)].push_back(record);
        while self.count > ENTRIES_MAX || self.bytes > ENTRY_BYTES_MAX {
            let Some(left_out) = self.by_heat[self.coldest()].pop_front() else { return };
            self.count -= 1;
            self.bytes -= left_out.len();
            self.full = true;
        }
    }
}

/// Replaces the file at `path` by one that is whole and on the disk, and that only its owner reads. The name's change
/// is not waited for: after a loss of power the file may be the one before.
pub fn write(path: &Path, about: &About, warmest: &Warmest) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    // A mode counts when a file is made, so one that a crash has left is not used.
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    write_to(&file, about, warmest).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&part, path)).inspect_err(
        |_| {
            // What is left of it is of no use, and may be what fills the disk.
            let _ = fs::remove_file(&part);
        },
    )
}

fn write_to(file: &File, about: &About, warmest: &Warmest) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    let head = encode_head(about, warmest.count);
    let mut sum = fnv1a(FNV_BASIS, &head);
    out.write_all(&head)?;
    for record in warmest.by_heat.iter().rev().flat_map(|of_heat| of_heat.iter().rev()) {
        sum = fnv1a(sum, record);
        out.write_all(record)?;
    }
    out.write_all(&sum.to_le_bytes())?;
    out.flush()
}

/// The file at `path`; none if there is none.
pub fn read(path: &Path) -> Result<Option<Warm>, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::TooLong);
    }
    decode(&bytes).map(Some)
}

fn decode(bytes: &[u8]) -> Result<Warm, Error> {
    let version = *bytes.strip_prefix(&MAGIC).ok_or(Error::Foreign)?.first().ok_or(Error::Damaged)?;
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let (body, sum) = bytes.split_last_chunk().ok_or(Error::Damaged)?;
    if fnv1a(FNV_BASIS, body) != u64::from_le_bytes(*sum) {
        return Err(Error::Damaged);
    }
    let rest = body.get(MAGIC.len() + 1..).ok_or(Error::Damaged)?;
    decode_body(&mut Reader(rest)).ok_or(Error::Damaged)
}

fn encode_head(about: &About, entries: usize) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.push(VERSION);
    value::put_text(&mut out, &about.store);
    out.extend(about.as_of.generation.to_le_bytes());
    out.extend(about.as_of.position.to_le_bytes());
    out.extend(about.followed_at.0.to_le_bytes());
    value::put_text(&mut out, &about.codes);
    out.extend((about.domains.len() as u32).to_le_bytes());
    for (number, host) in &about.domains {
        out.extend(number.0.to_le_bytes());
        value::put_text(&mut out, host);
    }
    out.extend((entries as u32).to_le_bytes());
    out
}

/// No count is believed beyond what it counts: room is made as things are read.
fn decode_body(reader: &mut Reader<'_>) -> Option<Warm> {
    let about = About {
        store: reader.text()?.to_owned(),
        as_of: StoredAsOf { generation: reader.u64()?, position: reader.u64()? },
        followed_at: reader.time()?,
        codes: reader.text()?.to_owned(),
        domains: (0..reader.u32()?)
            .map(|_| Some((DomainId(reader.u16()?), reader.text()?.to_owned())))
            .collect::<Option<_>>()?,
    };
    let entries = (0..reader.u32()?).map(|_| decode_entry(reader)).collect::<Option<_>>()?;
    reader.0.is_empty().then_some(Warm { about, entries })
}

fn encode(key: &Key, entry: &Entry) -> Vec<u8> {
    let mut out = key.domain.0.to_le_bytes().to_vec();
    value::put_text(&mut out, &key.code.to_string());
    let mut bytes = Vec::new();
    value::put_entry(&mut bytes, entry);
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend(bytes);
    out
}

fn decode_entry(reader: &mut Reader<'_>) -> Option<(Key, Entry)> {
    let domain = DomainId(reader.u16()?);
    // Letters were folded, where they are, when the key was made.
    let code = Code::parse(reader.text()?.as_bytes(), Case::Sensitive).ok()?;
    let length = usize::try_from(reader.u32()?).ok()?;
    Some((Key { domain, code }, value::take_entry(reader.take(length)?)?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::link::{LinkId, Rules};
    use crate::domain::target::Target;
    use crate::resolve::value::tests::entries;

    fn about() -> About {
        About {
            store: "a-store".into(),
            as_of: StoredAsOf { generation: 1, position: 2 },
            followed_at: UnixMillis(3),
            codes: "base62, sensitive".into(),
            domains: vec![(DomainId(0), String::new()), (DomainId(1), "go.example".into())],
        }
    }

    fn key(number: usize) -> Key {
        Key { domain: DomainId(1), code: Code::parse(format!("c{number}").as_bytes(), Case::Sensitive).unwrap() }
    }

    fn entry(number: usize, bytes: usize) -> Entry {
        let target = Target::new(&format!("https://example.com/{}", "x".repeat(bytes))).unwrap();
        Entry { id: LinkId(number as u64), target, rules: Rules::default() }
    }

    fn bytes_of(about: &About, warmest: &Warmest) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("warm");
        write(&path, about, warmest).unwrap();
        fs::read(path).unwrap()
    }

    fn ids(bytes: &[u8]) -> Vec<u64> {
        decode(bytes).unwrap().entries.iter().map(|(_, entry)| entry.id.0).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn what_was_written_is_read(
            links in prop::collection::vec((any::<u16>(), "[A-Za-z0-9._~-]{1,128}", entries()), 0..8),
            (store, codes, generation, position, followed_at) in any::<(String, String, u64, u64, i64)>(),
            domains in prop::collection::vec((any::<u16>().prop_map(DomainId), any::<String>()), 0..4),
        ) {
            let as_of = StoredAsOf { generation, position };
            let about = About { store, codes, as_of, followed_at: UnixMillis(followed_at), domains };
            let mut warmest = Warmest::none();
            let mut want = Vec::new();
            for (domain, code, entry) in links {
                let code = Code::parse(code.as_bytes(), Case::Sensitive).unwrap();
                let key = Key { domain: DomainId(domain), code };
                warmest.offer(0, &key, &entry);
                want.insert(0, (key, entry));
            }
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("warm");
            write(&path, &about, &warmest).unwrap();
            prop_assert_eq!(read(&path).unwrap(), Some(Warm { about, entries: want }));
        }

        #[test]
        fn a_damaged_file_is_an_error(
            links in prop::collection::vec(entries(), 0..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            damage in 0..4,
        ) {
            let mut warmest = Warmest::none();
            links.iter().enumerate().for_each(|(number, entry)| warmest.offer(0, &key(number), entry));
            let whole = bytes_of(&about(), &warmest);
            let mut damaged = whole.clone();
            let at = at.index(whole.len());
            match damage {
                0 => damaged[at] = byte,
                1 => damaged.insert(at, byte),
                2 => damaged.truncate(at),
                _ => damaged.push(byte),
            }
            prop_assert_eq!(decode(&damaged).is_ok(), damaged == whole);
        }

        /// What the checksum does not find, such as counts of more than there is.
        #[test]
        fn any_body_under_a_right_checksum_is_a_file_or_an_error(
            body in prop::collection::vec(prop_oneof![Just(0), Just(1), Just(u8::MAX), any::<u8>()], 0..300),
        ) {
            let mut bytes = [&MAGIC[..], &[VERSION], &body].concat();
            bytes.extend(fnv1a(FNV_BASIS, &bytes).to_le_bytes());
            if let Err(error) = decode(&bytes) {
                prop_assert!(matches!(error, Error::Damaged), "{}", error);
            }
        }
    }

    #[test]
    fn files_that_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("warm");
        assert_eq!(read(&path).unwrap(), None);
        let whole = bytes_of(&about(), &Warmest::none());
        let check = |bytes: &[u8], want: &str| {
            fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(want), "{error:?} without {want:?}");
        };
        check(b"", "no file of this program");
        check(b"SQLite format 3\0", "no file of this program");
        check(b"wp-warm\n", "cut or damaged");
        check(b"wp-warm\n\x01", "cut or damaged");
        check(b"wp-warm\n\x01\0\0\0\0\0\0\0", "cut or damaged");
        check(b"wp-warm\n\x02", "version 2");
        check(&whole[..whole.len() - 1], "cut or damaged");
        File::options().write(true).open(&path).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(matches!(read(&path), Err(Error::TooLong)));
        assert!(matches!(read(folder.path()), Err(Error::Io(_))));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("warm");
        let part = folder.path().join("warm.part");
        for (number, left) in [(1, false), (2, true)] {
            if left {
                fs::write(&part, "left by a crash").unwrap();
                fs::set_permissions(&part, fs::Permissions::from_mode(0o666)).unwrap();
            }
            let mut warmest = Warmest::none();
            warmest.offer(0, &key(number), &entry(number, 0));
            write(&path, &about(), &warmest).unwrap();
            assert_eq!(read(&path).unwrap().unwrap().entries, [(key(number), entry(number, 0))]);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            assert!(!part.exists());
        }
        // What cannot take its place leaves it, and nothing beside it.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        write(&taken, &about(), &Warmest::none()).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_most_asked_for_stay_and_come_first() {
        let mut warmest = Warmest::none();
        for number in 0..ENTRIES_MAX + 10 {
            // The first five are hotter than all.
            warmest.offer(if number < 5 { 31 } else { 7 }, &key(number), &entry(number, 0));
        }
        warmest.offer(0, &key(0), &entry(usize::MAX, 0));
        assert_eq!(warmest.count(), ENTRIES_MAX);
        let ids = ids(&bytes_of(&about(), &warmest));
        assert_eq!(ids[..7], [4, 3, 2, 1, 0, 100_009, 100_008]);
        assert_eq!((ids.len(), ids.last()), (ENTRIES_MAX, Some(&15)));
    }

    #[test]
    fn bytes_are_bounded_too() {
        let mut warmest = Warmest::none();
        let long = 1 << 20;
        for number in 0..40 {
            warmest.offer(if number % 2 == 0 { 1 } else { 0 }, &key(number), &entry(number, long));
        }
        let bytes = bytes_of(&about(), &warmest);
        assert!((ENTRY_BYTES_MAX - 2 * long..ENTRY_BYTES_MAX + 1024).contains(&bytes.len()), "{}", bytes.len());
        let ids = ids(&bytes);
        assert_eq!(ids.len(), 31);
        assert!(ids[..20].iter().all(|id| id % 2 == 0), "those of the greater heat are all there: {ids:?}");
    }

    #[test]
    fn what_memory_is_asked_for_is_what_is_written() {
        let state = ahash::RandomState::with_seeds(1, 2, 3, 4);
        let hash_of = |key: &Key| state.hash_one(key);
        let shards = Shards::new(8 << 20, 1);
        for number in 0..20 {
            assert!(shards.insert(hash_of(&key(number)), &key(number), &entry(number, 10), hash_of, || true));
        }
        assert_eq!(Warmest::of(&shards, hash_of).count(), 20);
        for asked in [3, 9] {
            assert!(shards.get(hash_of(&key(asked)), &key(asked)).is_some());
        }
        assert_eq!(Warmest::of(&shards, hash_of).count(), 20);
        assert!(shards.get(hash_of(&key(9)), &key(9)).is_some());
        let ids = ids(&bytes_of(&about(), &Warmest::of(&shards, hash_of)));
        assert_eq!((&ids[..2], ids.len()), (&[9, 3][..], 20));
    }
}
