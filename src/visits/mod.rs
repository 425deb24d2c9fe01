//! Visits: every redirect to a target that leaves is one, stored exactly once.
//!
//! In: a [`Visit`] on a worker, before its redirect leaves. Out: rows and rollups in the store, and figures that add up:
//! `answered = stored + pending + dropped(reason)`, per instance.
//! Never: makes a redirect wait, allocates for one, or tells the store anything twice.
//! At its limit: redirects go on, and each visit that is given up is counted by its reason.
//!
//! ```text
//!  front, per core                 back: the spool's thread               the writer's thread
//!  Recorder ─▶ spool::ring ──────▶ spool::copy ─▶ spool::log ───────────▶ spool::read ─▶ batch ─▶ sink ─▶ the store
//!   (intern)   tmpfs, this core's   each 20 ms    DATA/spool, one of all    (agents)     rows      compare-and-set,
//!                                                     ▲ fdatasync each        │          rollups   rows, rollups
//!                                                     │ spool.sync            └─ refused rows ─▶ DATA/dead-letters.ndjson
//!                                            spool::recovery (rings of a start that was killed)
//! ```
//!
//! What may be lost, where, and what shows it:
//!
//! | what happens | what is lost | counted as |
//! |---|---|---|
//! | `kill -9`, a panic, out of memory | nothing: ring and page cache outlive the process. A visit may be stored whose redirect was in flight and never arrived | – |
//! | power cut, kernel crash | visits of the last `spool.sync`, one `fdatasync` and 20 ms | nothing can count them: neither `answered` nor stored |
//! | back hangs, or copies more slowly than visits come, until a ring is full | the visits that find no room in it | `ring_full` |
//! | the disk of the log fails or is full (a new segment is tried each second), until a ring is full | the same | `spool_error` |
//! | the store is away until the log has `spool.max_bytes` | the oldest segments that were never sent (those of earlier starts may have been, and stay); per link in `DATA/spool/lost.ndjson` | `spool_full` |
//! | a segment was damaged on the disk | its records whose checksum is wrong, and what stood behind a broken length | `corrupt` |
//! | the store lost commits (failover), and their segments are no longer kept (`spool.keep`); or what was damaged stood before the first thing that is read | the visits between | `failover_gap` |
//! | the store refuses a row (SQLSTATE 22, 23) | its row; the visit lies in `DATA/dead-letters.ndjson` | `refused` |
//! | `visits.bots = "drop"` | visits of declared bots, on purpose | `bot` |
//! | a store of visits that cannot be asked for its key at the first start | nothing but distinctness: those visits count for no unique visitor | – |
//!
//! Positions decide, and nothing else does. A record's place is `(epoch, core, number)`: each start draws a random epoch,
//! and numbers count the records of a core from 0. The store keeps for each `(epoch, core)` the number of the next record
//! that it wants, and moves it in the transaction that stores the records. Whoever replays anything, however often and
//! from wherever, finds its position moved and skips.
//!
//! [`spool::format`] has every byte that lies on tmpfs and disk.

pub mod agents;
pub mod batch;
pub mod dead;
pub mod sink;
pub mod spool;
pub mod visitor;
pub mod visitor_keys;
pub mod writer;

use std::net::IpAddr;
use std::sync::Arc;

use self::spool::format::{KIND_CLICK, KIND_HEAD, KIND_ORPHAN, KIND_PREFETCH};
use self::spool::intern::Strings;
use self::spool::record::{Record, RequestId};
use self::spool::ring::RingWriter;
use crate::config::KeptAddress;
use crate::domain::time::UnixMillis;
pub use crate::domain::visit::{Dropped, Drops};
use crate::domain::visit::{Kind, Of, Visit};
use crate::metrics::Counter;
use crate::stats::rollup::DAY_MS;

/// What this core has answered.
#[derive(Debug, Default)]
pub struct Counts {
    pub click: Counter,
    pub head: Counter,
    pub prefetch: Counter,
    /// Unknown and dead codes, and fallbacks: answered, but no visit of a link.
    pub orphan: Counter,
}

