//! Images without a daemon: a Dockerfile's [`dockerfile`] subset is carried out on a folder, which becomes an [`archive`]. The file
//! a person would build with Docker and the image the cluster runs are therefore one, and cannot drift apart.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use self::archive::Config;
use self::dockerfile::{Base, Instruction, Stage, Variables};
use crate::artefacts::Key;
use crate::command::{command, output, run, run_logged, wait_for};
use crate::layout::Layout;
use crate::progress::Progress;

pub mod archive;
pub mod dockerfile;
mod files;
mod rootfs;

/// Part of every image's key: raise it when the same Dockerfile would give something else than before.
const BUILDER: &str = "2";

/// What to build.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The Dockerfile.
    pub dockerfile: PathBuf,
    /// Folders in which the sources of `COPY` are looked for, in this order.
    pub contexts: Vec<PathBuf>,
    /// Name of the image.
    pub tag: String,
    /// Values of `ARG`.
    pub args: Variables,
}

/// A built image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name with registry and tag.
    pub reference: String,
    /// The tar file.
    pub archive: PathBuf,
}

impl Recipe {
    /// The recipe in `path`, which is a Dockerfile or a folder with one. Without contexts, the Dockerfile's folder is it; without a
    /// tag, the image is `mayfly.test/FOLDER:dev`.
    pub fn new(path: &Path, contexts: Vec<PathBuf>, tag: Option<&str>) -> Result<Self> {
        let dockerfile = if path.is_dir() { path.join("Dockerfile") } else { path.to_owned() };
        let dockerfile = dockerfile.canonicalize().with_context(|| format!("there is no Dockerfile at {}", dockerfile.display()))?;
        let folder = dockerfile.parent().context("a Dockerfile has a folder")?.to_owned();
        let default = format!("mayfly.test/{}:dev", folder.file_name().unwrap_or_default().to_string_lossy());
        let contexts = if contexts.is_empty() { vec![folder] } else { contexts };
        Ok(Self { dockerfile, contexts, tag: archive::normalize(tag.unwrap_or(&default))?, args: Variables::new() })
    }

    /// Builds the image, or finds it built.
    pub fn build(&self, layout: &Layout, progress: &Progress) -> Result<Image> {
        let inside = || format!("in {}", self.dockerfile.display());
        let text = fs::read_to_string(&self.dockerfile).with_context(|| format!("cannot read {}", self.dockerfile.display()))?;
        let stages = dockerfile::parse(&text, &self.args).with_context(inside)?;
        let key = self.key(layout, &text, &stages).with_context(inside)?;
        // Without the tag, so that old builds of one image are forgotten whatever their tags were.
        let name = self.tag.rsplit_once(':').map_or(self.tag.as_str(), |(name, _)| name);
        let slug: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
        let folder = layout.cache().join("images").join(format!("{slug}-{key}"));
        let image = Image { reference: self.tag.clone(), archive: folder.join("image.tar") };
        if image.archive.exists() {
            return Ok(image);
        }
        if !nix::unistd::geteuid().is_root() {
            bail!("building images changes owners and roots of file trees; run this as root");
        }
        let step = progress.step(format!("image {}", self.tag));
        let work = layout.cache().join("images").join(format!(".work-{slug}.{}", std::process::id()));
        let built = crate::artefacts::publish(&folder, |target| {
            let mut builder = Builder {
                recipe: self,
                layout,
                work: &work,
                done: HashMap::new(),
                began: SystemTime::now(),
                doing: &|what| step.doing(what),
            };
            builder.stage(&stages, stages.len() - 1).with_context(inside)?;
            let (root, config) = &builder.done[&(stages.len() - 1)];
            let began = builder.began.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
            archive::write(root, config, &self.tag, began, &target.join("image.tar"))
        });
        if work.exists() {
            fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
        built?;
        step.done(format!("built, {} MiB", fs::metadata(&image.archive)?.len() >> 20));
        Ok(image)
    }

    fn key(&self, layout: &Layout, text: &str, stages: &[Stage]) -> Result<String> {
        let mut key = Key::new("image");
        key.text(BUILDER).text(&self.tag).text(text);
        for (name, value) in &self.args {
            key.text(name).text(value);
        }
        for stage in stages {
            for step in &stage.steps {
                if let Instruction::Copy { from: None, sources, .. } = &step.instruction {
                    for source in sources {
                        let path = self.find(source).with_context(|| format!("line {}: COPY", step.line))?;
                        files::add_to_key(&path, &layout.cache().join("parts"), &mut key)?;
                    }
                }
            }
        }
        Ok(key.short())
    }

    fn find(&self, source: &str) -> Result<PathBuf> {
        let source = source.trim_start_matches('/');
        let found = self.contexts.iter().map(|context| context.join(source)).find(|path| path.symlink_metadata().is_ok());
        found.with_context(|| {
            let contexts: Vec<String> = self.contexts.iter().map(|context| context.display().to_string()).collect();
            format!("{source} is not in {}; put it there or name its folder with --context", contexts.join(" nor "))
        })
    }
}

struct Builder<'a> {
    recipe: &'a Recipe,
    layout: &'a Layout,
    work: &'a Path,
    done: HashMap<usize, (PathBuf, Config)>,
    began: SystemTime,
    doing: &'a dyn Fn(String),
}

