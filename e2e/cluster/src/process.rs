//! Long-running processes of a cluster: started so that they outlive this program, found again by pid *and* start time, so that
//! a pid the kernel has given to somebody else is never signalled.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::command::{Final, command, line, open_log, tail, write_file};
use crate::layout::{Layout, World};

/// A process as it can be told from every other since the machine started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id; also the id of its process group and session.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: clock ticks from the machine's start to the process's.
    pub start_time: u64,
}

impl Identity {
    /// The process that has this pid now, unless it is a zombie or not there.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_time) = state_and_start(&stat)?;
        (state != 'Z' && state != 'X').then_some(Self { pid, start_time })
    }

    /// Whether this very process still runs.
    pub fn alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }
}

/// State and start time from `/proc/PID/stat`. The name in parentheses may itself hold spaces and parentheses.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // `state` is field 3, so field 22 is the nineteenth after it.
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// What to start, and where.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Name of the part: of its record, and of its log file.
    pub part: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its whole environment beside `PATH` and `HOME`: nothing is inherited, so that a proxy setting or a token of the caller
    /// does not reach the cluster.
    pub env: Vec<(String, String)>,
    /// The namespaces it runs in.
    pub world: World,
    /// Run as this user and group, with no capability.
    pub user: Option<u32>,
    /// Shell commands run first, in a mount namespace of the process's own.
    pub mounts: Option<Mounts>,
    /// Shell commands run before each start, in the process that becomes the program.
    pub before: Option<String>,
    /// Start it again whenever it ends.
    pub restart: bool,
}

/// What a process sees differently from the others.
#[derive(Clone, Debug)]
pub struct Mounts {
    /// Propagation of the new mount namespace, as `unshare --propagation` takes it.
    pub propagation: &'static str,
    /// Shell commands.
    pub script: String,
}

impl Daemon {
    /// A program in `world`, with nothing special about it.
    pub fn new(part: &str, world: World, program: PathBuf) -> Self {
        Self {
            part: part.to_owned(),
            program,
            args: Vec::new(),
            env: Vec::new(),
            world,
            user: None,
            mounts: None,
            before: None,
            restart: false,
        }
    }

    /// Adds arguments.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Starts it unless it runs. Returns whether it was started.
    pub fn ensure(&self, layout: &Layout) -> Result<bool> {
        if let Some(identity) = recorded(layout, &self.part) {
            if identity.alive() {
                return Ok(false);
            }
            // A loop that was killed leaves its program behind, which would hold ports and files.
            cgroup::kill_group(layout, identity.pid)?;
        }
        self.start(layout).with_context(|| format!("cannot start {}", self.part))?;
        Ok(true)
    }

    /// Whether it runs, or ran, with other arguments or in another place than it would be started with now, or before its program was built
    /// anew. Variables are not compared.
    pub fn differs(&self, layout: &Layout) -> bool {
        let Some(record) = record(layout, &self.part) else { return false };
        let written = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
        let rebuilt = written(&record_path(layout, &self.part)).zip(written(&self.program)).is_some_and(|(then, built)| built > then);
        rebuilt || record.command != line(&self.command(layout))
    }

    fn command(&self, layout: &Layout) -> Command {
        let mut argv: Vec<String> = Vec::new();
        if self.world != World::Machine {
            argv.push("nsenter".into());
            argv.push(format!("--net={}", layout.netns_file(self.world).display()));
            argv.push(format!("--mount={}", layout.mntns_file(self.world).display()));
        }
        if let Some(mounts) = &self.mounts {
            argv.extend(["unshare".into(), "--mount".into(), "--propagation".into(), mounts.propagation.into()]);
            argv.extend(["sh".into(), "-euc".into(), format!("{}\nexec \"$@\"", mounts.script), self.part.clone()]);
        }
        if self.restart {
            argv.extend(["sh", "-c", "while :; do \"$@\"; echo \"ended with $?, starting it again\"; sleep 1; done"].map(Into::into));
            argv.push(self.part.clone());
        }
        if let Some(before) = &self.before {
            argv.extend(["sh".into(), "-euc".into(), format!("{before}\nexec \"$@\""), self.part.clone()]);
        }
        if let Some(user) = self.user {
            argv.extend(["setpriv".into(), format!("--reuid={user}"), format!("--regid={user}")]);
            argv.extend(["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"].map(Into::into));
        }
        argv.push(self.program.display().to_string());
        argv.extend(self.args.iter().cloned());

        let mut command = command("setsid", &argv);
        command.env_clear().env("PATH", search_path(layout)).env("HOME", "/root").envs(self.env.iter().cloned());
        command.current_dir("/");
        command
    }

    fn start(&self, layout: &Layout) -> Result<()> {
        let log_path = layout.log(&self.part);
        let log = open_log(&log_path)?;
        let mut command = self.command(layout);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("cannot start `setsid`; is util-linux installed?")?;
        let pid = i32::try_from(child.id()).context("impossible pid")?;
        let Some(identity) = Identity::of(pid) else {
            bail!("it ended at once; the end of {}:\n{}", log_path.display(), tail(&log_path, 20));
        };
        if self.world != World::Machine {
            cgroup::track(layout, pid)?;
        }
        let record = Record { identity, boot: boot_id()?, command: line(&command) };
        write_file(&record_path(layout, &self.part), &serde_json::to_string_pretty(&record)?)
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    identity: Identity,
    /// Start times begin anew with the machine.
    boot: String,
    command: String,
}

/// Names this start of the machine.
pub fn boot_id() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the machine's boot id")?;
    Ok(text.trim().to_owned())
}

