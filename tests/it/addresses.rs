//! Whose address counts: forwarding headers and the PROXY protocol; and what of a request reaches the log.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::support::{Answer, Client, LIMIT, Server, eventually, request};

const OPEN: &str = "[shorten]\nopen = true\n[limits]\nshorten_per_minute = 3\n";

/// Shortens without a key, from `source`, with these headers.
fn shorten(server: &Server, source: &str, headers: &[(&str, &str)]) -> Answer {
    let mut client = Client::connect_from(source, server.address());
    let headers = [&[("Content-Type", "application/json")], headers].concat();
    client.ask("POST", "/shorten", &headers, json!({"original_url": "https://example.com/"}).to_string().as_bytes())
}

#[test]
fn limits_count_by_the_address_of_the_client() {
    let (_setup, server) = Server::new(&format!("{OPEN}[proxies]\ntrusted = [\"127.0.0.2\", \"10.0.0.0/8\"]"));
    let x = |value: &'static str| [("X-Forwarded-For", value)];
    let f = |value: &'static str| [("Forwarded", value)];
    // How many of three requests are allowed: three for who has not called, none for who has used them up.
    let check = |source: &str, headers: &[(&str, &str)], want: usize| {
        let allowed = (0..3).filter(|_| shorten(&server, source, headers).status == 201).count();
        assert_eq!(allowed, want, "{source} {headers:?}");
    };
    let balancer = "127.0.0.2";
    check(balancer, &x("203.0.113.1"), 3);
    check(balancer, &x("203.0.113.1"), 0);
    check(balancer, &x("203.0.113.2"), 3);
    // Whatever the client wrote itself stands left of its own address.
    check(balancer, &x("198.51.100.1, 203.0.113.1"), 0);
    check(balancer, &x("203.0.113.1, 10.1.2.3"), 0);
    check(balancer, &f("for=203.0.113.1;proto=https"), 0);
    check(balancer, &f("for=203.0.113.3"), 3);
    check(balancer, &f("for=\"203.0.113.3:4711\""), 0);
    check(balancer, &x("203.0.113.3:4711"), 0);
    // A customer has a /64.
    check(balancer, &x("2001:db8:1::1"), 3);
    check(balancer, &x("2001:db8:1::2"), 0);
    check(balancer, &f("for=\"[2001:db8:2::1]:80\""), 3);
    // The balancer itself, and what it forwards without an address.
    check(balancer, &[], 3);
    check(balancer, &x("unknown"), 0);
    // An untrusted peer cannot choose.
    check("127.0.0.3", &x("203.0.113.9"), 3);
    check("127.0.0.3", &x("203.0.113.10"), 0);
    check("127.0.0.3", &f("for=203.0.113.11"), 0);
    check("127.0.0.3", &[], 0);
    check("127.0.0.4", &[], 3);
}

#[test]
fn who_is_refused_is_told_until_when() {
    let (_setup, server) = Server::new(OPEN);
    for left in ["2", "1", "0"] {
        let answer = shorten(&server, "127.0.0.5", &[]);
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(answer.header("ratelimit-limit"), Some("3"), "{answer:?}");
        assert_eq!(answer.header("ratelimit-remaining"), Some(left), "{answer:?}");
        assert_eq!(answer.header("retry-after"), None, "{answer:?}");
    }
    let refused = shorten(&server, "127.0.0.5", &[]);
    assert_eq!((refused.status, refused.json()["status"].as_u64()), (429, Some(429)), "{refused:?}");
    let seconds = |name: &str| refused.header(name).unwrap().parse::<u64>().unwrap();
    assert!((1..=20).contains(&seconds("retry-after")), "one of three a minute comes back within 20 s: {refused:?}");
    assert!((40..=60).contains(&seconds("ratelimit-reset")), "{refused:?}");
    assert_eq!(refused.header("ratelimit-remaining"), Some("0"), "{refused:?}");
}

