//! How many pods, and which of them have to go: a pure function from what was seen to what shall be done.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::accept::Refusal;
use super::registry::OwedJob;
use super::validate::Deadlines;
use crate::forge::JobKey;
use crate::runner::{Phase, Reason};

/// A runner is only taken back for want of a job after this long: the job may be on its way to it.
const SETTLE: SignedDuration = SignedDuration::from_secs(5);
/// Between keeping a runner from new jobs and removing it: what it had taken by then is seen.
const PAUSE: SignedDuration = SignedDuration::from_secs(2);
/// Oldest age of a pod that waits ahead of demand.
const WARM_AGE: SignedDuration = SignedDuration::from_hours(1);

/// Seconds a pod has to end by itself when its job is over: the runner is leaving anyway.
const GRACE_DONE: u32 = 2;
/// Seconds for a runner that must stop: enough for it to tell the forge that the job is cancelled.
const GRACE_STOP: u32 = 1;
/// Seconds for a job past its deadline.
const GRACE_DEADLINE: u32 = 10;

/// What was seen.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) now: Timestamp,
    pub(crate) max: u32,
    pub(crate) warm: u32,
    /// Nodes on which a pod is wanted for the sake of the proof of isolation alone.
    pub(crate) probe: Vec<String>,
    pub(crate) deadlines: Deadlines,
    /// Accepted jobs that wait, oldest first.
    pub(crate) queued: Vec<OwedJob>,
    /// Every pod of the pool.
    pub(crate) pods: Vec<PodFacts>,
    /// Pods that the namespace's quotas leave room for, beside those; `None` where no quota counts them.
    pub(crate) quota: Option<u32>,
    /// No pod is created before.
    pub(crate) not_before: Option<Timestamp>,
}

/// One pod.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PodFacts {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) created: Timestamp,
    pub(crate) phase: Phase,
    pub(crate) role: Role,
    /// Why it has to go although it runs: it is not isolated, as far as is known.
    pub(crate) unproved: Option<Reason>,
    /// Where it is.
    pub(crate) node: Option<String>,
    /// It was made to prove isolation on this node, and runs nowhere else.
    pub(crate) only_on: Option<String>,
}

impl PodFacts {
    /// Where it is, or will be.
    fn place(&self) -> Option<&String> {
        self.node.as_ref().or(self.only_on.as_ref())
    }
}

/// What the pod is to the forge.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub(crate) enum Role {
    /// Made by this process, without a registration.
    Waiting {
        /// Its gate has asked for a registration: everything in it runs.
        ready: bool,
    },
    /// A registration for this job is being made.
    Registering(OwedJob),
    /// Its registration failed.
    Burnt(String),
    /// Registered, without a job as far as is known.
    Idle {
        /// Since when.
        since: Timestamp,
        /// For which job it was registered.
        meant_for: Option<OwedJob>,
        /// Kept from taking jobs since.
        paused: Option<Timestamp>,
        /// The registration did not arrive at the pod.
        lost: bool,
    },
    /// Registered and running a job.
    Busy {
        /// Which.
        job: JobKey,
        /// Since when, as first seen.
        since: Timestamp,
        /// Why the pool does not accept it.
        refused: Option<Refusal>,
    },
    /// Its job is over.
    Done,
    /// Of an earlier process and without a registration: worth nothing.
    Stray,
    /// Of an earlier process; whether it has a registration is not known yet.
    Unknown,
}

/// What shall be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Plan {
    /// Pods to create, wherever there is room.
    pub(crate) create: u32,
    /// Nodes to create a pod on, for the sake of the proof.
    pub(crate) probe: Vec<String>,
    /// Pods to delete.
    pub(crate) delete: Vec<Deletion>,
    /// Runners to keep from taking a job.
    pub(crate) pause: Vec<String>,
    /// Jobs for which registrations may be made, oldest first.
    pub(crate) owed: Vec<OwedJob>,
    /// Pods that are wanted, and that a quota has no room for.
    pub(crate) beyond_quota: u32,
}

/// A pod to delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Deletion {
    pub(crate) name: String,
    pub(crate) uid: String,
    /// Seconds between SIGTERM and SIGKILL.
    pub(crate) grace: u32,
    /// Whether a registration may still exist at the forge.
    pub(crate) deregister: bool,
    /// Only while the pod has not asked for a job in the meantime.
    pub(crate) unless_taken: bool,
    /// What to tell, where it did not simply finish its job.
    pub(crate) failure: Option<Reason>,
    /// Whether the failure was one of starting, after which the next start waits.
    pub(crate) start_failure: bool,
}

