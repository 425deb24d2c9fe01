//! HAProxy by the file that people deploy, in front of three instances.
//!
//! In: the addresses of the instances, changes to `deploy/haproxy/haproxy.cfg`. Out: one address for visitors, and what
//! HAProxy says of its servers.
//! Never: a line of configuration that is not in that file, but for addresses, paths and users.
//! At the limit: a change that meets nothing in the file, and a file that HAProxy refuses, fail the test.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{Process, READY, folder, log, run, shipped, start, write};
use crate::support::eventually;

/// The two server sets of the file: the one that is asked by visitors, by whether it has the store, and the one that tells who
/// only lives.
pub(crate) const SETS: [&str; 2] = ["waypost", "waypost_without_store"];
/// The instances, as the file calls them.
pub(crate) const NAMES: [&str; 3] = ["one", "two", "three"];

#[derive(Debug)]
pub(crate) struct Haproxy {
    // Ends before its folder goes.
    process: Process,
    folder: TempDir,
    port: u16,
    servers: [SocketAddr; 3],
}

impl Haproxy {
    /// In front of these, whether they run yet or not. Whoever comes from 127.0.0.0/9 is believed as a CDN is, so that the
    /// ids of a load reach the visits, and may use the API unless it is of 127.0.0.128/25; the rest of 127.0.0.0/8 are visitors.
    pub(crate) fn start(servers: [SocketAddr; 3]) -> Self {
        Self::changed(servers, &[])
    }

    /// With changes to the file that make it another one that it describes.
    pub(crate) fn changed(servers: [SocketAddr; 3], changes: &[(&str, &str)]) -> Self {
        let folder = folder();
        let spawn = |port| {
            configure(folder.path(), port, servers, changes);
            let arguments = ["-W", "-db", "-f", "haproxy.cfg"].map(str::to_owned);
            Process::spawn(folder.path(), "TERM", Path::new("haproxy"), &arguments)
        };
        let ready = |port| {
            let listens = || TcpStream::connect(("127.0.0.1", port)).is_ok();
            ask(folder.path(), "show info").is_some() && listens()
        };
        let (port, process) = start(folder.path(), spawn, ready);
        Self { process, folder, port, servers }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// What the stats socket answers.
    #[track_caller]
    pub(crate) fn ask(&self, command: &str) -> String {
        ask(self.folder.path(), command).unwrap_or_else(|| panic!("no answer to {command}: {}", self.log()))
    }

    /// A column of `show stat` for a server of a set, or for the set itself, which is `BACKEND`.
    #[track_caller]
    pub(crate) fn stat(&self, set: &str, server: &str, column: &str) -> String {
        let table = self.ask("show stat");
        let mut rows = table.trim_start_matches("# ").lines().map(|line| line.split(',').collect::<Vec<_>>());
        let names = rows.next().unwrap();
        let at = names.iter().position(|name| *name == column).unwrap_or_else(|| panic!("no {column} in {names:?}"));
        let row = rows.find(|row| row[..2] == [set, server]);
        row.unwrap_or_else(|| panic!("no {set}/{server} in {table}"))[at].to_owned()
    }

    /// Whether a set sends requests to this instance.
    #[track_caller]
    pub(crate) fn is_up(&self, set: &str, server: &str) -> bool {
        self.stat(set, server, "status").starts_with("UP")
    }

    /// Puts an instance into a state, `ready`, `drain` or `maint`, as a person does: in both sets.
    #[track_caller]
    pub(crate) fn set_state(&self, server: &str, state: &str) {
        for set in SETS {
            assert_eq!(self.ask(&format!("set server {set}/{server} state {state}")).trim(), "");
        }
    }

    /// Other changes to the file, from now on. Connections that there are end with the process that has them.
    pub(crate) fn reload(&self, changes: &[(&str, &str)]) {
        let process = || self.ask("show info").lines().find(|line| line.starts_with("Pid:")).unwrap().to_owned();
        let before = process();
        configure(self.folder.path(), self.port, self.servers, changes);
        self.process.signal(Signal::USR2);
        eventually(READY, "another process serves", || {
            ask(self.folder.path(), "show info").is_some_and(|info| !info.contains(&before))
        });
    }

    pub(crate) fn log(&self) -> String {
        log(self.folder.path())
    }
}

/// Writes the file, and lets HAProxy check it.
fn configure(folder: &Path, port: u16, servers: [SocketAddr; 3], changes: &[(&str, &str)]) {
    let socket = folder.join("admin.sock");
    let [one, two, three] = servers.map(|server| server.to_string());
    let bind = format!("bind 127.0.0.1:{port}\n");
    let own = [
        ("log /dev/log local0", "log stdout format raw local0"),
        // These are for who starts as root.
        ("    chroot /var/lib/haproxy\n", ""),
        ("    user haproxy\n", ""),
        ("    group haproxy\n", ""),
        ("/run/haproxy/admin.sock", socket.to_str().unwrap()),
        ("bind :80\n", &bind),
        ("    bind :::80 v6only\n", ""),
        ("acl edge src 192.0.2.1", "acl edge src 127.0.0.0/9"),
        ("acl private src 127.0.0.0/8", "acl private src 127.0.0.0/9"),
        // Loads are both believed and let in, which nobody is by the file.
        ("|| api edge", "|| api edge { src 127.0.0.128/25 }"),
        ("10.0.0.11:8080", &one),
        ("10.0.0.12:8080", &two),
        ("10.0.0.13:8080", &three),
    ];
    let file = folder.join("haproxy.cfg");
    write(&file, &shipped("haproxy/haproxy.cfg", &[changes, &own].concat()));
    run(Command::new("haproxy").args(["-c", "-q", "-f"]).arg(&file));
}

/// None: nobody listens at the stats socket.
fn ask(folder: &Path, command: &str) -> Option<String> {
    let mut socket = UnixStream::connect(folder.join("admin.sock")).ok()?;
    socket.set_read_timeout(Some(READY)).unwrap();
    writeln!(socket, "{command}").ok()?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).ok()?;
    Some(answer)
}