impl Counts {
    /// Redirects to a target that left.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.click.get() + self.head.get() + self.prefetch.get()
    }
}

/// Records of codes that lead nowhere, a second and core. Who guesses codes cannot fill the store with them.
const ORPHANS_PER_SECOND: u32 = 100;
/// Answers that waited for the store are older than those that did not: only a clock that was set goes back farther.
const LATE_SECONDS_MAX: i64 = 10;

/// What every core records by.
#[derive(Clone, Debug)]
pub struct Settings {
    pub address: KeptAddress,
    pub keys: Arc<visitor::Keys>,
}

/// A core's way to record: what `http` knows of visits.
#[derive(Debug, Default)]
pub struct Recorder(Option<Spooling>);

#[derive(Debug)]
struct Spooling {
    ring: RingWriter,
    strings: Strings,
    settings: Settings,
    /// The second of the last orphan, and how many of its orphans were recorded.
    orphans: (i64, u32),
}

impl Recorder {
    /// Records in `ring`, which is this core's. The default counts, and records nothing.
    #[must_use]
    pub fn new(ring: RingWriter, settings: Settings) -> Self {
        let strings = Strings::new(&ring);
        Self(Some(Spooling { ring, strings, settings, orphans: (0, 0) }))
    }

    /// Counts an answer that is about to leave, and records it: a kill after this loses nothing.
    #[inline]
    pub fn record(&mut self, counts: &Counts, visit: &Visit<'_>) {
        match visit.of {
            Of::Link(_, Kind::Click) => counts.click.add(1),
            Of::Link(_, Kind::Head) => counts.head.add(1),
            Of::Link(_, Kind::Prefetch) => counts.prefetch.add(1),
            Of::Orphan(_) => counts.orphan.add(1),
        }
        if let Some(spooling) = &mut self.0 {
            spooling.record(visit);
        }
    }
}

impl Spooling {
    fn record(&mut self, visit: &Visit<'_>) {
        let mut code = [0; _];
        let (kind, link, code) = match &visit.of {
            Of::Link(link, Kind::Click) => (KIND_CLICK, link.0, &[][..]),
            Of::Link(link, Kind::Head) => (KIND_HEAD, link.0, &[][..]),
            Of::Link(link, Kind::Prefetch) => (KIND_PREFETCH, link.0, &[][..]),
            Of::Orphan(Some(key)) if self.may_record_orphan(visit.at) => {
                (KIND_ORPHAN, u64::from(key.domain.0), key.code.bytes(&mut code))
            }
            Of::Orphan(_) => return self.ring.leave_out_orphan(),
        };
        let plain = Record {
            kind,
            link,
            at: visit.at,
            visitor: 0,
            agent: 0,
            referrer: 0,
            address: None,
            request_id: RequestId::None,
            code,
            not_tracked: visit.not_tracked,
            no_agent_room: false,
        };
        let record = if visit.not_tracked {
            plain
        } else {
            let agent = self.strings.intern(&mut self.ring, visit.agent);
            let referrer = self.strings.intern(&mut self.ring, visit.referrer);
            let client = visit.client.to_canonical();
            Record {
                visitor: self.settings.keys.visitor(visit.at.0.div_euclid(DAY_MS), client, agent.fixed_hash),
                agent: agent.id,
                referrer: referrer.id,
                address: kept(client, self.settings.address),
                request_id: RequestId::new(visit.request_id),
                no_agent_room: agent.no_room,
                ..plain
            }
        };
        self.ring.append(&record);
    }

    fn may_record_orphan(&mut self, at: UnixMillis) -> bool {
        let second = at.0.div_euclid(1000);
        let last = self.orphans.0;
        if second > last || second < last - LATE_SECONDS_MAX {
            self.orphans = (second, 0);
        }
        let may = self.orphans.1 < ORPHANS_PER_SECOND;
        self.orphans.1 += u32::from(may);
        may
    }
}

