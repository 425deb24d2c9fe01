//! Targets by the URL Standard's own cases: `urltestdata.json` of the web platform tests, and two files more in the
//! same form, as crate `ada-url` publishes them.
//!
//! A shortener is given the input alone. A case without a base is taken as it is; one with a base only where the base
//! has no say in its verdict: the input has no scheme (alone, it is no URL), or one that makes it absolute.
//! The others are skipped, and counted.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use waypost::guard::targets::{Lookalikes, MAX_BYTES, Policy, Refused, SCHEMES};

/// File; cases that are taken; cases that are skipped since their base decides.
const FILES: [(&str, usize, usize); 3] = [
    ("urltestdata.json", 873, 18),
    ("ada_extra_urltestdata.json", 27, 1),
    // Its one case is longer than any target.
    ("ada_long_urltestdata.json", 1, 0),
];

/// Inputs on which we leave the Standard, and why; there is none. An entry that no longer deviates fails the test.
const DEVIATIONS: [(&str, &str); 0] = [];

/// The schemes whose URLs are relative to a base of the same scheme, unless `//` follows.
const SPECIAL: [&str; 6] = ["http", "https", "ws", "wss", "ftp", "file"];

/// Where cargo has put a package of `tests/corpora`.
fn corpus(package: &str) -> PathBuf {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes json");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|found| found["name"] == package).expect("a dependency of tests/corpora");
    let manifest = PathBuf::from(found["manifest_path"].as_str().expect("a path"));
    manifest.parent().expect("a manifest lies in a directory").to_owned()
}

/// A case whose verdict holds for the input alone.
struct Case {
    input: String,
    /// None = the Standard refuses it.
    href: Option<String>,
    scheme: String,
    opaque_path: bool,
    credentials: bool,
}

/// The cases that are taken, and the number of those that are not.
fn cases(json: &str) -> (Vec<Case>, usize) {
    let json: Value = serde_json::from_str(json).expect("json");
    let all = json.as_array().expect("an array").iter().filter(|case| case.is_object());
    let all: Vec<_> = all.map(case).collect();
    let skipped = all.iter().filter(|case| case.is_none()).count();
    (all.into_iter().flatten().collect(), skipped)
}

fn case(case: &Value) -> Option<Case> {
    let text = |field: &str| case[field].as_str().unwrap_or_default().to_owned();
    let (input, base) = (text("input"), case["base"].as_str());
    let absolute = match (scheme(&input), base) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some((scheme, rest)), Some(base)) => {
            let relative = SPECIAL.contains(&&*scheme) && base.starts_with(&format!("{scheme}:"));
            // A base that is itself no URL fails whatever the input is.
            if relative && !rest.starts_with("//") || url::Url::parse(base).is_err() {
                return None;
            }
            true
        }
    };
    let protocol = text("protocol");
    Some(Case {
        href: case["href"].as_str().filter(|_| absolute).map(str::to_owned),
        scheme: protocol.trim_end_matches(':').to_owned(),
        opaque_path: text("host").is_empty() && !text("pathname").starts_with('/'),
        credentials: !(text("username") + &text("password")).is_empty(),
        input,
    })
}

/// The scheme of an input, in lower case, and what follows its colon.
fn scheme(input: &str) -> Option<(String, String)> {
    let cleaned: String = input.trim_matches(|c| c <= ' ').chars().filter(|c| !"\t\n\r".contains(*c)).collect();
    let (scheme, rest) = cleaned.split_once(':')?;
    let well_formed = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    well_formed.then(|| (scheme.to_ascii_lowercase(), rest.to_owned()))
}

/// What the Standard and our own rules make of a case: a `Location`, or a code. In opaque paths the Standard leaves
/// spaces, which no header can carry in a URL: ours are encoded.
fn expected(case: &Case, schemes: &[String]) -> Result<String, &'static str> {
    if case.input.len() > MAX_BYTES {
        return Err("too_long");
    }
    let href = case.href.as_deref().ok_or("not_a_url")?;
    if !schemes.contains(&case.scheme) {
        return Err("scheme");
    }
    if case.credentials {
        return Err("credentials");
    }
    let href = if case.opaque_path { href.replace(' ', "%20") } else { href.to_owned() };
    if href.len() > MAX_BYTES { Err("too_long") } else { Ok(href) }
}

fn all_cases() -> Vec<Case> {
    let directory = corpus("ada-url").join("tests/wpt");
    let read = FILES.iter().map(|(file, taken, skipped)| {
        let json = std::fs::read_to_string(directory.join(file)).expect("a file of the corpus");
        let (cases, left) = cases(&json);
        assert_eq!((cases.len(), left), (*taken, *skipped), "{file}: taken, skipped");
        cases
    });
    read.flatten().collect()
}

/// The number of cases that were accepted.
fn check(cases: &[Case], schemes: &[String]) -> usize {
    let none: [&str; 0] = [];
    let policy = Policy::new(schemes, MAX_BYTES, None, &none, Lookalikes::Flag).expect("a policy");
    let location = |written: &str| {
        let accepted = policy.check(written).map_err(|refused| refused.code());
        accepted.map(|accepted| accepted.target.as_str().to_owned())
    };
    let mut wrong = Vec::new();
    let mut accepted = 0;
    for case in cases {
        let (got, want) = (location(&case.input), expected(case, schemes));
        let deviation = DEVIATIONS.iter().find(|(input, _)| *input == case.input);
        match deviation {
            None if got != want => wrong.push(format!("{:?}: {got:?}, the Standard has {want:?}", case.input)),
            Some((_, reason)) if got == want => wrong.push(format!("{:?} deviates no more ({reason})", case.input)),
            _ => {}
        }
        if let Ok(href) = got {
            accepted += 1;
            assert!(href.bytes().all(|byte| (0x21..=0x7E).contains(&byte)), "{href:?}");
            assert_eq!(location(&href).as_ref(), Ok(&href), "parsed again");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    accepted
}

#[test]
fn the_standards_cases_with_the_default_schemes() {
    assert_eq!(check(&all_cases(), &SCHEMES.map(str::to_owned)), 161);
}

/// All schemes of the corpus but `file`, which no policy takes.
#[test]
fn the_standards_cases_with_every_scheme() {
    let cases = all_cases();
    let parsed = cases.iter().filter(|case| case.href.is_some() && case.scheme != "file");
    let mut schemes: Vec<_> = parsed.map(|case| case.scheme.clone()).collect();
    schemes.sort();
    schemes.dedup();
    assert_eq!(check(&cases, &schemes), 367);
}

/// Whatever spelling of its host leads to a target, the host is known again.
#[test]
fn the_standards_cases_as_own_hosts() {
    let none: [&str; 0] = [];
    let open = Policy::new(&SCHEMES, MAX_BYTES, None, &none, Lookalikes::Flag).expect("a policy");
    let mut refused = 0;
    for case in all_cases() {
        let Ok(accepted) = open.check(&case.input) else { continue };
        let host = url::Url::parse(accepted.target.as_str()).ok().and_then(|url| url.host_str().map(str::to_owned));
        // Crate url does not parse the domains that are ASCII and no IDNA.
        let Some(host) = host else { continue };
        let own = Policy::new(&SCHEMES, MAX_BYTES, None, &[host], Lookalikes::Flag).expect("a policy");
        assert!(matches!(own.check(&case.input), Err(Refused::OwnHost { .. })), "{:?}", case.input);
        refused += 1;
    }
    assert_eq!(refused, 154);
}
