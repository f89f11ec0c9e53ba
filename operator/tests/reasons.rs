//! Every reason that the operator gives, for a job that waits or a runner that failed, is explained to people.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

/// What stands before a reason in the source.
const MARKS: [&str; 5] = ["refuse(\"", "Reason::new(\"", "reason: \"", "Refusal { reason: \"", "warn(&reference, \""];

#[test]
fn every_reason_is_in_the_documentation() -> io::Result<()> {
    let operator = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut reasons = BTreeSet::new();
    for folder in ["pool", "runner", "runtime"] {
        collect(&operator.join("src").join(folder), &mut reasons)?;
    }
    assert!(reasons.len() > 20, "the sources are not read rightly: {reasons:?}");
    let read = |page: &str| fs::read_to_string(operator.join("../docs").join(page));
    let text = read("troubleshooting.md")? + &read("runnerpool.md")?;
    let missing: Vec<&String> = reasons.iter().filter(|reason| !text.contains(&format!("`{reason}`"))).collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md and docs/runnerpool.md do not explain {missing:?}");
    Ok(())
}

fn collect(folder: &Path, reasons: &mut BTreeSet<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, reasons)?;
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for mark in MARKS {
            reasons.extend(code.split(mark).skip(1).filter_map(word));
        }
        // The kubelet's waiting reasons that a pod does not survive.
        let stuck = code.split("const STUCK").nth(1).and_then(|rest| rest.split("];").next()).unwrap_or_default();
        reasons.extend(stuck.lines().filter_map(|line| word(line.trim().strip_prefix('"')?)));
    }
    Ok(())
}

/// The word up to the closing quote, if it is one of the form of a reason.
fn word(text: &str) -> Option<String> {
    let word = text.split('"').next()?;
    let fits = word.len() > 3 && word.starts_with(|c: char| c.is_ascii_uppercase()) && word.chars().all(|c| c.is_ascii_alphanumeric());
    fits.then(|| word.to_owned())
}