#[test]
fn a_balancer_that_was_forgotten_is_named_once() {
    let (_setup, server) = Server::new("[proxies]\ntrusted = [\"127.0.0.2\"]");
    let forwarded = [("X-Forwarded-For", "203.0.113.1")];
    Client::connect_from("127.0.0.3", server.address()).get("/x");
    Client::connect_from("127.0.0.2", server.address()).ask("GET", "/x", &forwarded, b"");
    for source in ["127.0.0.4", "127.0.0.4", "127.0.0.5"] {
        for _ in 0..5 {
            Client::connect_from(source, server.address()).ask("GET", "/x", &forwarded, b"");
        }
    }
    let log = server.stop();
    let warnings: Vec<Value> = log
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &Value| line["message"].as_str().is_some_and(|text| text.contains("proxies.trusted")))
        .collect();
    let want = "visits are recorded with the balancer's address 127.0.0.4: add it to proxies.trusted";
    assert_eq!(warnings.len(), 1, "{log:?}");
    assert_eq!((&warnings[0]["level"], &warnings[0]["message"]), (&json!("WARN"), &json!(want)), "{log:?}");
}

/// A PROXY v2 header of a TCP over IPv4 connection (proxy-protocol.txt, section 2.2).
fn version_2(source: [u8; 4]) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    bytes.extend(source);
    bytes.extend([127, 0, 0, 1, 0x12, 0x34, 0, 80]);
    bytes
}

