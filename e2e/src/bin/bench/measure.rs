//! How figures are taken: what was seen when, what the API server was asked, and how it is told.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, ResourceExt};
use mayfly_cluster::Cluster;
use mayfly_cluster::command::output;
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{SYSTEM, repository};
use serde_json::{Value, json};
use tokio::sync::Mutex;

/// Figures, told as they come.
#[derive(Default)]
pub(crate) struct Figures(Vec<(String, f64, &'static str)>);

impl Figures {
    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        let name = name.into();
        // Nobody to tell if the terminal is gone.
        let _ = writeln!(std::io::stdout(), "{name} {value:.3} {unit}");
        self.0.push((name, value, unit));
    }

    pub(crate) fn spread(&mut self, name: &str, mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        self.add(format!("{name}_p50"), at(0.5), "s");
        if values.len() >= 20 {
            self.add(format!("{name}_p95"), at(0.95), "s");
        }
        self.add(format!("{name}_max"), at(1.0), "s");
        at(0.5)
    }

    pub(crate) fn write(&self) -> Result<()> {
        let all: Vec<Value> = self.0.iter().map(|(name, value, unit)| json!({"name": name, "value": value, "unit": unit})).collect();
        let file = repository().join("target/bench.json");
        fs::write(&file, serde_json::to_string_pretty(&all)?).with_context(|| file.display().to_string())
    }
}

/// When pods of the stage were first seen, when their deletion was, and when they were gone.
#[derive(Clone, Default)]
pub(crate) struct Times(pub(crate) Arc<Mutex<BTreeMap<String, Life>>>);

#[derive(Clone, Copy)]
pub(crate) struct Life {
    pub(crate) seen: f64,
    pub(crate) leaving: Option<f64>,
    pub(crate) gone: Option<f64>,
}

impl Times {
    pub(crate) fn watch(api: Api<Pod>) -> Self {
        let times = Self::default();
        let seen = times.clone();
        tokio::spawn(async move {
            let mut events = watcher(api, Config::default()).boxed();
            while let Ok(Some(event)) = events.try_next().await {
                let now = now();
                let mut all = seen.0.lock().await;
                match event {
                    Event::Apply(pod) | Event::InitApply(pod) => {
                        let life = all.entry(pod.name_any()).or_insert(Life { seen: now, leaving: None, gone: None });
                        if pod.metadata.deletion_timestamp.is_some() {
                            life.leaving.get_or_insert(now);
                        }
                    }
                    Event::Delete(pod) => drop(all.entry(pod.name_any()).and_modify(|life| life.gone = Some(now))),
                    Event::Init | Event::InitDone => {}
                }
            }
        });
        times
    }

    /// The life of a pod that is gone: of this name, or of the only one.
    pub(crate) async fn over(&self, name: Option<&str>) -> Result<Life> {
        eventually("the pod's end", Duration::from_secs(10), || async {
            let all = self.0.lock().await;
            Ok(all.iter().find(|(pod, life)| name.is_none_or(|name| name == *pod) && life.gone.is_some()).map(|(_, life)| *life))
        })
        .await
    }
}

pub(crate) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|time| time.as_secs_f64()).unwrap_or_default()
}

/// Calls of the operator, by kind (`read`, `write`) and by verb and resource.
pub(crate) type Calls = BTreeMap<(String, String), u32>;

/// What the API server's log says from some moment on.
pub(crate) struct Audited {
    log: PathBuf,
    before: u64,
}

impl Audited {
    pub(crate) fn from_now(cluster: &Cluster) -> Result<Self> {
        let log = cluster.audit_log();
        let before = fs::metadata(&log)?.len();
        Ok(Self { log, before })
    }

    pub(crate) fn calls(&self) -> Result<Calls> {
        let text = fs::read(&self.log)?;
        ensure!(text.len() as u64 >= self.before, "the audit log was rotated meanwhile: run the benchmark again");
        Ok(count(&String::from_utf8_lossy(&text[usize::try_from(self.before)?..])))
    }
}

