//! What a pool tells: conditions, numbers, waiting jobs. Written only when it says something new.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use mayfly_crds::conditions::{self, Verdict, reasons};
use mayfly_crds::{Counts, EgressHost, IsolationVerdict, JobIssuer, NodeIsolation, RunnerPoolStatus, ScaleSetStatus, Starts, WaitingJob};

use super::accept::Rules;
use super::dialects::Names;
use super::gather::{GatherError, Observed, WAITING_TOLD};
use super::nodes::PoolNode;
use super::plan::{Plan, Role};
use super::proof;
use super::registry::PoolState;
use super::room::Left;
use super::validate::{GitHubCredential, Pool};
use crate::forge::{ForgeError, Members, RunnerGroup};
use crate::runner::Phase;

/// Numbers and waiting jobs are not written more often than this.
pub(super) const COUNTS_EVERY: SignedDuration = SignedDuration::from_secs(5);

/// How long jobs wait for a quota before it is told.
const SHORT: SignedDuration = SignedDuration::from_secs(10);

/// Whether runner pods get a user namespace of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UserNamespaces {
    /// Schedulable nodes that cannot do it.
    pub(crate) lacking: Vec<String>,
    /// Schedulable nodes that can.
    pub(crate) supporting: usize,
}

impl UserNamespaces {
    /// Whether every node can.
    pub(crate) fn all_support(&self) -> bool {
        self.lacking.is_empty() && self.supporting > 0
    }

    fn verdict(&self) -> Verdict {
        let type_ = conditions::USER_NAMESPACES;
        match self.all_support() {
            true => Verdict::yes(type_, reasons::OK, "runner pods have a user namespace of their own"),
            false => {
                if self.lacking.is_empty() {
                    return Verdict::unknown(type_, reasons::NODES_LACK_SUPPORT, "no schedulable node is known");
                }
                let names = self.lacking.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
                let message = format!(
                    "runner pods share the host's user namespace: no support on {} node(s) ({names}); it takes Linux 6.3, \
                     containerd 2 or CRI-O 1.25, and Kubernetes 1.33",
                    self.lacking.len()
                );
                Verdict::no(type_, reasons::NODES_LACK_SUPPORT, message)
            }
        }
    }
}

