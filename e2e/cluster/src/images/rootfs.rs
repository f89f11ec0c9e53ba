//! Debian file trees, and commands that change them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::archive::{Config, YOUNGEST};
use super::dockerfile::{Instruction, Step, Variables};
use super::files;
use crate::artefacts::{Key, publish};
use crate::command::{command, run, run_logged};
use crate::layout::Layout;

/// Files that Debian's slim images leave out as well.
const LEFT_OUT: [&str; 6] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
];

/// What mmdebstrap leaves behind that differs from one run to the next, or names this machine.
const NOT_FOR_IMAGES: [&str; 7] = [
    "etc/hostname",
    "etc/resolv.conf",
    "etc/machine-id",
    "var/cache/ldconfig/aux-cache",
    "var/log/alternatives.log",
    "var/log/dpkg.log",
    "var/log/bootstrap.log",
];

/// The packages that the first steps install, if they do nothing else, and how many steps those are: mmdebstrap installs them in
/// one go with the base, several times faster than apt in the finished base.
pub(super) fn leading_packages(steps: &[Step]) -> (BTreeSet<String>, usize) {
    let mut packages = BTreeSet::new();
    let mut used = 0;
    for step in steps {
        let Instruction::Run { command, .. } = &step.instruction else { break };
        let [shell, option, script] = command.as_slice() else { break };
        if shell != "/bin/sh" || option != "-c" {
            break;
        }
        let Some(more) = only_installs(script) else { break };
        packages.extend(more);
        used += 1;
    }
    (packages, used)
}

/// The packages a script installs, if all it does is `apt-get` and cleaning up after it.
fn only_installs(script: &str) -> Option<Vec<String>> {
    let mut packages = Vec::new();
    let mut without_recommends = true;
    for part in script.split("&&") {
        let words: Vec<&str> = part.split_whitespace().filter(|word| *word != "DEBIAN_FRONTEND=noninteractive").collect();
        match words.as_slice() {
            ["apt-get", "update", options @ ..] if options.iter().all(|word| is_quiet(word)) => {}
            ["apt-get", "clean"] | ["rm", "-rf", "/var/lib/apt/lists/*"] => {}
            ["apt-get", "install", rest @ ..] => {
                let (options, names): (Vec<&str>, Vec<&str>) = rest.iter().partition(|word| word.starts_with('-'));
                without_recommends &= options.contains(&"--no-install-recommends");
                if !options.iter().all(|word| is_quiet(word) || *word == "--no-install-recommends") {
                    return None;
                }
                for name in names {
                    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
                    if !plain {
                        return None;
                    }
                    packages.push(name.to_owned());
                }
            }
            _ => return None,
        }
    }
    (without_recommends && !packages.is_empty()).then_some(packages)
}

fn is_quiet(option: &str) -> bool {
    matches!(option, "-y" | "--yes" | "-q" | "-qq")
}

/// Fills `root` with a minimal Debian and these packages.
pub(super) fn debian(layout: &Layout, suite: &str, packages: &BTreeSet<String>, root: &Path) -> Result<()> {
    let include: Vec<&str> = packages.iter().map(String::as_str).collect();
    let include = include.join(",");
    let mut key = Key::new("debian");
    key.text("1").text(suite).text(&include);
    for option in LEFT_OUT {
        key.text(option);
    }
    let folder = layout.cache().join("rootfs").join(format!("debian_{suite}-{}", key.short()));
    let base = folder.join("base.tar");
    if !base.exists() {
        publish(&folder, |target| {
            let mut mmdebstrap = command("mmdebstrap", ["--mode=root", "--variant=minbase", "--format=tar"]);
            mmdebstrap.args(["--aptopt=Acquire::Retries \"3\"", "--skip=check/empty"]);
            if !include.is_empty() {
                mmdebstrap.arg(format!("--include={include}"));
            }
            for option in LEFT_OUT {
                mmdebstrap.arg(format!("--dpkgopt={option}"));
            }
            mmdebstrap.arg(suite).arg(target.join("base.tar")).env("SOURCE_DATE_EPOCH", YOUNGEST.to_string());
            run_logged(&mut mmdebstrap, &layout.cache().join("log/rootfs.log"))
        })
        .with_context(|| format!("cannot make a Debian {suite} (is its archive reachable?)"))?;
    }
    run(command("tar", ["--numeric-owner", "--exclude=./dev/*", "-xpf"]).arg(&base).arg("-C").arg(root))?;
    for file in NOT_FOR_IMAGES {
        let path = root.join(file);
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Runs a command in the tree, with this machine's network, names and certificate authorities, in mount and process namespaces of its own.
pub(super) fn run_in(root: &Path, argv: &[String], environment: &Variables, config: &Config, log: &Path) -> Result<()> {
    let (user, group) = config.user.split_once(':').unwrap_or((&config.user, ""));
    let user = if user.is_empty() { 0 } else { files::number(root, "etc/passwd", user)? };
    let group = if group.is_empty() { user } else { files::number(root, "etc/group", group)? };
    let workdir = if config.workdir.is_empty() { "/" } else { &config.workdir };
    for folder in ["proc", "dev", "etc"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let resolv = root.join("etc/resolv.conf");
    let own_resolv = resolv.symlink_metadata().is_ok();
    if !own_resolv {
        fs::write(&resolv, "")?;
    }
    let script = r#"
root=$1 userspec=$2 workdir=$3; shift 3
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
ln -s /proc/self/fd "$root/dev/fd"
authorities=/etc/ssl/certs/ca-certificates.crt
for file in /etc/resolv.conf $authorities; do
  if [ -e $file ] && [ -e "$root$file" ]; then mount --bind $file "$root$file"; fi
done
exec chroot --userspec="$userspec" "$root" /usr/bin/env -C "$workdir" -- "$@""#;
    let mut unshare = command("unshare", ["--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script, "run"]);
    unshare.arg(root).arg(format!("{user}:{group}")).arg(workdir).args(argv);
    unshare.env_clear().env("HOME", "/root").env("SOURCE_DATE_EPOCH", YOUNGEST.to_string()).envs(environment);
    if !environment.contains_key("PATH") {
        unshare.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
    let result = run_logged(&mut unshare, log);
    if !own_resolv {
        fs::remove_file(&resolv)?;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sees_through_the_usual_way_to_install() {
        let script = "apt-get update && apt-get install -y --no-install-recommends bash git && rm -rf /var/lib/apt/lists/*";
        assert_eq!(only_installs(script).unwrap(), ["bash", "git"]);
        assert_eq!(only_installs("apt-get install -yq --no-install-recommends x"), None);
    }

    #[test]
    fn leaves_everything_else_to_a_shell() {
        for script in [
            "apt-get update",
            "apt-get install -y bash",
            "apt-get install -y --no-install-recommends bash=5",
            "apt-get install -y --no-install-recommends $PACKAGES",
            "apt-get install -y --no-install-recommends bash; rm x",
            "apt-get install -y --no-install-recommends bash && useradd x",
            "rm -rf /",
        ] {
            assert_eq!(only_installs(script), None, "{script}");
        }
    }
}
