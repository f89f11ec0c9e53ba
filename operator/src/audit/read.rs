//! Reading records: those that fit, for people, for programs or for a table.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

/// How often a file that is followed is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// Columns of the table. Those that are objects hold JSON.
const COLUMNS: [&str; 14] = [
    "occurred_at",
    "action",
    "success",
    "actor",
    "target",
    "scope",
    "payload",
    "metadata",
    "request_id",
    "ip_address",
    "id",
    "version",
    "previous",
    "hash",
];

/// Which records are shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// One of these actions; any where there are none.
    pub(crate) actions: Vec<String>,
    /// Of this namespace.
    pub(crate) namespace: Option<String>,
    /// Of this pool.
    pub(crate) pool: Option<String>,
    /// With this correlation id.
    pub(crate) request: Option<String>,
    /// Only what did not succeed.
    pub(crate) failed: bool,
    /// From then on.
    pub(crate) since: Option<Timestamp>,
    /// Before then.
    pub(crate) until: Option<Timestamp>,
}

impl Filter {
    fn fits(&self, record: &Value) -> bool {
        let is = |wanted: &Option<String>, found: &Value| wanted.as_ref().is_none_or(|wanted| found == wanted.as_str());
        let at: Option<Timestamp> = record["occurred_at"].as_str().and_then(|time| time.parse().ok());
        let action = record["action"].as_str().unwrap_or_default();
        (self.actions.is_empty() || self.actions.iter().any(|wanted| wanted == action))
            && is(&self.namespace, &record["scope"]["namespace"])
            && is(&self.pool, &record["scope"]["pool"])
            && is(&self.request, &record["request"]["id"])
            && (!self.failed || record["success"] == false)
            && self.since.is_none_or(|since| at.is_some_and(|at| at >= since))
            && self.until.is_none_or(|until| at.is_some_and(|at| at < until))
    }
}

/// How records are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A line for a person.
    #[default]
    Text,
    /// As they were written, a line each.
    Json,
    /// A table (RFC 4180) with a head; what is an object is JSON in its column.
    Csv,
}

/// Shows records.
pub(crate) struct Shown<W: Write> {
    filter: Filter,
    how: How<W>,
}

enum How<W: Write> {
    Text(W),
    Json(W),
    Csv(Box<csv::Writer<W>>),
}

impl<W: Write> Shown<W> {
    /// Writes the head, where there is one.
    pub(crate) fn new(filter: Filter, format: Format, out: W) -> io::Result<Self> {
        let how = match format {
            Format::Text => How::Text(out),
            Format::Json => How::Json(out),
            Format::Csv => {
                let mut table = csv::Writer::from_writer(out);
                table.write_record(COLUMNS)?;
                How::Csv(Box::new(table))
            }
        };
        Ok(Self { filter, how })
    }

    /// Shows a line, if it is a record that fits. Lines that are no records are left out: a container's log has others in between.
    pub(crate) fn line(&mut self, line: &str) -> io::Result<()> {
        let Ok(record) = serde_json::from_str::<Value>(line) else { return Ok(()) };
        let is_record = ["id", "action", "occurred_at", "previous", "hash"].iter().all(|field| record[field].is_string());
        if !is_record || !self.filter.fits(&record) {
            return Ok(());
        }
        match &mut self.how {
            How::Text(out) => writeln!(out, "{}", text(&record)).and_then(|()| out.flush()),
            How::Json(out) => writeln!(out, "{}", line.trim_end()).and_then(|()| out.flush()),
            How::Csv(table) => {
                table.write_record(COLUMNS.map(|column| cell(&record, column)))?;
                table.flush()
            }
        }
    }
}

