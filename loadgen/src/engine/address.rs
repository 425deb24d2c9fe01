//! Where connections come from: the addresses of a class's `bind` in turn, and sockets bound to them.
//!
//! In: a range, this worker's number and how many there are. Out: addresses for ever, and sockets. Never: gives two
//! workers the same address as long as there is one for each; waits. At its limit: fewer addresses than workers: all
//! workers take all of them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// One worker's share of a range, for ever: worker w of W takes each W-th address from the w-th on, then begins again.
/// Without a range it is empty: the kernel chooses.
#[derive(Debug, Clone)]
pub struct Addresses {
    first: IpAddr,
    count: u128,
    begin: u128,
    step: u128,
    /// From `first`.
    next: u128,
}

impl Addresses {
    #[must_use]
    pub fn new(range: Option<IpNet>, worker: usize, workers: usize) -> Self {
        let (worker, workers) = (worker as u128, workers as u128);
        let Some((first, last)) = range.map(first_and_last) else {
            return Self { first: Ipv4Addr::UNSPECIFIED.into(), count: 0, begin: 0, step: 1, next: 0 };
        };
        // All of IPv6 has one more than that: nobody will come to the last.
        let count = (bits(last) - bits(first)).saturating_add(1);
        let is_shared = count < workers;
        let begin = worker % count;
        Self { first, count, begin, step: if is_shared { 1 } else { workers }, next: begin }
    }
}

impl Iterator for Addresses {
    type Item = IpAddr;

    fn next(&mut self) -> Option<IpAddr> {
        if self.count == 0 {
            return None;
        }
        let bits = bits(self.first) + self.next;
        self.next += self.step;
        if self.next >= self.count {
            self.next = if self.step == 1 { 0 } else { self.begin };
        }
        Some(match self.first {
            IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(bits).expect("not beyond the range's last address")).into(),
            IpAddr::V6(_) => Ipv6Addr::from(bits).into(),
        })
    }
}

/// The ends of what connections can come from: without the network's and the broadcast address, where IPv4 has those
/// (prefixes below 31; RFC 3021).
#[must_use]
pub fn first_and_last(range: IpNet) -> (IpAddr, IpAddr) {
    match range {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            let (network, broadcast) = (u32::from(net.network()), u32::from(net.broadcast()));
            (Ipv4Addr::from(network + 1).into(), Ipv4Addr::from(broadcast - 1).into())
        }
        net => (net.network(), net.broadcast()),
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// A TCP socket for a connection to `address`, not connected yet; nonblocking, without Nagle's delay.
///
/// With `local` it is bound to that address and a port of the kernel's choice. `IP_BIND_ADDRESS_NO_PORT` would put that
/// choice off until connect(2), which sees the target as well, so that one address could use a port for several targets;
/// neither socket2 nor rustix offers it. A run has one target: all that is lost is that a port in TIME_WAIT is not used
/// again, so an address carries some 28,000 connections a minute (`net.ipv4.ip_local_port_range`), and a range of more
/// addresses that many times more.
pub fn socket(address: SocketAddr, local: Option<IpAddr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(local) = local {
        socket.bind(&SocketAddr::new(local, 0).into())?;
    }
    Ok(socket)
}

/// A [`socket`] that has begun to connect.
pub fn connect(address: SocketAddr, local: Option<IpAddr>) -> io::Result<Socket> {
    let socket = socket(address, local)?;
    match socket.connect(&address.into()) {
        Err(error) if Errno::from_io_error(&error) != Some(Errno::INPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Why a connection could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    Refused,
    /// This process, or the machine, may open no more files.
    NoFd,
    /// No port is left for the local address, or it is none of this machine's.
    NoPort,
    Other,
}

/// What an error of [`connect`], or the one that the socket holds later, stands for.
#[must_use]
pub fn failure(error: &io::Error) -> Failure {
    match Errno::from_io_error(error) {
        // Memory for sockets, and watches of epoll, are as much ours as files.
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::NOSPC) => Failure::NoFd,
        // bind(2) says ADDRINUSE when all ports of the address are taken, connect(2) ADDRNOTAVAIL.
        Some(Errno::ADDRNOTAVAIL | Errno::ADDRINUSE) => Failure::NoPort,
        Some(Errno::CONNREFUSED) => Failure::Refused,
        _ => Failure::Other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn shares_of_a_range() {
        let check = |range: &str, worker: usize, workers: usize, expected: &[&str]| {
            let addresses = Addresses::new(Some(range.parse().unwrap()), worker, workers);
            let taken: Vec<String> = addresses.take(expected.len()).map(|address| address.to_string()).collect();
            assert_eq!(taken, expected, "worker {worker} of {workers} in {range}");
        };
        check("127.66.0.0/30", 0, 1, &["127.66.0.1", "127.66.0.2", "127.66.0.1"]);
        check("127.66.0.77/29", 1, 2, &["127.66.0.74", "127.66.0.76", "127.66.0.78", "127.66.0.74"]);
        check("127.66.0.0/29", 0, 4, &["127.66.0.1", "127.66.0.5", "127.66.0.1"]);
        check("127.66.0.0/29", 3, 4, &["127.66.0.4", "127.66.0.4"]);
        check("127.66.0.0/30", 2, 4, &["127.66.0.1", "127.66.0.2", "127.66.0.1"]);
        check("127.66.0.0/30", 3, 4, &["127.66.0.2", "127.66.0.1", "127.66.0.2"]);
        check("127.66.0.4/31", 0, 1, &["127.66.0.4", "127.66.0.5", "127.66.0.4"]);
        check("127.66.0.4/32", 7, 8, &["127.66.0.4", "127.66.0.4"]);
        check("255.255.255.254/31", 0, 1, &["255.255.255.254", "255.255.255.255", "255.255.255.254"]);
        check("::1/128", 0, 2, &["::1", "::1"]);
        check("::/0", 1, 2, &["::1", "::3"]);
        assert_eq!(Addresses::new(None, 0, 1).next(), None);
    }

    #[test]
    fn workers_divide_a_range_among_them() {
        for workers in 1..=6_usize {
            let mut seen = HashSet::new();
            for worker in 0..workers {
                let mut addresses = Addresses::new(Some("127.66.0.0/28".parse().unwrap()), worker, workers);
                let first = addresses.next().unwrap();
                assert!(seen.insert(first));
                for next in addresses.take_while(|next| *next != first) {
                    assert!(seen.insert(next), "{next} twice with {workers} workers");
                }
            }
            assert_eq!(seen.len(), 14);
        }
    }

    #[test]
    fn a_connection_comes_from_its_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = connect(listener.local_addr().unwrap(), Some("127.66.0.9".parse().unwrap())).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && socket.nonblocking().unwrap());
        assert_eq!(listener.accept().unwrap().1.ip().to_string(), "127.66.0.9");
    }

    #[test]
    fn what_cannot_be_opened_says_whose_fault_it_is() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let foreign = socket(listener.local_addr().unwrap(), Some("192.0.2.1".parse().unwrap())).unwrap_err();
        assert_eq!(failure(&foreign), Failure::NoPort);
        for (errno, expected) in [
            (Errno::MFILE, Failure::NoFd),
            (Errno::NFILE, Failure::NoFd),
            (Errno::ADDRINUSE, Failure::NoPort),
            (Errno::CONNREFUSED, Failure::Refused),
            (Errno::TIMEDOUT, Failure::Other),
            (Errno::CONNRESET, Failure::Other),
        ] {
            assert_eq!(failure(&errno.into()), expected, "{errno:?}");
        }
    }
}
