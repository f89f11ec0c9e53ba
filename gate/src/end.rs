//! Sees the runner's program end: its entry point opens a named pipe that stays open for as long as any program of its container runs.
//! The kubelet looks once a second, and a forge's webhook takes its time.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::retry_on_intr;

use crate::pipe;

/// The pipe's name, beside the registration.
const RUNNING: &str = "running";

/// A pipe that the runner is to hold open, for reading: a shell that opens one for writing would make it if it were not there, which
/// Linux refuses in a folder like this (`fs.protected_fifos`, which systemd sets) where the pipe is somebody else's.
pub(crate) struct Running(PathBuf);

impl Running {
    /// Makes it. It has to be there before the registration: an entry point that finds the one has the other.
    ///
    /// # Errors
    /// When this container was started before.
    pub(crate) fn open(folder: &Path) -> Result<Self, String> {
        let pipe = folder.join(RUNNING);
        pipe::make(&pipe, Mode::WUSR | Mode::RGRP)?;
        Ok(Self(pipe))
    }

    /// Returns when nobody holds it any more; never, where an entry point of somebody's own does not open it. Nothing is written into it.
    ///
    /// # Errors
    /// When the pipe vanished.
    pub(crate) fn wait(self) -> Result<(), String> {
        let pipe = pipe::open(&self.0)?;
        // Whoever opened it keeps it; there is nothing to find for the job.
        let held = fs::remove_file(&self.0).and_then(|()| {
            // What is always told of a pipe without readers: an error.
            let mut held = [PollFd::new(&pipe, PollFlags::empty())];
            Ok(retry_on_intr(|| poll(&mut held, None))?)
        });
        held.map(drop).map_err(|error| format!("{}: {error}", self.0.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
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
        let pipe = File::open(&path).expect("the gate holds the other end");
        let mut program = Command::new("sleep").arg("60").stdin(Stdio::from(pipe)).spawn().expect("a program");
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err(), "it runs");
        assert!(!path.exists());
        program.kill().and_then(|()| program.wait()).expect("it ends");
        assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(Ok(())));
        waiting.join().expect("no panic").expect("heard");
        fs::remove_dir_all(folder).expect("removed");
    }
}
