//! Dead letters: visits that the store refuses, for somebody to look at.
//!
//! In: a row, with its texts and the store's reason. Out: a line of JSON at the end of `DATA/dead-letters.ndjson`, on the
//! disk before the batch that leaves the row out is stored.
//! Never: goes to anybody else; is read by the server.
//! At its limit: a line for each refused row. A stop in between makes a second line of the same row: of an (epoch, core,
//! number) the first line counts.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde_json::json;

use super::batch::{Refused, RequestId};
use crate::domain::time::UnixMillis;

/// Appends a line and syncs it. `now` is when the row was refused.
pub fn append(path: &Path, refused: &Refused<'_>, reason: &str, now: UnixMillis) -> io::Result<()> {
    let mut line = line(refused, reason, now);
    line.push('\n');
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let len = file.metadata()?.len();
    let mut last = [b'\n'];
    if len > 0 {
        file.read_exact_at(&mut last, len - 1)?;
    }
    if last != *b"\n" {
        // A stop has cut the line before.
        line.insert(0, '\n');
    }
    file.write_all(line.as_bytes())?;
    file.sync_data()?;
    if len == 0
        && let Some(folder) = path.parent()
    {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn line(refused: &Refused<'_>, reason: &str, now: UnixMillis) -> String {
    let Refused { row, code, agent, referrer } = refused;
    let request_id = match &row.request_id {
        RequestId::None => None,
        RequestId::Packed(number) => Some(format!("{number:032x}")),
        RequestId::Written { len, bytes } => Some(String::from_utf8_lossy(&bytes[..usize::from(*len)]).into_owned()),
    };
    json!({
        "epoch": format!("{:016x}", row.epoch),
        "core": row.core,
        "number": row.number,
        "reason": reason,
        "refused_at": rfc3339(now),
        "at": rfc3339(row.at),
        "kind": row.class.name(),
        "link_id": code.is_none().then_some(row.link.0),
        "domain_id": code.map(|(domain, _)| domain),
        "code": code.map(|(_, code)| code),
        "address": row.address,
        "visitor": (row.visitor != 0).then(|| format!("{:016x}", row.visitor)),
        "user_agent": agent,
        "referrer": referrer,
        "request_id": request_id,
    })
    .to_string()
}

/// With milliseconds, UTC.
fn rfc3339(at: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.to_string(), |at| format!("{at:.3}"))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::domain::link::LinkId;
    use crate::domain::visit::Class;
    use crate::visits::batch::Row;

    #[test]
    fn a_line_says_everything_of_a_visit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dead-letters.ndjson");
        let row = Row {
            link: LinkId(7),
            at: UnixMillis(1_700_000_000_123),
            epoch: 0xab,
            core: 3,
            number: 41,
            class: Class::Tool,
            address: Some("192.0.2.0".parse().unwrap()),
            visitor: 0xcd,
            agent: 1,
            referrer: 0,
            request_id: RequestId::Packed(0xef),
        };
        let refused = Refused { row: &row, code: None, agent: Some("curl/8.5.0"), referrer: None };
        append(&path, &refused, "out of range", UnixMillis(1_700_000_001_000)).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"cut\":").unwrap();
        let orphan = Refused { code: Some((1, "nope")), ..refused };
        append(&path, &orphan, "again", UnixMillis(1_700_000_001_000)).unwrap();

        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!(
            lines[0],
            json!({
                "epoch": "00000000000000ab", "core": 3, "number": 41, "reason": "out of range",
                "refused_at": "2023-11-14T22:13:21.000Z", "at": "2023-11-14T22:13:20.123Z", "kind": "tool",
                "link_id": 7, "domain_id": null, "code": null, "address": "192.0.2.0",
                "visitor": "00000000000000cd", "user_agent": "curl/8.5.0", "referrer": null,
                "request_id": "000000000000000000000000000000ef",
            })
        );
        assert_eq!((&lines[1]["code"], &lines[1]["link_id"]), (&json!("nope"), &Value::Null));
        assert_eq!(lines.len(), 2);
    }
}
