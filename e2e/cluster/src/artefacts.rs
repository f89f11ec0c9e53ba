//! What the cluster is built from, and where a built part lies. A part's folder is named by a hash of everything that decides
//! what is in it, so that it is built again when that changes and only then.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::command::{command, hex, output};
use crate::layout::Layout;
use crate::process::Identity;

/// Builds of one part that are kept: the one in use, the newest, and one to go back to.
const KEPT: usize = 3;

/// Programs built from one Go module.
#[derive(Debug)]
pub struct GoPart {
    /// Name of the part on the command line.
    pub name: &'static str,
    /// Folder of the module in the repository.
    pub module: &'static str,
    /// Whether C code is compiled in.
    pub cgo: bool,
    /// The module whose version is the part's.
    pub versioned_by: Option<&'static str>,
    /// What is built.
    pub programs: &'static [GoProgram],
    /// Folders of that same module which the program reads when it runs.
    pub data: &'static [&'static str],
}

/// One `go build`.
#[derive(Debug)]
pub struct GoProgram {
    /// Name of the file.
    pub file: &'static str,
    /// Package, or folder within the module.
    pub package: &'static str,
    /// Build tags.
    pub tags: &'static str,
    /// `-X` assignments; `{version}`, `{major}` and `{minor}` are those of the part.
    pub variables: &'static [&'static str],
}

impl GoProgram {
    const fn new(file: &'static str, package: &'static str) -> Self {
        Self { file, package, tags: "", variables: &[] }
    }

    const fn tags(mut self, tags: &'static str) -> Self {
        self.tags = tags;
        self
    }

    const fn variables(mut self, variables: &'static [&'static str]) -> Self {
        self.variables = variables;
        self
    }
}

const CILIUM_VERSION: &[&str] = &["github.com/cilium/cilium/pkg/version.ciliumVersion={version}"];

/// Everything built from Go modules, in the order in which a cluster needs it.
pub const GO_PARTS: &[GoPart] = &[
    GoPart {
        name: "kubernetes",
        module: "e2e/tools/kubernetes",
        cgo: false,
        versioned_by: Some("k8s.io/kubernetes"),
        programs: &[GoProgram::new("kube", "./kube").variables(&[
            "k8s.io/component-base/version.gitVersion=v{version}",
            "k8s.io/component-base/version.gitMajor={major}",
            "k8s.io/component-base/version.gitMinor={minor}",
            "k8s.io/client-go/pkg/version.gitVersion=v{version}",
        ])],
        data: &[],
    },
    GoPart {
        name: "coredns",
        module: "e2e/tools/kubernetes",
        cgo: false,
        versioned_by: None,
        programs: &[GoProgram::new("coredns", "./coredns")],
        data: &[],
    },
    GoPart {
        name: "containerd",
        module: "e2e/tools/containerd",
        cgo: false,
        versioned_by: None,
        programs: &[
            GoProgram::new("containerd", "github.com/containerd/containerd/v2/cmd/containerd").tags("no_btrfs"),
            GoProgram::new("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2").tags("no_btrfs"),
            GoProgram::new("ctr", "github.com/containerd/containerd/v2/cmd/ctr").tags("no_btrfs"),
        ],
        data: &[],
    },
    GoPart {
        name: "runc",
        module: "e2e/tools/containerd",
        cgo: true,
        versioned_by: None,
        programs: &[GoProgram::new("runc", "github.com/opencontainers/runc").tags("seccomp")],
        data: &[],
    },
    GoPart {
        name: "pause",
        module: "e2e/images/pause",
        cgo: false,
        versioned_by: None,
        programs: &[GoProgram::new("pause", ".")],
        data: &[],
    },
    GoPart {
        name: "cilium",
        module: "e2e/tools/cilium",
        cgo: false,
        versioned_by: Some("github.com/cilium/cilium"),
        programs: &[
            GoProgram::new("cilium-agent", "github.com/cilium/cilium/daemon").tags("osusergo").variables(CILIUM_VERSION),
            GoProgram::new("cilium-operator-generic", "github.com/cilium/cilium/operator")
                .tags("osusergo,ipam_provider_operator")
                .variables(CILIUM_VERSION),
            GoProgram::new("cilium-cni", "github.com/cilium/cilium/plugins/cilium-cni").tags("osusergo").variables(CILIUM_VERSION),
            GoProgram::new("cilium-dbg", "github.com/cilium/cilium/cilium-dbg").tags("osusergo").variables(CILIUM_VERSION),
        ],
        data: &["bpf"],
    },
    GoPart {
        name: "gitea",
        module: "e2e/tools/gitea",
        cgo: true,
        versioned_by: Some("code.gitea.io/gitea"),
        programs: &[GoProgram::new("gitea", "code.gitea.io/gitea")
            .tags("sqlite sqlite_unlock_notify")
            .variables(&["main.Version={version}"])],
        data: &["templates", "options", "public"],
    },
    GoPart {
        name: "gitea-runner",
        module: "e2e/tools/gitea-runner",
        cgo: false,
        versioned_by: None,
        programs: &[GoProgram::new("gitea-runner", "gitea.com/gitea/runner")],
        data: &[],
    },
    GoPart {
        name: "helm",
        module: "e2e/tools/kubernetes",
        cgo: false,
        versioned_by: None,
        programs: &[GoProgram::new("helm", "helm.sh/helm/v4/cmd/helm")],
        data: &[],
    },
    GoPart {
        name: "minio",
        module: "e2e/tools/minio",
        cgo: false,
        versioned_by: None,
        programs: &[
            GoProgram::new("minio", "github.com/minio/minio"),
            // Its client, which shares nearly all packages.
            GoProgram::new("mc", "github.com/minio/mc"),
        ],
        data: &[],
    },
    GoPart {
        name: "clouds",
        module: "e2e/tools/clouds",
        cgo: false,
        versioned_by: None,
        programs: &[GoProgram::new("clouds", ".")],
        data: &[],
    },
    GoPart {
        name: "kwok",
        module: "e2e/tools/kwok",
        cgo: false,
        versioned_by: Some("sigs.k8s.io/kwok"),
        programs: &[GoProgram::new("kwok", "sigs.k8s.io/kwok/cmd/kwok")],
        // What becomes of nodes and pods, and when.
        data: &["kustomize/stage"],
    },
    GoPart {
        name: "kind",
        module: "e2e/tools/kind",
        cgo: false,
        versioned_by: Some("sigs.k8s.io/kind"),
        programs: &[GoProgram::new("kind", "sigs.k8s.io/kind")],
        // What its node image is made of.
        data: &["images/base/files"],
    },
];

