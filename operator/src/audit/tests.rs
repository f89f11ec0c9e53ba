//! The trail holds together, across restarts, and shows what was done to it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use futures::FutureExt;
use serde_json::json;

use super::*;

/// A sink in memory that can be told to fail.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    pub(crate) lines: Arc<Mutex<Vec<String>>>,
    pub(crate) fails: Arc<AtomicBool>,
}

impl Memory {
    /// The records so far.
    pub(crate) fn records(&self) -> Vec<Value> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

impl Sink for Memory {
    fn append(&mut self, lines: &str) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("no room"));
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).extend(lines.lines().map(str::to_owned));
        Ok(())
    }
}

/// A file of this test's own, which goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("mayfly-audit-{}.jsonl", uuid())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// How many records a file has from the beginning of its chain, or the first line that is wrong.
fn verify(path: &Path) -> io::Result<Result<usize, usize>> {
    let mut chain = Verification::new(true);
    Ok(chain.file(path)?.map(|()| chain.count))
}

fn event(n: u32) -> Event {
    Event {
        action: Action::CredentialGranted,
        actor: json!({"kind": "Pod", "name": "p"}),
        target: json!({"kind": "CredentialBinding", "name": "b"}),
        scope: json!({"namespace": "ci"}),
        payload: json!({"n": n, "text": "\",\"hash\":\""}),
        metadata: Program::THIS,
        success: true,
        request: Request { id: uuid(), ip_address: Some("192.0.2.1".to_owned()) },
    }
}

#[tokio::test]
async fn a_record_has_every_field_of_its_version() {
    let memory = Memory::default();
    Audit::new(memory.clone()).write(&event(1)).await.expect("written");
    let record = &memory.records()[0];
    for field in ["id", "version", "action", "actor", "target", "scope", "payload", "metadata", "occurred_at", "success", "request"] {
        assert!(!record[field].is_null(), "{field}");
    }
    assert_eq!((&record["version"], &record["action"], &record["previous"]), (&json!(1), &json!("credential.granted"), &json!(GENESIS)));
    assert!(record["occurred_at"].as_str().is_some_and(|time| time.parse::<Timestamp>().is_ok()));
    assert_eq!(record["id"].as_str().map(|id| (id.len(), &id[14..15])), Some((36, "4")));
}

