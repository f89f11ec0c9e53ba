//! The named pipe through which the registration passes.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;

use rustix::fs::{CWD, Mode, mkfifoat};

/// Makes the pipe: writable for the gate, readable for the pod's group, which is the runner's.
///
/// # Errors
/// When it exists: this container was started again, and the registration may have been handed over already.
pub(crate) fn make(path: &Path) -> Result<(), String> {
    mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR | Mode::RGRP).map_err(|error| match error {
        rustix::io::Errno::EXIST => format!("{} exists: this container was started before", path.display()),
        other => format!("{} cannot be made: {other}", path.display()),
    })
}

/// Opens the pipe for writing; returns when somebody has opened it for reading.
///
/// # Errors
/// When the pipe vanished.
pub(crate) fn open(path: &Path) -> Result<File, String> {
    OpenOptions::new().write(true).open(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes the registration and removes the pipe's name: it is read once.
///
/// # Errors
/// When the reader has gone.
pub(crate) fn write(mut pipe: File, path: &Path, registration: &[u8]) -> Result<(), String> {
    fs::remove_file(path).map_err(|error| format!("{} cannot be removed: {error}", path.display()))?;
    pipe.write_all(registration).map_err(|error| format!("the runner stopped reading: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::thread;

    use super::*;

    #[test]
    fn what_is_written_is_read_once_and_the_name_is_gone() {
        let folder = std::env::temp_dir().join(format!("mayfly-gate-pipe-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("registration");
        make(&path).expect("a pipe");
        assert!(make(&path).expect_err("it exists").contains("started before"));
        let reader = {
            let path = path.clone();
            thread::spawn(move || {
                let mut text = String::new();
                File::open(path).and_then(|mut file| file.read_to_string(&mut text)).map(|_| text)
            })
        };
        write(open(&path).expect("a reader"), &path, b"one job").expect("written");
        assert_eq!(reader.join().expect("no panic").expect("read"), "one job");
        assert!(!path.exists());
        fs::remove_dir_all(folder).expect("removed");
    }
}