/// The part of that name.
pub fn go_part(name: &str) -> Result<&'static GoPart> {
    GO_PARTS.iter().find(|part| part.name == name).with_context(|| format!("there is no part {name:?}"))
}

impl GoPart {
    /// Arguments of `go build` and `go list` for one program, apart from `-o`.
    pub fn flags(&self, layout: &Layout, program: &GoProgram) -> Result<Vec<String>> {
        let mut linker = "-s -w".to_owned();
        if !program.variables.is_empty() {
            let version = self.version(layout)?;
            let mut numbers = version.split('.');
            let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
            for variable in program.variables {
                let variable = variable.replace("{version}", &version).replace("{major}", major).replace("{minor}", minor);
                linker.push_str(" -X ");
                linker.push_str(&variable);
            }
        }
        let mut flags = vec!["-trimpath".to_owned(), "-buildvcs=false".to_owned()];
        if !program.tags.is_empty() {
            flags.extend(["-tags".to_owned(), program.tags.to_owned()]);
        }
        flags.extend(["-ldflags".to_owned(), linker]);
        Ok(flags)
    }

    /// Version of the part, as its go.mod requires it, without the `v`.
    pub fn version(&self, layout: &Layout) -> Result<String> {
        let module = self.versioned_by.with_context(|| format!("part {} has no version", self.name))?;
        let path = layout.repo().join(self.module).join("go.mod");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        required_version(&text, module).with_context(|| format!("{} does not require {module}", path.display()))
    }

    /// Where this part is, or will be, built.
    pub fn folder(&self, layout: &Layout, go: &GoVersion) -> Result<PathBuf> {
        Ok(layout.cache().join("parts").join(format!("{}-{}", self.name, self.key(layout, go)?)))
    }

    fn key(&self, layout: &Layout, go: &GoVersion) -> Result<String> {
        let module = layout.repo().join(self.module);
        let mut key = Key::new("go");
        key.text(&go.0).text(if self.cgo { "cgo" } else { "static" });
        for file in ["go.mod", "go.sum"] {
            let path = module.join(file);
            // A module without dependencies has no go.sum.
            if file == "go.mod" || path.exists() {
                key.file(&path)?;
            }
        }
        for program in self.programs {
            key.text(program.file).text(program.package);
            for flag in self.flags(layout, program)? {
                key.text(&flag);
            }
            if let Some(own) = program.package.strip_prefix('.') {
                key.go_files(&module.join(own.trim_start_matches('/')))?;
            }
        }
        for data in self.data {
            key.text(data);
        }
        Ok(key.short())
    }
}

/// The version in a `require` of a go.mod.
fn required_version(go_mod: &str, module: &str) -> Option<String> {
    go_mod.lines().find_map(|line| {
        let line = line.trim();
        let mut words = line.strip_prefix("require ").unwrap_or(line).split_whitespace();
        (words.next()? == module).then(|| words.next())?.filter(|word| *word != "=>")?.strip_prefix('v').map(str::to_owned)
    })
}

/// What `go version` says.
#[derive(Clone, Debug)]
pub struct GoVersion(String);

impl GoVersion {
    /// Asks the Go that would build, once.
    pub fn installed() -> Result<Self> {
        static KNOWN: OnceLock<GoVersion> = OnceLock::new();
        if let Some(known) = KNOWN.get() {
            return Ok(known.clone());
        }
        let text = output(&mut command("go", ["version"]))
            .context("Go is needed to build the cluster's parts: install Go 1.26 or newer and put it on PATH (https://go.dev/dl/)")?;
        Ok(KNOWN.get_or_init(|| Self(text.trim().to_owned())).clone())
    }
}

