//! What the stub does, and when.
//!
//! In: the flags of `loadgen stub`, or fields set by `prove`. Out: a [`Script`], every time in nanoseconds since its
//! clock began. Never: depends on anything but the number of a request or connection and the time, so that a run's truth
//! can be said beforehand. At its limit: a value that does not fit is refused with the form that does.

use crate::{links, units};

/// How the stub answers. The default answers everything at once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Script {
    /// From a request's turn to its answer; answers of other connections are not held up by it.
    pub service_ns: u64,
    /// Turns a second, one queue in order of arrival for all connections: each request occupies 1/μ before its service
    /// begins. `None`: without limit.
    pub capacity_per_s: Option<f64>,
    /// Nothing is read, answered or accepted.
    pub stall: Option<Window>,
    /// Of each N connections in the order they were accepted one is read from and never answered: number N/2, counted
    /// from 0, so that the connection that replaces the first stuck one is not stuck as well.
    pub stuck_one_of: Option<u64>,
    /// Nothing is accepted; connections that are open go on.
    pub accept_stall: Option<Window>,
    /// This share of requests takes this long instead of `service_ns`.
    pub slow: Option<Slow>,
    /// Answered 503 at once, whatever the service and capacity.
    pub fail: Option<Window>,
    /// This share of requests is answered by a TCP reset, 0 to 1.
    pub reset_share: f64,
    /// Redirects get a body of [`DRIP_BYTES`], one byte each so many nanoseconds; 0: no body.
    pub drip_ns: u64,
}

/// Bytes of a dripping body.
pub const DRIP_BYTES: u64 = 16;

/// A stretch of the script's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub from_ns: u64,
    /// `u64::MAX`: for ever.
    pub lasts_ns: u64,
}

/// Which share of requests is slow, and how slow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slow {
    /// 0 to 1.
    pub share: f64,
    pub service_ns: u64,
}

impl Window {
    #[must_use]
    pub fn holds(&self, at_ns: u64) -> bool {
        at_ns >= self.from_ns && at_ns < self.end_ns()
    }

    #[must_use]
    pub fn end_ns(&self) -> u64 {
        self.from_ns.saturating_add(self.lasts_ns)
    }

    /// The next instant after `at_ns` at which [`Window::holds`] changes.
    #[must_use]
    pub fn next_edge_ns(&self, at_ns: u64) -> u64 {
        if at_ns < self.from_ns {
            self.from_ns
        } else if at_ns < self.end_ns() {
            self.end_ns()
        } else {
            u64::MAX
        }
    }
}

impl Script {
    /// Sets what a flag of `loadgen stub` says: `service` `100us`, `capacity` `40k`, `stall` `2s@20s` or `forever@20s`,
    /// `stuck` `1/64`, `accept-stall` `1s@5s`, `slow` `1%@50ms`, `fail` `503:1s@5s`, `reset` `1%`, `drip` `1ms`.
    ///
    /// # Errors
    /// What is wrong, in words that follow the flag and its value, and a value that would do.
    pub fn set(&mut self, flag: &str, value: &str) -> Result<(), String> {
        let (done, example) = match flag {
            "service" => (units::duration_ns(value).map(|ns| self.service_ns = ns), "100us"),
            "capacity" => (capacity(value).map(|rate| self.capacity_per_s = Some(rate)), "40k"),
            "stall" => (window(value).map(|stall| self.stall = Some(stall)), "2s@20s"),
            "stuck" => (one_of(value).map(|of| self.stuck_one_of = Some(of)), "1/64"),
            "accept-stall" => (window(value).map(|stall| self.accept_stall = Some(stall)), "1s@5s"),
            "slow" => (slow(value).map(|slow| self.slow = Some(slow)), "1%@50ms"),
            "fail" => (fail(value).map(|fail| self.fail = Some(fail)), "503:1s@5s"),
            "reset" => (share(value).map(|share| self.reset_share = share), "1%"),
            "drip" => (units::duration_ns(value).map(|ns| self.drip_ns = ns), "1ms"),
            _ => return Err(format!("the stub has no --{flag}")),
        };
        done.map_err(|why| format!("{why}; write it like --{flag} {example}"))
    }

    /// How long request `number` is served.
    #[must_use]
    pub fn service_of(&self, number: u64) -> u64 {
        match self.slow {
            Some(slow) if chosen(number, SLOW_SALT, slow.share) => slow.service_ns,
            _ => self.service_ns,
        }
    }

    /// Whether request `number` is answered by a reset.
    #[must_use]
    pub fn resets(&self, number: u64) -> bool {
        chosen(number, RESET_SALT, self.reset_share)
    }

    /// Whether connection `number` is never answered.
    #[must_use]
    pub fn sticks(&self, number: u64) -> bool {
        self.stuck_one_of.is_some_and(|of| number % of == of / 2)
    }
}

const SLOW_SALT: u64 = 0x51;
const RESET_SALT: u64 = 0x52;

/// A share of all numbers, spread evenly and the same in each run.
fn chosen(number: u64, salt: u64, share: f64) -> bool {
    (links::mix(number ^ (salt << 56)) as f64) < share * 2f64.powi(64)
}

