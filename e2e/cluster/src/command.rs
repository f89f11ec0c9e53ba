//! Running other programs: quietly, with their output in a log file or in the error.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Lines of a log that an error shows.
const TAIL: usize = 20;

/// A program and its arguments. Folders that a shell's path often lacks, for administration and for Go, are searched last.
pub fn command<I, S>(program: impl AsRef<OsStr>, args: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    static PATH: OnceLock<OsString> = OnceLock::new();
    let path = PATH.get_or_init(|| with_usual_folders(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = Command::new(program);
    command.env("PATH", path).args(args);
    command
}

fn with_usual_folders(path: &OsStr) -> OsString {
    let mut folders: Vec<PathBuf> = std::env::split_paths(path).filter(|folder| !folder.as_os_str().is_empty()).collect();
    for usual in ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/go/bin"] {
        if !folders.iter().any(|folder| folder == Path::new(usual)) {
            folders.push(usual.into());
        }
    }
    // Fails only for a folder with a colon in its name, which cannot have come out of a path.
    std::env::join_paths(folders).unwrap_or_else(|_| path.to_owned())
}

/// Runs to the end and returns standard output; a failure carries standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let result = raw_output(command)?;
    if !result.status.success() {
        bail!("{} ended with {}: {}", name(command), result.status, last_words(&result));
    }
    String::from_utf8(result.stdout).with_context(|| format!("{} printed something that is not text", name(command)))
}

/// Runs to the end; a failure carries standard error.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Whether the program ends with success; its output is dropped.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs to the end with `input` on standard input.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(|| cannot_start(command))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early closes the pipe; its own message says more than ours would.
        let _ = stdin.write_all(input.as_bytes());
    }
    let result = child.wait_with_output()?;
    if !result.status.success() {
        bail!("{} ended with {}: {}", name(command), result.status, last_words(&result));
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

/// Runs to the end with both outputs appended to `log`; a failure shows the end of it.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let mut file = open_log(log)?;
    writeln!(file, "+ {}", line(command))?;
    let status = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).status().with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("{} ended with {status}; the end of {}:\n{}", name(command), log.display(), tail(log, TAIL));
    }
    Ok(())
}

/// Opens a log for appending, making its folder.
pub fn open_log(log: &Path) -> Result<fs::File> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("cannot write {}", log.display()))
}

/// The last `lines` lines of a file, or why it cannot be read.
pub fn tail(file: &Path, lines: usize) -> String {
    match fs::read(file) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("(cannot read it: {error})"),
    }
}

/// A failure that waiting does not mend.
#[derive(Debug)]
pub struct Final(pub String);

impl std::fmt::Display for Final {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Final {}

/// Asks `ready` every `every` until it says yes; after `limit`, or at a [`Final`] failure, the last reason it gave becomes the error.
pub fn wait_for(what: &str, limit: Duration, every: Duration, mut ready: impl FnMut() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    loop {
        match ready() {
            Ok(()) => return Ok(()),
            Err(error) if error.is::<Final>() => return Err(error),
            Err(error) if began.elapsed() >= limit => {
                return Err(error.context(format!("{what} did not happen within {} s", limit.as_secs())));
            }
            Err(_) => thread::sleep(every),
        }
    }
}

/// `name` and the program's arguments as one line, for logs.
pub fn line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Writes a file that only the owner may read, replacing what was there in one step.
pub fn write_private(path: &Path, content: &str) -> Result<()> {
    write_mode(path, content.as_bytes(), 0o600)
}

/// Writes a file in one step: it is there whole or not at all.
pub fn write_file(path: &Path, content: &str) -> Result<()> {
    write_mode(path, content.as_bytes(), 0o644)
}

fn write_mode(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let folder = path.parent().ok_or_else(|| anyhow!("{} has no folder", path.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = folder.join(name);
    // A leftover could have a wider mode.
    let _ = fs::remove_file(&new);
    let written = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// `bytes` random bytes as lower-case hexadecimal.
pub fn random_hex(bytes: usize) -> Result<String> {
    let mut buffer = vec![0u8; bytes];
    fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut buffer)).context("cannot read /dev/urandom")?;
    Ok(hex(&buffer))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn raw_output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start {}; is it installed? (`cluster build packages` installs what Debian has)", name(command))
}

fn name(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    match command.get_args().next() {
        Some(first) if !first.to_string_lossy().starts_with('-') => format!("`{program} {}`", first.to_string_lossy()),
        _ => format!("`{program}`"),
    }
}

fn last_words(result: &Output) -> String {
    let text = if result.stderr.is_empty() { &result.stdout } else { &result.stderr };
    let text = String::from_utf8_lossy(text);
    let all: Vec<&str> = text.trim().lines().collect();
    all[all.len().saturating_sub(TAIL)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_carries_what_the_program_said() {
        let error = output(&mut command("sh", ["-c", "echo first >&2; echo why >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("exit status: 3") && text.contains("why"), "{text}");
    }

    #[test]
    fn administration_is_on_the_path_and_comes_last() {
        let path = with_usual_folders(OsStr::new("/mine:/usr/bin"));
        let path = path.to_str().unwrap();
        assert!(path.starts_with("/mine:/usr/bin:") && path.contains(":/usr/sbin:"), "{path}");
        assert_eq!(path.matches("/usr/bin").count(), 1);
        assert!(!with_usual_folders(OsStr::new("")).to_str().unwrap().starts_with(':'));
    }

    #[test]
    fn missing_program_says_how_to_get_it() {
        let error = run(&mut command("no-such-program-here", ["x"])).unwrap_err();
        assert!(format!("{error:#}").contains("cluster build packages"));
    }

    #[test]
    fn private_file_is_private_even_over_an_open_one() {
        use std::os::unix::fs::PermissionsExt;
        let folder = std::env::temp_dir().join(format!("mayfly-cluster-{}", std::process::id()));
        let path = folder.join("secret");
        write_file(&path, "open").unwrap();
        write_private(&path, "closed").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&path).unwrap(), "closed");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn waiting_ends_with_the_last_reason() {
        let error = wait_for("rain", Duration::ZERO, Duration::ZERO, || bail!("blue sky")).unwrap_err();
        assert_eq!(format!("{error:#}"), "rain did not happen within 0 s: blue sky");
        let mut asked = 0;
        let ready = || {
            asked += 1;
            Err(Final("drought".into()).into())
        };
        assert!(wait_for("rain", Duration::from_secs(60), Duration::ZERO, ready).is_err());
        assert_eq!(asked, 1);
    }
}