/// A hash under construction. Each piece is preceded by its length, so that pieces cannot run into one another.
pub struct Key(Sha256);

impl Key {
    /// `kind` keeps keys of different kinds apart.
    pub fn new(kind: &str) -> Self {
        let mut key = Self(Sha256::new());
        key.text(kind);
        key
    }

    /// Adds a text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    /// Adds bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds the content of a file.
    pub fn file(&mut self, path: &Path) -> Result<&mut Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.bytes(&content))
    }

    fn go_files(&mut self, folder: &Path) -> Result<&mut Self> {
        let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut files: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "go")).collect();
        files.sort();
        for file in files {
            self.text(&file.file_name().unwrap_or_default().to_string_lossy()).file(&file)?;
        }
        Ok(self)
    }

    /// The first 16 hexadecimal digits.
    pub fn short(self) -> String {
        let mut text = hex(&self.0.finalize());
        text.truncate(16);
        text
    }
}

/// Makes a folder of the cache in one step: `fill` works in a temporary one, which then takes its place.
pub fn publish(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = folder.parent().with_context(|| format!("{} has no parent", folder.display()))?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    sweep(parent);
    let working = parent.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_dir_all(&working);
    fs::create_dir_all(&working).with_context(|| format!("cannot make {}", working.display()))?;
    let filled = fill(&working);
    if let Err(error) = filled {
        let _ = fs::remove_dir_all(&working);
        return Err(error);
    }
    match fs::rename(&working, folder) {
        Ok(()) => {}
        // Another process was faster; the same key means the same content.
        Err(_) if folder.exists() => fs::remove_dir_all(&working)?,
        Err(error) => return Err(error).with_context(|| format!("cannot put {} in place", folder.display())),
    }
    forget_old(parent, &name)
}

/// Removes working folders, `.NAME.PID`, of processes that are gone: somebody interrupted them.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix('.')?.rsplit_once('.')?.1.parse::<i32>().ok());
        if pid.is_some_and(|pid| Identity::of(pid).is_none()) {
            // Another process may sweep too.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Removes all but the newest few folders `PART-*` beside a new one.
fn forget_old(parent: &Path, newest: &str) -> Result<()> {
    let Some((part, _)) = newest.rsplit_once('-') else { bail!("{newest} is not NAME-KEY") };
    let mut builds: Vec<(std::time::SystemTime, PathBuf)> = fs::read_dir(parent)?
        .flatten()
        .filter(|entry| entry.file_name().to_str().and_then(|name| name.rsplit_once('-')).is_some_and(|(name, _)| name == part))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    builds.sort();
    for (_, path) in builds.iter().rev().skip(KEPT) {
        if path.is_dir() {
            fs::remove_dir_all(path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_key_cannot_run_together() {
        let key = |pieces: &[&str]| {
            let mut key = Key::new("test");
            for piece in pieces {
                key.text(piece);
            }
            key.short()
        };
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["ab"]), key(&["ab", ""]));
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        assert_eq!(key(&["x"]).len(), 16);
    }

    #[test]
    fn version_comes_from_the_requirement_not_the_replacement() {
        let text = "require (\n\tk8s.io/kubernetes v1.36.3\n\tx v1.0.0 // indirect\n)\nreplace x => y v2.0.0\nrequire z v3.1.4\n";
        assert_eq!(required_version(text, "k8s.io/kubernetes").as_deref(), Some("1.36.3"));
        assert_eq!(required_version(text, "x").as_deref(), Some("1.0.0"));
        assert_eq!(required_version(text, "z").as_deref(), Some("3.1.4"));
        assert_eq!(required_version(text, "k8s.io"), None);
    }

    #[test]
    fn every_part_has_a_key_of_its_own_and_a_version_where_it_says_so() {
        let layout = Layout::new("keys").unwrap();
        let go = GoVersion("go version go1.26.8 linux/amd64".to_owned());
        let mut keys: Vec<String> = GO_PARTS.iter().map(|part| part.key(&layout, &go).unwrap()).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), GO_PARTS.len());
        let newer = GoVersion("go version go1.27.0 linux/amd64".to_owned());
        assert_ne!(GO_PARTS[0].key(&layout, &go).unwrap(), GO_PARTS[0].key(&layout, &newer).unwrap());
    }

    #[test]
    fn a_folder_appears_whole_and_only_a_few_are_kept() {
        let parent = std::env::temp_dir().join(format!("mayfly-publish-{}", std::process::id()));
        for number in 0..5 {
            let folder = parent.join(format!("part-{number}"));
            publish(&folder, |working| Ok(fs::write(working.join("file"), "x")?)).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(publish(&parent.join("part-9"), |_| bail!("no")).is_err());
        // No pid is that large.
        fs::create_dir(parent.join(".part-1.99999999")).unwrap();
        assert!(publish(&parent.join("part-9"), |_| bail!("no")).is_err());
        let mut left: Vec<String> = fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["part-2", "part-3", "part-4"]);
        fs::remove_dir_all(parent).unwrap();
    }
}
