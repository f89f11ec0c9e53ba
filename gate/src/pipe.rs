//! Named pipes: what passes through them is in no file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::{CWD, Mode, RenameFlags, chmod, mkfifoat, renameat_with};

/// Makes a pipe with these permissions; the group is the pod's, which is the runner's. Whoever waits for its name can use it at once.
///
/// # Errors
/// When it exists: this container was started again, and what passes through may have passed already.
pub(crate) fn make(path: &Path, mode: Mode) -> Result<(), String> {
    let unready = path.with_extension("unready");
    let made = mkfifoat(CWD, &unready, Mode::empty())
        // Whatever the process's mask takes away.
        .and_then(|()| chmod(&unready, mode))
        .and_then(|()| renameat_with(CWD, &unready, CWD, path, RenameFlags::NOREPLACE));
    made.map_err(|error| match error {
        rustix::io::Errno::EXIST => format!("{} exists: this container was started before", path.display()),
        other => format!("{} cannot be made: {other}", path.display()),
    })
}

/// Reads what somebody writes, at most `most` bytes, once somebody does, and removes the pipe's name: it is written once. Whoever
/// writes more can write to the end, instead of dying of it.
///
/// # Errors
/// When the pipe vanished, or more was written.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    let mut pipe = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    fs::remove_file(path).map_err(|error| format!("{} cannot be removed: {error}", path.display()))?;
    let read = (&mut pipe).take(most).read_to_end(&mut text).and_then(|_| io::copy(&mut pipe, &mut io::sink()));
    match read.map_err(|error| format!("{}: {error}", path.display()))? {
        0 => Ok(text),
        _ => Err(format!("{}: more than {most} bytes", path.display())),
    }
}

/// Opens the pipe for writing; returns when somebody has opened it for reading.
///
/// # Errors
/// When the pipe vanished.
pub(crate) fn open(path: &Path) -> Result<File, String> {
    OpenOptions::new().write(true).open(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes and removes the pipe's name: it is read once.
///
/// # Errors
/// When the reader has gone.
pub(crate) fn write(mut pipe: File, path: &Path, text: &[u8]) -> Result<(), String> {
    fs::remove_file(path).map_err(|error| format!("{} cannot be removed: {error}", path.display()))?;
    pipe.write_all(text).map_err(|error| format!("the runner stopped reading: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::thread;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("mayfly-gate-pipe-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        folder
    }

    #[test]
    fn what_is_handed_over_is_read_once_and_not_without_end() {
        let folder = folder("read");
        let long = "x".repeat(1 << 20);
        for (text, whole) in [("four", true), ("fives", false), (&long, false)] {
            let text = text.to_owned();
            let path = folder.join("identity");
            make(&path, Mode::RUSR | Mode::WUSR | Mode::WGRP).expect("a pipe");
            assert_eq!(fs::metadata(&path).expect("the pipe").permissions().mode() & 0o777, 0o620);
            let expected = whole.then(|| text.clone().into_bytes());
            let writer = {
                let path = path.clone();
                thread::spawn(move || fs::write(path, text))
            };
            let found = read(&path, 4);
            writer.join().expect("no panic").expect("written");
            assert_eq!(found.ok(), expected);
            assert!(!path.exists());
        }
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn what_is_written_is_read_once_and_the_name_is_gone() {
        let folder = folder("write");
        let path = folder.join("registration");
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP;
        make(&path, mode).expect("a pipe");
        assert!(make(&path, mode).expect_err("it exists").contains("started before"));
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