/// A record for a person. Letters that a terminal would obey are replaced.
fn text(record: &Value) -> String {
    let said = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let outcome = if record["success"] == true { "ok" } else { "refused" };
    let actor = format!("{}/{}", said(&record["actor"]["namespace"]), said(&record["actor"]["name"]));
    let target = format!("{} {}", said(&record["target"]["kind"]), said(&record["target"]["name"]));
    let mut line = format!("{} {} {outcome} {actor} -> {target}", said(&record["occurred_at"]), said(&record["action"]));
    if let Some(reason) = record["payload"]["denial"]["reason"].as_str() {
        line.push_str(": ");
        line.push_str(reason);
    }
    line.push_str(&format!(" (request {})", said(&record["request"]["id"])));
    line.chars().map(|letter| if letter.is_control() { char::REPLACEMENT_CHARACTER } else { letter }).collect()
}

fn cell(record: &Value, column: &str) -> String {
    let value = match column {
        "request_id" => &record["request"]["id"],
        "ip_address" => &record["request"]["ip_address"],
        other => &record[other],
    };
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Shows what a stream holds, to its end.
pub(crate) fn show(from: impl Read, shown: &mut Shown<impl Write>) -> io::Result<()> {
    for line in BufReader::new(from).lines() {
        shown.line(&line?)?;
    }
    Ok(())
}

/// Shows what a file holds and what is added to it, for ever. A file that takes its place is read from its beginning.
pub(crate) fn follow(path: &Path, shown: &mut Shown<impl Write>) -> io::Result<()> {
    loop {
        let file = File::open(path)?;
        let own = file.metadata()?.ino();
        let mut lines = BufReader::new(file);
        let mut line = String::new();
        loop {
            // Half a line is kept until the rest is there.
            if lines.read_line(&mut line)? > 0 && line.ends_with('\n') {
                shown.line(&line)?;
                line.clear();
                continue;
            }
            thread::sleep(LOOK);
            let replaced = std::fs::metadata(path).is_ok_and(|now| now.ino() != own);
            if replaced && lines.fill_buf()?.is_empty() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;

    fn record(n: u32, change: impl Fn(&mut Value)) -> String {
        let mut record = json!({
            "id": format!("id-{n}"), "version": 1, "occurred_at": format!("2026-11-22T10:00:0{n}.123456789Z"), "action": "credential.granted",
            "actor": {"kind": "Pod", "namespace": "ci", "name": "linux-1", "uid": "u"}, "target": {"kind": "CredentialBinding", "name": "deploy"},
            "scope": {"namespace": "ci", "pool": "linux"}, "payload": {"n": n}, "metadata": {}, "success": true,
            "request": {"id": format!("r{n}"), "ip_address": "192.0.2.1"}, "previous": "p", "hash": "h",
        });
        change(&mut record);
        record.to_string()
    }

    fn trail() -> String {
        let denied = |record: &mut Value| {
            record["success"] = json!(false);
            record["action"] = json!("credential.denied");
            record["payload"] = json!({"denial": {"reason": "another\u{1b}[2J pod, said \"it\""}});
        };
        let elsewhere = |record: &mut Value| record["scope"] = json!({"namespace": "other", "pool": "gpu"});
        let noise = r#"{"level":"INFO","message":"not a record"}"#;
        [record(1, |_| {}), noise.to_owned(), record(2, denied), "half".to_owned(), record(3, elsewhere)].join("\n")
    }

    fn shown(filter: Filter, format: Format) -> String {
        let mut out = Vec::new();
        show(trail().as_bytes(), &mut Shown::new(filter, format, &mut out).expect("a head")).expect("shown");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn people_get_a_line_a_record_and_no_terminal_obeys_it() {
        let text = shown(Filter::default(), Format::Text);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "2026-11-22T10:00:01.123456789Z credential.granted ok ci/linux-1 -> CredentialBinding deploy (request r1)");
        assert!(lines[1].contains(" refused ") && lines[1].contains("another\u{fffd}[2J pod"), "{text}");
        assert_eq!((lines.len(), text.contains('\u{1b}')), (3, false));
    }

    #[test]
    fn each_filter_leaves_out_what_does_not_fit() {
        let ids = |filter: Filter| {
            let json = shown(filter, Format::Json);
            json.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"].clone()).collect::<Vec<_>>()
        };
        let time = |second: u32| format!("2026-11-22T10:00:0{second}Z").parse::<Timestamp>().ok();
        assert_eq!(ids(Filter::default()), ["id-1", "id-2", "id-3"]);
        assert_eq!(ids(Filter { actions: vec!["credential.denied".to_owned()], ..Filter::default() }), ["id-2"]);
        assert_eq!(ids(Filter { namespace: Some("ci".to_owned()), ..Filter::default() }), ["id-1", "id-2"]);
        assert_eq!(ids(Filter { pool: Some("gpu".to_owned()), ..Filter::default() }), ["id-3"]);
        assert_eq!(ids(Filter { request: Some("r1".to_owned()), ..Filter::default() }), ["id-1"]);
        assert_eq!(ids(Filter { failed: true, ..Filter::default() }), ["id-2"]);
        assert_eq!(ids(Filter { since: time(2), until: time(3), ..Filter::default() }), ["id-2"]);
    }

    #[test]
    fn a_table_can_be_read_back_with_its_payloads() {
        let table = shown(Filter::default(), Format::Csv);
        let mut rows = csv::Reader::from_reader(table.as_bytes());
        assert_eq!(rows.headers().expect("a head").iter().collect::<Vec<_>>(), COLUMNS);
        let rows: Vec<csv::StringRecord> = rows.records().collect::<Result<_, _>>().expect("rows");
        assert_eq!(rows.len(), 3);
        let payload: Value = serde_json::from_str(&rows[1][6]).expect("JSON");
        assert_eq!(payload["denial"]["reason"], "another\u{1b}[2J pod, said \"it\"");
        assert_eq!((&rows[0][8], &rows[0][9], &rows[0][2]), ("r1", "192.0.2.1", "true"));
    }

    #[test]
    fn what_is_added_is_followed_and_so_is_the_file_that_takes_its_place() {
        /// Ends whoever writes to it when it has enough.
        #[derive(Clone, Default)]
        struct Page(Arc<Mutex<Vec<u8>>>);
        impl Write for Page {
            fn write(&mut self, text: &[u8]) -> io::Result<usize> {
                let mut all = self.0.lock().expect("no panic");
                all.extend_from_slice(text);
                match all.iter().filter(|byte| **byte == b'\n').count() >= 3 {
                    true => Err(io::Error::other("enough")),
                    false => Ok(text.len()),
                }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let path = std::env::temp_dir().join(format!("mayfly-audit-follow-{}", std::process::id()));
        std::fs::write(&path, record(1, |_| {}) + "\n").expect("written");
        let page = Page::default();
        let following = {
            let (path, page) = (path.clone(), page.clone());
            thread::spawn(move || follow(&path, &mut Shown::new(Filter::default(), Format::Json, page).expect("no head")))
        };
        let wait = |lines: usize| {
            while page.0.lock().expect("no panic").iter().filter(|byte| **byte == b'\n').count() < lines {
                thread::sleep(Duration::from_millis(5));
            }
        };
        wait(1);
        let (second, third) = (record(2, |_| {}) + "\n", record(3, |_| {}) + "\n");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("the file");
        file.write_all(&second.as_bytes()[..20]).expect("half a line");
        thread::sleep(LOOK * 2);
        file.write_all(&second.as_bytes()[20..]).expect("the rest");
        wait(2);
        std::fs::rename(&path, path.with_extension("1")).expect("moved");
        std::fs::write(&path, third).expect("written");
        assert!(following.join().expect("no panic").is_err());
        let text = String::from_utf8(page.0.lock().expect("no panic").clone()).expect("text");
        assert!(text.contains("id-1") && text.contains("id-2") && text.contains("id-3"), "{text}");
        for path in [path.with_extension("1"), path] {
            std::fs::remove_file(path).expect("removed");
        }
    }
}