impl Builder<'_> {
    /// Carries out a stage and those it needs.
    fn stage(&mut self, stages: &[Stage], number: usize) -> Result<()> {
        if self.done.contains_key(&number) {
            return Ok(());
        }
        let stage = &stages[number];
        let root = self.work.join(number.to_string());
        fs::create_dir_all(&root)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))?;
        let mut steps = stage.steps.as_slice();
        let mut config = match &stage.base {
            Base::Scratch => Config::default(),
            Base::Debian(suite) => {
                let (packages, used) = rootfs::leading_packages(steps);
                (self.doing)(format!("Debian {suite} with {} packages", packages.len()));
                rootfs::debian(self.layout, suite, &packages, &root)?;
                steps = &steps[used..];
                let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
                Config { env: vec![("PATH".into(), path.into())], cmd: vec!["bash".into()], ..Config::default() }
            }
            Base::Stage(base) => {
                self.stage(stages, *base)?;
                let (from, config) = &self.done[base];
                run(command("cp", ["-a", "--"]).arg(from.join(".")).arg(&root))?;
                config.clone()
            }
        };
        for step in steps {
            (self.doing)(format!("line {}", step.line));
            self.step(stages, &step.instruction, &root, &mut config).with_context(|| format!("line {}", step.line))?;
        }
        self.done.insert(number, (root, config));
        Ok(())
    }

    fn step(&mut self, stages: &[Stage], instruction: &Instruction, root: &Path, config: &mut Config) -> Result<()> {
        match instruction {
            Instruction::Run { command, environment } => {
                let log = self.layout.cache().join("log/images.log");
                rootfs::run_in(root, command, environment, config, &log)
            }
            Instruction::Copy { from, sources, destination, mode, owner } => {
                let owner = owner.as_ref().map(|(user, group)| files::owner(root, user, group)).transpose()?;
                let base = if destination.starts_with('/') { "/" } else { config.workdir.as_str() };
                for source in sources {
                    let path = match from {
                        Some(stage) => {
                            self.stage(stages, *stage)?;
                            self.done[stage].0.join(source.trim_start_matches('/'))
                        }
                        None => self.recipe.find(source)?,
                    };
                    let target = files::target(root, base, destination, &path)?;
                    files::copy(&path, &target, *mode, owner)?;
                }
                Ok(())
            }
            Instruction::Env(pairs) => {
                for (name, value) in pairs {
                    config.env.retain(|(known, _)| known != name);
                    config.env.push((name.clone(), value.clone()));
                }
                Ok(())
            }
            Instruction::User(user) => {
                config.user.clone_from(user);
                Ok(())
            }
            Instruction::Workdir(folder) => {
                config.workdir.clone_from(folder);
                Ok(fs::create_dir_all(root.join(folder.trim_start_matches('/')))?)
            }
            Instruction::Entrypoint(argv) => {
                config.entrypoint.clone_from(argv);
                // As Docker does: a base's CMD was meant for the base's ENTRYPOINT.
                config.cmd.clear();
                Ok(())
            }
            Instruction::Cmd(argv) => {
                config.cmd.clone_from(argv);
                Ok(())
            }
            Instruction::Label(pairs) => {
                config.labels.extend(pairs.iter().cloned());
                Ok(())
            }
        }
    }
}

/// Puts an image into the node's containerd. Returns whether it was not there yet.
pub fn load(layout: &Layout, archive: &Path) -> Result<bool> {
    if let Some((reference, digest)) = archive::identify(archive)?
        && stored_digest(layout, &reference)?.as_deref() == Some(digest.as_str())
    {
        return Ok(false);
    }
    let log = layout.log("images");
    run_logged(ctr(layout).args(["images", "import", "--digests=false"]).arg(archive), &log)
        .with_context(|| format!("cannot import {}", archive.display()))?;
    Ok(true)
}

/// The manifest digest containerd has for a name.
fn stored_digest(layout: &Layout, reference: &str) -> Result<Option<String>> {
    let listed = output(ctr(layout).args(["images", "ls", &format!("name=={reference}")]))?;
    Ok(listed.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == reference).then(|| words.find(|word| word.starts_with("sha256:")))?.map(str::to_owned)
    }))
}

/// Waits until containerd answers. A disk that is busy with something else was seen to keep it from that for half a minute.
pub fn wait_for_runtime(layout: &Layout) -> Result<()> {
    wait_for("containerd's first answer", Duration::from_secs(120), Duration::from_millis(100), || {
        crate::process::check_running(layout, "containerd")?;
        run(ctr(layout).arg("version"))
    })
}

fn ctr(layout: &Layout) -> std::process::Command {
    let mut ctr = command(layout.bin("ctr"), ["--address"]);
    ctr.arg(layout.containerd_socket()).args(["--namespace", "k8s.io"]);
    ctr
}

/// Size in MiB of what a folder holds.
pub fn size_of(folder: &Path) -> u64 {
    fn bytes(path: &Path) -> u64 {
        let Ok(meta) = path.symlink_metadata() else { return 0 };
        if !meta.is_dir() {
            return meta.size();
        }
        fs::read_dir(path).map_or(0, |entries| entries.flatten().map(|entry| bytes(&entry.path())).sum())
    }
    bytes(folder) >> 20
}
