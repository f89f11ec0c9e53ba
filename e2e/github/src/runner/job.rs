//! Runs the steps of a job.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::process::Pid;
use serde_json::{Map, Value, json};

use super::Options;
use super::commands::{Command, object, pairs};
use super::log::Log;
use super::process::{self, End};
use super::protocol::{Job, Registration};
use crate::expressions::{Scope, Status, condition, interpolate, to_text};
use crate::keys::uuid;

/// How a job ended.
pub(crate) struct Outcome {
    /// `succeeded`, `failed`, `canceled`.
    pub(crate) conclusion: &'static str,
    /// Results of its steps.
    pub(crate) steps: Vec<Value>,
    /// Its outputs.
    pub(crate) outputs: Vec<(String, String)>,
}

/// A result with a capital letter, as the real runner's console shows it.
pub(crate) fn capitalized(conclusion: &str) -> String {
    let mut letters = conclusion.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// Runs a job.
pub(crate) fn run(job: &Job, registration: &Registration, options: &Options, cancelled: &AtomicBool, log: &Log) -> Outcome {
    log.begin_job();
    log.line(&format!("This log was written by runner-stand-in {}: {}.", env!("CARGO_PKG_VERSION"), super::WHAT_THIS_IS));
    let timeout = Duration::from_secs(60 * job.message["timeoutInMinutes"].as_u64().unwrap_or(360));
    let mut running = match Running::prepare(job, registration, options, cancelled, log) {
        Ok(running) => running,
        Err(error) => {
            log.line(&format!("##[error]{error}"));
            return Outcome { conclusion: "failed", steps: Vec::new(), outputs: Vec::new() };
        }
    };
    running.deadline = Instant::now() + timeout;
    running.all();
    process::sweep(&running.groups);
    let conclusion = match running.status() {
        Status::Success => "succeeded",
        Status::Failure => "failed",
        Status::Cancelled => "canceled",
    };
    let outputs = running.job_outputs();
    Outcome { conclusion, steps: running.results, outputs }
}

struct Running<'a> {
    job: &'a Job,
    log: &'a Log,
    cancelled: &'a AtomicBool,
    ending: &'a AtomicBool,
    deadline: Instant,
    failed: bool,
    /// What steps inherit of the container.
    inherited: BTreeMap<String, OsString>,
    /// `GITHUB_*`, `RUNNER_*`.
    own: BTreeMap<String, String>,
    /// `env` of workflow and job, and what `GITHUB_ENV` added.
    env: Map<String, Value>,
    /// What `GITHUB_PATH` added, last first.
    path: Vec<String>,
    contexts: Value,
    workspace: PathBuf,
    temp: PathBuf,
    results: Vec<Value>,
    groups: Vec<Pid>,
}

enum Result_ {
    Succeeded,
    Failed,
    Cancelled,
    Skipped,
}