/// What can be done while the forge does not answer: pods that are over, stuck or overdue go. Nothing is created, nothing paused, and
/// nothing deleted for want of a job.
pub(crate) fn plan_blind(input: &Input) -> Plan {
    let overdue = |pod: &PodFacts| match verdict(pod, input) {
        Verdict::Delete(deletion) => Some(deletion),
        Verdict::Keep | Verdict::Pause | Verdict::Ignore => None,
    };
    Plan { delete: input.pods.iter().filter_map(overdue).collect(), ..Plan::default() }
}

/// The plan.
pub(crate) fn plan(input: &Input) -> Plan {
    let mut plan = Plan::default();
    let mut waiting: Vec<&PodFacts> = Vec::new();
    let mut idle: Vec<&PodFacts> = Vec::new();
    for pod in &input.pods {
        match verdict(pod, input) {
            Verdict::Keep => match &pod.role {
                Role::Waiting { .. } => waiting.push(pod),
                Role::Idle { .. } | Role::Registering(_) => idle.push(pod),
                _ => {}
            },
            Verdict::Delete(deletion) => plan.delete.push(deletion),
            Verdict::Pause => plan.pause.push(pod.name.clone()),
            Verdict::Ignore => {}
        }
    }
    let (owed, needless) = match_jobs(&input.queued, &idle, input.now);
    plan.pause.extend(needless);
    plan.owed = owed;

    let wanted = plan.owed.len() + input.warm as usize;
    let below_max = (input.max as usize).saturating_sub(input.pods.len());
    let room = input.quota.map_or(below_max, |left| below_max.min(left as usize));
    let may_create = input.not_before.is_none_or(|time| time <= input.now);
    let missing = wanted.saturating_sub(waiting.len());
    plan.beyond_quota = u32::try_from(missing.min(below_max).saturating_sub(room)).unwrap_or(u32::MAX);
    if may_create {
        plan.create = u32::try_from(missing.min(room)).unwrap_or(u32::MAX);
        // Jobs first: the nodes on which their pods will be are proved by these.
        if missing == 0 && waiting.iter().all(|pod| pod.place().is_some()) {
            // One that goes makes way first: what it found, or that there was no room, is known then.
            let there = |node: &String| {
                let waits = |pod: &PodFacts| matches!(pod.role, Role::Waiting { .. });
                input.pods.iter().any(|pod| waits(pod) && pod.place() == Some(node))
            };
            let to_prove = input.probe.iter().filter(|node| !there(node));
            plan.probe = to_prove.take(room).cloned().collect();
        }
    }
    let proves = |pod: &PodFacts| pod.place().is_some_and(|node| input.probe.contains(node));
    let (kept, mut spare): (Vec<&PodFacts>, Vec<&PodFacts>) = waiting.into_iter().partition(|pod| proves(pod));
    // Those that are least far go first.
    spare.sort_by_key(|pod| (pod.role != Role::Waiting { ready: false }, std::cmp::Reverse(pod.created)));
    let needed = wanted.saturating_sub(kept.len());
    for pod in spare.iter().take(spare.len().saturating_sub(needed)) {
        plan.delete.push(Deletion { unless_taken: true, ..deletion(pod, GRACE_STOP) });
    }
    plan
}

enum Verdict {
    Keep,
    Pause,
    Delete(Deletion),
    Ignore,
}

