//! The forge's process: its configuration, its first start, its administrator.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::client::Forge;
use crate::builder::part_folder;
use crate::command::{command, output, random_hex, run, wait_for, write_private};
use crate::layout::{FORGE_PORT, Layout, OUTSIDE_DOMAIN, World};
use crate::process::{Daemon, check_running, search_path};
use crate::template::render;

/// The forge's administrator.
pub const ADMIN: &str = "mayfly-admin";

/// Name of the forge's process.
pub const PART: &str = "forge";

/// The log of requests, below the cluster's state.
pub const ACCESS_LOG: &str = "forge/data/log/access.log";

/// The administrator's token, below the cluster's state.
pub const TOKEN_FILE: &str = "forge/admin-token";

/// The administrator's password, below the cluster's state.
pub const PASSWORD_FILE: &str = "forge/admin-password";

/// The forge refuses to run as root, and needs no name for its user.
const USER: u32 = 64_977;

/// Where the forge runs, and what it is called.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where its process runs.
    pub world: World,
    /// The address it listens on.
    pub ip: String,
    /// What it calls itself.
    pub url: String,
}

impl Place {
    /// In the outside world of a local cluster.
    pub fn outside(layout: &Layout) -> Self {
        let url = format!("http://forge.{OUTSIDE_DOMAIN}:{FORGE_PORT}");
        Self { world: World::Outside, ip: layout.addresses().outside.clone(), url }
    }

    fn local_url(&self) -> String {
        format!("http://{}:{FORGE_PORT}", self.ip)
    }
}

/// Starts the forge, if it does not run, waits for its answer, and makes its administrator on the first start.
pub fn ensure(layout: &Layout, place: &Place) -> Result<()> {
    let programs = programs(layout)?;
    let config = configure(layout, place, &programs)?;
    daemon(layout, place, &config).ensure(layout)?;
    wait_for("the forge's first answer", Duration::from_secs(180), Duration::from_millis(200), || {
        check_running(layout, PART)?;
        healthy(&place.local_url())
    })?;
    if !layout.at(TOKEN_FILE).exists() {
        bootstrap(layout, place, &config).context("cannot make the forge's administrator")?;
    }
    Ok(())
}

/// Fails unless the forge at this address says it is healthy.
pub fn healthy(url: &str) -> Result<()> {
    Forge::new(url, "").healthy()
}

/// The administrator's token, with all scopes.
pub fn admin_token(layout: &Layout) -> Result<String> {
    read_secret(&layout.at(TOKEN_FILE))
}

/// The administrator's password, for a browser.
pub fn admin_password(layout: &Layout) -> Result<String> {
    read_secret(&layout.at(PASSWORD_FILE))
}

/// Writes the configuration, with secrets of its own, once.
fn configure(layout: &Layout, place: &Place, programs: &Path) -> Result<PathBuf> {
    let folder = layout.at("forge");
    let (config, data) = (folder.join("app.ini"), folder.join("data"));
    if config.exists() {
        return Ok(config);
    }
    fs::create_dir_all(&data)?;
    let secret = |kind: &str| -> Result<String> {
        let text = output(&mut command(programs.join("gitea"), ["generate", "secret", kind]))?;
        Ok(text.trim().to_owned())
    };
    let text = render(
        include_str!("../../templates/forge.ini"),
        &[
            ("DATA", &data.display().to_string()),
            ("IP", &place.ip),
            ("PORT", &FORGE_PORT.to_string()),
            ("URL", &place.url),
            ("OUTSIDE_DOMAIN", OUTSIDE_DOMAIN),
            ("USER", if is_root() { "forge".to_owned() } else { this_user()? }.as_str()),
            ("PROGRAMS", &programs.display().to_string()),
            ("SECRET_KEY", &random_hex(32)?),
            ("INTERNAL_TOKEN", &secret("INTERNAL_TOKEN")?),
            ("JWT_SECRET", &secret("JWT_SECRET")?),
            ("LFS_JWT_SECRET", &secret("LFS_JWT_SECRET")?),
        ],
    )?;
    // The folder also holds the administrator's secrets: the forge may pass through it, not list it.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o711))?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700))?;
    write_private(&config, &text)?;
    if is_root() {
        chown(&data, Some(USER), Some(USER))?;
        chown(&config, Some(USER), Some(USER))?;
    }
    Ok(config)
}

/// The forge's program and its data where its user can reach them: the cache may lie in a home that is closed to others.
fn programs(layout: &Layout) -> Result<PathBuf> {
    let folder = layout.at("forge/programs");
    if folder.exists() {
        return Ok(folder);
    }
    fs::create_dir_all(layout.at("forge"))?;
    let (built, new) = (part_folder(layout, "gitea")?, layout.at("forge/programs.new"));
    // Links where both are on one file system.
    for how in ["-al", "-a"] {
        let _ = fs::remove_dir_all(&new);
        let copied = run(command("cp", [how, "--"]).arg(&built).arg(&new));
        if copied.is_ok() || how == "-a" {
            copied?;
            break;
        }
    }
    fs::rename(&new, &folder)?;
    Ok(folder)
}

/// Whether the forge needs a user other than this program's.
fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn this_user() -> Result<String> {
    output(&mut command("id", ["-un"])).map(|name| name.trim().to_owned())
}

fn daemon(layout: &Layout, place: &Place, config: &Path) -> Daemon {
    let data = layout.at("forge/data").display().to_string();
    let mut daemon = Daemon::new(PART, place.world, layout.at("forge/programs/gitea"))
        .args(["web".to_owned(), "--config".into(), config.display().to_string()])
        .env("USER", "forge")
        .env("HOME", data.clone())
        .env("GITEA_WORK_DIR", data);
    daemon.user = is_root().then_some(USER);
    daemon
}

fn bootstrap(layout: &Layout, place: &Place, config: &Path) -> Result<()> {
    let password_file = layout.at(PASSWORD_FILE);
    if !password_file.exists() {
        let password = random_hex(16)?;
        // Kept before it is used: an interrupted start leaves nothing that nobody can open.
        write_private(&password_file, &password)?;
    }
    let password = read_secret(&password_file)?;
    let anonymous = Forge::new(place.local_url(), "");
    if !anonymous.has_user(ADMIN)? {
        let email = format!("{ADMIN}@{OUTSIDE_DOMAIN}");
        admin_command(
            layout,
            config,
            &["user", "create", "--admin", "--username", ADMIN, "--password", &password, "--email", &email, "--must-change-password=false"],
        )?;
    }
    let name = format!("mayfly-cluster-{}", random_hex(4)?);
    let token = anonymous.create_token((ADMIN, &password), ADMIN, &name, &["all"])?;
    write_private(&layout.at(TOKEN_FILE), &token)
}

/// `gitea admin ..` as the forge's own user.
fn admin_command(layout: &Layout, config: &Path, args: &[&str]) -> Result<()> {
    let data = layout.at("forge/data");
    let program = layout.at("forge/programs/gitea");
    let mut gitea = if is_root() {
        let mut setpriv = command("setpriv", [format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".into()]);
        setpriv.arg(program);
        setpriv
    } else {
        std::process::Command::new(program)
    };
    gitea.arg("admin").args(args).arg("--config").arg(config);
    gitea.env_clear().env("PATH", search_path(layout)).env("USER", "forge").env("HOME", &data).env("GITEA_WORK_DIR", &data);
    output(gitea.current_dir("/")).map(drop)
}

fn read_secret(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}; is the forge up?", path.display()))?;
    Ok(text.trim().to_owned())
}
