//! Rate limits that all instances count together.
//!
//! In: who calls. Out: the same verdict as `guard::limits` gives, by the clock of the Redis server; when Redis does not
//! answer, that of this process's own table, at once: neither open nor closed. The own table knows only the calls that
//! it was asked about, so each instance grants a caller a whole allowance when Redis goes away, and what it granted is
//! not told to Redis when it is back.
//! Never: waits longer than `redis.timeout`. At its limit: Redis forgets a caller when the allowance is whole.

use std::sync::LazyLock;

use ::redis::Value;

use super::{Redis, Script};
use crate::domain::time::UnixMillis;
use crate::guard::limits::{Caller, GCRA_LUA, Limiter, Rate, Verdict, gcra};

/// Since Redis 5 a script may write after it has asked for the time; what is replicated is the write.
const PROLOGUE: &str = "local time = redis.call('TIME')\n\
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2])\n\
    local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])\n";

static SCRIPT: LazyLock<Script> = LazyLock::new(|| Script::new(format!("{PROLOGUE}{GCRA_LUA}")));

/// Counts a call, in Redis if there is one that answers, else in `limiter` by `now`. `per_minute` is the rate of one who
/// has a rate of their own.
pub async fn check(
    redis: Option<&Redis>,
    limiter: &Limiter,
    caller: Caller,
    per_minute: Option<u32>,
    now: UnixMillis,
) -> Verdict {
    let rate = limiter.rate(per_minute);
    if rate.is_unlimited() {
        return Verdict::Unlimited;
    }
    if let Some(redis) = redis
        && let Some(verdict) = ask(redis, caller, rate).await
    {
        return verdict;
    }
    limiter.check_rate(caller, rate, now)
}

async fn ask(redis: &Redis, caller: Caller, rate: Rate) -> Option<Verdict> {
    let mut key = format!("{}r:", redis.prefix()).into_bytes();
    match caller {
        Caller::V4(address) => key.extend(format!("4:{address:08x}").into_bytes()),
        Caller::V6(network) => key.extend(format!("6:{network:016x}").into_bytes()),
        Caller::Key(id) => key.extend([b"k:".as_slice(), &id].concat()),
    }
    match redis.script(&SCRIPT, &key, &[rate.interval_us, i64::from(rate.burst)]).await? {
        Value::Array(values) => match values[..] {
            [Value::Int(tat_us), Value::Int(now_us)] => {
                Some(gcra(Some(tat_us), now_us, rate.interval_us, rate.burst).0)
            }
            _ => None,
        },
        _ => None,
    }
}