/// What becomes of one pod, whatever the demand.
fn verdict(pod: &PodFacts, input: &Input) -> Verdict {
    let age = |since: Timestamp| input.now.duration_since(since);
    let has_registration = matches!(pod.role, Role::Idle { .. } | Role::Busy { .. } | Role::Burnt(_) | Role::Registering(_));
    let gone = |grace: u32| Deletion { deregister: has_registration, ..deletion(pod, grace) };
    let fails = |grace: u32, reason: Reason| Deletion { failure: Some(reason), ..gone(grace) };
    let start_fails = |reason: Reason| Verdict::Delete(Deletion { start_failure: true, ..fails(GRACE_STOP, reason) });

    match &pod.phase {
        Phase::Leaving => return Verdict::Ignore,
        Phase::Stuck(reason) => return start_fails(reason.clone()),
        Phase::Over { success, reason } => {
            return match (&pod.role, success) {
                (Role::Waiting { .. } | Role::Registering(_), _) => {
                    let default = || Reason::new("RunnerExited", "the runner's process ended before it had a job");
                    start_fails(reason.clone().unwrap_or_else(default))
                }
                (Role::Stray | Role::Done, _) | (_, true) => Verdict::Delete(gone(GRACE_DONE)),
                (_, false) => {
                    let default = || Reason::new("RunnerFailed", "the runner's process failed");
                    Verdict::Delete(fails(GRACE_DONE, reason.clone().unwrap_or_else(default)))
                }
            };
        }
        Phase::Alive { .. } => {}
    }
    // What one node cannot do keeps nothing from starting elsewhere.
    let anywhere = pod.only_on.is_none();
    if let Some(reason) = &pod.unproved {
        let waits = matches!(pod.role, Role::Waiting { .. } | Role::Registering(_));
        return Verdict::Delete(Deletion { start_failure: waits && anywhere, ..fails(GRACE_STOP, reason.clone()) });
    }
    match &pod.role {
        Role::Done => Verdict::Delete(gone(GRACE_DONE)),
        Role::Stray => Verdict::Delete(gone(GRACE_STOP)),
        Role::Burnt(why) => start_fails(Reason::new("RegistrationFailed", why.clone())),
        Role::Busy { job, refused: Some(refusal), .. } => {
            let reason = Reason::new("JobRefused", format!("{job}: {}", refusal.message));
            Verdict::Delete(fails(GRACE_STOP, reason))
        }
        Role::Busy { job, since, refused: None } if age(*since) > input.deadlines.job => {
            let reason = Reason::new("JobDeadlineExceeded", format!("{job} took longer than deadlines.job"));
            Verdict::Delete(fails(GRACE_DEADLINE, reason))
        }
        // There is no room for it where it is to prove something, which is no failure.
        Role::Waiting { ready: false } if !anywhere && matches!(pod.phase, Phase::Alive { waits: Some(_) }) => {
            Verdict::Delete(Deletion { unless_taken: true, ..gone(GRACE_STOP) })
        }
        Role::Waiting { ready: false } if age(pod.created) > input.deadlines.start => {
            let waits = match &pod.phase {
                Phase::Alive { waits: Some(reason) } => format!("{}: {}", reason.reason, reason.message),
                _ => "its gate did not report in".to_owned(),
            };
            let reason = Reason::new("StartDeadlineExceeded", format!("not ready within deadlines.start; {waits}"));
            Verdict::Delete(Deletion { start_failure: anywhere, ..fails(GRACE_STOP, reason) })
        }
        Role::Waiting { ready: true } if age(pod.created) > WARM_AGE => {
            Verdict::Delete(Deletion { unless_taken: true, ..gone(GRACE_STOP) })
        }
        Role::Idle { paused: Some(paused), .. } if age(*paused) > PAUSE => Verdict::Delete(gone(GRACE_STOP)),
        Role::Idle { paused: Some(_), .. } => Verdict::Ignore,
        Role::Idle { since, lost, .. } if *lost || age(*since) > input.deadlines.idle => Verdict::Pause,
        _ => Verdict::Keep,
    }
}

/// Which jobs are still owed a runner, and which registered runners have no job to wait for.
fn match_jobs(queued: &[OwedJob], idle: &[&PodFacts], now: Timestamp) -> (Vec<OwedJob>, Vec<String>) {
    let mut owed: Vec<OwedJob> = queued.to_vec();
    let mut needless = Vec::new();
    for pod in idle {
        let (meant_for, since) = match &pod.role {
            Role::Registering(job) => (Some(job), None),
            Role::Idle { meant_for, since, .. } => (meant_for.as_ref(), Some(*since)),
            _ => continue,
        };
        let served = match meant_for {
            Some(job) => owed.iter().position(|queued| queued.same_runner_as(job)),
            None => None,
        };
        match (served, since) {
            (Some(index), _) => drop(owed.remove(index)),
            (None, Some(since)) if now.duration_since(since) > SETTLE => needless.push(pod.name.clone()),
            (None, _) => {}
        }
    }
    (owed, needless)
}

fn deletion(pod: &PodFacts, grace: u32) -> Deletion {
    Deletion {
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        grace,
        deregister: false,
        unless_taken: false,
        failure: None,
        start_failure: false,
    }
}

#[cfg(test)]
mod tests;