/// `2s@20s`: for two seconds from the twentieth.
fn window(text: &str) -> Result<Window, String> {
    let (lasts, from) = text.split_once('@').ok_or("no @ between how long and from when")?;
    let lasts_ns = if lasts == "forever" { u64::MAX } else { units::duration_ns(lasts)? };
    Ok(Window { from_ns: units::duration_ns(from)?, lasts_ns })
}

fn fail(text: &str) -> Result<Window, String> {
    window(text.strip_prefix("503:").ok_or("only 503: can be served")?)
}

fn slow(text: &str) -> Result<Slow, String> {
    let (part, service) = text.split_once('@').ok_or("no @ between the share and its time")?;
    Ok(Slow { share: share(part)?, service_ns: units::duration_ns(service)? })
}

fn share(text: &str) -> Result<f64, String> {
    let share = units::fraction_of(text)?;
    if share <= 1.0 { Ok(share) } else { Err("a share is at most 100%".to_owned()) }
}

fn one_of(text: &str) -> Result<u64, String> {
    let of = text.strip_prefix("1/").and_then(|number| number.parse().ok()).unwrap_or(0);
    if of > 0 { Ok(of) } else { Err("not one of a number of connections".to_owned()) }
}

fn capacity(text: &str) -> Result<f64, String> {
    let rate = units::number_of(text)?;
    if rate > 0.0 { Ok(rate) } else { Err("must be more than 0 answers a second".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::{Script, Slow, Window};

    const MS: u64 = 1_000_000;
    const S: u64 = 1_000 * MS;

    #[test]
    fn flags_are_read() {
        let plain = Script::default;
        let check = |flag: &str, value: &str, expected: Script| {
            let mut script = plain();
            assert_eq!(script.set(flag, value), Ok(()), "--{flag} {value}");
            assert_eq!(script, expected, "--{flag} {value}");
        };
        check("service", "100us", Script { service_ns: 100_000, ..plain() });
        check("capacity", "40k", Script { capacity_per_s: Some(40_000.0), ..plain() });
        check("stall", "2s@20s", Script { stall: Some(Window { from_ns: 20 * S, lasts_ns: 2 * S }), ..plain() });
        check("stall", "forever@8s", Script { stall: Some(Window { from_ns: 8 * S, lasts_ns: u64::MAX }), ..plain() });
        check("stuck", "1/64", Script { stuck_one_of: Some(64), ..plain() });
        check(
            "accept-stall",
            "1s@5s",
            Script { accept_stall: Some(Window { from_ns: 5 * S, lasts_ns: S }), ..plain() },
        );
        check("slow", "1%@50ms", Script { slow: Some(Slow { share: 0.01, service_ns: 50 * MS }), ..plain() });
        check("fail", "503:1s@5s", Script { fail: Some(Window { from_ns: 5 * S, lasts_ns: S }), ..plain() });
        check("reset", "1.5%", Script { reset_share: 0.015, ..plain() });
        check("drip", "1ms", Script { drip_ns: MS, ..plain() });
    }

    #[test]
    fn wrong_flags_are_refused_with_an_example() {
        let check = |flag: &str, value: &str, part: &str| {
            let message = Script::default().set(flag, value).expect_err(value);
            assert!(message.contains(part), "--{flag} {value}: {message}");
            assert!(message.contains(&format!("write it like --{flag} ")), "{message}");
        };
        check("stall", "2s", "no @");
        check("stall", "2@20s", "2");
        check("stuck", "1/0", "not one of");
        check("stuck", "2/64", "not one of");
        check("slow", "1@50ms", "no share");
        check("slow", "101%@50ms", "at most 100%");
        check("fail", "500:1s@5s", "only 503:");
        check("reset", "x%", "no share");
        check("capacity", "0", "more than 0");
        assert_eq!(Script::default().set("burst", "1"), Err("the stub has no --burst".to_owned()));
    }

    #[test]
    fn a_window_knows_its_edges() {
        let window = Window { from_ns: 10, lasts_ns: 5 };
        for (at, holds, edge) in [(0, false, 10), (10, true, 15), (14, true, 15), (15, false, u64::MAX)] {
            assert_eq!((window.holds(at), window.next_edge_ns(at)), (holds, edge), "{at}");
        }
        let forever = Window { from_ns: 10, lasts_ns: u64::MAX };
        assert!(forever.holds(u64::MAX - 1));
    }

    #[test]
    fn shares_are_shares_of_the_numbers() {
        let script = Script { slow: Some(Slow { share: 0.01, service_ns: 7 }), reset_share: 0.3, ..Script::default() };
        let slow = (0..1_000_000).filter(|&number| script.service_of(number) == 7).count();
        let reset = (0..1_000_000).filter(|&number| script.resets(number)).count();
        let both = (0..1_000_000).filter(|&number| script.resets(number) && script.service_of(number) == 7).count();
        // Four standard deviations of a binomial count.
        assert!(slow.abs_diff(10_000) < 400, "{slow}");
        assert!(reset.abs_diff(300_000) < 1_840, "{reset}");
        assert!(both.abs_diff(3_000) < 220, "{both}");
        assert!((0..10_000).all(|number| !Script::default().resets(number)));
    }

    #[test]
    fn one_of_each_n_connections_sticks() {
        let script = Script { stuck_one_of: Some(4), ..Script::default() };
        let stuck: Vec<u64> = (0..12).filter(|&number| script.sticks(number)).collect();
        assert_eq!(stuck, [2, 6, 10]);
    }
}