#[tokio::test]
async fn a_chain_goes_on_after_a_restart_and_after_a_torn_line() {
    let scratch = Scratch::new();
    for (n, torn) in [(1, ""), (2, ""), (3, r#"{"id":"torn"#), (4, "")] {
        let audit = Audit::new(FileSink::open(&scratch.0, None).expect("the file"));
        audit.write(&event(n)).await.expect("written");
        drop(audit);
        let mut file = std::fs::OpenOptions::new().append(true).open(&scratch.0).expect("the file");
        std::io::Write::write_all(&mut file, torn.as_bytes()).expect("written");
    }
    assert_eq!(verify(&scratch.0).expect("read"), Ok(4));
}

#[tokio::test]
async fn records_that_come_at_once_are_one_chain_and_fail_together() {
    let memory = Memory::default();
    let audit = &Audit::new(memory.clone());
    let all = |range: std::ops::Range<u32>| futures::future::join_all(range.map(|n| async move { audit.write(&event(n)).await }));
    assert!(all(0..500).await.iter().all(Result::is_ok));
    memory.fails.store(true, Ordering::SeqCst);
    assert!(all(500..600).await.iter().all(Result::is_err));
    memory.fails.store(false, Ordering::SeqCst);
    assert!(all(600..700).await.iter().all(Result::is_ok));
    let scratch = Scratch::new();
    std::fs::write(&scratch.0, memory.lines.lock().expect("lines").join("\n")).expect("written");
    assert_eq!(verify(&scratch.0).expect("read"), Ok(600));
}

#[tokio::test]
async fn whatever_is_done_to_a_line_shows() {
    let scratch = Scratch::new();
    let audit = Audit::new(FileSink::open(&scratch.0, None).expect("the file"));
    for n in 0..4 {
        audit.write(&event(n)).await.expect("written");
    }
    let good = std::fs::read_to_string(&scratch.0).expect("text");
    let lines: Vec<&str> = good.lines().collect();
    let changed = |lines: &[&str]| {
        std::fs::write(&scratch.0, lines.join("\n")).expect("written");
        verify(&scratch.0).expect("read")
    };
    let edited = lines[1].replacen(r#""n":1"#, r#""n":7"#, 1);
    assert_ne!(edited, lines[1]);
    assert_eq!(changed(&lines), Ok(4));
    assert_eq!(changed(&[lines[0], &edited, lines[2], lines[3]]), Err(2), "changed");
    assert_eq!(changed(&[lines[0], lines[2], lines[3]]), Err(2), "left out");
    assert_eq!(changed(&[lines[0], lines[2], lines[1], lines[3]]), Err(2), "put elsewhere");
    assert_eq!(changed(&[lines[1], lines[2]]), Err(1), "the beginning left out");
    assert_eq!(changed(&[lines[0], lines[0]]), Err(2), "twice");
    assert_eq!(changed(&[lines[0], "{}"]), Err(2), "put in");
}

#[test]
fn one_process_writes_to_a_file() {
    let scratch = Scratch::new();
    let first = FileSink::open(&scratch.0, None).expect("the file");
    assert!(FileSink::open(&scratch.0, None).is_err());
    drop(first);
    assert!(FileSink::open(&scratch.0, None).is_ok());
    std::fs::write(&scratch.0, "something else\n").expect("written");
    assert!(FileSink::open(&scratch.0, None).is_err(), "a file that holds no records is not appended to");
}

#[tokio::test]
async fn the_chain_goes_on_from_file_to_file_and_old_ones_go() {
    let scratch = Scratch::new();
    let rotation = Some(Rotation { most: 1_500, kept: 2 });
    let numbered = |n: u32| scratch.0.with_added_extension(n.to_string());
    // A restart in between, also between two files.
    for n in 0..12 {
        let audit = Audit::new(FileSink::open(&scratch.0, rotation).expect("the file"));
        audit.write(&event(n)).await.expect("written");
        drop(audit);
        if n == 7 {
            std::fs::rename(numbered(1), numbered(2)).expect("moved");
            std::fs::rename(&scratch.0, numbered(1)).expect("moved");
        }
    }
    let files = [numbered(2), numbered(1), scratch.0.clone()];
    assert!(!numbered(3).exists() && files.iter().all(|file| std::fs::metadata(file).is_ok_and(|found| found.len() <= 1_500)));
    let mut chain = Verification::new(false);
    assert!(files.iter().all(|file| chain.file(file).expect("read") == Ok(())));
    assert!((3..12).contains(&chain.count), "{}", chain.count);
    assert_eq!(Verification::new(true).file(&files[0]).expect("read"), Err(1), "it is not the beginning");
    let mut gap = Verification::new(false);
    assert_eq!(gap.file(&files[0]).expect("read"), Ok(()));
    assert_eq!(gap.file(&files[2]).expect("read"), Err(1), "a file is missing");
    for file in &files[..2] {
        std::fs::remove_file(file).expect("removed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_has_a_record_when_it_says_so() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let (kept, fails) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicBool::new(false)));
    let (page, broken) = (kept.clone(), fails.clone());
    let take = axum::routing::post(move |headers: axum::http::HeaderMap, body: String| {
        let answer = match (headers["authorization"] == "Bearer hunter2", broken.load(Ordering::SeqCst)) {
            (true, false) => {
                page.lock().expect("no panic").push_str(&body);
                axum::http::StatusCode::NO_CONTENT
            }
            (true, true) => axum::http::StatusCode::INSUFFICIENT_STORAGE,
            (false, _) => axum::http::StatusCode::UNAUTHORIZED,
        };
        async move { answer }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = reqwest::Url::parse(&format!("http://{}/records", listener.local_addr().expect("an address"))).expect("an address");
    #[expect(clippy::disallowed_methods, reason = "a test's own server ends with the test")]
    let server = tokio::spawn(async move { drop(axum::serve(listener, axum::Router::new().route("/records", take)).await) });
    let (scratch, token) = (Scratch::new(), Scratch::new());
    std::fs::write(&token.0, "hunter2\n").expect("written");
    let sink = |token_file: Option<PathBuf>| HttpSink {
        client: reqwest::Client::new(),
        url: url.clone(),
        token_file,
        runtime: tokio::runtime::Handle::current(),
    };
    let audit = Audit::new(sink(Some(token.0.clone())));
    audit.write(&event(1)).await.expect("written");
    fails.store(true, Ordering::SeqCst);
    let error = audit.write(&event(2)).await.expect_err("no room").to_string();
    assert!(error.contains("507") && !error.contains("hunter2"), "{error}");
    fails.store(false, Ordering::SeqCst);
    audit.write(&event(3)).await.expect("written");
    std::fs::write(&scratch.0, &*kept.lock().expect("no panic")).expect("written");
    assert_eq!(verify(&scratch.0).expect("read"), Ok(2));
    assert!(Audit::new(sink(Some(scratch.0.with_extension("none")))).write(&event(4)).await.is_err(), "without the token nothing is sent");
    server.abort();
    let _ = server.await;
    let error = audit.write(&event(5)).await.expect_err("nobody is there").to_string();
    assert!(!error.contains("/records"), "{error}");
}

#[tokio::test]
async fn what_waits_for_a_sink_that_hangs_has_a_bound() {
    let memory = Memory::default();
    let audit = Audit::new(memory.clone());
    let accepted = {
        let _hangs = memory.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever asks gives up at once. The writer has no more in hand than waits.
        let told = |_: &usize| matches!(audit.write(&event(0)).now_or_never(), Some(Err(AuditError::Behind)));
        (0..=2 * MOST).find(told).expect("an end")
    };
    // What happened is recorded even so.
    while memory.records().len() < accepted {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    audit.write(&event(0)).await.expect("there is room again");
}

#[tokio::test]
async fn a_record_that_failed_is_no_part_of_the_chain() {
    let memory = Memory::default();
    let audit = Audit::new(memory.clone());
    audit.write(&event(1)).await.expect("written");
    memory.fails.store(true, Ordering::SeqCst);
    assert!(audit.write(&event(2)).await.is_err());
    memory.fails.store(false, Ordering::SeqCst);
    audit.write(&event(3)).await.expect("written");
    let lines = memory.lines.lock().expect("lines").clone();
    assert_eq!(memory.records()[1]["previous"].as_str(), own_hash(lines[0].trim_end()));
}