/// Outcome of one pass, for the status.
pub(super) enum Outcome<'a> {
    /// The spec makes no sense.
    Invalid(&'a str),
    /// Nothing could be seen.
    Blind(&'a GatherError),
    /// The namespace could not be prepared.
    Unprepared(&'a str),
    /// All was seen and a plan was made.
    Planned(&'a Observed, &'a Plan),
}

/// The new status.
pub(super) fn status(
    old: &RunnerPoolStatus,
    pool: Option<&Pool>,
    generation: Option<i64>,
    state: &PoolState,
    users: &UserNamespaces,
    issuer: Option<&str>,
    outcome: &Outcome<'_>,
    now: &Time,
) -> RunnerPoolStatus {
    let mut new = old.clone();
    new.isolation = proof::nodes_told(state, &old.isolation);
    let mut verdicts = vec![users.verdict(), isolation(&new.isolation, &state.nodes)];
    verdicts.extend(pool.and_then(|pool| hosts(&pool.spec.isolation.egress.hosts, state)));
    verdicts.extend(pool.and_then(|pool| job_identity(pool.spec.job_identity.issuer, issuer)));
    new.scope = pool.map(Pool::scope_text).unwrap_or_default();
    let known = state.link.as_ref().and_then(|link| link.forge.scale_set());
    if let Some(set) = known {
        new.scale_set = Some(ScaleSetStatus { id: set.id, name: set.name, session_id: set.session });
    }
    new.last_failure = state.last_failure.clone().or_else(|| old.last_failure.clone());
    match outcome {
        Outcome::Invalid(why) => {
            verdicts.push(Verdict::no(conditions::READY, reasons::INVALID, *why));
            verdicts.push(Verdict::unknown(conditions::FORGE_REACHABLE, reasons::INVALID, "the forge was not asked"));
        }
        Outcome::Blind(error) => {
            let (reason, message) = blind(error);
            verdicts.push(Verdict::no(conditions::READY, reason, message.clone()));
            verdicts.push(Verdict::no(conditions::FORGE_REACHABLE, reason, message));
        }
        Outcome::Unprepared(why) => {
            verdicts.push(Verdict::no(conditions::READY, reasons::NOT_PREPARED, *why));
            verdicts.push(reachable(pool));
        }
        Outcome::Planned(observed, plan) => {
            verdicts.push(ready(state));
            verdicts.push(reachable(pool));
            verdicts.push(overlap(observed));
            verdicts
                .extend(pool.zip(observed.quota.as_ref()).map(|(pool, left)| quota(pool.spec.scale.max, left, state.short_since, now.0)));
            let group = state.link.as_ref().and_then(|link| link.forge.runner_group());
            verdicts.extend(pool.zip(group).map(|(pool, group)| runner_group(&pool.rules, &group)));
            new.counts = counts(observed, plan);
            new.waiting_jobs = waiting(observed, plan, pool, state);
            new.observed_generation = generation;
        }
    }
    new.conditions = conditions::merge(&old.conditions, &verdicts, generation, now);
    new
}

/// Jobs that wait, and why: those without a pod on its way first, then those that are not served.
fn waiting(observed: &Observed, plan: &Plan, pool: Option<&Pool>, state: &PoolState) -> Vec<WaitingJob> {
    let coming =
        observed.pods.iter().filter(|pod| matches!(pod.role, Role::Waiting { .. }) && matches!(pod.phase, Phase::Alive { .. })).count();
    let max = pool.map_or(0, |pool| pool.spec.scale.max);
    let (reason, message) = match (state.start_failures, observed.pods.len() >= max as usize) {
        (0, false) if plan.beyond_quota > 0 => ("AtQuota", observed.quota.as_ref().map(|left| left.by.clone()).unwrap_or_default()),
        (0, _) | (_, true) => ("AtMax", format!("all {max} runner pods of scale.max are in use")),
        _ => ("StartsFail", "runner pods do not start; see the condition Ready".to_owned()),
    };
    let without_pod = plan.owed.iter().skip(coming + plan.create as usize);
    let owed = without_pod.map(|job| WaitingJob { job: job.to_string(), reason: reason.to_owned(), message: message.clone() });
    owed.chain(observed.waiting.iter().cloned()).take(WAITING_TOLD).collect()
}

fn blind(error: &GatherError) -> (&'static str, String) {
    let reason = match error {
        GatherError::Secret(_) => reasons::SECRET_NOT_FOUND,
        GatherError::NotAllowed(_) => reasons::SECRET_NOT_ALLOWED,
        GatherError::Forge(ForgeError::Unreachable(_)) => reasons::UNREACHABLE,
        GatherError::Forge(ForgeError::Unauthorized { .. }) => reasons::UNAUTHORIZED,
        GatherError::Forge(ForgeError::NotFound { .. }) => reasons::SCOPE_NOT_FOUND,
        GatherError::Forge(ForgeError::TooOpen(_)) => reasons::RUNNER_GROUP_TOO_OPEN,
        GatherError::Forge(ForgeError::Unexpected(_)) => reasons::UNEXPECTED_ANSWER,
    };
    (reason, error.to_string())
}

fn reachable(pool: Option<&Pool>) -> Verdict {
    let type_ = conditions::FORGE_REACHABLE;
    match pool.and_then(|pool| pool.source.github_credential()) {
        Some(GitHubCredential::Token(_)) => {
            let message =
                "the forge answers, to a personal access token: it is a person's and lives long; use a GitHub App (forge.github.app)";
            Verdict::yes(type_, reasons::PERSONAL_ACCESS_TOKEN, message)
        }
        _ => Verdict::yes(type_, reasons::OK, "the forge answers"),
    }
}

fn ready(state: &PoolState) -> Verdict {
    match &state.last_failure {
        Some(failure) if state.start_failures > 0 => {
            let message = format!("runners did not start {} time(s) in a row; the last: {}", state.start_failures, failure.message);
            Verdict::no(conditions::READY, reasons::PODS_FAIL, message)
        }
        _ => Verdict::yes(conditions::READY, reasons::OK, "jobs are served"),
    }
}

fn isolation(found: &[NodeIsolation], nodes: &[PoolNode]) -> Verdict {
    let type_ = conditions::ISOLATION_PROVED;
    match proof::told(found, nodes) {
        (IsolationVerdict::Proved, reason, message) => Verdict::yes(type_, reason, message),
        (_, reason @ reasons::NO_PROOF_YET, message) => Verdict::unknown(type_, reason, message),
        (_, reason, message) => Verdict::no(type_, reason, message),
    }
}

/// Whether the host names that the pool opens are open. Nothing where it opens none.
fn hosts(opened: &[EgressHost], state: &PoolState) -> Option<Verdict> {
    let type_ = conditions::EGRESS_HOSTS;
    let first = opened.first()?;
    let names = match opened.len() - 1 {
        0 => first.host.clone(),
        more => format!("{} and {more} more", first.host),
    };
    let why = match (state.names, state.policies.is_some()) {
        (Names::Known, true) => return Some(Verdict::yes(type_, reasons::OK, format!("{names}: opened by a CiliumNetworkPolicy"))),
        (Names::Known, false) => return Some(Verdict::unknown(type_, reasons::NOT_PREPARED, "the pool's policies were not applied yet")),
        (Names::NoEngine, _) => {
            "The cluster's network engine knows no host names: that takes Cilium and its CiliumNetworkPolicy. Name address ranges in \
             isolation.egress.allow instead."
        }
        (Names::NoProxy, _) => {
            "Cilium's L7 proxy is off (enable-l7-proxy in its ConfigMap cilium-config), and without it Cilium knows no host names. Turn it \
             on, or name address ranges in isolation.egress.allow instead."
        }
    };
    Some(Verdict::no(type_, reasons::ENGINE_CANNOT, format!("{names}: closed to jobs, which run all the same. {why}")))
}

/// Whether jobs get tokens of Mayfly's. Nothing where the pool does not ask for that.
fn job_identity(wanted: JobIssuer, issuer: Option<&str>) -> Option<Verdict> {
    let type_ = conditions::JOB_IDENTITY;
    match (wanted, issuer) {
        (JobIssuer::Forge, _) => None,
        (JobIssuer::Mayfly, Some(issuer)) => {
            let message = format!("jobs get OIDC tokens of {issuer}; the forge does not vouch for them, as their claim vouched_by says");
            Some(Verdict::yes(type_, reasons::MAYFLY_VOUCHES, message))
        }
        (JobIssuer::Mayfly, None) => {
            let message = "jobs run without OIDC tokens: the operator has no address as an issuer. Set jobIdentity.issuer in the values of \
                           its chart, or leave jobIdentity out of the pool";
            Some(Verdict::no(type_, reasons::NO_ISSUER, message))
        }
    }
}

/// What to say where host names are found to be closed and were not before.
pub(super) fn newly_closed_hosts<'a>(old: &RunnerPoolStatus, new: &'a RunnerPoolStatus) -> Option<&'a str> {
    let closed = |condition: &&Condition| condition.type_ == conditions::EGRESS_HOSTS && condition.status == "False";
    let told = old.conditions.iter().any(|condition| closed(&condition));
    new.conditions.iter().find(closed).filter(|_| !told).map(|condition| condition.message.as_str())
}

