//! nginx by the file that people deploy, in front of three instances.
//!
//! In: the addresses of the instances, changes to `deploy/nginx/waypost.conf`. Out: one address for visitors.
//! Never: a line about waypost that is not in that file, but for addresses.
//! At the limit: a change that meets nothing in the file, and a file that nginx refuses, fail the test.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use super::{Process, READY, folder, log, run, shipped, start, unprivileged, write};
use crate::support::eventually;

/// What Debian's nginx.conf has around the file, with everything that it writes in the folder, and a site that is there
/// already.
const MAIN: &str = "daemon off;
worker_processes 2;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
    client_body_temp_path body;
    proxy_temp_path proxied;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include waypost.conf;
    include sites.conf;
}
";

#[derive(Debug)]
pub(crate) struct Nginx {
    // Ends before its folder goes.
    process: Process,
    folder: TempDir,
    port: u16,
    servers: [SocketAddr; 3],
}

impl Nginx {
    /// In front of these, whether they run yet or not. Whoever comes from 127.0.0.0/9 is believed as a CDN is, so that the
    /// ids of a load reach the visits, and may use the API unless it is of 127.0.0.128/25; the rest of 127.0.0.0/8 are visitors.
    pub(crate) fn changed(servers: [SocketAddr; 3], changes: &[(&str, &str)]) -> Self {
        let folder = folder();
        let spawn = |port| {
            configure(folder.path(), port, servers, changes);
            let arguments = arguments(folder.path(), &[]);
            Process::spawn(folder.path(), "TERM", Path::new("nginx"), &arguments)
        };
        let ready = |port| TcpStream::connect(("127.0.0.1", port)).is_ok();
        let (port, process) = start(folder.path(), spawn, ready);
        Self { process, folder, port, servers }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Other changes to the file, from now on, after which the old workers take no more requests.
    pub(crate) fn reload(&self, changes: &[(&str, &str)]) {
        let before = self.process.children();
        configure(self.folder.path(), self.port, self.servers, changes);
        self.process.signal(Signal::HUP);
        let is_new = |pid: &Pid| !before.contains(pid);
        eventually(READY, "other workers serve", || {
            // The old ones are there until their last connection ends; they have let go of the listener before that.
            self.process.children().iter().filter(|pid| is_new(pid)).count() == 2
        });
    }

    /// Takes an instance out, as a person does: `down`, and a reload.
    pub(crate) fn take_out(&self, number: usize) {
        let server = format!("server 10.0.0.{}:8080 ", 11 + number);
        self.reload(&[(&server, &format!("{server}down "))]);
    }

    pub(crate) fn log(&self) -> String {
        log(self.folder.path())
    }
}

fn arguments(folder: &Path, more: &[&str]) -> Vec<String> {
    // The first error log, which it opens before it reads that there is another one, is Debian's otherwise.
    let folder = format!("{}/", folder.display());
    ["-p", &folder, "-c", "nginx.conf", "-e", "stderr"].iter().chain(more).map(|&word| word.to_owned()).collect()
}

/// Writes the files, and lets nginx check them.
fn configure(folder: &Path, port: u16, servers: [SocketAddr; 3], changes: &[(&str, &str)]) {
    let [one, two, three] = servers.map(|server| server.to_string());
    let listen = format!("listen 127.0.0.1:{port} default_server;");
    let site = format!("server {{ listen 127.0.0.1:{port}; server_name localhost; access_log off; return 418; }}\n");
    let own = [
        ("listen 80 default_server;", &*listen),
        ("    listen [::]:80 default_server;\n", ""),
        ("    192.0.2.1 1;", "    127.0.0.0/9 1;"),
        // Loads are both believed and let in, which nobody is by the file: a value of their own. The upper half is not.
        ("    127.0.0.0/8 1;", "    127.0.0.0/9 2;\n    127.0.0.128/25 1;"),
        ("    \"0:1\" 1;", "    \"0:1\" 1;\n    \"1:2\" 1;"),
        ("10.0.0.11:8080", &one),
        ("10.0.0.12:8080", &two),
        ("10.0.0.13:8080", &three),
    ];
    write(&folder.join("nginx.conf"), MAIN);
    write(&folder.join("sites.conf"), &site);
    write(&folder.join("waypost.conf"), &shipped("nginx/waypost.conf", &[changes, &own].concat()));
    run(unprivileged(Command::new("nginx").args(arguments(folder, &["-t", "-q"])), folder));
}