impl<'a> Running<'a> {
    fn prepare(
        job: &'a Job,
        registration: &Registration,
        options: &'a Options,
        cancelled: &'a AtomicBool,
        log: &'a Log,
    ) -> Result<Self, String> {
        let message = &job.message;
        for mask in message["mask"].as_array().into_iter().flatten() {
            log.mask(mask["value"].as_str().unwrap_or_default());
        }
        let mut secrets = Map::new();
        for (name, variable) in message["variables"].as_object().into_iter().flatten() {
            if variable["isSecret"] == true {
                log.mask(variable["value"].as_str().unwrap_or_default());
                let name = if name == "system.github.token" { "GITHUB_TOKEN" } else { name };
                secrets.insert(name.to_owned(), variable["value"].clone());
            }
        }
        let mut github = message["contextData"]["github"].clone();
        let repository = github["repository"].as_str().and_then(|name| name.rsplit('/').next()).unwrap_or("repository").to_owned();
        let work = options.root.join(&registration.work_folder);
        let (outer, temp, tools) = (work.join(&repository), work.join("_temp"), work.join("_tool"));
        let workspace = outer.join(&repository);
        for folder in [&workspace, &tools, &temp.join("_github_workflow"), &temp.join("_runner_file_commands")] {
            fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let event = temp.join("_github_workflow/event.json");
        fs::write(&event, github["event"].to_string()).map_err(|error| format!("{}: {error}", event.display()))?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        github["workspace"] = json!(text(&workspace));
        github["event_path"] = json!(text(&event));
        github["token"] = secrets.get("GITHUB_TOKEN").cloned().unwrap_or_default();
        let architecture = if cfg!(target_arch = "aarch64") { "ARM64" } else { "X64" };
        let mut own: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in github.as_object().into_iter().flatten() {
            if !matches!(name.as_str(), "token" | "event" | "repositoryUrl" | "secret_source" | "repository_visibility")
                && !value.is_object()
            {
                own.insert(format!("GITHUB_{}", name.to_uppercase()), to_text(value));
            }
        }
        let variables = [
            ("CI", "true".to_owned()),
            ("GITHUB_ACTIONS", "true".to_owned()),
            ("RUNNER_NAME", registration.name.clone()),
            ("RUNNER_OS", "Linux".to_owned()),
            ("RUNNER_ARCH", architecture.to_owned()),
            ("RUNNER_ENVIRONMENT", "self-hosted".to_owned()),
            ("RUNNER_TEMP", text(&temp)),
            ("RUNNER_TOOL_CACHE", text(&tools)),
            ("RUNNER_WORKSPACE", text(&outer)),
            ("RUNNER_TRACKING_ID", format!("github_{}", uuid())),
        ];
        own.extend(variables.map(|(name, value)| (name.to_owned(), value)));
        if let Some((url, token)) = job.id_token() {
            own.insert("ACTIONS_ID_TOKEN_REQUEST_URL".to_owned(), url.to_owned());
            own.insert("ACTIONS_ID_TOKEN_REQUEST_TOKEN".to_owned(), token.to_owned());
        }
        let inherited = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| !name.starts_with("ACTIONS_RUNNER_INPUT_"));
        let runner =
            json!({"name": registration.name, "os": "Linux", "arch": architecture, "temp": text(&temp), "tool_cache": text(&tools)});
        let context = |name: &str| message["contextData"][name].clone();
        let mut running = Self {
            job,
            log,
            cancelled,
            ending: &options.ending,
            deadline: Instant::now(),
            failed: false,
            inherited: inherited.collect(),
            own,
            env: Map::new(),
            path: Vec::new(),
            contexts: json!({
                "github": github, "matrix": context("matrix"), "needs": context("needs"), "inputs": context("inputs"), "runner": runner,
                "secrets": secrets, "steps": {}, "env": {}, "job": {"status": "success"},
            }),
            workspace,
            temp,
            results: Vec::new(),
            groups: Vec::new(),
        };
        for variables in message["environmentVariables"].as_array().into_iter().flatten() {
            for (name, value) in variables.as_object().into_iter().flatten() {
                let value = running.fill(&to_text(value))?;
                running.env.insert(name.clone(), Value::String(value));
                running.contexts["env"] = json!(running.env);
            }
        }
        Ok(running)
    }

    fn status(&self) -> Status {
        if self.cancelled.load(Ordering::Relaxed) || self.ending.load(Ordering::Relaxed) || Instant::now() >= self.deadline {
            Status::Cancelled
        } else if self.failed {
            Status::Failure
        } else {
            Status::Success
        }
    }

    fn fill(&self, text: &str) -> Result<String, String> {
        interpolate(text, &Scope { contexts: &self.contexts, status: self.status() })
    }

