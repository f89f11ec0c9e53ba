//! Copying files into an image.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::artefacts::Key;

/// Adds a file or a tree to a key: names, kinds, modes and contents. What lies below `fixed` never changes: its path stands for it.
pub(super) fn add_to_key(path: &Path, fixed: &Path, key: &mut Key) -> Result<()> {
    if path.starts_with(fixed) {
        key.text("fixed").text(&path.to_string_lossy());
        return Ok(());
    }
    let meta = fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    key.text(&path.file_name().unwrap_or_default().to_string_lossy());
    if meta.is_dir() {
        key.text("dir");
        for entry in sorted(path)? {
            add_to_key(&entry, fixed, key)?;
        }
        key.text("end");
    } else if meta.is_symlink() {
        key.text("link").text(&fs::read_link(path)?.to_string_lossy());
    } else {
        key.text("file").text(&format!("{:o}", meta.permissions().mode() & 0o7777)).file(path)?;
    }
    Ok(())
}

/// Where a source goes. A destination that ends with `/`, or that is a folder already, takes the source by its name; a source that
/// is a folder gives its content.
pub(super) fn target(root: &Path, base: &str, destination: &str, source: &Path) -> Result<PathBuf> {
    let mut target = root.to_owned();
    for part in [base, destination] {
        for component in Path::new(part).components() {
            match component {
                Component::Normal(name) => target.push(name),
                Component::RootDir | Component::CurDir => {}
                _ => bail!("{destination} is not understood here"),
            }
        }
    }
    let folder = destination.ends_with('/') || target.is_dir();
    if folder && !source.is_dir() {
        target.push(source.file_name().context("a source has a name")?);
    }
    Ok(target)
}

/// Copies a file, a link or the content of a folder, making the folders above.
pub(super) fn copy(source: &Path, target: &Path, mode: Option<u32>, owner: Option<(u32, u32)>) -> Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let meta = fs::symlink_metadata(source).with_context(|| format!("cannot read {}", source.display()))?;
    let (user, group) = owner.unwrap_or((0, 0));
    if meta.is_dir() {
        if !target.exists() {
            fs::create_dir_all(target)?;
            fs::set_permissions(target, fs::Permissions::from_mode(meta.permissions().mode() & 0o7777))?;
            chown(target, Some(user), Some(group))?;
        }
        for entry in sorted(source)? {
            let name = entry.file_name().context("an entry has a name")?;
            copy(&entry, &target.join(name), mode, owner)?;
        }
        return Ok(());
    }
    if target.symlink_metadata().is_ok() {
        fs::remove_file(target)?;
    }
    if meta.is_symlink() {
        symlink(fs::read_link(source)?, target)?;
        lchown(target, Some(user), Some(group))?;
    } else {
        fs::copy(source, target).with_context(|| format!("cannot copy {}", source.display()))?;
        chown(target, Some(user), Some(group))?;
        let mode = mode.unwrap_or(meta.permissions().mode() & 0o7777);
        fs::set_permissions(target, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Numbers of a user and a group, which may be names that the image knows.
pub(super) fn owner(root: &Path, user: &str, group: &str) -> Result<(u32, u32)> {
    Ok((number(root, "etc/passwd", user)?, number(root, "etc/group", group)?))
}

/// The number of `name` in a file of the form `NAME:x:NUMBER:`.
pub(super) fn number(root: &Path, file: &str, name: &str) -> Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = fs::read_to_string(root.join(file)).unwrap_or_default();
    text.lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then(|| fields.nth(1))??.parse().ok()
        })
        .with_context(|| format!("the image's /{file} does not know {name}"))
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_goes_into_a_folder_or_under_a_new_name() {
        let root = std::env::temp_dir().join(format!("mayfly-target-{}", std::process::id()));
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        let file = Path::new("/context/tool");
        assert_eq!(target(&root, "/", "/usr/bin", file).unwrap(), root.join("usr/bin/tool"));
        assert_eq!(target(&root, "/", "/opt/", file).unwrap(), root.join("opt/tool"));
        assert_eq!(target(&root, "/", "/opt/x", file).unwrap(), root.join("opt/x"));
        assert_eq!(target(&root, "/home", "x", file).unwrap(), root.join("home/x"));
        assert!(target(&root, "/", "/../x", file).is_err());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_key_changes_with_content_name_and_mode() {
        let folder = std::env::temp_dir().join(format!("mayfly-key-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let key = || {
            let mut key = Key::new("test");
            add_to_key(&folder, Path::new("/nowhere"), &mut key).unwrap();
            key.short()
        };
        let mut seen = vec![key()];
        let file = folder.join("a");
        fs::write(&file, "1").unwrap();
        seen.push(key());
        fs::write(&file, "2").unwrap();
        seen.push(key());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        seen.push(key());
        fs::rename(&file, folder.join("b")).unwrap();
        seen.push(key());
        assert_eq!(seen.last(), Some(&key()));
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
        fs::remove_dir_all(folder).unwrap();
    }
}
