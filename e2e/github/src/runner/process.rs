//! Runs a process, hands out its lines, and ends it the way the real runner does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, pipe};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// After SIGINT and after SIGTERM.
const GRACE: [Duration; 2] = [Duration::from_millis(7500), Duration::from_millis(2500)];
/// How long output is waited for that a process left behind.
const AFTERMATH: Duration = Duration::from_millis(300);

/// How a process ended.
pub(crate) enum End {
    /// With this code.
    Code(i32),
    /// It was cancelled, or took too long.
    Stopped,
}

/// Runs a program with just this environment. Output and errors come as lines in their order.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn run(
    words: &[String],
    folder: &Path,
    environment: &BTreeMap<String, OsString>,
    groups: &mut Vec<Pid>,
    mut line: impl FnMut(&str),
    stop: impl Fn() -> bool,
) -> Result<End, String> {
    let [program, arguments @ ..] = words else { return Err("there is no program".to_owned()) };
    let (reader, writer) = pipe().map_err(|error| error.to_string())?;
    let errors = writer.try_clone().map_err(|error| error.to_string())?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).env_clear().envs(environment);
    command.stdin(Stdio::null()).stdout(writer).stderr(errors).process_group(0);
    let mut child = command.spawn().map_err(|error| format!("{program}: {error}"))?;
    drop(command);
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    groups.extend(group);
    let (sender, lines) = channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned();
            bytes.clear();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    let mut ended: Option<(i32, Instant)> = None;
    let mut stopping: Option<Instant> = None;
    let mut signals = 0;
    loop {
        match lines.recv_timeout(Duration::from_millis(20)) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) if ended.is_some() => break,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(5)),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if ended.is_none()
            && let Some(status) = child.try_wait().map_err(|error| error.to_string())?
        {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            ended = Some((code, Instant::now()));
        }
        if ended.is_some_and(|(_, at)| at.elapsed() > AFTERMATH) {
            break;
        }
        if ended.is_none() && (stopping.is_some() || stop()) {
            let since = *stopping.get_or_insert_with(Instant::now);
            let due = [Duration::ZERO, GRACE[0], GRACE[0] + GRACE[1]];
            if let Some((group, signal)) =
                group.zip([Signal::INT, Signal::TERM, Signal::KILL].get(signals).filter(|_| since.elapsed() >= due[signals]))
            {
                // It may just have ended.
                let _ = kill_process_group(group, *signal);
                signals += 1;
            }
        }
    }
    Ok(if stopping.is_some() { End::Stopped } else { End::Code(ended.map_or(-1, |(code, _)| code)) })
}

/// Ends what steps left behind.
pub(crate) fn sweep(groups: &[Pid]) {
    for group in groups {
        let _ = kill_process_group(*group, Signal::KILL);
    }
}
