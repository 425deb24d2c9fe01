//! Codes that the server has just made, waiting to be read back.
//!
//! In: what a creating class was answered. Out: the newest whose delay is over and that nobody has read rightly yet, so
//! that the time from create to right answer is the server's and not the wait for a reader; where there is none, one
//! that was read before, in turn. At its limit: a full ring forgets the oldest.

use std::collections::VecDeque;

/// Longest code that is read back; generated ones have 7 characters.
pub(super) const CODE_MAX: usize = 32;

/// Codes of one class that one worker keeps of each kind.
const KEPT_MAX: usize = 4_096;

/// A code that is read later than this after it was due waited for a reader, not for the server.
const WAIT_NS: u64 = 5_000_000;

#[derive(Debug, Clone, Copy)]
pub(super) struct Fresh {
    code: [u8; CODE_MAX],
    length: u8,
    /// The ordinal of the request that made it: names its target.
    pub(super) ordinal: u64,
    /// When that was answered.
    pub(super) created_ns: u64,
    /// No right answer for it yet.
    pub(super) unseen: bool,
    /// Waited for a reader longer than for its delay: the time to its answer would be that wait.
    waited: bool,
}

impl Fresh {
    /// None where the code is too long to be kept.
    #[must_use]
    pub(super) fn new(code: &[u8], ordinal: u64, created_ns: u64) -> Option<Self> {
        let mut kept = [0; CODE_MAX];
        kept.get_mut(..code.len())?.copy_from_slice(code);
        let length = u8::try_from(code.len()).ok()?;
        Some(Self { code: kept, length, ordinal, created_ns, unseen: true, waited: false })
    }

    #[must_use]
    pub(super) fn code(&self) -> &[u8] {
        &self.code[..usize::from(self.length)]
    }

    /// Whether the time from its create to its answer is the server's.
    pub(super) fn is_timed(&self) -> bool {
        self.unseen && !self.waited
    }
}

/// Of one creating class, in one worker.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// (due, code), in order of time.
    unseen: VecDeque<(u64, Fresh)>,
    seen: VecDeque<Fresh>,
}

impl Ring {
    pub(super) fn created(&mut self, fresh: Fresh, due_ns: u64) {
        if self.unseen.len() == KEPT_MAX {
            self.unseen.pop_front();
        }
        // Mostly at the end: only one that is asked for again may be due later than a newer one.
        let at = self.unseen.partition_point(|(other_ns, _)| *other_ns <= due_ns);
        self.unseen.insert(at, (due_ns, fresh));
    }

    /// The code to ask for now.
    pub(super) fn take(&mut self, now_ns: u64) -> Option<Fresh> {
        let due = self.unseen.partition_point(|(due_ns, _)| *due_ns <= now_ns);
        if let Some((due_ns, fresh)) = due.checked_sub(1).and_then(|newest| self.unseen.remove(newest)) {
            return Some(Fresh { waited: fresh.waited || now_ns > due_ns + WAIT_NS, ..fresh });
        }
        let fresh = self.seen.pop_front()?;
        self.seen.push_back(fresh);
        Some(fresh)
    }

    /// What became of a code that was taken: read rightly, or to be asked for again at `retry_ns`.
    pub(super) fn answered(&mut self, fresh: Fresh, right: bool, retry_ns: u64) {
        if !fresh.unseen {
            return;
        }
        if !right {
            return self.created(fresh, retry_ns);
        }
        if self.seen.len() == KEPT_MAX {
            self.seen.pop_front();
        }
        self.seen.push_back(Fresh { unseen: false, ..fresh });
    }
}

#[cfg(test)]
mod tests {
    use super::{Fresh, KEPT_MAX, Ring};

    fn fresh(ordinal: u64) -> Fresh {
        Fresh::new(format!("code{ordinal}").as_bytes(), ordinal, 100).unwrap()
    }

    #[test]
    fn a_code_is_read_after_its_delay_until_it_is_right_and_then_in_turn() {
        let mut ring = Ring::default();
        assert!(ring.take(1_000).is_none());
        ring.created(fresh(1), 150);
        ring.created(fresh(2), 160);
        assert!(ring.take(149).is_none());
        let first = ring.take(150).unwrap();
        assert_eq!((first.code(), first.unseen), (&b"code1"[..], true));
        ring.answered(first, false, 200);
        ring.created(fresh(3), 200);
        assert_eq!(ring.take(170).unwrap().ordinal, 2);
        assert!(ring.take(170).is_none(), "the first one waits for its next try, the second is under way");
        assert_eq!(ring.take(200).unwrap().ordinal, 3, "the newest first");
        let again = ring.take(200).unwrap();
        ring.answered(again, true, 0);
        for _ in 0..2 {
            let seen = ring.take(201).unwrap();
            assert_eq!((seen.ordinal, seen.unseen), (1, false));
            ring.answered(seen, true, 0);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_or_forgotten() {
        assert!(Fresh::new(&[b'a'; 33], 0, 0).is_none());
        let mut ring = Ring::default();
        for ordinal in 0..KEPT_MAX as u64 + 2 {
            ring.created(fresh(ordinal), 0);
        }
        let mut left: Vec<u64> =
            std::iter::from_fn(|| ring.take(0)).take(KEPT_MAX).map(|fresh| fresh.ordinal).collect();
        left.sort_unstable();
        assert_eq!(left, (2..KEPT_MAX as u64 + 2).collect::<Vec<_>>());
    }
}
