//! A Redis Cluster: which node has which keys, and a connection to each.
//!
//! In: commands of one key each. Out: their answers, in one round trip to each node that has some of the keys.
//! Never: follows a MOVED or an ASK: the key is a miss once, and the map of slots is read anew in the background. (The
//! client's own cluster connection follows them, and holds back the keys of all nodes meanwhile: measured, four fifths
//! of a thousand keys were not answered within a second while 300 slots moved.) Never makes a failure of one
//! node's silence for the keys of another; but all of a call are answered together, so that a silent node holds them back
//! up to the deadline, until it has been silent as often as the breaker allows: then its keys fail at once.
//! At its limit: the map is read at most each [`REFRESH_GAP`]; keys of slots that nobody has are failures.
//!
//! Redis Cluster specification, sections "Key distribution model" and "MOVED redirection".

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ::redis::{Client, Cmd, ConnectionAddr, RedisResult, Value, cmd};
use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use super::connect::{CONNECT_TIMEOUT, Line, Seeds, Target, broken};
use super::is_answer;
use crate::domain::time::monotonic;

const SLOTS: u16 = 16384;
/// Of a slot that no node has.
const NOBODY: u16 = u16::MAX;
/// Between two readings of the map.
const REFRESH_GAP: Duration = Duration::from_millis(50);
/// Without any sign that it has changed.
const REFRESH_EVERY: Duration = Duration::from_secs(30);
/// How long a known node may take to send the map, before the next one is asked.
const MAP_TIMEOUT: Duration = Duration::from_millis(250);

pub(super) struct Cluster {
    map: watch::Receiver<Arc<Map>>,
    stale: mpsc::Sender<()>,
    seeds: Arc<Seeds>,
}

#[derive(Default)]
struct Map {
    /// The place in `nodes` of each slot's master, or [`NOBODY`]; empty before the first reading.
    slots: Vec<u16>,
    nodes: Vec<Arc<Node>>,
}

struct Node {
    host: String,
    port: u16,
    client: Client,
    line: Line,
}

impl Cluster {
    pub(super) fn open(seeds: Seeds, failures: u32) -> Self {
        let seeds = Arc::new(seeds);
        let (map_sender, map) = watch::channel(Arc::default());
        let (stale, stale_receiver) = mpsc::channel(1);
        tokio::spawn(follow(Arc::clone(&seeds), failures, map_sender, stale_receiver));
        Self { map, stale, seeds }
    }

    /// The answers to `commands`, in their order.
    pub(super) async fn run(&self, commands: Vec<(u16, Cmd)>, deadline: Instant) -> Vec<RedisResult<Value>> {
        let mut known = self.map.clone();
        let map = timeout_at(deadline, known.wait_for(|map| !map.nodes.is_empty())).await;
        let Some(map) = map.ok().and_then(Result::ok).map(|map| Arc::clone(&map)) else {
            return vec![Err(broken("no node of the cluster has answered yet")); commands.len()];
        };
        let mut answers = vec![Err(broken("no node of the cluster has this key")); commands.len()];
        let mut by_node: BTreeMap<u16, (Vec<usize>, Vec<Cmd>)> = BTreeMap::new();
        for (place, (slot, command)) in commands.into_iter().enumerate() {
            let (places, commands) = by_node.entry(map.slots[usize::from(slot)]).or_default();
            places.push(place);
            commands.push(command);
        }
        by_node.remove(&NOBODY);
        let run = by_node.into_iter().map(|(node, (places, commands))| {
            let line = &map.nodes[usize::from(node)].line;
            async move { (places, line.run(commands, deadline).await) }
        });
        for (places, of_node) in join_all(run).await {
            for (place, answer) in places.into_iter().zip(of_node) {
                answers[place] = answer;
            }
        }
        if answers.iter().any(|answer| answer.as_ref().is_err_and(|error| !is_answer(error))) {
            // When it is full, somebody has just said so.
            let _ = self.stale.try_send(());
        }
        answers
    }