    fn all(&mut self) {
        if let Ok(hook) = std::env::var("ACTIONS_RUNNER_HOOK_JOB_STARTED") {
            self.hook("Set up runner", &hook);
        }
        let steps = self.job.message["steps"].as_array().cloned().unwrap_or_default();
        for step in &steps {
            self.step(step);
        }
        if let Ok(hook) = std::env::var("ACTIONS_RUNNER_HOOK_JOB_COMPLETED") {
            self.hook("Complete runner", &hook);
        }
    }

    fn note(&mut self, id: &Value, name: &str, began: Timestamp, result: &Result_) {
        let conclusion = match result {
            Result_::Succeeded => "succeeded",
            Result_::Failed => "failed",
            Result_::Cancelled => "canceled",
            Result_::Skipped => "skipped",
        };
        self.results.push(json!({
            "external_id": id, "number": self.results.len() + 1, "name": name, "status": "completed", "conclusion": conclusion,
            "started_at": began.to_string(), "completed_at": Timestamp::now().to_string(),
        }));
    }

    fn hook(&mut self, name: &str, path: &str) {
        let began = Timestamp::now();
        self.log.line(&format!("A job hook has been configured by the self-hosted runner administrator: {path}"));
        let step = json!({"contextName": "hook", "environment": {}});
        let words = vec!["bash".to_owned(), "-e".to_owned(), path.to_owned()];
        let result = self.process(&step, &words, &self.workspace.clone(), &Map::new(), None);
        if matches!(result, Result_::Failed) {
            self.failed = true;
        }
        self.note(&json!(uuid()), name, began, &result);
    }

    fn step(&mut self, step: &Value) {
        let began = Timestamp::now();
        let script = step["inputs"]["script"].as_str();
        let uses = step["reference"]["name"].as_str();
        let shown = match (step["displayName"].as_str(), script, uses) {
            (Some(name), _, _) => self.fill(name).unwrap_or_else(|_| name.to_owned()),
            (None, Some(script), _) => format!("Run {}", script.trim().lines().next().unwrap_or_default()),
            (None, None, uses) => format!("Run {}", uses.unwrap_or_default()),
        };
        let scope = Scope { contexts: &self.contexts, status: self.status() };
        let wanted = condition(step["condition"].as_str(), &scope);
        let result = match wanted {
            Ok(false) => Result_::Skipped,
            Err(error) => {
                self.log.line(&format!("##[error]{error}"));
                Result_::Failed
            }
            Ok(true) => {
                self.log.line(&format!("##[group]{shown}"));
                let result = match script {
                    Some(script) => self.script(step, script),
                    None => self.action(uses.unwrap_or_default()),
                };
                result.unwrap_or_else(|error| {
                    self.log.line("##[endgroup]");
                    self.log.line(&format!("##[error]{error}"));
                    Result_::Failed
                })
            }
        };
        let forgiven = step["continueOnError"] == true;
        let (outcome, conclusion) = match result {
            Result_::Succeeded => ("success", "success"),
            Result_::Failed if forgiven => ("failure", "success"),
            Result_::Failed => ("failure", "failure"),
            Result_::Cancelled => ("cancelled", "cancelled"),
            Result_::Skipped => ("skipped", "skipped"),
        };
        if conclusion == "failure" {
            self.failed = true;
        }
        let name = step["contextName"].as_str().unwrap_or_default();
        self.contexts["steps"][name]["outcome"] = json!(outcome);
        self.contexts["steps"][name]["conclusion"] = json!(conclusion);
        self.contexts["job"]["status"] = json!(if self.failed { "failure" } else { "success" });
        self.note(&step["id"], &shown, began, &result);
    }

    fn action(&self, name: &str) -> Result<Result_, String> {
        self.log.line("##[endgroup]");
        if name.split('@').next() == Some("actions/checkout") {
            self.log.line("The stand-in runner checks nothing out: actions/checkout does nothing here.");
            return Ok(Result_::Succeeded);
        }
        Err(format!("The stand-in runner runs no actions, and cannot run {name}."))
    }

