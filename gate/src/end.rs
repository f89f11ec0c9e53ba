//! Sees the runner's program end: its entry point opens a named pipe that stays open for as long as any program of its container runs.
//! The kubelet looks once a second, and a forge's webhook takes its time.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use crate::pipe;

/// The pipe's name, beside the registration.
const RUNNING: &str = "running";

/// A pipe that the runner is to hold open.
pub(crate) struct Running(PathBuf);

impl Running {
    /// Makes it. It has to be there before the registration: an entry point that finds the one has the other.
    ///
    /// # Errors
    /// When this container was started before.
    pub(crate) fn open(folder: &Path) -> Result<Self, String> {
        let pipe = folder.join(RUNNING);
        pipe::make(&pipe, Mode::RUSR | Mode::WGRP)?;
        Ok(Self(pipe))
    }

    /// Returns when nobody holds it any more; never, where an entry point of somebody's own does not open it. What is written into it
    /// means nothing.
    ///
    /// # Errors
    /// When the pipe vanished.
    pub(crate) fn wait(self) -> Result<(), String> {
        let held = File::open(&self.0).and_then(|mut pipe| {
            // Whoever opened it keeps it; there is nothing to find for the job.
            fs::remove_file(&self.0)?;
            io::copy(&mut pipe, &mut io::sink())
        });
        held.map(drop).map_err(|error| format!("{}: {error}", self.0.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_end_is_seen_when_the_last_program_has_ended_and_not_before() {
        let folder = std::env::temp_dir().join(format!("mayfly-gate-end-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let running = Running::open(&folder).expect("a pipe");
        let path = running.0.clone();
        assert!(Running::open(&folder).is_err_and(|why| why.contains("started before")));
        let (tell, told) = mpsc::channel();
        let waiting = thread::spawn(move || tell.send(running.wait()));
        // As an entry point does: what it starts has the pipe as well.
        let mut pipe = OpenOptions::new().write(true).open(&path).expect("the gate reads");
        pipe.write_all(b"anything").expect("written");
        let mut program = Command::new("cat").stdin(Stdio::piped()).stdout(pipe).spawn().expect("a program");
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err(), "it runs");
        assert!(!path.exists());
        drop(program.stdin.take());
        program.wait().expect("it ends");
        assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(Ok(())));
        waiting.join().expect("no panic").expect("heard");
        fs::remove_dir_all(folder).expect("removed");
    }
}
