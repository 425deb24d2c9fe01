//! The site: what the configuration says of domains, pages and targets, made ready for the front.
//!
//! In: a checked configuration, the numbers of its domains. Out: tables that no request waits for.
//! Never: reads a file after the start. At its limit: a page of more than [`PAGE_BYTES_MAX`] is refused by name.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context;
use bytes::Bytes;
use http::HeaderValue;

use crate::config::Config;
use crate::domain::key::DomainId;
use crate::domain::target::Target;
use crate::domain::time;
use crate::guard::targets::{Blocklist, Policy};
use crate::http::site::{DomainSite, Page, Pages, Site};
use crate::resolve::header_value;

const PAGE_BYTES_MAX: u64 = 1 << 20;

/// The rules of targets: what the configuration says, and no link to ourselves.
pub fn policy(config: &Config, base_url: &str) -> anyhow::Result<Policy> {
    let targets = &config.targets;
    let blocklist = targets.blocklist.clone().map(|path| Blocklist::open(path, time::now())).transpose()?;
    let mut own: Vec<String> = targets.own_hosts.clone();
    own.extend(config.domains.iter().map(|domain| domain.host.clone()));
    if let Ok(url) = url::Url::parse(base_url)
        && let Some(host) = url.host()
    {
        // Another port of a machine is another service; a name of ours is ours.
        own.push(match (host, url.port_or_known_default()) {
            (url::Host::Domain(name), _) if name != "localhost" => name.to_owned(),
            (host, Some(port)) => format!("{host}:{port}"),
            (host, None) => host.to_string(),
        });
    }
    Ok(Policy::new(&targets.schemes, targets.max_bytes, blocklist, &own, targets.lookalikes)?)
}

pub fn site(config: &Config, numbers: &[DomainId], base_url: &str) -> anyhow::Result<Site> {
    let value = |target: &Option<Target>| target.clone().map(header_value);
    let redirect = &config.redirect;
    let default_domain = DomainSite {
        id: DomainId::default(),
        root_url: value(&redirect.root_url),
        not_found_url: value(&redirect.not_found_url),
        gone_url: value(&redirect.gone_url),
    };
    let mut domains: HashMap<String, DomainSite, _> = HashMap::default();
    if !config.domains.is_empty()
        && let Ok(url) = url::Url::parse(base_url)
        && let Some(host) = url.host_str()
    {
        domains.insert(host.to_owned(), default_domain.clone());
    }
    for (domain, id) in config.domains.iter().zip(numbers) {
        let site = DomainSite {
            id: *id,
            root_url: value(&domain.root_url),
            not_found_url: value(&domain.not_found_url),
            gone_url: value(&domain.gone_url),
        };
        domains.insert(domain.host.clone(), site);
    }
    let pages = match &config.pages.dir {
        Some(dir) => read_pages(dir).with_context(|| format!("pages.dir: cannot read {}", dir.display()))?,
        None => Pages::default(),
    };
    Ok(Site { case: config.codes.case, default_domain, domains, pages })
}

/// Reads the site's files once: no request ever waits for a disk.
fn read_pages(dir: &Path) -> anyhow::Result<Pages> {
    let mut pages = Pages::default();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(dir)?.to_string_lossy().into_owned();
            if path.is_dir() {
                if name == ".well-known" || name.starts_with(".well-known/") {
                    folders.push(path);
                }
                continue;
            }
            let length = std::fs::metadata(&path)?.len();
            anyhow::ensure!(
                length <= PAGE_BYTES_MAX,
                "{} has {length} bytes, at most {PAGE_BYTES_MAX} fit",
                path.display()
            );
            let page = Page { content_type: content_type(&name), bytes: Bytes::from(std::fs::read(&path)?) };
            match name.as_str() {
                "index.html" => pages.home = Some(page),
                "404.html" => pages.missing = Some(page),
                "410.html" => pages.gone = Some(page),
                "robots.txt" | "favicon.ico" => drop(pages.files.insert(name, page)),
                _ if name.starts_with(".well-known/") => drop(pages.files.insert(name, page)),
                _ => tracing::warn!(file = name, "pages.dir has a file that is not served"),
            }
        }
    }
    Ok(pages)
}

fn content_type(name: &str) -> HeaderValue {
    HeaderValue::from_static(match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => "text/html; charset=utf-8",
        Some("txt") => "text/plain; charset=utf-8",
        Some("json") => "application/json",
        Some("ico") => "image/x-icon",
        _ => "application/octet-stream",
    })
}
