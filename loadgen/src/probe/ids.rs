//! Before a run with a ledger: does the server take over the ids that requests carry?
//!
//! In: the scenario, and the name of the header. Out: nothing, or an error with the lines that the server's configuration
//! lacks. Never: sends more than one request from each end of each range of client addresses, and one from no address in
//! particular if some class has none. At its limit: a server that does not answer within the time-out is an error too.
//!
//! A server that believed the header of everybody would let anybody forge what it records, so waypost believes peers that
//! are named under `proxies.trusted` only, and gives others an id of its own. Which of the two it did is seen in the
//! `X-Request-Id` of its answer to `GET /healthz`.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::client::Client;
use crate::engine::address::first_and_last;
use crate::ledger::read::RequestId;
use crate::ledger::write::by_chance;
use crate::scenario::Scenario;

/// The header that carries the id where nothing else was configured, and in which it comes back.
pub const HEADER: &str = "X-Request-Id";

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the server at `address` from all addresses that requests of `scenario` will come from; they carry their ids in
/// `header`.
pub fn ask(scenario: &Scenario, address: SocketAddr, header: &str) -> Result<()> {
    let mut ranges: Vec<IpNet> = scenario.traffic.iter().filter_map(|traffic| traffic.bind).collect();
    ranges.sort();
    ranges.dedup();
    let authority = &scenario.run.target.authority;
    // Asked from there only if requests come from there: a server trusts no more than it must.
    let is_unbound = scenario.traffic.iter().any(|traffic| traffic.bind.is_none());
    let mut believed = !is_unbound || is_believed(None, address, authority, header)?;
    for range in &ranges {
        let (first, last) = first_and_last(*range);
        believed &= is_believed(Some(first), address, authority, header)?;
        believed &= first == last || is_believed(Some(last), address, authority, header)?;
    }
    if !believed && is_unbound {
        ranges.insert(0, IpNet::from(unbound(address)?));
    }
    ensure!(
        believed,
        "{authority} does not take over the ids of requests, so its visits could not be compared with the ledger; it \
         believes them from peers that its configuration trusts:\n\n{}",
        configuration(&ranges, header)
    );
    Ok(())
}

/// Whether an id that is sent from `local` comes back.
fn is_believed(local: Option<IpAddr>, address: SocketAddr, authority: &str, header: &str) -> Result<bool> {
    let id = RequestId { run: by_chance()?, worker: u16::MAX, number: 0 }.to_string();
    let from = local.map_or(String::new(), |local| format!(" from {local}"));
    let ask =
        || Client::connect_from(local, address, authority, PATIENCE)?.request("GET", "/healthz", &[(header, &id)], b"");
    let answer = ask().with_context(|| format!("cannot ask {authority}{from} whether it takes over ids"))?;
    Ok([header, HEADER].iter().any(|name| answer.header(name) == Some(&id)))
}

/// The address that connections to `address` come from without being bound: connect(2) of UDP chooses it and sends nothing.
fn unbound(address: SocketAddr) -> Result<IpAddr> {
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).and_then(|socket| socket.connect(address).and_then(|()| socket.local_addr()));
    Ok(socket.with_context(|| format!("no way to {address}"))?.ip())
}

/// The lines that waypost's configuration lacks.
fn configuration(ranges: &[IpNet], header: &str) -> String {
    let trusted: Vec<String> = ranges.iter().map(|range| format!("\"{}\"", range.trunc())).collect();
    let mut lines = format!("[proxies]\ntrusted = [{}]\n", trusted.join(", "));
    if !header.eq_ignore_ascii_case(HEADER) {
        lines.push_str(&format!("\n[visits]\nrequest_id_header = \"{header}\"\n"));
    }
    lines
}
