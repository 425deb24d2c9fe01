//! The server's contract: shortening, redirects, errors, pages, domains, codes, health and metrics.

use std::collections::HashSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use waypost::domain::link::Fields;
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::guard::keys::Scope;
use waypost::store::row::Change;

use crate::support::{Answer, Client, Direct, LIMIT, Server, Setup, embedded_only, eventually, key, metric, request};

/// What every error of the API looks like (RFC 9457); returns the pointers of its `errors`, sorted.
#[track_caller]
fn problem(answer: &Answer, status: u16) -> Vec<String> {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some("no-store"), "{answer:?}");
    let body = answer.json();
    assert_eq!(body["status"], status, "{body}");
    for member in ["type", "title", "detail"] {
        assert!(body[member].as_str().is_some_and(|text| !text.is_empty()), "{member} is missing: {body}");
    }
    let id = answer.header("x-request-id").unwrap_or_default();
    assert_eq!(id.len(), 32, "{answer:?}");
    assert!(body["instance"].as_str().is_some_and(|instance| instance.ends_with(id)), "{answer:?}");
    let mut pointers: Vec<String> = Vec::new();
    for error in body["errors"].as_array().into_iter().flatten() {
        assert!(error["code"].is_string() && error["detail"].is_string(), "{error}");
        pointers.push(error["pointer"].as_str().unwrap().to_owned());
    }
    pointers.sort();
    pointers
}

/// A redirect, and nothing but a redirect.
#[track_caller]
fn redirects(answer: &Answer, status: u16, location: &str, cache_control: &str) {
    assert_eq!((answer.status, answer.location()), (status, Some(location)), "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some(cache_control), "{answer:?}");
    assert_eq!(answer.body, b"", "{answer:?}");
    assert_eq!(answer.header("set-cookie"), None, "{answer:?}");
}

/// A page that says something and does nothing.
#[track_caller]
fn page(answer: &Answer, status: u16, kind: &str) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some(kind), "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some("no-store"), "{answer:?}");
    assert!((1..1024).contains(&answer.body.len()), "{answer:?}");
    assert!(!answer.text().contains("<script"), "{answer:?}");
}

const PLAIN: &str = "text/plain; charset=utf-8";
const TEMPORARY: &str = "private, max-age=0";
const PERMANENT: &str = "private, max-age=90";

