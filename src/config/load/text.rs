//! What a text means: paths, addresses, URLs, hosts, headers.
//!
//! In: a value as it was written. Out: what it stands for, or what it must be. Never: resolves a name, opens a file, shows
//! a password.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use url::Url;

use crate::config::{Peers, units};
use crate::domain::target::Target;

const HEADER_BYTES_MAX: usize = 256;

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        return Err(format!("must be a path, not {text:?}"));
    }
    Ok(text.into())
}

/// What keys of Redis begin with. Braces would put every key into one slot of a cluster.
pub(super) fn prefix(text: &str) -> Result<String, String> {
    let fits = text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}'));
    fits.then(|| text.to_owned())
        .ok_or_else(|| format!("must be at most 64 visible ascii characters without braces, not {text:?}"))
}

pub(super) fn size(text: &str) -> Result<u64, String> {
    units::size(text).map_err(|error| error.to_string())
}

pub(super) fn size_within(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let size = size(text)?;
    let fits = (min..=max).contains(&size).then_some(size);
    fits.ok_or_else(|| format!("must be from {}KiB to {}MiB, not {text:?}", min >> 10, max >> 20))
}

/// Where visits go.
pub(super) fn sink(text: &str) -> Result<(), String> {
    if text == "store" { Ok(()) } else { Err(format!("must be [\"store\"], or [] for none, not {text:?}")) }
}

pub(super) fn header_name(text: &str) -> Result<HeaderName, String> {
    text.parse().map_err(|_| format!("must be the name of a header, such as \"X-Request-Id\", not {text:?}"))
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("must be IP:PORT or [IPv6]:PORT, such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80, not {text:?}")
    })
}

/// An absolute `http` or `https` URL.
fn web(text: &str) -> Result<Url, String> {
    let url = Url::parse(text)
        .map_err(|error| format!("must be an absolute URL, such as https://go.example, not {text:?} ({error})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("must begin with http:// or https://, not {:?}", format!("{}:", url.scheme())));
    }
    // The value is not shown: it has a password in it.
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not have a user name or password: leave out what stands before the @".to_owned());
    }
    Ok(url)
}

pub(super) fn target(text: &str) -> Result<Target, String> {
    Target::new(web(text)?.as_str())
        .ok_or_else(|| format!("must be a URL of visible ascii when serialised, not {text:?}"))
}

pub(super) fn base_url(text: &str) -> Result<Target, String> {
    let url = web(text)?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("must have no query and no fragment: leave out what stands after ? or #, not {text:?}"));
    }
    let url = url.as_str().trim_end_matches('/');
    Target::new(url).ok_or_else(|| format!("must be a URL of visible ascii when serialised, not {text:?}"))
}

pub(super) fn header(text: &str) -> Result<HeaderValue, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > HEADER_BYTES_MAX {
        return Err(format!("must have from 1 to {HEADER_BYTES_MAX} bytes, such as \"no-store\", not {}", text.len()));
    }
    // The crate lets bytes past ASCII through (obs-text of RFC 9110, section 5.5), which nobody agrees on how to read.
    let value = HeaderValue::from_str(text).ok().filter(|_| text.is_ascii());
    value.ok_or_else(|| format!("must be visible ascii, such as \"no-store\", not {text:?}"))
}

/// A host as the WHATWG URL standard parses and serialises it, in lower-case ASCII; without a trailing dot. Labels have
/// 1 to 63 bytes, a name at most 253 (RFC 1035, section 2.3.4).
pub(super) fn host(text: &str) -> Result<String, String> {
    let problem = || format!("must be a host name without scheme, port and path, such as \"go.example\", not {text:?}");
    let host = url::Host::parse(text.strip_suffix('.').unwrap_or(text)).map_err(|_| problem())?;
    if let url::Host::Domain(name) = &host
        && (name.len() > 253 || name.split('.').any(|label| !(1..=63).contains(&label.len())))
    {
        return Err(problem());
    }
    Ok(host.to_string())
}

pub(super) fn host_and_port(text: &str) -> Result<String, String> {
    let with_port = || {
        let (name, port) = text.rsplit_once(':')?;
        Some(format!("{}:{}", host(name).ok()?, port.parse::<u16>().ok()?))
    };
    host(text)
        .ok()
        .or_else(with_port)
        .ok_or_else(|| format!("must be hosts, such as \"go.example\" or \"127.0.0.1:8080\", not {text:?}"))
}

/// RFC 3986, section 3.1.
pub(super) fn scheme(text: &str) -> Result<String, String> {
    let is_scheme = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    is_scheme
        .then(|| text.to_ascii_lowercase())
        .ok_or_else(|| format!("must be schemes without colon, such as \"https\" or \"mailto\", not {text:?}"))
}

/// An address is the network of itself; bits past the prefix are cleared.
pub(super) fn net(text: &str) -> Result<IpNet, String> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc())
        .ok_or_else(|| format!("must be addresses and CIDRs, such as \"10.0.0.0/8\" or \"::1\", not {text:?}"))
}

pub(super) fn peers(text: &str) -> Result<Peers, String> {
    match text {
        "loopback" => Ok(Peers::Loopback),
        "private" => Ok(Peers::Private),
        _ => net(text).map(Peers::Net).map_err(|_| {
            format!("must be \"loopback\", \"private\", addresses and CIDRs such as \"10.0.0.0/8\", not {text:?}")
        }),
    }
}
