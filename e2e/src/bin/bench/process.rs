//! Figures of one process alone, which the operator's own tests take.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use mayfly_cluster::command::output;
use mayfly_e2e::world::repository;

use super::measure::Figures;

/// What the broker does on one core, without a cluster.
pub(crate) fn broker(figures: &mut Figures) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(repository()).args(["test", "--quiet", "--release", "--workspace", "--bins"]);
    cargo.args(["--", "--ignored", "--nocapture", "--test-threads=1", "broker::figures"]);
    let said = output(&mut cargo)?;
    let mut count = 0;
    for line in said.lines().filter_map(|line| line.strip_prefix("figure ")) {
        let mut words = line.split(' ');
        let (Some(name), Some(value), Some(unit)) = (words.next(), words.next(), words.next()) else { continue };
        let unit = ["1/s", "ratio", "ms", "fetches", "MiB"].into_iter().find(|known| *known == unit).with_context(|| line.to_owned())?;
        figures.add(name, value.parse().with_context(|| line.to_owned())?, unit);
        count += 1;
    }
    ensure!(count > 0, "no figure was taken:\n{said}");
    Ok(())
}
