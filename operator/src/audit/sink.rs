//! Where records go.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

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

/// A file that one process appends to. Each line is on the disk before it counts.
pub(crate) struct FileSink {
    file: File,
    /// Up to where the file holds whole records.
    length: u64,
    last: Option<String>,
}

impl FileSink {
    /// Opens or makes the file, and takes away what a crash left of a record: it never counted.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        // Two writers would each make a chain of their own out of one file.
        file.try_lock().map_err(|_| io::Error::new(io::ErrorKind::WouldBlock, "another process writes to the audit file"))?;
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut text)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        file.sync_all()?;
        let last = text[..whole].split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
        let last = match last {
            None => None,
            Some(line) => match std::str::from_utf8(line).ok().and_then(own_hash) {
                Some(hash) => Some(hash.to_owned()),
                None => return Err(io::Error::new(io::ErrorKind::InvalidData, "the last line of the audit file is no audit record")),
            },
        };
        Ok(Self { file, length: whole as u64, last })
    }
}

impl Sink for FileSink {
    fn append(&mut self, lines: &str) -> io::Result<()> {
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