#[test]
fn the_proxy_protocol() {
    let (_setup, server) = Server::new(&format!(
        "{OPEN}[[listen]]\naddress = \"127.0.0.1:0\"\n[[listen]]\naddress = \"127.0.0.2:0\"\nproxy_protocol = true"
    ));
    let (plain, proxied) = (server.listener("127.0.0.1"), server.listener("127.0.0.2"));
    server_has_code(plain, &server);
    let get = request("GET", "/code", &[], b"");
    let accepted = |header: &[u8]| {
        let mut client = Client::connect(proxied);
        client.send([header, &get].concat());
        assert_eq!(client.answer().status, 307, "{}", String::from_utf8_lossy(header));
        assert_eq!(client.get("/code").status, 307, "one header, then requests");
        // In pieces, as the network may bring it.
        let mut client = Client::connect(proxied);
        for byte in header {
            client.send([*byte]);
        }
        client.send(&get);
        assert_eq!(client.answer().status, 307, "{}", String::from_utf8_lossy(header));
    };
    accepted(b"PROXY TCP4 203.0.113.1 127.0.0.1 4711 80\r\n");
    accepted(b"PROXY TCP6 2001:db8::1 ::1 4711 80\r\n");
    accepted(b"PROXY UNKNOWN\r\n");
    accepted(&version_2([203, 0, 113, 1]));
    // LOCAL: the balancer's own health check.
    accepted(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00");
    let refused = |bytes: &[u8]| {
        let mut client = Client::connect(proxied);
        client.try_send(bytes);
        assert_eq!(client.rest(), b"", "{}", String::from_utf8_lossy(bytes));
    };
    refused(&get);
    refused(b"PROXY TCP4 203.0.113.1\r\n");
    refused(b"PROXY TCP4 nonsense 127.0.0.1 4711 80\r\n");
    refused(&[b"PROXY ".as_slice(), &[b'x'; 200]].concat());
    let mut closed = Client::connect(plain);
    eventually(LIMIT, "they are counted", || {
        let text = closed.get("/metrics").text();
        crate::support::metric(&text, "waypost_connections_closed_total", &["reason=\"no_proxy_header\""]) == 4.0
    });
    for header in [b"PROXY TCP4 203.0.113.1 127.0.0.1 4711 80\r\n".as_slice(), &version_2([203, 0, 113, 1])] {
        let mut client = Client::connect(plain);
        client.try_send([header, &get].concat());
        assert_eq!(client.answer().status, 400, "{}", String::from_utf8_lossy(header));
        assert_eq!(client.rest(), b"");
    }
    // Limits count by whom the header names.
    let shorten = |header: &[u8]| {
        let mut client = Client::connect(proxied);
        client.send(header);
        client.shorten(&json!({"original_url": "https://example.com/"}), "").status
    };
    for (header, want) in [
        (version_2([203, 0, 113, 5]), [201, 201, 201, 429]),
        (b"PROXY TCP4 203.0.113.6 127.0.0.1 4711 80\r\n".to_vec(), [201, 201, 201, 429]),
        (b"PROXY TCP4 203.0.113.5 127.0.0.1 4711 80\r\n".to_vec(), [429; 4]),
    ] {
        assert_eq!([(); 4].map(|()| shorten(&header)), want, "{}", String::from_utf8_lossy(&header));
    }
}

/// A link `code`, made over the listener that wants no header.
fn server_has_code(plain: std::net::SocketAddr, server: &Server) {
    let body = json!({"original_url": "https://example.com/", "custom_code": "code"});
    assert_eq!(Client::connect(plain).shorten(&body, &server.admin_key()).status, 201);
}

#[test]
fn a_request_id_is_taken_from_who_is_trusted() {
    let (_setup, server) = Server::new("[proxies]\ntrusted = [\"127.0.0.2\"]");
    let check = |source: &str, id: &str, taken: bool| {
        let mut client = Client::connect_from(source, server.address());
        let answer = client.ask("GET", "/api/v1/nothing", &[("X-Request-Id", id)], b"");
        let got = answer.header("x-request-id").unwrap();
        assert_eq!(got == id, taken, "{source} {id:?}: {got:?}");
        assert!(taken || got.len() == 32 && got.bytes().all(|byte| byte.is_ascii_hexdigit()), "{got:?}");
        assert_eq!(answer.json()["instance"], format!("urn:waypost:request:{got}"));
        got.to_owned()
    };
    check("127.0.0.2", "req-1/abc", true);
    check("127.0.0.2", &"x".repeat(128), true);
    check("127.0.0.2", &"x".repeat(129), false);
    check("127.0.0.2", "with space", false);
    check("127.0.0.2", "", false);
    let own: HashSet<String> = (0..10).map(|_| check("127.0.0.1", "req-1", false)).collect();
    assert_eq!(own.len(), 10, "one is given twice");
}

#[test]
fn nobody_forges_a_line_of_the_log() {
    for format in ["json", "text"] {
        let (_setup, server) = Server::new(&format!(
            "[log]\nformat = \"{format}\"\nlevel = \"trace\"\naccess = true\n[targets]\nlookalikes = \"flag\"\n"
        ));
        let forged = r#"%0A%0D%1B{"level":"ERROR","message":"forged"}"#;
        let mut client = server.connect();
        client.send(request(
            "GET",
            &format!("/%0D%0A{}?q={}", "a".repeat(10), "%0A%7B%22message%22%3A%22forged%22"),
            &[("User-Agent", "x\u{85}\u{2028}{\"message\":\"forged\"}\u{9b}31m"), ("X-Forwarded-For", forged)],
            b"",
        ));
        assert_eq!(client.answer().status, 404);
        // A host that looks like another one is logged, as it is served.
        let answer = server.shorten(&json!({"original_url": "https://аpple.com/\n\r\u{2028}{\"message\":\"forged\"}"}));
        assert!(matches!(answer.status, 201 | 422), "{answer:?}");
        let target = "https://xn--pple-43d.com/\u{2028}\u{85}%0A{\"message\":\"forged\"}";
        assert_eq!(server.shorten(&json!({"original_url": target})).status, 201);
        let log = server.stop();
        for line in &log {
            assert!(!line.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')), "{line:?}");
            match format {
                "json" => {
                    let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
                    assert_ne!(line["message"], "forged");
                }
                _ => assert!(line.starts_with("20"), "a line without its time: {line:?}"),
            }
        }
        assert!(log.iter().any(|line| line.contains("looks like another")), "{log:?}");
        assert!(
            log.iter().any(|line| line.contains("aaaaaaaaaa")),
            "log.access is on, and the request has no line: {log:?}"
        );
    }
}

/// Figures are for the machine and its network; who comes from elsewhere by way of a balancer is neither.
#[test]
fn figures_are_not_read_through_a_balancer() {
    for (trusted, headers, status) in [
        ("", &[][..], 200),
        ("", &[("X-Forwarded-For", "8.8.8.8")], 401),
        ("\"127.0.0.0/8\"", &[("X-Forwarded-For", "8.8.8.8")], 401),
        ("\"127.0.0.0/8\"", &[("X-Forwarded-For", "8.8.8.8"), ("Forwarded", "for=1.2.3.4")], 401),
        ("\"127.0.0.0/8\"", &[("X-Forwarded-For", "10.1.2.3")], 200),
    ] {
        let (_setup, server) = Server::new(&format!("[proxies]\ntrusted = [{trusted}]"));
        let got = server.connect().ask("GET", "/metrics", headers, b"").status;
        assert_eq!(got, status, "{trusted} {headers:?}");
    }
}