/// How many of a kind each job took.
pub(crate) fn per_job(calls: &Calls, kind: &str, jobs: usize) -> f64 {
    calls.iter().filter(|((k, _), _)| k == kind).map(|(_, n)| f64::from(*n)).sum::<f64>().abs() / jobs as f64
}

fn count(log: &str) -> Calls {
    let account = format!("system:serviceaccount:{SYSTEM}:mayfly-controller");
    let mut calls = BTreeMap::new();
    for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let verb = event["verb"].as_str().unwrap_or_default();
        let kind = match verb {
            "get" | "list" => "read",
            "create" | "update" | "patch" | "delete" | "deletecollection" => "write",
            _ => continue,
        };
        if event["user"]["username"].as_str() != Some(account.as_str()) || event["stage"].as_str() != Some("ResponseComplete") {
            continue;
        }
        let what = &event["objectRef"];
        let resource = what["resource"].as_str().unwrap_or_default();
        let resource = what["subresource"].as_str().map_or(resource.to_owned(), |sub| format!("{resource}/{sub}"));
        *calls.entry((kind.to_owned(), format!("{verb} {resource}"))).or_insert(0) += 1;
    }
    calls
}

/// What the operator counts, at one moment.
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) fn now(cluster: &Cluster) -> Result<Self> {
        let mut get = cluster.kubectl();
        get.args(["-n", SYSTEM, "get", "pods", "-l", "app.kubernetes.io/component=controller", "-o", "jsonpath={.items[0].metadata.name}"]);
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{}:8081/proxy/metrics", output(&mut get)?.trim());
        Ok(Self(output(cluster.kubectl().args(["get", "--raw", &path]))?))
    }

    /// Of a series by its whole name, labels included.
    pub(crate) fn value(&self, name: &str) -> Result<f64> {
        let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
        self.0.lines().find_map(of).with_context(|| name.to_owned())
    }
}

/// Ticks of the kernel's accounting in a second, on Linux.
const TICKS: f64 = 100.0;

/// A process of this machine.
pub(crate) struct Process(PathBuf);

impl Process {
    /// The operator's.
    pub(crate) fn operator() -> Result<Self> {
        Self::find("the operator", |words| words == ["/mayfly", "controller"])
    }

    /// The API server's.
    pub(crate) fn api_server() -> Result<Self> {
        Self::find("the API server", |words| words.first().is_some_and(|program| program.ends_with("/kube-apiserver")))
    }

    fn find(what: &str, is: impl Fn(&[&str]) -> bool) -> Result<Self> {
        for process in fs::read_dir("/proc")?.flatten() {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            if is(&command.split_terminator('\0').collect::<Vec<_>>()) {
                return Ok(Self(process.path()));
            }
        }
        anyhow::bail!("the process of {what} was not found on this machine")
    }

    /// What it has in memory, in MiB.
    pub(crate) fn memory(&self) -> Result<f64> {
        let status = fs::read_to_string(self.0.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    /// Processor time it has used so far, in seconds.
    pub(crate) fn used(&self) -> Result<f64> {
        let stat = fs::read_to_string(self.0.join("stat"))?;
        // The name, in parentheses, may have spaces. After it the 12th and 13th.
        let fields = stat.rsplit_once(')').context("a name")?.1.split_whitespace().skip(11);
        Ok(fields.take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()? / TICKS)
    }

    /// Established TCP connections of its network namespace.
    pub(crate) fn connections(&self) -> Result<f64> {
        let mut count = 0;
        for table in ["net/tcp", "net/tcp6"] {
            let text = fs::read_to_string(self.0.join(table))?;
            count += text.lines().skip(1).filter(|line| line.split_whitespace().nth(3) == Some("01")).count();
        }
        Ok(count as f64)
    }
}
