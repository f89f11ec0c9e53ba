//! Looking at a local cluster.

use std::fs;
use std::thread;

use anyhow::Result;
use serde::Serialize;

use crate::layout::Layout;
use crate::local::Saved;
use crate::process::{Identity, all_recorded};
use crate::provider::Provider;
use crate::{control_plane, dns, forge};

/// How a cluster is.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Name of the cluster.
    pub name: String,
    /// Whether everything it should have runs and is healthy.
    pub healthy: bool,
    /// Its engine; nothing if it is not up.
    pub engine: Option<String>,
    /// Its processes.
    pub processes: Vec<ProcessStatus>,
    /// What was asked, and what it said.
    pub checks: Vec<Check>,
}

/// How a process is.
#[derive(Debug, Serialize)]
pub struct ProcessStatus {
    /// Part.
    pub part: String,
    /// Process id, if it runs.
    pub pid: Option<i32>,
    /// Seconds since it started.
    pub seconds: Option<u64>,
    /// Memory it and its children hold, in MiB.
    pub memory_mib: Option<u64>,
}

/// One question about the cluster's health.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What was asked.
    pub name: &'static str,
    /// Nothing if all is well, or what is wrong.
    pub problem: Option<String>,
}

impl Status {
    /// Asks the cluster.
    pub fn of(layout: &Layout) -> Self {
        let saved = Saved::read(layout);
        let processes: Vec<ProcessStatus> =
            all_recorded(layout).into_iter().map(|(part, identity)| process_status(part, identity)).collect();
        let checks = saved.as_ref().map(|saved| checks(layout, saved)).unwrap_or_default();
        let healthy =
            saved.is_some() && processes.iter().all(|process| process.pid.is_some()) && checks.iter().all(|check| check.problem.is_none());
        let engine = saved.map(|saved| saved.engine.as_str().to_owned());
        Self { name: layout.name().to_owned(), healthy, engine, processes, checks }
    }
}

fn checks(layout: &Layout, saved: &Saved) -> Vec<Check> {
    let url = saved.place.as_ref().map_or_else(|| layout.addresses().forge_url(), |place| place.local_url.clone());
    let kubeconfig = saved.kubeconfig.clone().unwrap_or_else(|| layout.kubeconfig());
    thread::scope(|scope| {
        let mut asked: Vec<(&'static str, thread::ScopedJoinHandle<'_, Result<()>>)> =
            vec![("API server", scope.spawn(|| control_plane::ready(layout, &kubeconfig)))];
        if saved.provider == Provider::Local {
            asked.push(("node", scope.spawn(|| control_plane::node_ready(layout))));
            asked.push(("engine", scope.spawn(|| saved.engine.healthy(layout))));
            asked.push(("DNS", scope.spawn(|| dns::answers(layout))));
        }
        if saved.forge {
            asked.push(("forge", scope.spawn(|| forge::healthy(&url))));
        }
        asked
            .into_iter()
            .map(|(name, thread)| {
                let problem = match thread.join() {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(format!("{error:#}")),
                    Err(_) => Some("the question was not asked to its end".to_owned()),
                };
                Check { name, problem }
            })
            .collect()
    })
}

fn process_status(part: String, identity: Identity) -> ProcessStatus {
    if !identity.alive() {
        return ProcessStatus { part, pid: None, seconds: None, memory_mib: None };
    }
    ProcessStatus { part, pid: Some(identity.pid), seconds: age(identity), memory_mib: Some(memory_of_group(identity.pid) >> 10) }
}

/// Seconds since a process started: the kernel counts hundredths since the machine did.
fn age(identity: Identity) -> Option<u64> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole seconds since a start are small and positive")]
    let now = uptime as u64;
    Some(now.saturating_sub(identity.start_time / 100))
}

/// Resident memory of a process group in KiB.
fn memory_of_group(group: i32) -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/stat"))
                .ok()
                .and_then(|stat| stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(2)?.parse::<i32>().ok())
                == Some(group)
        })
        .filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok())
        })
        .sum()
}