fn overlap(observed: &Observed) -> Verdict {
    match observed.overlaps.is_empty() {
        true => Verdict::no(conditions::OVERLAPPING, reasons::NO_OVERLAP, "no older pool can accept the same jobs"),
        false => {
            let message = format!("older pools that may accept the same jobs are served first: {}", observed.overlaps.join(", "));
            Verdict::yes(conditions::OVERLAPPING, reasons::OLDER_POOL_FIRST, message)
        }
    }
}

/// Whether the quotas of the namespace let the pool be as large as it wants. What is short for a moment, while a pod goes and the next comes,
/// is not told.
fn quota(max: u32, left: &Left, short_since: Option<Timestamp>, now: Timestamp) -> Verdict {
    let type_ = conditions::QUOTA;
    if left.most < max {
        let message = format!("{}: that is {} runner pod(s) at most, and scale.max is {max}", left.most_by, left.most);
        return Verdict::no(type_, reasons::QUOTA_BELOW_MAX, message);
    }
    match short_since {
        Some(since) if now.duration_since(since) >= SHORT => {
            let message = format!("jobs wait because the quota is used up, by others than this pool as well: {}", left.by);
            Verdict::no(type_, reasons::QUOTA_USED_UP, message)
        }
        _ => Verdict::yes(type_, reasons::OK, "the ResourceQuotas of the namespace keep no job waiting"),
    }
}

/// GitHub chooses the job that a runner of the scale set gets: what the group lets in and the rules refuse is given to the pool all the same.
fn runner_group(rules: &Rules, group: &RunnerGroup) -> Verdict {
    let (type_, name) = (conditions::RUNNER_GROUP, &group.name);
    let wider = rules.refused_of(group);
    if !wider.is_empty() {
        let message = format!(
            "runner group {name:?} lets in what the pool refuses: {}. GitHub gives such jobs to the pool all the same: they stay queued, and \
             one that gets the runner made for another job ends. Restrict the group at GitHub (its repository and workflow access)",
            wider.join("; ")
        );
        return Verdict::no(type_, reasons::RUNNER_GROUP_WIDER, message);
    }
    if group.members == Members::Unknown && rules.names_repositories() {
        let message = format!("GitHub does not say which repositories may use runner group {name:?}");
        return Verdict::unknown(type_, reasons::RUNNER_GROUP_UNKNOWN, message);
    }
    Verdict::yes(type_, reasons::OK, format!("runner group {name:?} lets in no repository and no workflow that the pool refuses by name"))
}

