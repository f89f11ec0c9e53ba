//! Building what is missing, in an order and side by side so that the whole is done as early as two cores allow.
//!
//! Three lanes run beside one another: one fetches (Go modules, Debian packages), which waits for the network; two compile, the
//! second at a lower priority, so that no core idles while a single linker runs, and what is needed first is still finished first.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};

use crate::artefacts::{GO_PARTS, GoPart, GoVersion, publish};
use crate::command::{command, output, run, run_logged};
use crate::images::{Image, Recipe};
use crate::layout::Layout;
use crate::packages;
use crate::progress::Progress;

/// Names of our own images, with the Go parts each carries.
pub const IMAGES: &[(&str, &[&str])] = &[
    ("image-pause", &["pause"]),
    ("image-coredns", &["coredns"]),
    ("image-gitea-runner", &["gitea-runner"]),
    ("image-gitea-runner-with-boto3", &["gitea-runner"]),
    (KIND_NODE, &["kubernetes", "coredns", "containerd", "runc", "pause", "cilium", "kind"]),
];
/// The image of a node of kind's that is built here.
const KIND_NODE: &str = "image-kind-node";

/// The pods' sandbox image.
pub const PAUSE_IMAGE: &str = "mayfly.test/pause:dev";
/// The cluster's DNS server.
pub const COREDNS_IMAGE: &str = "mayfly.test/coredns:dev";
/// The forge's runner with what jobs usually need.
pub const RUNNER_IMAGE: &str = "mayfly.test/gitea-runner:dev";
/// The same with AWS's SDK for Python.
pub const RUNNER_WITH_BOTO3_IMAGE: &str = "mayfly.test/gitea-runner-with-boto3:dev";
const KIND_NODE_IMAGE: &str = "mayfly.test/kind-node:dev";

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection(BTreeSet<&'static str>);

impl Selection {
    /// Everything that this machine can use: kind only where it is asked for by name.
    pub fn all() -> Self {
        Self(all_names().filter(|name| !["kind", KIND_NODE].contains(name)).collect())
    }

    /// What a cluster needs to start.
    pub fn for_cluster(cilium: bool, forge: bool) -> Self {
        let mut names: BTreeSet<&str> = ["packages", "kubernetes", "coredns", "containerd", "runc", "pause"].into();
        names.extend(["image-pause", "image-coredns"]);
        if cilium {
            names.insert("cilium");
        }
        if forge {
            names.insert("gitea");
        }
        Self(names)
    }

    /// What a cluster of kind's needs, and the image of its node where no registry is asked for it.
    pub fn for_kind(forge: bool, node: bool) -> Self {
        let mut names: BTreeSet<&str> = ["kind", "kubernetes"].into();
        names.extend(forge.then_some("gitea"));
        if node {
            names.extend(parts_of(KIND_NODE).iter().chain(&["packages", KIND_NODE]));
        }
        Self(names)
    }

    /// What somebody else's cluster needs: `kubectl`.
    pub fn for_given() -> Self {
        Self(["kubernetes"].into())
    }

    /// The parts of these names, and what they are made from.
    pub fn named(names: &[String]) -> Result<Self> {
        if names.is_empty() {
            return Ok(Self::all());
        }
        let mut chosen = BTreeSet::new();
        for name in names {
            let Some(known) = all_names().find(|known| known == name) else {
                bail!("there is no part {name:?}; there are: {}", all_names().collect::<Vec<_>>().join(", "));
            };
            chosen.insert(known);
            chosen.extend(parts_of(known));
            if ["runc", "gitea"].contains(&known) || takes_packages(known) {
                chosen.insert("packages");
            }
        }
        Ok(Self(chosen))
    }

    /// These, and the parts of these names too.
    pub fn and(self, names: &[String]) -> Result<Self> {
        let more = if names.is_empty() { Self(BTreeSet::new()) } else { Self::named(names)? };
        Ok(Self(self.0.into_iter().chain(more.0).collect()))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// Names of all parts.
pub fn all_names() -> impl Iterator<Item = &'static str> {
    std::iter::once("packages").chain(GO_PARTS.iter().map(|part| part.name)).chain(IMAGES.iter().map(|(name, _)| *name))
}

/// Builds what is missing of a selection.
pub fn build(layout: &Layout, selection: &Selection, progress: &Progress) -> Result<()> {
    fs::create_dir_all(layout.cache().join("parts"))?;
    let needs_go = GO_PARTS.iter().any(|part| selection.has(part.name));
    let mut missing = Vec::new();
    if needs_go {
        let go = GoVersion::installed()?;
        for part in GO_PARTS.iter().filter(|part| selection.has(part.name)) {
            let folder = part.folder(layout, &go)?;
            if !folder.exists() {
                missing.push((part, folder));
            }
        }
    }
    let lanes = Lanes::new(layout, progress, selection, missing);
    thread::scope(|scope| {
        scope.spawn(|| lanes.run(|| lanes.fetch()));
        scope.spawn(|| lanes.run(|| lanes.compile(false)));
        scope.spawn(|| lanes.run(|| lanes.compile(true)));
        scope.spawn(|| lanes.run(|| lanes.images()));
    });
    match lanes.board().failure.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Where a built part lies.
pub fn part_folder(layout: &Layout, name: &str) -> Result<PathBuf> {
    let folder = crate::artefacts::go_part(name)?.folder(layout, &GoVersion::installed()?)?;
    if !folder.exists() {
        bail!("{name} is not built; run `cluster build {name}`");
    }
    Ok(folder)
}

/// The Go parts that an image carries.
fn parts_of(name: &str) -> &'static [&'static str] {
    IMAGES.iter().find(|(image, _)| *image == name).map_or(&[], |(_, parts)| parts)
}

/// The image of a node of kind's, made from Debian's packages and Go modules, with Cilium as its network.
pub fn kind_node(layout: &Layout, progress: &Progress) -> Result<Image> {
    image(layout, KIND_NODE, progress)
}

/// A built image of ours.
pub fn image(layout: &Layout, name: &str, progress: &Progress) -> Result<Image> {
    image_recipe(layout, name)?.build(layout, progress)
}

fn image_recipe(layout: &Layout, name: &str) -> Result<Recipe> {
    let (source, tag) = match name {
        "image-pause" => ("e2e/images/pause", PAUSE_IMAGE),
        "image-coredns" => ("e2e/images/coredns", COREDNS_IMAGE),
        "image-gitea-runner" => ("images/gitea-runner", RUNNER_IMAGE),
        "image-gitea-runner-with-boto3" => ("e2e/images/gitea-runner-with-boto3", RUNNER_WITH_BOTO3_IMAGE),
        KIND_NODE => ("e2e/images/kind-node", KIND_NODE_IMAGE),
        _ => bail!("there is no image {name:?}"),
    };
    let source = layout.repo().join(source);
    // What one Gitea runner's image has of its own is what the other has as well; a node of kind's has the views of this cluster's.
    let mut contexts = vec![source.clone(), layout.repo().join("images/gitea-runner"), layout.repo().join("e2e/cluster")];
    for part in parts_of(name) {
        contexts.push(part_folder(layout, part)?);
    }
    Recipe::new(&source, contexts, Some(tag))
}

/// Whether an image is made from Debian's packages.
fn takes_packages(image: &str) -> bool {
    image.starts_with("image-gitea-runner") || image == KIND_NODE
}

/// What the lanes tell one another.
#[derive(Default)]
struct Board {
    fetched: BTreeSet<&'static str>,
    taken: BTreeSet<&'static str>,
    /// Modules of which a part is being compiled: two at a time would compile what they share twice.
    compiling: BTreeSet<&'static str>,
    built: BTreeSet<&'static str>,
    failure: Option<anyhow::Error>,
}

struct Lanes<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    selection: &'a Selection,
    missing: Vec<(&'static GoPart, PathBuf)>,
    board: Mutex<Board>,
    changed: Condvar,
}

impl<'a> Lanes<'a> {
    fn new(layout: &'a Layout, progress: &'a Progress, selection: &'a Selection, missing: Vec<(&'static GoPart, PathBuf)>) -> Self {
        Self { layout, progress, selection, missing, board: Mutex::default(), changed: Condvar::new() }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a lane; its failure stops the others at their next step.
    fn run(&self, lane: impl FnOnce() -> Result<()>) {
        if let Err(error) = lane() {
            self.board().failure.get_or_insert(error);
        }
        self.changed.notify_all();
    }

    fn tell(&self, write: impl FnOnce(&mut Board)) {
        write(&mut self.board());
        self.changed.notify_all();
    }

    /// Waits until `ready`, or until another lane has failed.
    fn wait(&self, ready: impl Fn(&Board) -> bool) -> bool {
        let mut board = self.board();
        while board.failure.is_none() && !ready(&board) {
            board = self.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        board.failure.is_none()
    }

    fn fetch(&self) -> Result<()> {
        // Kubernetes first: its compilation is the longest, and everything waits for it. It needs no package.
        let mut packages = self.selection.has("packages");
        for (part, _) in &self.missing {
            if part.cgo && packages {
                packages::install(self.layout, self.progress)?;
                packages = false;
                self.tell(|board| {
                    board.fetched.insert("packages");
                });
            }
            if self.board().failure.is_some() {
                return Ok(());
            }
            self.fetch_part(part).with_context(|| format!("cannot fetch the sources of {}", part.name))?;
            self.tell(|board| {
                board.fetched.insert(part.name);
            });
        }
        if packages {
            packages::install(self.layout, self.progress)?;
        }
        self.tell(|board| {
            board.fetched.insert("packages");
        });
        Ok(())
    }

    /// Brings the modules a part's packages need, and no others, into Go's module cache.
    fn fetch_part(&self, part: &GoPart) -> Result<()> {
        let step = self.progress.step(format!("{} sources", part.name));
        step.doing("waiting for the Go module proxy");
        let log = self.layout.cache().join(format!("log/{}.log", part.name));
        for program in part.programs {
            let mut list = self.go(part, "list");
            list.args(["-deps", "-f", "{{if .Error}}{{.Error}}{{end}}"]);
            if !program.tags.is_empty() {
                list.args(["-tags", program.tags]);
            }
            run_logged(list.arg(program.package), &log)?;
        }
        step.done("fetched");
        Ok(())
    }

    fn compile(&self, spare: bool) -> Result<()> {
        loop {
            let mut next = None;
            let open = self.wait(|board| {
                // The most urgent part is not for the lane that gives way.
                let may = !spare || !board.compiling.is_empty();
                board.taken.len() == self.missing.len()
                    || (may && self.missing.iter().any(|(part, _)| is_ready(part, board, self.selection)))
            });
            if !open {
                return Ok(());
            }
            self.tell(|board| {
                next = self.missing.iter().find(|(part, _)| is_ready(part, board, self.selection));
                if let Some((part, _)) = next {
                    board.taken.insert(part.name);
                    board.compiling.insert(part.module);
                }
            });
            match next {
                Some((part, folder)) => {
                    self.compile_part(part, folder, spare).with_context(|| format!("cannot build {}", part.name))?;
                    self.tell(|board| {
                        board.built.insert(part.name);
                        board.compiling.remove(part.module);
                    });
                }
                None if self.board().taken.len() == self.missing.len() => return Ok(()),
                None => {}
            }
        }
    }

    fn compile_part(&self, part: &GoPart, folder: &Path, spare: bool) -> Result<()> {
        let step = self.progress.step(part.name);
        let log = self.layout.cache().join(format!("log/{}.log", part.name));
        publish(folder, |target| {
            for program in part.programs {
                step.doing(format!("compiling {}", program.file));
                let mut build = self.go(part, "build");
                build.args(part.flags(self.layout, program)?).arg("-o").arg(target.join(program.file)).arg(program.package);
                let mut nice = command("nice", ["-n", if spare { "10" } else { "0" }]);
                nice.arg(build.get_program()).args(build.get_args());
                if let Some(folder) = build.get_current_dir() {
                    nice.current_dir(folder);
                }
                nice.env("CGO_ENABLED", if part.cgo { "1" } else { "0" });
                run_logged(&mut nice, &log)?;
            }
            if !part.data.is_empty() {
                let module = part.versioned_by.context("a part with data has a module")?;
                let source = output(self.go(part, "list").args(["-m", "-f", "{{.Dir}}", module]))?;
                for data in part.data {
                    run(command("cp", ["-r", "--"]).arg(Path::new(source.trim()).join(data)).arg(target))?;
                }
                // The module cache is read-only.
                run(command("chmod", ["-R", "u+w"]).arg(target))?;
            }
            Ok(())
        })?;
        step.done(format!("built, {} MiB", crate::images::size_of(folder)));
        Ok(())
    }

    fn images(&self) -> Result<()> {
        for (image, parts) in IMAGES.iter().filter(|(image, _)| self.selection.has(image)) {
            let missing = || self.missing.iter().filter(|(missing, _)| parts.contains(&missing.name));
            let go_on = self.wait(|board| {
                missing().all(|(part, _)| board.built.contains(part.name)) && (!takes_packages(image) || board.fetched.contains("packages"))
            });
            if !go_on {
                return Ok(());
            }
            image_recipe(self.layout, image)?.build(self.layout, self.progress).map_err(|error| anyhow!("{error:#}"))?;
        }
        Ok(())
    }

    fn go(&self, part: &GoPart, verb: &str) -> std::process::Command {
        let mut go = command("go", [verb]);
        go.current_dir(self.layout.repo().join(part.module));
        go.env("CGO_ENABLED", if part.cgo { "1" } else { "0" });
        go
    }
}

/// A part that can be compiled now and that nobody compiles yet. The first such part in the list is the most urgent.
fn is_ready(part: &GoPart, board: &Board, selection: &Selection) -> bool {
    let packages = !part.cgo || !selection.has("packages") || board.fetched.contains("packages");
    let alone = !board.compiling.contains(part.module);
    packages && alone && board.fetched.contains(part.name) && !board.taken.contains(part.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_image_brings_what_it_is_made_from() {
        let selection = Selection::named(&["image-gitea-runner".to_owned()]).unwrap();
        assert!(selection.has("gitea-runner") && selection.has("packages") && !selection.has("gitea"));
        assert_eq!(Selection::named(&[]).unwrap(), Selection::all());
        let both = Selection::for_given().and(&["helm".to_owned()]).unwrap();
        assert!(both.has("helm") && both.has("kubernetes") && !both.has("gitea"));
        let started = Selection::for_cluster(true, true);
        assert!(!started.has("minio") && started.and(&["minio".to_owned()]).unwrap().has("minio"));
        assert_eq!(Selection::for_given().and(&[]).unwrap(), Selection::for_given());
        assert!(Selection::for_kind(false, true).has("cilium") && !Selection::for_kind(true, false).has("packages"));
        let error = Selection::named(&["kubernets".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("there are: packages, kubernetes,"), "{error}");
    }

    #[test]
    fn a_cluster_without_engine_or_forge_builds_neither() {
        let selection = Selection::for_cluster(false, false);
        assert!(!selection.has("cilium") && !selection.has("gitea") && selection.has("image-coredns"));
    }

    #[test]
    fn a_part_waits_for_its_compiler_and_for_its_neighbour() {
        let runc = crate::artefacts::go_part("runc").unwrap();
        let selection = Selection::all();
        let mut board = Board::default();
        board.fetched.insert("runc");
        assert!(!is_ready(runc, &board, &selection));
        board.fetched.insert("packages");
        assert!(is_ready(runc, &board, &selection));
        board.compiling.insert(crate::artefacts::go_part("containerd").unwrap().module);
        assert!(!is_ready(runc, &board, &selection));
        board.compiling.clear();
        board.taken.insert("runc");
        assert!(!is_ready(runc, &board, &selection));
    }
}