/// As much of an address as may be kept.
fn kept(client: IpAddr, how: KeptAddress) -> Option<IpAddr> {
    match (how, client) {
        (KeptAddress::Nothing, _) => None,
        (KeptAddress::Full, client) => Some(client),
        (KeptAddress::Truncated, IpAddr::V4(v4)) => {
            let [a, b, c, _] = v4.octets();
            Some(IpAddr::from([a, b, c, 0]))
        }
        (KeptAddress::Truncated, IpAddr::V6(v6)) => {
            let [a, b, c, ..] = v6.segments();
            Some(IpAddr::from([a, b, c, 0, 0, 0, 0, 0]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::spool::record::{self, RequestId};
    use super::spool::ring::{self, RingReader};
    use super::spool::{Epoch, Source};
    use super::*;
    use crate::domain::key::{Case, Code, DomainId, Key};
    use crate::domain::link::LinkId;

    const SOURCE: Source = Source { epoch: Epoch(1), core: 3 };
    const AT: UnixMillis = UnixMillis(1_800_000_000_000);

    struct Fixture {
        _folder: tempfile::TempDir,
        recorder: Recorder,
        reader: RingReader,
        counts: Counts,
    }

    fn fixture(address: KeptAddress) -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let about = ring::About { source: SOURCE, spool: 0, made_at: AT };
        let (writer, reader) = ring::create(&folder.path().join("ring"), 256 << 10, &about).unwrap();
        let keys = Arc::<visitor::Keys>::default();
        keys.set(visitor::EVERY_DAY, [1, 2]);
        let recorder = Recorder::new(writer, Settings { address, keys });
        Fixture { _folder: folder, recorder, reader, counts: Counts::default() }
    }

    fn visit(client: &str) -> Visit<'static> {
        Visit {
            of: Of::Link(LinkId(7), Kind::Click),
            at: AT,
            client: client.parse().unwrap(),
            agent: b"Mozilla/5.0",
            referrer: b"https://news.example.org/",
            request_id: b"id-1",
            not_tracked: false,
        }
    }

    impl Fixture {
        fn record(&mut self, visit: &Visit<'_>) {
            self.recorder.record(&self.counts, visit);
        }

        /// The one record that is new.
        fn last<T>(&mut self, look: impl FnOnce(&RingReader, record::Record<'_>) -> T) -> T {
            let mut records = Vec::new();
            let read = self.reader.read(&mut records, usize::MAX);
            assert_eq!(read.count, 1);
            let (record, _) = record::decode(&records, SOURCE, read.first).unwrap();
            look(&self.reader, record)
        }
    }

    #[test]
    fn as_much_of_an_address_as_may_be_kept() {
        for (how, client, want) in [
            (KeptAddress::Truncated, "203.0.113.7", Some("203.0.113.0")),
            (KeptAddress::Truncated, "::ffff:203.0.113.7", Some("203.0.113.0")),
            (KeptAddress::Truncated, "2001:db8:1:2:3:4:5:6", Some("2001:db8:1::")),
            (KeptAddress::Full, "203.0.113.7", Some("203.0.113.7")),
            (KeptAddress::Full, "::ffff:203.0.113.7", Some("203.0.113.7")),
            (KeptAddress::Full, "2001:db8:1:2:3:4:5:6", Some("2001:db8:1:2:3:4:5:6")),
            (KeptAddress::Nothing, "203.0.113.7", None),
        ] {
            let mut f = fixture(how);
            f.record(&visit(client));
            let (address, visitor) = f.last(|_, record| (record.address, record.visitor));
            assert_eq!(address, want.map(|text| text.parse().unwrap()), "{how:?} {client}");
            // It tells visitors apart whose addresses are not kept.
            f.record(&visit("198.51.100.1"));
            f.reader.take();
            assert!(visitor != 0 && f.last(|_, record| record.visitor) != visitor);
        }
    }

    #[test]
    fn orphans_of_a_second_are_limited_in_whichever_order_they_come() {
        let key = Key { domain: DomainId(4), code: Code::parse(b"no.such", Case::Sensitive).unwrap() };
        let check = |seconds: &[i64], recorded: u64| {
            let mut f = fixture(KeptAddress::Truncated);
            for number in 0..300 {
                let at = UnixMillis(AT.0 + seconds[number % seconds.len()] * 1000);
                f.record(&Visit { of: Of::Orphan(Some(&key)), at, ..visit("203.0.113.7") });
            }
            let figures = f.reader.figures();
            assert_eq!((figures.appended, figures.orphans), (recorded, 300 - recorded), "{seconds:?}");
        };
        check(&[0], 100);
        check(&[0, -1], 100);
        check(&[0, -1, -3], 100);
        check(&(0..300).collect::<Vec<_>>(), 300);
        // The clock was set.
        check(&(0..300).map(|number| -100 * (number / 150)).collect::<Vec<_>>(), 200);
    }

    #[test]
    fn kinds_and_their_counts() {
        let mut f = fixture(KeptAddress::Truncated);
        let key = Key { domain: DomainId(4), code: Code::parse(b"no.such", Case::Sensitive).unwrap() };
        let ofs = [
            (Of::Link(LinkId(7), Kind::Click), KIND_CLICK, 7, &b""[..]),
            (Of::Link(LinkId(7), Kind::Head), KIND_HEAD, 7, b""),
            (Of::Link(LinkId(7), Kind::Prefetch), KIND_PREFETCH, 7, b""),
            (Of::Orphan(Some(&key)), KIND_ORPHAN, 4, b"no.such"),
        ];
        for (of, kind, link, code) in ofs {
            f.record(&Visit { of, ..visit("203.0.113.7") });
            f.last(|_, record| assert_eq!((record.kind, record.link, record.code), (kind, link, code)));
        }
        f.record(&Visit { of: Of::Orphan(None), ..visit("203.0.113.7") });
        let figures = f.reader.figures();
        assert_eq!((figures.appended, figures.visits, figures.orphans), (4, 3, 1));
        assert_eq!((f.counts.answered(), f.counts.orphan.get()), (3, 2));

        let (mut counting, counts) = (Recorder::default(), Counts::default());
        counting.record(&counts, &visit("203.0.113.7"));
        assert_eq!(counts.answered(), 1);
    }

    #[test]
    fn what_a_record_says() {
        let mut f = fixture(KeptAddress::Truncated);
        f.record(&visit("203.0.113.7"));
        f.last(|reader, record| {
            assert_eq!((record.at, record.request_id), (AT, RequestId::Written(b"id-1")));
            for (id, want) in [(record.agent, "Mozilla/5.0"), (record.referrer, "https://news.example.org/")] {
                let mut text = Vec::new();
                assert!(reader.string(id, &mut text));
                assert_eq!(text, want.as_bytes());
            }
        });
        // Nothing of who asked for it.
        f.record(&Visit { not_tracked: true, ..visit("203.0.113.7") });
        f.last(|_, record| {
            assert!(record.not_tracked && record.address.is_none() && record.request_id == RequestId::None);
            assert_eq!((record.agent, record.referrer, record.visitor, record.link), (0, 0, 0, 7));
        });
    }

    #[test]
    fn orphans_are_recorded_up_to_a_rate() {
        let mut f = fixture(KeptAddress::Truncated);
        let key = Key { domain: DomainId(0), code: Code::parse(b"guess", Case::Sensitive).unwrap() };
        for (ms, want) in [(0, (100, 50)), (999, (100, 200)), (1000, (200, 250)), (500, (200, 400))] {
            for _ in 0..150 {
                let at = UnixMillis(AT.0 + ms);
                f.record(&Visit { of: Of::Orphan(Some(&key)), at, ..visit("203.0.113.7") });
            }
            let figures = f.reader.figures();
            assert_eq!((figures.appended, figures.orphans), want, "at {ms} ms");
        }
        assert_eq!(f.counts.orphan.get(), 600);
    }
}
