//! Listening sockets: made here, one per worker and address, or handed over by systemd.
//!
//! Closing one of several `SO_REUSEPORT` sockets resets what waits in its queue. So a restart without loss hands the
//! same sockets on, and a passed socket never stays without somebody who accepts from it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use socket2::{Domain, Protocol, Socket, Type};

use crate::http::route::Surface;

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;

/// What to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    pub address: SocketAddr,
    pub proxy_protocol: bool,
    pub surface: Surface,
}

/// A socket that a worker accepts from.
#[derive(Debug)]
pub struct Listener {
    pub socket: TcpListener,
    pub listen: Listen,
    /// It was handed over: its queue is the next process's too.
    pub passed: bool,
}

/// A socket for each worker. With port 0 the first one chooses, and the others follow. Where another process listens,
/// also one that would share the address, the error is [`io::ErrorKind::AddrInUse`]: of two servers on one address each
/// would answer a part of the visitors from its own store.
pub fn bind(mut listen: Listen, workers: usize) -> io::Result<Vec<Listener>> {
    // Without SO_REUSEPORT, which only an address that nobody has allows; given back at once.
    unbound(listen)?.bind(&listen.address.into())?;
    let mut listeners = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = unbound(listen)?;
        socket.set_reuse_port(true)?;
        // Inherited by what is accepted.
        socket.set_tcp_nodelay(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&listen.address.into())?;
        socket.listen(BACKLOG)?;
        let socket = TcpListener::from(socket);
        listen.address = socket.local_addr()?;
        listeners.push(Listener { socket, listen, passed: false });
    }
    Ok(listeners)
}

fn unbound(listen: Listen) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(listen.address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if listen.address.is_ipv6() {
        // 0.0.0.0 and [::] with the same port are two listeners, if somebody wants both.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Takes over the sockets that systemd passed (sd_listen_fds(3)), each with what the configuration says of its address.
/// One that the configuration does not know serves what `surface` says.
pub fn take_passed(configured: &[Listen], surface: Surface) -> io::Result<Vec<Listener>> {
    let passed: Vec<RawFd> = sd_notify::listen_fds()?.collect();
    passed.into_iter().map(|fd| take(fd, configured, surface)).collect()
}

fn take(fd: RawFd, configured: &[Listen], surface: Surface) -> io::Result<Listener> {
    #[expect(unsafe_code, reason = "the descriptor is ours by the protocol of sd_listen_fds(3), and is taken once")]
    // SAFETY: systemd passes open descriptors from 3 on to this process alone, and nothing else here touches them.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let socket = Socket::from(owned);
    if !socket.is_listener()? {
        return Err(io::Error::other(format!(
            "passed descriptor {fd} does not listen: set Accept=no in its socket unit"
        )));
    }
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    let socket = TcpListener::from(socket);
    let address = socket.local_addr()?;
    let listen = configured.iter().find(|listen| listen.address == address).copied();
    let listen = listen.unwrap_or(Listen { address, proxy_protocol: false, surface });
    Ok(Listener { socket, listen, passed: true })
}

/// Shares passed sockets out so that each is accepted from and each worker has one, whichever are more.
pub fn share_out(passed: Vec<Listener>, workers: usize) -> io::Result<Vec<Vec<Listener>>> {
    let mut shares: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for (share, shared) in shares.iter_mut().skip(passed.len()).zip(passed.iter().cycle()) {
        share.push(Listener { socket: shared.socket.try_clone()?, ..*shared });
    }
    for (index, listener) in passed.into_iter().enumerate() {
        shares[index % workers].push(listener);
    }
    Ok(shares)
}

/// Where a listener is reached from its own machine.
#[must_use]
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_server() {
        let listen =
            Listen { address: ([127, 0, 0, 1], 0).into(), proxy_protocol: false, surface: Surface::Everything };
        let first = bind(listen, 2).unwrap();
        let same = Listen { address: first[0].listen.address, ..listen };
        assert_eq!(bind(same, 2).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        bind(same, 2).unwrap();
    }

    #[test]
    fn passed_sockets_are_shared_out() {
        for (sockets, workers) in [(1, 1), (1, 3), (2, 3), (3, 3), (5, 2), (4, 1)] {
            let listen =
                Listen { address: ([127, 0, 0, 1], 0).into(), proxy_protocol: false, surface: Surface::Everything };
            let passed: Vec<Listener> = (0..sockets).flat_map(|_| bind(listen, 1).unwrap()).collect();
            let mut all: Vec<_> = passed.iter().map(|listener| listener.listen.address).collect();
            let shares = share_out(passed, workers).unwrap();
            assert!(shares.iter().all(|share| !share.is_empty()), "{sockets} sockets, {workers} workers");
            let mut accepted: Vec<_> = shares.iter().flatten().map(|listener| listener.listen.address).collect();
            accepted.sort();
            accepted.dedup();
            all.sort();
            assert_eq!(accepted, all, "{sockets} sockets, {workers} workers");
        }
    }
}
