//! An image as one tar file that `docker load`, `ctr images import` and `kind load image-archive` take: an OCI image layout with
//! the older `manifest.json` beside it. The same content gives the same bytes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use super::dockerfile::architecture;
use crate::command::hex;

/// Time of everything that was made while the image was built, and the latest time in an image. Older times are kept, because
/// compiled Python files remember those of their sources.
pub const YOUNGEST: u64 = 1_793_491_200;

/// What a container of the image runs, and as whom.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Variables.
    pub env: Vec<(String, String)>,
    /// User and group.
    pub user: String,
    /// Folder.
    pub workdir: String,
    /// Program.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// Labels.
    pub labels: Vec<(String, String)>,
}

/// Writes the image `reference` with the files of `root` as its only layer. Building it began at `began` (seconds since 1970).
pub fn write(root: &Path, config: &Config, reference: &str, began: u64, archive: &Path) -> Result<()> {
    let layer_path = archive.with_extension("layer");
    let layer = write_layer(root, began, &layer_path).context("cannot write the layer")?;
    let config = config_json(config, &layer.digest).to_string();
    let config = Blob::of(config.as_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{}", config.digest), "size": config.size,
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{}", layer.digest), "size": layer.size,
        }],
    })
    .to_string();
    let manifest = Blob::of(manifest.as_bytes());
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": format!("sha256:{}", manifest.digest),
            "size": manifest.size,
            "platform": {"architecture": architecture(), "os": "linux"},
            "annotations": {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": tag(reference)},
        }],
    });
    let docker = json!([{
        "Config": blob_path(&config.digest), "RepoTags": [reference], "Layers": [blob_path(&layer.digest)],
    }]);

    let mut out = Builder::new(io::BufWriter::new(File::create(archive)?));
    let mut add =
        |name: &str, content: &[u8]| -> io::Result<()> { out.append_data(&mut plain_header(content.len() as u64), name, content) };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    add("index.json", index.to_string().as_bytes())?;
    add("manifest.json", docker.to_string().as_bytes())?;
    add(&blob_path(&config.digest), &config.content)?;
    add(&blob_path(&manifest.digest), &manifest.content)?;
    out.append_data(&mut plain_header(layer.size), blob_path(&layer.digest), File::open(&layer_path)?)?;
    out.into_inner()?.flush()?;
    fs::remove_file(&layer_path)?;
    Ok(())
}

/// Reference and manifest digest (`sha256:...`) of an archive that names them: one that [`write()`] wrote.
pub fn identify(archive: &Path) -> Result<Option<(String, String)>> {
    let file = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
    let mut tar = tar::Archive::new(file);
    let entries = tar.entries().with_context(|| format!("{} is not a tar file", archive.display()))?;
    for entry in entries {
        let mut entry = entry.with_context(|| format!("{} is not a tar file", archive.display()))?;
        if entry.path()?.as_ref() == Path::new("index.json") {
            let mut text = String::new();
            entry.read_to_string(&mut text)?;
            let index: Value = serde_json::from_str(&text)?;
            let manifests = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default();
            let [manifest] = manifests else { return Ok(None) };
            let name = manifest["annotations"]["io.containerd.image.name"].as_str();
            let digest = manifest["digest"].as_str();
            return Ok(name.zip(digest).map(|(name, digest)| (name.to_owned(), digest.to_owned())));
        }
    }
    Ok(None)
}

/// A reference as containerd stores it: with registry, repository and tag.
pub fn normalize(reference: &str) -> Result<String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:".contains(c) || c.is_ascii_uppercase();
    if reference.is_empty() || !reference.chars().all(allowed) {
        bail!("{reference:?} is not an image name");
    }
    let (name, tag) = match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    };
    if name.is_empty() || tag.is_empty() || name.chars().any(|c| c.is_ascii_uppercase()) {
        bail!("{reference:?} is not an image name");
    }
    let registry = name.split_once('/').map(|(first, _)| first).filter(|first| first.contains(['.', ':']) || *first == "localhost");
    Ok(match registry {
        Some(_) => format!("{name}:{tag}"),
        None if name.contains('/') => format!("docker.io/{name}:{tag}"),
        None => format!("docker.io/library/{name}:{tag}"),
    })
}

struct Blob {
    content: Vec<u8>,
    digest: String,
    size: u64,
}

impl Blob {
    fn of(content: &[u8]) -> Self {
        Self { content: content.to_vec(), digest: hex(&Sha256::digest(content)), size: content.len() as u64 }
    }
}

struct Layer {
    digest: String,
    size: u64,
}

