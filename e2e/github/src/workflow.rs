//! Workflow files: what a run is made from.
//!
//! The part of the syntax that the tests of a runner operator need: `on`, `permissions`, `env`, `defaults.run`, `jobs` with `needs`,
//! `if`, `runs-on`, a simple `strategy.matrix`, `environment`, and steps. What stands in a file and is not known here is an error.

use std::fmt;
use std::marker::PhantomData;

use anyhow::{Context, Result, bail};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::expressions::{Scope, Status, interpolate, to_text};

/// A mapping that keeps its order.
#[derive(Clone, Debug, Serialize)]
pub struct Pairs<T>(pub Vec<(String, T)>);

impl<T> Default for Pairs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
            type Value = Pairs<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Reader(PhantomData))
    }
}

impl Pairs<Value> {
    fn texts(&self) -> Map<String, Value> {
        self.0.iter().map(|(name, value)| (name.clone(), Value::String(to_text(value)))).collect()
    }
}

/// A workflow file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Workflow {
    /// Its name.
    pub name: Option<String>,
    #[serde(rename = "run-name")]
    _run_name: Option<String>,
    on: Value,
    permissions: Option<Value>,
    #[serde(default)]
    env: Pairs<Value>,
    #[serde(default)]
    defaults: Defaults,
    #[serde(rename = "concurrency")]
    _concurrency: Option<Value>,
    jobs: Pairs<Job>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Defaults {
    #[serde(default)]
    run: RunDefaults,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RunDefaults {
    shell: Option<String>,
    working_directory: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Job {
    name: Option<String>,
    runs_on: Value,
    #[serde(default)]
    needs: Value,
    #[serde(rename = "if")]
    condition: Option<Value>,
    permissions: Option<Value>,
    environment: Option<Value>,
    #[serde(default)]
    env: Pairs<Value>,
    #[serde(default)]
    defaults: Defaults,
    #[serde(default)]
    outputs: Pairs<Value>,
    #[serde(default)]
    strategy: Strategy,
    steps: Vec<Step>,
    timeout_minutes: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Strategy {
    #[serde(default)]
    matrix: Pairs<Vec<Value>>,
    #[serde(rename = "fail-fast")]
    _fail_fast: Option<bool>,
    #[serde(rename = "max-parallel")]
    _max_parallel: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Step {
    id: Option<String>,
    name: Option<String>,
    #[serde(rename = "if")]
    condition: Option<Value>,
    uses: Option<String>,
    #[serde(default)]
    with: Pairs<Value>,
    run: Option<String>,
    shell: Option<String>,
    working_directory: Option<String>,
    #[serde(default)]
    env: Pairs<Value>,
    #[serde(default)]
    continue_on_error: bool,
    timeout_minutes: Option<Value>,
}

/// One job of a run: a job of the file with one combination of its matrix.
#[derive(Clone, Debug)]
pub struct JobPlan {
    /// Its key in the file.
    pub key: String,
    /// What the forge shows.
    pub name: String,
    /// `runs-on`.
    pub labels: Vec<String>,
    /// The runner group that `runs-on` asks for.
    pub group: Option<String>,
    /// Keys of the jobs it waits for.
    pub needs: Vec<String>,
    /// Its `if`.
    pub condition: Option<String>,
    /// Whether it may ask for OIDC tokens.
    pub id_token: bool,
    /// The environment it names.
    pub environment: Option<String>,
    /// Its combination of the matrix.
    pub matrix: Value,
    /// `env` of workflow and job.
    pub env: Map<String, Value>,
    /// Its steps, as the runner gets them.
    pub steps: Vec<Value>,
    /// Expressions of its outputs.
    pub outputs: Map<String, Value>,
    /// `timeout-minutes`.
    pub timeout_minutes: u64,
}

impl Workflow {
    /// Reads a workflow file.
    ///
    /// # Errors
    /// When it is not YAML, or holds what is not known here.
    pub fn parse(text: &str) -> Result<Self> {
        let workflow: Self = serde_saphyr::from_str(text).map_err(|error| anyhow::anyhow!("the workflow file: {error}"))?;
        for (key, job) in &workflow.jobs.0 {
            for need in one_or_many(&job.needs)? {
                if !workflow.jobs.0.iter().any(|(other, _)| *other == need) {
                    bail!("job {key} needs {need}, which is not there");
                }
            }
            for step in &job.steps {
                if step.run.is_some() == step.uses.is_some() {
                    bail!("a step of job {key} needs one of `run` and `uses`");
                }
            }
        }
        Ok(workflow)
    }

    /// Whether an event with this name starts it, on this branch.
    pub fn starts_on(&self, event: &str, branch: &str) -> bool {
        let filter = match &self.on {
            Value::String(name) => return name == event,
            Value::Array(names) => return names.iter().any(|name| name == event),
            Value::Object(events) => match events.get(event) {
                None => return false,
                Some(filter) => filter,
            },
            _ => return false,
        };
        match filter["branches"].as_array() {
            None => true,
            Some(branches) => branches.iter().filter_map(Value::as_str).any(|pattern| matches(pattern, branch)),
        }
    }

    /// Its jobs. `contexts` are what is known when the run starts.
    ///
    /// # Errors
    /// For an expression that is not understood.
    pub fn plan(&self, contexts: &Value) -> Result<Vec<JobPlan>> {
        let mut plans = Vec::new();
        for (key, job) in &self.jobs.0 {
            for matrix in combinations(&job.strategy.matrix) {
                plans.push(self.plan_one(key, job, matrix, contexts).with_context(|| format!("job {key}"))?);
            }
        }
        Ok(plans)
    }

    fn plan_one(&self, key: &str, job: &Job, matrix: Vec<(String, Value)>, contexts: &Value) -> Result<JobPlan> {
        let values: Vec<String> = matrix.iter().map(|(_, value)| to_text(value)).collect();
        let matrix: Value = if matrix.is_empty() { Value::Null } else { Value::Object(matrix.into_iter().collect()) };
        let mut contexts = contexts.clone();
        contexts["matrix"] = matrix.clone();
        let scope = Scope { contexts: &contexts, status: Status::Success };
        let fill = |text: &str| interpolate(text, &scope).map_err(anyhow::Error::msg);
        let (group, labels) = match &job.runs_on {
            Value::Object(of) => (of.get("group").and_then(Value::as_str), one_or_many(of.get("labels").unwrap_or(&Value::Null))?),
            other => (None, one_or_many(other)?),
        };
        let name = match &job.name {
            Some(name) => fill(name)?,
            None if values.is_empty() => key.to_owned(),
            None => format!("{key} ({})", values.join(", ")),
        };
        let environment = match &job.environment {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) => Some(fill(name)?),
            Some(other) => Some(fill(other["name"].as_str().context("an environment has a name")?)?),
        };
        let mut env = self.env.texts();
        env.extend(job.env.texts());
        Ok(JobPlan {
            key: key.to_owned(),
            name,
            labels: labels.iter().map(|label| fill(label)).collect::<Result<_>>()?,
            group: group.map(fill).transpose()?,
            needs: one_or_many(&job.needs)?,
            condition: job.condition.as_ref().map(to_text),
            id_token: job.permissions.as_ref().or(self.permissions.as_ref()).is_some_and(grants_id_token),
            environment,
            matrix,
            env,
            steps: job.steps.iter().enumerate().map(|(number, step)| self.step(number, step, job)).collect(),
            outputs: job.outputs.texts(),
            timeout_minutes: job.timeout_minutes.as_ref().and_then(Value::as_u64).unwrap_or(360),
        })
    }

    fn step(&self, number: usize, step: &Step, job: &Job) -> Value {
        let shell = step.shell.as_ref().or(job.defaults.run.shell.as_ref()).or(self.defaults.run.shell.as_ref());
        let folder = step.working_directory.as_ref().or(job.defaults.run.working_directory.as_ref()).or(self
            .defaults
            .run
            .working_directory
            .as_ref());
        let reference = match &step.uses {
            Some(uses) => json!({"type": "repository", "name": uses}),
            None => json!({"type": "script"}),
        };
        json!({
            "id": crate::keys::uuid(),
            "type": "action",
            "contextName": step.id.clone().unwrap_or_else(|| format!("__run_{number}")),
            "name": step.id,
            "displayName": step.name,
            "reference": reference,
            "condition": step.condition.as_ref().map(to_text),
            "continueOnError": step.continue_on_error,
            "timeoutInMinutes": step.timeout_minutes.as_ref().and_then(Value::as_u64),
            "environment": step.env.texts(),
            "inputs": if step.uses.is_some() { json!(step.with.texts()) } else {
                json!({"script": step.run, "shell": shell, "workingDirectory": folder})
            },
        })
    }
}

/// Whether `permissions` let a job ask for OIDC tokens.
fn grants_id_token(permissions: &Value) -> bool {
    permissions == "write-all" || permissions["id-token"] == "write"
}

fn one_or_many(value: &Value) -> Result<Vec<String>> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(one) => Ok(vec![one.clone()]),
        Value::Array(many) => many.iter().map(|one| Ok(one.as_str().context("expected a text")?.to_owned())).collect(),
        _ => bail!("expected a text or a list of texts, found {value}"),
    }
}

fn combinations(matrix: &Pairs<Vec<Value>>) -> Vec<Vec<(String, Value)>> {
    matrix.0.iter().fold(vec![Vec::new()], |done, (name, values)| {
        done.iter()
            .flat_map(|before| values.iter().map(move |value| before.iter().cloned().chain([(name.clone(), value.clone())]).collect()))
            .collect()
    })
}

/// Whether a name fits a pattern in which `*` stands for anything without a slash and `**` for anything.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some(star) = pattern.find('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(&pattern[..star]) else { return false };
    let deep = pattern[star..].starts_with("**");
    let after = &pattern[star + if deep { 2 } else { 1 }..];
    let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    ends.take_while(|end| deep || !rest[..*end].contains('/')).any(|end| matches(after, &rest[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r"
name: CI
on:
  push: {branches: [main, 'release/**']}
  workflow_dispatch:
permissions: {id-token: write}
env: {LEVEL: 1}
jobs:
  test:
    strategy: {matrix: {os: [big, small], version: [1, 2]}}
    runs-on: ['self-hosted', '${{ matrix.os }}']
    steps:
      - uses: actions/checkout@v4
      - run: echo ${{ matrix.version }}
        if: always()
  after:
    needs: test
    permissions: {}
    environment: production
    runs-on: {group: locked, labels: [x]}
    steps: [{run: 'true', shell: bash}]
";

    #[test]
    fn a_file_becomes_jobs() {
        let workflow = Workflow::parse(FILE).unwrap();
        assert!(workflow.starts_on("push", "release/1/2") && !workflow.starts_on("push", "other"));
        assert!(workflow.starts_on("workflow_dispatch", "any") && !workflow.starts_on("pull_request", "main"));
        let jobs = workflow.plan(&json!({"github": {}})).unwrap();
        let names: Vec<_> = jobs.iter().map(|job| job.name.as_str()).collect();
        assert_eq!(names, ["test (big, 1)", "test (big, 2)", "test (small, 1)", "test (small, 2)", "after"]);
        assert_eq!(jobs[2].labels, ["self-hosted", "small"]);
        assert!(jobs[0].id_token && !jobs[4].id_token);
        assert_eq!(jobs[4].group.as_deref(), Some("locked"));
        assert_eq!(jobs[4].needs, ["test"]);
        assert_eq!(jobs[4].environment.as_deref(), Some("production"));
        assert_eq!(jobs[0].env["LEVEL"], "1");
        assert_eq!(jobs[0].steps[1]["condition"], "always()");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for file in ["on: push\njobs: {a: {runs-on: x, container: y, steps: []}}", "on: push\njobs: {a: {runs-on: x, needs: b, steps: []}}"]
        {
            assert!(Workflow::parse(file).is_err(), "{file}");
        }
    }

    #[test]
    fn patterns_match_as_documented() {
        assert!(matches("feature/*", "feature/a") && !matches("feature/*", "feature/a/b"));
        assert!(matches("**", "a/b") && matches("a*c", "abc") && !matches("a*c", "abd"));
    }
}