    fn script(&mut self, step: &Value, script: &str) -> Result<Result_, String> {
        let mut env = Map::new();
        for (name, value) in step["environment"].as_object().into_iter().flatten() {
            env.insert(name.clone(), Value::String(self.fill(&to_text(value))?));
        }
        let before = self.contexts["env"].take();
        let mut merged = self.env.clone();
        merged.extend(env.clone());
        self.contexts["env"] = json!(merged);
        let filled = self.prepare_script(step, script);
        self.contexts["env"] = before;
        let (words, folder) = filled?;
        self.log.line(&format!("shell: {}", words.join(" ")));
        self.log.line("##[endgroup]");
        let minutes = step["timeoutInMinutes"].as_u64();
        Ok(self.process(step, &words, &folder, &env, minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes))))
    }

    fn prepare_script(&self, step: &Value, script: &str) -> Result<(Vec<String>, PathBuf), String> {
        let script = self.fill(script)?;
        for line in script.lines() {
            self.log.line(line);
        }
        let inputs = &step["inputs"];
        let folder = match inputs["workingDirectory"].as_str() {
            Some(folder) => self.workspace.join(self.fill(folder)?),
            None => self.workspace.clone(),
        };
        let shell = inputs["shell"].as_str().map(|shell| self.fill(shell)).transpose()?;
        let (template, ending) = match shell.as_deref() {
            None if on_path("bash") => ("bash -e {0}", "sh"),
            None | Some("sh") => ("sh -e {0}", "sh"),
            Some("bash") => ("bash --noprofile --norc -e -o pipefail {0}", "sh"),
            Some("python") if on_path("python") => ("python {0}", "py"),
            Some("python") => ("python3 {0}", "py"),
            Some(custom) if custom.contains("{0}") => (custom, "sh"),
            Some(other) => return Err(format!("The stand-in runner does not know the shell {other}.")),
        };
        let file = self.temp.join(format!("{}.{ending}", uuid()));
        fs::write(&file, script).map_err(|error| format!("{}: {error}", file.display()))?;
        let words = template.split_whitespace().map(|word| word.replace("{0}", &file.to_string_lossy())).collect();
        Ok((words, folder))
    }

    fn process(&mut self, step: &Value, words: &[String], folder: &Path, env: &Map<String, Value>, deadline: Option<Instant>) -> Result_ {
        let id = uuid();
        let kinds = [
            ("GITHUB_ENV", "set_env"),
            ("GITHUB_OUTPUT", "set_output"),
            ("GITHUB_PATH", "add_path"),
            ("GITHUB_STATE", "save_state"),
            ("GITHUB_STEP_SUMMARY", "step_summary"),
        ];
        let file = |kind: &str| self.temp.join("_runner_file_commands").join(format!("{kind}_{id}"));
        let mut environment = self.inherited.clone();
        environment.extend(self.own.iter().map(|(name, value)| (name.clone(), value.into())));
        for (name, value) in self.env.iter().chain(env) {
            environment.insert(name.clone(), to_text(value).into());
        }
        environment.insert("GITHUB_ACTION".to_owned(), step["contextName"].as_str().unwrap_or_default().into());
        for (variable, kind) in kinds {
            let _ = fs::write(file(kind), "");
            environment.insert(variable.to_owned(), file(kind).into());
        }
        if !self.path.is_empty() {
            let old = environment.get("PATH").map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
            let all: Vec<&str> = self.path.iter().rev().map(String::as_str).chain([old.as_str()]).collect();
            environment.insert("PATH".to_owned(), all.join(":").into());
        }
        let mut output = Output { log: self.log, stopped: None, refused: false };
        let always = step["condition"].as_str().is_some_and(|text| text.contains("always()") || text.contains("cancelled()"));
        let already = self.status() == Status::Cancelled;
        let (cancelled, ending, job_deadline) = (self.cancelled, self.ending, self.deadline);
        let stop = || {
            // A step that is meant for cancelled jobs runs on; one that was running when the job was cancelled does not.
            let job = cancelled.load(Ordering::Relaxed) || ending.load(Ordering::Relaxed) || Instant::now() >= job_deadline;
            deadline.is_some_and(|deadline| Instant::now() >= deadline) || job && !(already && always)
        };
        let end = process::run(words, folder, &environment, &mut self.groups, |line| output.line(line), stop);
        let refused = output.refused;
        let read = |kind: &str| fs::read_to_string(file(kind)).unwrap_or_default();
        let told = self.file_commands(step, &read("set_env"), &read("set_output"), &read("add_path"));
        for (_, kind) in kinds {
            let _ = fs::remove_file(self.temp.join("_runner_file_commands").join(format!("{kind}_{id}")));
        }
        match end {
            Err(error) => {
                self.log.line(&format!("##[error]{error}"));
                Result_::Failed
            }
            Ok(End::Stopped) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                self.log.line("##[error]The action has timed out.");
                Result_::Failed
            }
            Ok(End::Stopped) => {
                self.log.line("##[error]The operation was canceled.");
                Result_::Cancelled
            }
            Ok(End::Code(0)) if told.is_ok() && !refused => Result_::Succeeded,
            Ok(End::Code(code)) => {
                match told {
                    Err(error) => self.log.line(&format!("##[error]{error}")),
                    Ok(()) if code != 0 => self.log.line(&format!("##[error]Process completed with exit code {code}.")),
                    Ok(()) => {}
                }
                Result_::Failed
            }
        }
    }

    fn file_commands(&mut self, step: &Value, env: &str, outputs: &str, path: &str) -> Result<(), String> {
        for (name, value) in pairs(env).map_err(|error| format!("Unable to process file command 'env' successfully. {error}"))? {
            if name.eq_ignore_ascii_case("NODE_OPTIONS") {
                return Err("Can't store NODE_OPTIONS output parameter using '$GITHUB_ENV' command.".to_owned());
            }
            self.env.insert(name, Value::String(value));
        }
        self.contexts["env"] = json!(self.env);
        let outputs = pairs(outputs).map_err(|error| format!("Unable to process file command 'output' successfully. {error}"))?;
        let name = step["contextName"].as_str().unwrap_or_default();
        self.contexts["steps"][name]["outputs"] = Value::Object(object(outputs));
        self.path.extend(path.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        Ok(())
    }

    fn job_outputs(&self) -> Vec<(String, String)> {
        let outputs = self.job.message["jobOutputs"].as_object();
        outputs.into_iter().flatten().filter_map(|(name, text)| Some((name.clone(), self.fill(text.as_str()?).ok()?))).collect()
    }
}

/// What a step writes.
struct Output<'a> {
    log: &'a Log,
    stopped: Option<String>,
    refused: bool,
}

impl Output<'_> {
    fn line(&mut self, line: &str) {
        let Some(command) = Command::parse(line) else { return self.log.line(line) };
        if let Some(token) = &self.stopped {
            if command.name == token.to_lowercase() {
                self.stopped = None;
            }
            return self.log.line(line);
        }
        let text = &command.text;
        match command.name.as_str() {
            "add-mask" if text.trim().is_empty() => {
                self.log.line("##[warning]Can't add secret mask for empty string in ##[add-mask] command.");
            }
            // The command itself is not logged.
            "add-mask" => self.log.mask(text),
            name @ ("error" | "warning" | "notice" | "group") => self.log.line(&format!("##[{name}]{text}")),
            "endgroup" => self.log.line("##[endgroup]"),
            "debug" | "echo" | "add-matcher" | "remove-matcher" => {}
            "stop-commands" => self.stopped = Some(text.clone()),
            name @ ("set-output" | "save-state" | "set-env" | "add-path") => {
                self.refused = true;
                self.log.line(&format!("##[error]The `{name}` command is refused by the stand-in runner. Use an environment file."));
            }
            _ => self.log.line(line),
        }
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