/// Passes bytes on and hashes them.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn write_layer(root: &Path, began: u64, layer: &Path) -> Result<Layer> {
    let hashing = Hashing { inner: io::BufWriter::new(File::create(layer)?), hash: Sha256::new(), size: 0 };
    let mut tar = Builder::new(hashing);
    let mut paths = Vec::new();
    walk(root, &mut paths)?;
    paths.sort();
    let mut links: HashMap<(u64, u64), PathBuf> = HashMap::new();
    for path in paths {
        let name = path.strip_prefix(root)?.to_owned();
        let meta = fs::symlink_metadata(&path)?;
        let mut header = Header::new_gnu();
        header.set_mode(meta.mode() & 0o7777);
        header.set_uid(u64::from(meta.uid()));
        header.set_gid(u64::from(meta.gid()));
        let mtime = u64::try_from(meta.mtime()).unwrap_or(0);
        header.set_mtime(if mtime >= began { YOUNGEST } else { mtime.min(YOUNGEST) });
        header.set_size(0);
        let kind = meta.file_type();
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            tar.append_data(&mut header, &name, io::empty())?;
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            tar.append_link(&mut header, &name, fs::read_link(&path)?)?;
        } else if kind.is_file() {
            let first = (meta.nlink() > 1).then(|| links.get(&(meta.dev(), meta.ino())).cloned()).flatten();
            if let Some(first) = first {
                header.set_entry_type(EntryType::Link);
                tar.append_link(&mut header, &name, first)?;
            } else {
                links.insert((meta.dev(), meta.ino()), name.clone());
                header.set_entry_type(EntryType::Regular);
                header.set_size(meta.len());
                tar.append_data(&mut header, &name, File::open(&path)?)?;
            }
        }
        // Devices, sockets and pipes are the runtime's business.
    }
    let mut hashing = tar.into_inner()?;
    hashing.flush()?;
    Ok(Layer { digest: hex(&hashing.hash.finalize()), size: hashing.size })
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_bytes().starts_with(b".wh.") {
            bail!("{} would mean a deletion in an image", entry.path().display());
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            walk(&path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

fn config_json(config: &Config, layer: &str) -> Value {
    let env: Vec<String> = config.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let labels: serde_json::Map<String, Value> =
        config.labels.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    let mut run = json!({"Env": env, "Entrypoint": config.entrypoint, "Cmd": config.cmd, "Labels": labels});
    for (name, value) in [("User", &config.user), ("WorkingDir", &config.workdir)] {
        if !value.is_empty() {
            run[name] = Value::from(value.as_str());
        }
    }
    json!({
        "architecture": architecture(),
        "os": "linux",
        "created": "2026-11-01T00:00:00Z",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
        "history": [{"created": "2026-11-01T00:00:00Z", "created_by": "cluster image"}],
    })
}

fn plain_header(size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(YOUNGEST);
    header.set_size(size);
    header
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

fn tag(reference: &str) -> &str {
    reference.rsplit_once(':').map_or("latest", |(_, tag)| tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stored_the_way_the_kubelet_asks_for_them() {
        for (given, stored) in [
            ("pause", "docker.io/library/pause:latest"),
            ("mayfly/operator:dev", "docker.io/mayfly/operator:dev"),
            ("mayfly.test/gate", "mayfly.test/gate:latest"),
            ("localhost:5000/a/b:1", "localhost:5000/a/b:1"),
            ("ghcr.io/x/y:V1", "ghcr.io/x/y:V1"),
        ] {
            assert_eq!(normalize(given).unwrap(), stored);
        }
        for bad in ["", "a b", "A/b", ":x", "x:", "x;y"] {
            assert!(normalize(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn same_content_gives_the_same_bytes_whatever_the_clock_says() {
        use std::os::unix::fs::symlink;
        let folder = std::env::temp_dir().join(format!("mayfly-archive-{}", std::process::id()));
        let mut archives = Vec::new();
        for number in 0..2 {
            let root = folder.join(format!("root{number}"));
            fs::create_dir_all(root.join("bin")).unwrap();
            fs::write(root.join("bin/b"), "b").unwrap();
            fs::write(root.join("bin/a"), "a").unwrap();
            fs::hard_link(root.join("bin/a"), root.join("bin/c")).unwrap();
            symlink("a", root.join("bin/d")).unwrap();
            let archive = folder.join(format!("{number}.tar"));
            let config = Config { entrypoint: vec!["/bin/a".into()], user: "65532".into(), ..Config::default() };
            write(&root, &config, "mayfly.test/x:1", 0, &archive).unwrap();
            let (name, digest) = identify(&archive).unwrap().unwrap();
            assert_eq!(name, "mayfly.test/x:1");
            assert!(digest.starts_with("sha256:"));
            archives.push(fs::read(&archive).unwrap());
        }
        assert!(archives[0] == archives[1]);
        fs::remove_dir_all(folder).unwrap();
    }
}