#[test]
fn a_target_is_shortened_and_followed() {
    let (_setup, server) = Server::new("");
    let answer = server.shorten(&json!({"original_url": "https://EXAMPLE.com/ä?q=1#part"}));
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert!(answer.header("x-request-id").is_some());
    let body = answer.json();
    let code = body["short_code"].as_str().unwrap();
    let short_url = format!("http://{}/{code}", server.address());
    assert_eq!(
        body,
        json!({"short_code": code, "short_url": short_url, "original_url": "https://EXAMPLE.com/ä?q=1#part"})
    );
    assert_eq!(answer.location(), Some(short_url.as_str()));
    assert!(code.len() == 7 && code.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{code}");

    // Out of the store, out of the shards, out of the core's own memory: the same answer.
    let mut client = server.connect();
    for method in ["GET", "GET", "GET", "GET", "HEAD"] {
        let answer = client.ask(method, &format!("/{code}"), &[], b"");
        redirects(&answer, 307, "https://example.com/%C3%A4?q=1#part", TEMPORARY);
        // A HEAD may leave out what only content brings along (RFC 9110, section 9.3.2).
        let known = ["location", "cache-control", "content-length", "date"];
        assert!(answer.headers.iter().all(|(name, _)| known.contains(&name.as_str())), "{method} {answer:?}");
    }
}

#[test]
fn custom_codes() {
    let (_setup, server) = Server::new("");
    let check = |code: &str, status: u16, pointers: &[&str]| {
        let answer = server.shorten(&json!({"original_url": "https://example.com/", "custom_code": code}));
        if status == 201 {
            assert_eq!((answer.status, &answer.json()["short_code"]), (201, &json!(code)), "{answer:?}");
            redirects(&server.get(&format!("/{code}")), 307, "https://example.com/", TEMPORARY);
        } else {
            assert_eq!(problem(&answer, status), pointers, "{code}");
        }
    };
    check("spring-2027", 201, &[]);
    check("spring-2027", 409, &["/custom_code"]);
    check("Spring-2027", 201, &[]);
    check("a", 201, &[]);
    check(&"x".repeat(128), 201, &[]);
    check(&"x".repeat(129), 422, &["/custom_code"]);
    check("a b", 422, &["/custom_code"]);
    check("a/b", 422, &["/custom_code"]);
    check("é", 422, &["/custom_code"]);
    for reserved in ["api", "health", "Metrics", "robots.txt", "-", "_", ".well-known"] {
        check(reserved, 422, &["/custom_code"]);
    }
}

#[test]
fn what_is_refused() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    let json_type = ("Content-Type", "application/json");
    let bearer = |key: &str| format!("Bearer {key}");
    let admin = bearer(&server.admin_key());
    let reader = bearer(&store.key(&[Scope::LinksRead, Scope::StatsRead], None, None));
    let revoked = store.key(&[Scope::LinksWrite], None, None);
    store.revoke(&revoked);
    let revoked = bearer(&revoked);
    let expired = bearer(&store.key(&[Scope::LinksWrite], None, Some(UnixMillis(time::now().0 - 1))));
    let unknown = bearer(&format!("wp_{}_{}", "a".repeat(8), "b".repeat(32)));
    let good = br#"{"original_url": "https://example.com/"}"#.as_slice();
    let large = format!(r#"{{"original_url": "https://example.com/{}"}}"#, "a".repeat(64 << 10));
    let check = |headers: &[(&str, &str)], body: &[u8], status: u16| {
        let answer = server.connect().ask("POST", "/shorten", headers, body);
        problem(&answer, status);
        if status == 401 {
            assert!(answer.header("www-authenticate").is_some(), "{answer:?}");
        }
    };
    check(&[json_type, ("Authorization", &admin)], b"{\"original_url\": ", 400);
    check(&[json_type, ("Authorization", &admin)], b"[1]", 400);
    check(&[json_type, ("Authorization", &admin)], b"", 400);
    check(&[json_type, ("Authorization", &admin)], b"{\"original_url\": \"\xff\"}", 400);
    check(&[json_type], good, 401);
    check(&[json_type, ("Authorization", &unknown)], good, 401);
    check(&[json_type, ("Authorization", "Bearer nonsense")], good, 401);
    check(&[json_type, ("Authorization", "Basic YTpi")], good, 401);
    check(&[json_type, ("Authorization", &revoked)], good, 401);
    check(&[json_type, ("Authorization", &expired)], good, 401);
    check(&[json_type, ("Authorization", &reader)], good, 403);
    check(&[json_type, ("Authorization", &admin)], large.as_bytes(), 413);
    check(&[("Authorization", &admin)], good, 415);
    check(&[("Content-Type", "text/plain"), ("Authorization", &admin)], good, 415);
    for method in ["GET", "PUT", "DELETE"] {
        let answer = server.connect().ask(method, "/shorten", &[], b"");
        problem(&answer, 405);
        assert_eq!(answer.header("allow"), Some("POST"), "{answer:?}");
    }
    problem(&server.get("/api/v1/nothing"), 404);

    let writer = store.key(&[Scope::LinksWrite], None, None);
    let x_api_key = [json_type, ("X-Api-Key", writer.as_str())];
    assert_eq!(server.connect().ask("POST", "/shorten", &x_api_key, good).status, 201);
}

#[test]
fn every_wrong_field_is_named_at_once() {
    let (_setup, server) = Server::new("");
    let check = |body: serde_json::Value, want: &[&str]| {
        assert_eq!(problem(&server.shorten(&body), 422), want, "{body}");
    };
    let good = "https://example.com/";
    check(json!({}), &["/original_url"]);
    check(json!({"original_url": null}), &["/original_url"]);
    check(json!({"original_url": good, "custom_cod": "x"}), &["/custom_cod"]);
    check(json!({"original_url": good, "a/b~c": "x"}), &["/a~1b~0c"]);
    check(json!({"original_url": good, "max_visits": 0}), &["/max_visits"]);
    check(json!({"original_url": good, "max_visits": 1.5}), &["/max_visits"]);
    check(json!({"original_url": good, "expires_at": "tomorrow"}), &["/expires_at"]);
    for target in ["example.com", "ftp://example.com/", "javascript:alert(1)", "http://user:pass@example.com/", ""] {
        check(json!({"original_url": target}), &["/original_url"]);
    }
    let loops = format!("http://{}/abc", server.address());
    check(json!({"original_url": loops}), &["/original_url"]);
    check(
        json!({"original_url": "ftp://x/", "custom_code": "api", "expires_at": "yesterday"}),
        &["/custom_code", "/expires_at", "/original_url"],
    );
    check(
        json!({"original_url": 1, "custom_code": "api", "expires_at": "yesterday", "max_visits": 0, "nope": 1}),
        &["/custom_code", "/expires_at", "/max_visits", "/nope", "/original_url"],
    );
}

#[test]
fn anybody_may_shorten_where_it_is_open() {
    let setup = Setup::new("").argument("--open");
    let server = setup.start();
    let body = json!({"original_url": "https://example.com/"});
    for left in (0..10).rev() {
        let answer = server.connect().shorten(&body, "");
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(answer.header("ratelimit-remaining"), Some(left.to_string().as_str()), "{answer:?}");
    }
    problem(&server.connect().shorten(&body, ""), 429);
    // An admin key has no limit, and a wrong key is no way around one.
    assert_eq!(server.shorten(&body).status, 201);
    problem(&server.connect().shorten(&body, "nonsense"), 429);

    let public = Setup::new("").argument("--open").argument("--listen").argument("0.0.0.0:0");
    let (code, said) = public.refused();
    assert!(code == 78 && said.contains("--yes"), "{code}: {said}");
    let confirmed = Setup::new("").argument("--open").argument("--yes").argument("--listen").argument("0.0.0.0:0");
    confirmed.start().stop();
}

#[test]
fn keys_have_limits_of_their_own() {
    let (setup, server) = Server::new("[limits]\nkey_per_minute = 3");
    let store = setup.store();
    let body = json!({"original_url": "https://example.com/"});
    let check = |per_minute: Option<u32>, allowed: u32| {
        let key = store.key(&[Scope::LinksWrite], per_minute, None);
        for left in (0..allowed).rev() {
            let answer = server.connect().shorten(&body, &key);
            assert_eq!(answer.status, 201, "{answer:?}");
            assert_eq!(answer.header("ratelimit-limit"), Some(allowed.to_string().as_str()), "{answer:?}");
            assert_eq!(answer.header("ratelimit-remaining"), Some(left.to_string().as_str()), "{answer:?}");
        }
        let refused = server.connect().shorten(&body, &key);
        problem(&refused, 429);
        let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{refused:?}");
        assert_eq!(refused.header("ratelimit-remaining"), Some("0"), "{refused:?}");
        assert!(refused.header("ratelimit-reset").is_some(), "{refused:?}");
    };
    check(None, 3);
    check(None, 3);
    check(Some(1), 1);
    check(Some(5), 5);
    assert!(server.metric("waypost_limited_total", &[]) >= 4.0);
}

#[test]
fn an_admin_key_out_of_the_environment() {
    let secret = "0123456789abcdefghij";
    let setup = Setup::new("").variable("WAYPOST_ADMIN_KEY", secret);
    let server = setup.start();
    let body = json!({"original_url": "https://example.com/"});
    assert_eq!(server.connect().shorten(&body, secret).status, 201);
    assert_eq!(server.shorten(&body).status, 201);
    problem(&server.connect().shorten(&body, &secret[1..]), 401);
    problem(&server.connect().shorten(&body, &secret.to_uppercase()), 401);
    assert!(!server.stop().join("\n").contains(secret));

    let (code, said) = Setup::new("").variable("WAYPOST_ADMIN_KEY", "short").refused();
    assert!(code == 78 && said.contains("WAYPOST_ADMIN_KEY"), "{code}: {said}");
}

#[test]
fn the_admin_key_lies_in_a_file_of_its_owner() {
    if embedded_only("with Postgres a person makes the first key") {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let (setup, server) = Server::new("");
    let mode = std::fs::metadata(setup.data().join("admin.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let key = server.admin_key();
    assert!(key.starts_with("wp_") && key.len() == 44, "{key}");
    assert!(!server.stop().join("\n").contains(&key));
    // The second start makes no second key.
    let again = setup.start();
    assert_eq!(again.admin_key(), key);
}

#[test]
fn what_a_link_says_decides_its_answer() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    let now = time::now();
    let before = UnixMillis(now.0 - 1000);
    let later = now.after(Duration::from_secs(3600));
    let target = "https://example.com/t";
    let check = |code: &str, more: &dyn Fn(&mut Fields), change: Option<Change>, want: (u16, &str, &str)| {
        store.add(code, target, more);
        if let Some(change) = change {
            store.change(code, change);
        }
        // From every tier the same.
        let mut client = server.connect();
        for _ in 0..5 {
            for method in ["GET", "HEAD"] {
                let answer = client.ask(method, &format!("/{code}"), &[], b"");
                let (status, location, cache_control) = want;
                assert_eq!((answer.status, answer.location().unwrap_or("")), (status, location), "{code} {answer:?}");
                assert_eq!(answer.header("cache-control"), Some(cache_control), "{code} {answer:?}");
            }
        }
    };
    let gone = (410, "", "no-store");
    check("plain", &|_| {}, None, (307, target, TEMPORARY));
    check("expired", &|link| link.expires_at = Some(before), None, gone);
    let elsewhere = "https://example.com/over";
    let over = |link: &mut Fields| {
        link.expires_at = Some(before);
        link.expired_url = Target::new(elsewhere);
    };
    check("expired-to", &over, None, (302, elsewhere, "no-store"));
    check("not-yet-over", &|link| link.expires_at = Some(later), None, (307, target, TEMPORARY));
    check("not-begun", &|link| link.starts_at = Some(later), None, (404, "", "no-store"));
    check("begun", &|link| link.starts_at = Some(before), None, (307, target, TEMPORARY));
    check("disabled", &|_| {}, Some(Change::Disable), gone);
    check("disabled-to", &over, Some(Change::Disable), gone);
    check("deleted", &|_| {}, Some(Change::Delete), gone);
    for (status, cache_control) in
        [(301, PERMANENT), (302, TEMPORARY), (303, TEMPORARY), (307, TEMPORARY), (308, PERMANENT)]
    {
        check(&format!("s{status}"), &|link| link.status = Some(status), None, (status, target, cache_control));
    }
    let cached = |link: &mut Fields| {
        link.status = Some(301);
        link.cache_control = Some("public, max-age=60".to_owned());
    };
    check("cached", &cached, None, (301, target, "public, max-age=60"));
}

#[test]
fn the_instance_decides_where_the_link_says_nothing() {
    let (setup, server) = Server::new(
        "[redirect]\nstatus = 301\ncache_control = \"no-cache\"\npermanent_cache_control = \"max-age=5\"\n\
         forward_query = false",
    );
    let store = setup.store();
    store.add("default", "https://example.com/", |_| {});
    store.add("found", "https://example.com/", |link| link.status = Some(302));
    store.add("forwards", "https://example.com/", |link| link.forward_query = Some(true));
    redirects(&server.get("/default?a=1"), 301, "https://example.com/", "max-age=5");
    redirects(&server.get("/found?a=1"), 302, "https://example.com/", "no-cache");
    redirects(&server.get("/forwards?a=1"), 301, "https://example.com/?a=1", "max-age=5");
}

#[test]
fn a_link_ends_and_begins_while_it_is_in_memory() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    let soon = time::now().after(Duration::from_millis(1500));
    store.add("ends", "https://example.com/", |link| link.expires_at = Some(soon));
    store.add("begins", "https://example.com/", |link| link.starts_at = Some(soon));
    let mut client = server.connect();
    let mut seen = [HashSet::new(), HashSet::new()];
    eventually(LIMIT, "one ends, one begins", || {
        let asked = time::now();
        let ends = client.get("/ends").status;
        let begins = client.get("/begins").status;
        if asked >= soon {
            assert_eq!((ends, begins), (410, 307));
        } else if time::now() < soon {
            assert_eq!((ends, begins), (307, 404));
        }
        seen[0].insert(ends);
        seen[1].insert(begins);
        asked >= soon
    });
    assert_eq!(seen, [HashSet::from([307, 410]), HashSet::from([404, 307])]);
}

#[test]
fn a_limited_link_is_found_as_often_as_it_says() {
    let (_setup, server) = Server::new("");
    let body = json!({"original_url": "https://example.com/", "max_visits": 5});
    let code = server.shorten(&body).json()["short_code"].as_str().unwrap().to_owned();
    let path = format!("/{code}");
    let mut client = server.connect();
    for _ in 0..10 {
        assert_eq!(client.ask("HEAD", &path, &[], b"").status, 307, "a HEAD takes no visit");
    }
    let together = Barrier::new(20);
    let mut statuses: Vec<u16> = std::thread::scope(|scope| {
        let ask = || {
            let mut client = server.connect();
            together.wait();
            client.get(&path).status
        };
        let asking: Vec<_> = (0..20).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|asking| asking.join().unwrap()).collect()
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [[307; 5].as_slice(), &[410; 15]].concat());
    for method in ["GET", "HEAD"] {
        assert_eq!(client.ask(method, &path, &[], b"").status, 410, "{method}");
    }
    assert_eq!(server.metric("waypost_redirects_total", &["status=\"410\""]), 17.0);
}

#[test]
fn queries_are_forwarded() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    store.add("plain", "https://example.com/", |_| {});
    store.add("own", "https://example.com/x?a=1&b=2#part", |_| {});
    store.add("fixed", "https://example.com/?a=1", |link| link.forward_query = Some(false));
    let check = |path: &str, want: &str| {
        let mut client = server.connect();
        (0..4).for_each(|_| redirects(&client.get(path), 307, want, TEMPORARY));
    };
    check("/plain", "https://example.com/");
    check("/plain?", "https://example.com/");
    check("/plain?utm_source=mail&x=%C3%A4", "https://example.com/?utm_source=mail&x=%C3%A4");
    check("/plain?u=//evil.example/", "https://example.com/?u=//evil.example/");
    check("/own?a=9", "https://example.com/x?b=2&a=9#part");
    check("/own?c=3", "https://example.com/x?a=1&b=2&c=3#part");
    check("/fixed?a=9&b=2", "https://example.com/?a=1");
}

#[test]
fn spellings_of_a_code() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    store.add("a-b", "https://example.com/1", |_| {});
    store.add("end.", "https://example.com/2", |_| {});
    let check = |path: &str, want: Option<&str>| {
        let mut client = server.connect();
        for _ in 0..4 {
            let answer = client.get(path);
            assert_eq!((answer.status, answer.location()), (want.map_or(404, |_| 307), want), "{path} {answer:?}");
        }
    };
    for path in
        ["/a-b", "/a%2Db", "/%61%2d%62", "/a-b/", "/a-b.", "/a-b,", "/a-b)", "/a-b%3E", "/a-b%22", "/a-b).", "/a-b./"]
    {
        check(path, Some("https://example.com/1"));
    }
    check("/end.", Some("https://example.com/2"));
    check("/end..", Some("https://example.com/2"));
    check("/end", None);
    check("/A-b", None);
    check("/a-b!", None);
    check("/a%00b", None);
    check("/a-b%2F", None);
}