    /// Nodes that may be asked for something that all of them have, in any order, those of the URL last.
    pub(super) fn anybody(&self) -> Vec<Client> {
        let map = Arc::clone(&self.map.borrow());
        let mut clients: Vec<Client> = map.nodes.iter().map(|node| node.client.clone()).collect();
        if !clients.is_empty() {
            let first = rand::random_range(0..clients.len());
            clients.rotate_left(first);
        }
        clients.extend(self.seeds.clients());
        clients
    }
}

/// Reads the map, and again each time that it is said to be stale, until nobody looks at it any more.
async fn follow(seeds: Arc<Seeds>, failures: u32, map: watch::Sender<Arc<Map>>, mut stale: mpsc::Receiver<()>) {
    loop {
        let known = Arc::clone(&map.borrow());
        let read = tokio::select! {
            () = map.closed() => return,
            read = read(&seeds, &known, failures) => read,
        };
        let found = read.is_some();
        if let Some(read) = read {
            map.send_replace(Arc::new(read));
        }
        tokio::time::sleep(REFRESH_GAP).await;
        // Until there is one, it is asked for again at once.
        let wait = if found { REFRESH_EVERY } else { CONNECT_TIMEOUT };
        if let Ok(None) = tokio::time::timeout(wait, stale.recv()).await {
            return;
        }
    }
}

/// The map as the first node tells it that answers, beginning with any of those that are known.
async fn read(seeds: &Seeds, known: &Map, failures: u32) -> Option<Map> {
    let slots = || {
        let mut command = cmd("CLUSTER");
        command.arg("SLOTS");
        command
    };
    let first = if known.nodes.is_empty() { 0 } else { rand::random_range(0..known.nodes.len()) };
    for node in known.nodes.iter().cycle().skip(first).take(known.nodes.len()) {
        let deadline = Instant::from_std(monotonic() + MAP_TIMEOUT);
        let answer = node.line.run(vec![slots()], deadline).await.pop();
        if let Some(Ok(answer)) = answer
            && let Some(map) = parse(&answer, &node.host, seeds, known, failures)
        {
            return Some(map);
        }
    }
    for client in seeds.clients() {
        let host = match client.get_connection_info().addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host.clone(),
            _ => continue,
        };
        let ask = async {
            let mut connection = client.get_multiplexed_async_connection().await?;
            slots().query_async::<Value>(&mut connection).await
        };
        let answer = tokio::time::timeout(CONNECT_TIMEOUT, ask).await;
        if let Ok(Ok(answer)) = answer
            && let Some(map) = parse(&answer, &host, seeds, known, failures)
        {
            return Some(map);
        }
    }
    None
}

/// The answer to `CLUSTER SLOTS`: ranges of slots, each with its master first. A node that does not know its own host
/// means the one that it was asked by. None if it is not that, or no slot is anybody's.
fn parse(answer: &Value, asked: &str, seeds: &Seeds, known: &Map, failures: u32) -> Option<Map> {
    let Value::Array(ranges) = answer else { return None };
    let mut map = Map { slots: vec![NOBODY; usize::from(SLOTS)], nodes: Vec::new() };
    for range in ranges {
        let Value::Array(range) = range else { return None };
        let [Value::Int(from), Value::Int(to), Value::Array(master), ..] = &range[..] else { return None };
        let [host, Value::Int(port), ..] = &master[..] else { return None };
        let host = match host {
            Value::BulkString(host) if !matches!(&host[..], b"" | b"?") => std::str::from_utf8(host).ok()?,
            _ => asked,
        };
        let port = u16::try_from(*port).ok()?;
        let is_it = |node: &Arc<Node>| node.host == host && node.port == port;
        let place = match map.nodes.iter().position(is_it) {
            Some(place) => place,
            None => {
                let node = known.nodes.iter().find(|node| is_it(node)).cloned();
                let open = || -> RedisResult<Arc<Node>> {
                    let client = seeds.node(host, port)?;
                    let line = Line::open(Target::Single(client.clone()), failures);
                    Ok(Arc::new(Node { host: host.to_owned(), port, client, line }))
                };
                map.nodes.push(node.map_or_else(open, Ok).ok()?);
                map.nodes.len() - 1
            }
        };
        let (from, to) = (usize::try_from(*from).ok()?, usize::try_from(*to).ok()?);
        map.slots.get_mut(from..=to)?.fill(u16::try_from(place).ok()?);
    }
    (!map.nodes.is_empty()).then_some(map)
}