/// `PATH` of everything that runs in a cluster: its own programs first.
pub fn search_path(layout: &Layout) -> String {
    format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", layout.at("bin").display())
}

/// The process recorded for a part since the machine started, running or not.
pub fn recorded(layout: &Layout, part: &str) -> Option<Identity> {
    record(layout, part).map(|record| record.identity)
}

fn record(layout: &Layout, part: &str) -> Option<Record> {
    let text = fs::read_to_string(record_path(layout, part)).ok()?;
    let record: Record = serde_json::from_str(&text).ok()?;
    (record.boot == boot_id().ok()?).then_some(record)
}

/// All parts that were ever started in this cluster, with their processes.
pub fn all_recorded(layout: &Layout) -> Vec<(String, Identity)> {
    let Ok(entries) = fs::read_dir(layout.at("run")) else { return Vec::new() };
    let mut parts: Vec<(String, Identity)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let part = name.strip_suffix(".json")?;
            Some((part.to_owned(), recorded(layout, part)?))
        })
        .collect();
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    parts
}

/// Fails, with the end of the log, when a part that should run does not. There is no use in waiting for it: the failure is [`Final`].
pub fn check_running(layout: &Layout, part: &str) -> Result<()> {
    if recorded(layout, part).is_some_and(|identity| identity.alive()) {
        return Ok(());
    }
    let log = layout.log(part);
    let message = format!("{part} does not run; the end of {}:\n{}", log.display(), tail(&log, 15));
    Err(Final(message).into())
}

/// Asks the parts that still run to end, all at once, waits for them, and ends by force what is left after `patience`.
/// Whole process groups are meant: a restart loop goes with its program.
pub fn stop(layout: &Layout, parts: &[&str], patience: Duration) -> Result<()> {
    let mut waiting: Vec<(&str, Identity)> = Vec::new();
    for part in parts {
        if let Some(identity) = recorded(layout, part)
            && identity.alive()
        {
            signal_group(identity.pid, Signal::SIGTERM)?;
            waiting.push((part, identity));
        }
    }
    let began = Instant::now();
    let mut forced = false;
    while !waiting.is_empty() {
        waiting.retain(|(_, identity)| group_exists(identity.pid));
        if began.elapsed() >= patience && !forced {
            for (_, identity) in &waiting {
                signal_group(identity.pid, Signal::SIGKILL)?;
            }
            forced = true;
        } else if began.elapsed() >= patience + Duration::from_secs(10) {
            let names: Vec<&str> = waiting.iter().map(|(part, _)| *part).collect();
            bail!("{} will not end even when killed", names.join(", "));
        }
        thread::sleep(Duration::from_millis(20));
    }
    for part in parts {
        remove_if_there(&record_path(layout, part))?;
    }
    Ok(())
}

fn record_path(layout: &Layout, part: &str) -> PathBuf {
    layout.at("run").join(format!("{part}.json"))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).with_context(|| format!("cannot remove {}", path.display())),
        _ => Ok(()),
    }
}

fn signal_group(pid: i32, signal: Signal) -> Result<()> {
    match killpg(Pid::from_raw(pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot signal process group {pid}")),
    }
}

/// Whether a process group has a member that is not a zombie. Zombies stay when their parent does not look; they hold nothing.
fn group_exists(pgid: i32) -> bool {
    if killpg(Pid::from_raw(pgid), None).is_err() {
        return false;
    }
    let Ok(entries) = fs::read_dir("/proc") else { return true };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).any(|pid| {
        fs::read_to_string(format!("/proc/{pid}/stat")).ok().is_some_and(|stat| {
            let Some((_, after)) = stat.rsplit_once(')') else { return false };
            let fields: Vec<&str> = after.split_ascii_whitespace().take(3).collect();
            matches!(fields.as_slice(), [state, _, group] if *group == pgid.to_string() && *state != "Z" && *state != "X")
        })
    })
}

/// Ends one process by force if it is still the one meant.
pub fn kill_now(identity: Identity) {
    if identity.alive() {
        // It may end on its own in between; the pid cannot be reused that fast.
        let _ = kill(Pid::from_raw(identity.pid), Signal::SIGKILL);
    }
}

/// What a shell would return for this status: the code, or 128 + the signal.
pub fn exit_code(status: std::process::ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_start_time_behind_a_hostile_name() {
        let stat = "42 (a) b) R 1 2) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 0 0";
        assert_eq!(state_and_start(stat), Some(('S', 987_654)));
        assert_eq!(state_and_start("garbage"), None);
        assert_eq!(state_and_start("1 (x) S 1 2"), None);
    }

    #[test]
    fn another_process_with_the_same_pid_is_not_ours() {
        let me = Identity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.alive());
        assert!(!Identity { start_time: me.start_time + 1, ..me }.alive());
        // Signalling a stranger would end this very test.
        kill_now(Identity { start_time: me.start_time + 1, ..me });
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let began = Instant::now();
        while Identity::of(pid).is_some() {
            assert!(began.elapsed() < Duration::from_secs(5), "`true` does not end");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        child.wait().unwrap();
    }
}