#[test]
fn pages_for_those_who_cannot_be_redirected() {
    let (setup, server) = Server::new("");
    setup.store().add("gone", "https://example.com/", |link| link.expires_at = Some(UnixMillis(0)));
    let html = [("Accept", "text/html,application/xhtml+xml")];
    for (path, status) in [("/", 200), ("/unknown", 404), ("/no!code", 404), ("/gone", 410)] {
        page(&server.get(path), status, PLAIN);
        let answer = server.connect().ask("GET", path, &html, b"");
        page(&answer, status, "text/html; charset=utf-8");
        assert!(answer.text().starts_with("<!doctype html>"), "{answer:?}");
        let head = server.connect().ask("HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (status, 0), "{head:?}");
    }
    page(&server.get("/robots.txt"), 200, PLAIN);
    page(&server.get("/favicon.ico"), 404, PLAIN);
    page(&server.get("/.well-known/security.txt"), 404, PLAIN);
}

#[test]
fn pages_of_ones_own() {
    let setup = Setup::new("[pages]\ndir = \"site\"");
    for (name, text) in [
        ("index.html", "<p>home"),
        ("404.html", "<p>missing"),
        ("410.html", "<p>gone"),
        ("robots.txt", "User-agent: x"),
        (".well-known/acme/token", "token"),
        ("secret.txt", "secret"),
    ] {
        let path = setup.path("site").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let server = setup.start();
    setup.store().add("gone", "https://example.com/", |link| link.expires_at = Some(UnixMillis(0)));
    let check = |path: &str, status: u16, text: &str| {
        let answer = server.get(path);
        assert_eq!((answer.status, answer.text().as_str()), (status, text), "{path}");
    };
    check("/", 200, "<p>home");
    check("/unknown", 404, "<p>missing");
    check("/gone", 410, "<p>gone");
    check("/robots.txt", 200, "User-agent: x");
    check("/.well-known/acme/token", 200, "token");
    check("/secret.txt", 404, "<p>missing");
    assert_ne!(server.get("/.well-known/../secret.txt").text(), "secret");
}

#[test]
fn urls_for_those_who_cannot_be_redirected() {
    let (setup, server) = Server::new(
        "[redirect]\nroot_url = \"https://example.com/home\"\nnot_found_url = \"https://example.com/404\"\n\
         gone_url = \"https://example.com/410\"",
    );
    let store = setup.store();
    store.add("gone", "https://example.com/", |link| link.expires_at = Some(UnixMillis(0)));
    redirects(&server.get("/"), 302, "https://example.com/home", "no-store");
    redirects(&server.get("/unknown"), 302, "https://example.com/404", "no-store");
    redirects(&server.get("/gone"), 302, "https://example.com/410", "no-store");
    // Nobody has followed a link.
    assert_eq!(server.metric("waypost_visits_answered_total", &[]), 0.0);
}

#[test]
fn a_code_is_another_link_on_another_domain() {
    let (setup, server) = Server::new(
        "[[domains]]\nhost = \"one.example\"\n[[domains]]\nhost = \"two.example\"\n\
         not_found_url = \"https://example.com/404\"",
    );
    let store = setup.store();
    for host in ["", "one.example", "two.example"] {
        let fields = Direct::fields(&format!("https://example.com/{host}"));
        store.add_all(vec![(key(store.domain(host), "same"), fields)]);
    }
    store.add_all(vec![(key(store.domain("one.example"), "lone"), Direct::fields("https://example.com/lone"))]);
    let check = |host: &str, path: &str, status: u16, location: &str| {
        for _ in 0..4 {
            let answer = server.connect().ask("GET", path, &[("Host", host)], b"");
            assert_eq!((answer.status, answer.location().unwrap_or("")), (status, location), "{host} {path}");
        }
    };
    check("one.example", "/same", 307, "https://example.com/one.example");
    check("two.example", "/same", 307, "https://example.com/two.example");
    check("TWO.example:8080", "/same", 307, "https://example.com/two.example");
    check(&server.address().to_string(), "/same", 307, "https://example.com/");
    check("one.example", "/lone", 307, "https://example.com/lone");
    check("two.example", "/lone", 302, "https://example.com/404");
    for path in ["/same", "/lone", "/"] {
        check("other.example", path, 404, "");
        check("", path, 404, "");
    }
    check("other.example", "/healthz", 200, "");
    check("other.example", "http://one.example/lone", 307, "https://example.com/lone");
}

#[test]
fn codes_that_are_the_same_in_any_case() {
    let (_setup, server) = Server::new("[codes]\nalphabet = \"base36\"\ncase = \"insensitive\"");
    let answer = server.shorten(&json!({"original_url": "https://example.com/", "custom_code": "MiXed-1"}));
    assert_eq!(answer.json()["short_code"], "mixed-1");
    for path in ["/mixed-1", "/MIXED-1", "/mIxEd%2D1", "/MIXED-1."] {
        redirects(&server.get(path), 307, "https://example.com/", TEMPORARY);
    }
    problem(&server.shorten(&json!({"original_url": "https://example.com/", "custom_code": "mixeD-1"})), 409);
    let code = server.link("https://example.com/2");
    assert!(code.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()), "{code}");
    redirects(&server.get(&format!("/{}", code.to_uppercase())), 307, "https://example.com/2", TEMPORARY);
}

#[test]
fn permuted_codes_are_short_and_never_given_twice() {
    let setup = Setup::new("[codes]\nstrategy = \"permuted\"");
    let mut codes = Vec::new();
    for _ in 0..3 {
        let server = setup.start();
        for _ in 0..20 {
            let code = server.link("https://example.com/");
            redirects(&server.get(&format!("/{code}")), 307, "https://example.com/", TEMPORARY);
            codes.push(code);
        }
        server.stop();
    }
    assert!(codes.iter().all(|code| code.len() == 4), "{codes:?}");
    assert!(!codes.is_sorted(), "they can be counted through: {codes:?}");
    assert_eq!(codes.iter().collect::<HashSet<_>>().len(), 60, "{codes:?}");
}

#[test]
fn configurations_that_are_refused() {
    let setup = Setup::new("");
    setup.start().stop();
    let check = |config: &str, codes: &[i32], parts: &[&str]| {
        setup.configure(config);
        let (code, said) = setup.refused();
        assert!(codes.contains(&code), "{config}: {code}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{config}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    };
    check("[codes]\nalphabet = \"base58\"", &[1, 78], &["codes.alphabet", "base62", "base58"]);
    check("[codes]\nalphabet = \"base36\"\ncase = \"insensitive\"", &[1, 78], &["fixed when a store is made"]);
    check("[cache]\nmemroy = \"1GiB\"", &[78], &["cache.memroy", "cache.memory"]);
    check("[cache]\nttl = 5", &[78], &["cache.ttl"]);
    check("not toml", &[78], &["waypost.toml"]);
    setup.configure("");
    setup.start().stop();
}

#[test]
fn an_address_that_is_taken() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, said) = Setup::new("").argument("--listen").argument(&address).refused();
    assert!(code == 1 && said.contains(&address) && said.contains("--listen"), "{code}: {said}");
}

#[test]
fn health() {
    let (_setup, server) = Server::new("");
    for path in ["/health", "/healthz"] {
        let answer = server.get(path);
        assert_eq!((answer.status, answer.json()), (200, json!({"status": "pass"})), "{path}");
        assert_eq!(server.connect().ask("HEAD", path, &[], b"").status, 200);
    }
    for path in ["/readyz", "/readyz?require=store"] {
        let answer = server.get(path);
        assert_eq!((answer.status, &answer.json()["degraded"]), (200, &json!([])), "{path}");
    }
}

#[test]
fn metrics_add_up() {
    let (_setup, server) = Server::new("");
    let code = server.link("https://example.com/");
    let mut client = server.connect();
    let path = format!("/{code}");
    (0..10).for_each(|_| assert_eq!(client.get(&path).status, 307));
    (0..3).for_each(|_| assert_eq!(client.ask("HEAD", &path, &[], b"").status, 307));
    (0..2).for_each(|_| assert_eq!(client.get("/unknown").status, 404));
    let text = client.get("/metrics").text();
    let check = |name: &str, labels: &[&str], want: f64| {
        assert_eq!(metric(&text, name, labels), want, "{name} {labels:?} in\n{text}");
    };
    check("waypost_redirects_total", &["status=\"307\""], 13.0);
    check("waypost_redirects_total", &["status=\"307\"", "tier=\"store\""], 1.0);
    check("waypost_redirects_total", &["status=\"404\""], 2.0);
    check("waypost_visits_answered_total", &[], 13.0);
    check("waypost_cache_links", &[], 1.0);
    check("waypost_connections", &[], 1.0);
    check("waypost_degraded", &["reason=\"store\""], 0.0);
    check("waypost_codes_redrawn_total", &[], 0.0);
    assert!(metric(&text, "waypost_redirects_total", &["status=\"307\"", "tier=\"hot\""]) > 0.0, "{text}");
    assert!(metric(&text, "waypost_cache_bytes", &[]) > 0.0, "{text}");
    assert!(metric(&text, "waypost_cache_hits_total", &["tier=\"hot\""]) > 0.0, "{text}");
    eventually(LIMIT, "its visits are stored", || server.metric("waypost_visits_pending", &[]) == 0.0);
    // Latencies come with the next tick.
    eventually(LIMIT, "latencies of all of them", || server.metric("waypost_redirect_seconds_count", &[]) >= 15.0);
}

#[test]
fn metrics_are_not_for_everybody() {
    let (_setup, server) = Server::new("[metrics]\nallow = [\"127.0.0.9\"]");
    problem(&server.get("/metrics"), 401);
    let bearer = format!("Bearer {}", server.admin_key());
    assert_eq!(server.connect().ask("GET", "/metrics", &[("Authorization", &bearer)], b"").status, 200);
    assert_eq!(Client::connect_from("127.0.0.9", server.address()).get("/metrics").status, 200);
}

#[test]
fn an_api_with_a_listener_of_its_own() {
    let (_setup, server) = Server::new("[api]\nlisten = \"127.0.0.1:0\"");
    let (public, api) = (server.listener("(redirects)"), server.listener("(API)"));
    let body = json!({"original_url": "https://example.com/", "custom_code": "code"});
    let made = Client::connect(api).shorten(&body, &server.admin_key());
    assert_eq!((made.status, &made.json()["short_url"]), (201, &json!(format!("http://{public}/code"))));
    let check = |address, method: &str, path: &str, status: u16| {
        let answer = Client::connect(address).ask(method, path, &[], b"");
        assert_eq!(answer.status, status, "{method} {path} at {address}: {answer:?}");
    };
    check(public, "GET", "/code", 307);
    check(public, "GET", "/healthz", 200);
    check(public, "GET", "/readyz", 200);
    check(public, "POST", "/shorten", 405);
    for path in ["/metrics", "/health", "/api/v1/status", "/shorten"] {
        check(public, "GET", path, 404);
    }
    check(api, "GET", "/code", 404);
    check(api, "GET", "/healthz", 200);
    check(api, "GET", "/metrics", 200);
    check(api, "GET", "/api/v1/status", 401);
}

#[test]
fn two_hundred_at_once_ask_for_one_code() {
    let (_setup, server) = Server::new("");
    let admin = server.admin_key();
    let together = Barrier::new(200);
    let create = |number: usize| {
        let mut client = server.connect();
        together.wait();
        let body = json!({"original_url": format!("https://example.com/{number}"), "custom_code": "wanted"});
        client.shorten(&body, &admin).status
    };
    let create = &create;
    let mut answers: Vec<(u16, usize)> = std::thread::scope(|scope| {
        let creating: Vec<_> = (0..200).map(|number| (number, scope.spawn(move || create(number)))).collect();
        creating.into_iter().map(|(number, creating)| (creating.join().unwrap(), number)).collect()
    });
    answers.sort_unstable();
    assert!(answers[1..].iter().all(|(status, _)| *status == 409), "{answers:?}");
    let (status, winner) = answers[0];
    assert_eq!(status, 201);
    redirects(&server.get("/wanted"), 307, &format!("https://example.com/{winner}"), TEMPORARY);
}

#[test]
fn what_was_answered_is_there_after_a_kill() {
    let setup = Setup::new("");
    let mut made: Vec<String> = Vec::new();
    for _ in 0..3 {
        let server = setup.start();
        let before = made.len();
        let (address, admin) = (server.address(), server.admin_key());
        let killed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let create = || {
                let mut client = Client::connect(address);
                let mut codes = Vec::new();
                let body = json!({"original_url": "https://example.com/"}).to_string();
                let bearer = format!("Bearer {admin}");
                let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
                while client.try_send(request("POST", "/shorten", &headers, body.as_bytes()))
                    && let Ok(answer) = client.next(false)
                {
                    assert_eq!(answer.status, 201, "{answer:?}");
                    codes.push(answer.json()["short_code"].as_str().unwrap().to_owned());
                }
                assert!(killed.load(Ordering::SeqCst), "the server ended by itself");
                codes
            };
            let creating: Vec<_> = (0..4).map(|_| scope.spawn(create)).collect();
            eventually(LIMIT, "creates", || server.metric("waypost_api_calls_total", &[]) > 60.0);
            killed.store(true, Ordering::SeqCst);
            server.kill();
            creating.into_iter().for_each(|creating| made.extend(creating.join().unwrap()));
        });
        assert!(made.len() > before, "nothing was made in this round");
    }
    let server = setup.start();
    let mut client = server.connect();
    for code in &made {
        assert_eq!(client.get(&format!("/{code}")).status, 307, "{code} is lost");
    }
    assert_eq!(made.iter().collect::<HashSet<_>>().len(), made.len(), "a code was given twice");
}