/// The slot of a key: the CRC-16 (XMODEM) of it, or of what stands in its first braces, if anything does.
pub(super) fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.iter().position(|byte| *byte == b'}').map(|close| &rest[..close])
    });
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    let crc = hashed.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use ::redis::{IntoConnectionInfo, Value};
    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};

    use super::{Map, NOBODY, parse, slot};
    use crate::redis::connect::Seeds;

    #[test]
    fn slots_of_keys() {
        // The check value of CRC-16/XMODEM, and what `CLUSTER KEYSLOT` says.
        for (key, want) in [
            ("123456789", 0x31c3),
            ("", 0),
            ("foo", 12182),
            ("{foo}bar", 12182),
            ("a{foo}{bar}", 12182),
            ("somekey", 11058),
        ] {
            assert_eq!(slot(key.as_bytes()), want, "{key}");
        }
        assert_ne!(slot(b"{}foo"), slot(b"foo"));
    }

    fn range(from: i64, to: i64, host: &str, port: i64) -> Value {
        let node = |host: &str, port| {
            Value::Array(vec![Value::BulkString(host.into()), Value::Int(port), Value::BulkString("id".into())])
        };
        Value::Array(vec![Value::Int(from), Value::Int(to), node(host, port), node("replica", 1)])
    }

    fn read(answer: &Value) -> Option<Map> {
        let seeds = Seeds::new(vec!["redis://seed".into_connection_info().unwrap()]);
        parse(answer, "asked", &seeds, &Map::default(), 1)
    }

    #[tokio::test]
    async fn maps() {
        let answer = [range(0, 5, "a", 1), range(6, 6, "", 2), range(8, 16383, "a", 1)];
        let map = read(&Value::Array(answer.to_vec())).unwrap();
        let nodes: Vec<_> = map.nodes.iter().map(|node| (node.host.as_str(), node.port)).collect();
        assert_eq!(nodes, [("a", 1), ("asked", 2)]);
        assert_eq!([0, 5, 6, 7, 8, 16383].map(|slot: usize| map.slots[slot]), [0, 0, 1, NOBODY, 0, 0]);
        for bad in [
            Value::Nil,
            Value::Array(Vec::new()),
            Value::Array(vec![Value::Int(1)]),
            Value::Array(vec![range(0, 16384, "a", 1)]),
            Value::Array(vec![range(5, 3, "a", 1)]),
            Value::Array(vec![range(-1, 3, "a", 1)]),
            Value::Array(vec![range(0, 1, "a", 65536)]),
        ] {
            assert!(read(&bad).is_none(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(answer in answer()) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _entered = runtime.enter();
            if let Some(map) = read(&answer) {
                assert!(map.slots.iter().all(|place| *place == NOBODY || usize::from(*place) < map.nodes.len()));
            }
        }
    }

    fn answer() -> impl Strategy<Value = Value> {
        let number = prop_oneof![any::<i64>(), -1_i64..17000];
        let leaf = prop_oneof![
            Just(Value::Nil),
            number.prop_map(Value::Int),
            any::<Vec<u8>>().prop_map(Value::BulkString),
            (-1_i64..17000, -1_i64..17000, "[a-c]?", -1_i64..70000)
                .prop_map(|(from, to, host, port)| range(from, to, &host, port)),
        ];
        leaf.prop_recursive(3, 30, 5, |inner| proptest::collection::vec(inner, 0..5).prop_map(Value::Array))
    }
}
