//! Where records go.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::own_hash;

/// Takes lines, in order. Lines whose `append` returned without an error are kept; of those that failed nothing may be left.
pub(crate) trait Sink: Send {
    /// Keeps one line or several, each with its line feed.
    fn append(&mut self, lines: &str) -> io::Result<()>;

    /// The hash of the last record there is.
    fn last_hash(&self) -> Option<String> {
        None
    }
}

/// Standard output, which the node keeps or somebody collects. Each process begins a chain of its own there.
pub(crate) struct StdoutSink;

impl Sink for StdoutSink {
    fn append(&mut self, lines: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(lines.as_bytes())?;
        out.flush()
    }
}

/// How long a collector may take to say that it has a record.
const COLLECTOR: Duration = Duration::from_secs(10);

/// A collector that takes lines of JSON by POST (`application/x-ndjson`) and keeps what it answers with 2xx. A record that it got and did not
/// answer for comes to nothing here: nothing leaves. Each process begins a chain of its own there.
pub(crate) struct HttpSink {
    /// Its client.
    pub(crate) client: reqwest::Client,
    /// Where the collector is.
    pub(crate) url: reqwest::Url,
    /// File with the bearer token to show, read anew for every call.
    pub(crate) token_file: Option<PathBuf>,
    /// Drives the calls: the writer's thread waits for them.
    pub(crate) runtime: tokio::runtime::Handle,
}

impl Sink for HttpSink {
    fn append(&mut self, lines: &str) -> io::Result<()> {
        let mut request = self.client.post(self.url.clone()).timeout(COLLECTOR).body(lines.to_owned());
        request = request.header(reqwest::header::CONTENT_TYPE, "application/x-ndjson");
        if let Some(path) = &self.token_file {
            request = request.bearer_auth(std::fs::read_to_string(path)?.trim());
        }
        // The address may hold what nobody else is to see.
        let answer = self.runtime.block_on(async { request.send().await }).map_err(|error| io::Error::other(error.without_url()))?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(io::Error::other(format!("the collector answers {}", answer.status()))),
        }
    }
}

/// When a file is full, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rotation {
    /// Most bytes of one file; a record that is longer has a file of its own.
    pub(crate) most: u64,
    /// Full files that are kept, as `FILE.1`, the youngest, to `FILE.n`. The oldest is removed.
    pub(crate) kept: u32,
}

/// A file that one process appends to. Each line is on the disk before it counts. The chain goes on from a full file to the next.
pub(crate) struct FileSink {
    path: PathBuf,
    rotation: Option<Rotation>,
    file: File,
    /// Up to where the file holds whole records.
    length: u64,
    last: Option<String>,
}

impl FileSink {
    /// Opens or makes the file, and takes away what a crash left of a record: it never counted.
    pub(crate) fn open(path: &Path, rotation: Option<Rotation>) -> io::Result<Self> {
        let mut file = begin(path)?;
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut text)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        file.sync_all()?;
        let mut last = last_hash(&text[..whole])?;
        if last.is_none() {
            // The process may have ended between two files.
            last = match std::fs::read(numbered(path, 1)) {
                Ok(text) => last_hash(&text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
        }
        Ok(Self { path: path.to_owned(), rotation, file, length: whole as u64, last })
    }

    /// Moves the full file away and begins the next one. Where that fails the old one is still there, under one of the two names.
    fn rotate(&mut self, kept: u32) -> io::Result<()> {
        let next = self.path.with_added_extension("next");
        let file = begin(&next)?;
        file.set_len(0)?;
        for n in (1..kept).rev() {
            match std::fs::rename(numbered(&self.path, n), numbered(&self.path, n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match std::fs::rename(&self.path, numbered(&self.path, 1)) {
            // An earlier try got so far.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::rename(&next, &self.path)?;
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            File::open(folder)?.sync_all()?;
        }
        (self.file, self.length) = (file, 0);
        Ok(())
    }
}

fn begin(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
    // Two writers would each make a chain of their own out of one file.
    file.try_lock().map_err(|_| io::Error::new(io::ErrorKind::WouldBlock, "another process writes to the audit file"))?;
    Ok(file)
}

fn numbered(path: &Path, n: u32) -> PathBuf {
    path.with_added_extension(n.to_string())
}

fn last_hash(text: &[u8]) -> io::Result<Option<String>> {
    let Some(line) = text.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty()) else { return Ok(None) };
    match std::str::from_utf8(line).ok().and_then(own_hash) {
        Some(hash) => Ok(Some(hash.to_owned())),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the last line of the audit file is no audit record")),
    }
}

impl Sink for FileSink {
    fn append(&mut self, lines: &str) -> io::Result<()> {
        if let Some(rotation) = self.rotation
            && self.length > 0
            && self.length + lines.len() as u64 > rotation.most
        {
            self.rotate(rotation.kept)?;
        }
        let written = self.file.write_all(lines.as_bytes()).and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => self.length += lines.len() as u64,
            // Half a line would be glued to the next one.
            Err(_) => self.file.set_len(self.length)?,
        }
        written
    }

    fn last_hash(&self) -> Option<String> {
        self.last.clone()
    }
}