fn counts(observed: &Observed, plan: &Plan) -> Counts {
    let living = |pod: &&super::plan::PodFacts| {
        matches!(pod.phase, Phase::Alive { .. } | Phase::Stuck(_)) && !plan.delete.iter().any(|deletion| deletion.name == pod.name)
    };
    let total = observed.pods.iter().filter(living).count();
    let running = observed.pods.iter().filter(living).filter(|pod| matches!(pod.role, Role::Busy { .. })).count();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Counts {
        queued: number(observed.queued.len() + observed.beyond),
        starting: number(total - running + plan.probe.len()) + plan.create,
        running: number(running),
    }
}

/// Whether two statuses differ in what must not wait: conditions and failures, not the numbers and lists that every job changes.
pub(super) fn differs_at_once(a: &RunnerPoolStatus, b: &RunnerPoolStatus) -> bool {
    let lasting = |status: &RunnerPoolStatus| {
        let mut lasting = RunnerPoolStatus { counts: Counts::default(), waiting_jobs: Vec::new(), ..status.clone() };
        lasting.isolation.iter_mut().for_each(|node| node.starts = Starts { pods: 0, ..node.starts });
        lasting
    };
    lasting(a) != lasting(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube_io::stored_time;

    #[test]
    fn a_quota_that_limits_the_pool_is_told_once_it_lasts() {
        let now = Timestamp::from_second(1_000_000).expect("a time");
        let told = |most: u32, short_for: Option<i64>| {
            let left =
                Left { pods: 0, by: "ResourceQuota q: pods is 5".to_owned(), most, most_by: "ResourceQuota q: pods is 5".to_owned() };
            let verdict = quota(5, &left, short_for.map(|seconds| now - SignedDuration::from_secs(seconds)), now);
            assert!(verdict.status == conditions::Status::True || verdict.message.contains("ResourceQuota q"), "{}", verdict.message);
            verdict.reason
        };
        assert_eq!((told(5, None), told(4, None), told(4, Some(60))), (reasons::OK, reasons::QUOTA_BELOW_MAX, reasons::QUOTA_BELOW_MAX));
        assert_eq!((told(5, Some(1)), told(5, Some(60))), (reasons::OK, reasons::QUOTA_USED_UP));
    }

    #[test]
    fn who_vouches_for_jobs_is_told() {
        assert!(job_identity(JobIssuer::Forge, Some("https://mayfly.example")).is_none());
        let told = job_identity(JobIssuer::Mayfly, Some("https://mayfly.example")).expect("a verdict");
        assert_eq!((told.status, told.reason), (conditions::Status::True, reasons::MAYFLY_VOUCHES));
        assert!(told.message.contains("https://mayfly.example") && told.message.contains("does not vouch"));
        let told = job_identity(JobIssuer::Mayfly, None).expect("a verdict");
        assert_eq!((told.status, told.reason), (conditions::Status::False, reasons::NO_ISSUER));
    }

    #[test]
    fn host_names_without_an_engine_that_knows_them_are_told_once() {
        let opened = [EgressHost { host: "registry.example.org".to_owned(), ports: vec![443] }];
        let state = |names: Names| PoolState { names, policies: Some(Default::default()), ..PoolState::default() };
        let told = |state: &PoolState| {
            let now = stored_time(Timestamp::UNIX_EPOCH);
            let conditions = conditions::merge(&[], hosts(&opened, state).as_slice(), None, &now);
            RunnerPoolStatus { conditions, ..RunnerPoolStatus::default() }
        };
        let (nothing, closed, open) = (RunnerPoolStatus::default(), told(&state(Names::NoEngine)), told(&state(Names::Known)));
        assert!(
            newly_closed_hosts(&nothing, &closed).is_some_and(|why| why.contains("registry.example.org") && why.contains("egress.allow"))
        );
        assert!(newly_closed_hosts(&open, &closed).is_some() && newly_closed_hosts(&closed, &closed).is_none());
        assert!(newly_closed_hosts(&closed, &open).is_none() && open.conditions[0].status == "True");
        assert!(newly_closed_hosts(&open, &told(&state(Names::NoProxy))).is_some_and(|why| why.contains("L7 proxy")));
        assert_eq!(told(&PoolState { names: Names::Known, ..PoolState::default() }).conditions[0].status, "Unknown");
        assert!(hosts(&[], &state(Names::NoEngine)).is_none());
    }
}
