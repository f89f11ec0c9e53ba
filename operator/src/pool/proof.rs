//! The proof of a runner pod's isolation: what its gate is asked to try, and what the answer is worth.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use mayfly_crds::conditions::reasons;
use mayfly_crds::{ClassIsolation, Control, Enforcement, IsolationVerdict, NodeIsolation, Starts};
use mayfly_proof::{Challenge, Endpoint, Report, Start, Verdict, judge};
use serde_json::json;

use super::apply::{reference_to, runner_target};
use super::controller::Context;
use super::nodes::PoolNode;
use super::registry::{PoolHandle, PoolState};
use crate::audit::Action;
use crate::isolation::{Beside, Surroundings, WHOLE, challenge, forbidden};
use crate::kube_io::stored_time;
use crate::runner::Reason;

/// How old a proof may be when a registration is made. A gate that waits proves anew whenever its question was left without an answer.
pub(super) const PROOF_AGE: SignedDuration = SignedDuration::from_secs(90);
/// A runner whose gate has not proved anything for this long counts as unproven: its job may be what keeps the gate from it.
pub(super) const SILENCE: SignedDuration = SignedDuration::from_secs(90);
/// A port nobody listens on: a host that is reached refuses it, and no rule of Mayfly's opens it.
const UNUSED_PORT: u16 = 1;
/// Most nodes told in a status.
const NODES_TOLD: usize = 50;

/// Without jobs a pod is made on a node for the sake of the proof this often; sooner where the last one was not one.
const PROVE_EVERY: SignedDuration = SignedDuration::from_hours(1);
const PROVE_AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// Proofs of nodes that only time calls for, per pool and [`PROVE_EVERY`]; with more nodes than this it takes longer.
const PROVED_EVERY: usize = 10;
/// Nodes of one pool that are proved at the same time, and pools that have such pods at the same time.
const PROBES: usize = 3;
const PROBING: usize = 5;
/// Most nodes that a pod is kept away from because they were found open.
const AVOIDED: usize = 20;
/// Nodes on which controls are looked at ahead of pods.
const PREPARED: usize = 20;
/// Sentinels tried in one proof: all are alike.
const SENTINELS: usize = 4;
/// Most nodes named in a message.
const NODES_NAMED: usize = 5;

/// What is known of one pod's isolation.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodProof {
    /// What its gate was asked last.
    asked: Option<Asked>,
    /// What it told last.
    last: Option<Proof>,
    /// When it last told what the pool requires.
    proved: Option<Timestamp>,
}

#[derive(Clone, Debug)]
struct Asked {
    challenge: Challenge,
    /// The policies that stood.
    policies: String,
    /// What the challenge is held against.
    control: Control,
}

#[derive(Clone, Debug)]
struct Proof {
    at: Timestamp,
    /// The policies it holds for.
    policies: String,
    verdict: IsolationVerdict,
    classes: Vec<ClassIsolation>,
}

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It counts, and shows what the pool requires.
    Enough,
    /// It counts, and is not enough: the pod goes.
    NotEnough(String),
    /// It answers another challenge than the last one, or the policies changed in between.
    Stale,
}

impl PoolState {
    /// Whether a registration may be made for the pod: under today's policies, it has proved what the pool requires.
    pub(super) fn is_proved(&self, pod: &str, now: Timestamp) -> bool {
        let last = self.proofs.get(pod).and_then(|proof| proof.last.as_ref());
        last.is_some_and(|proof| {
            let current = self.policies_mark().is_some_and(|mark| mark == proof.policies);
            current && now.duration_since(proof.at) <= PROOF_AGE && self.suffices(proof.verdict)
        })
    }

    /// Why the pod has to go, if it is known not to be isolated. `registered` since when it may have a job: from then on it goes for what
    /// answers, and for a proof that is missing for long, not for one that did not come about this time.
    pub(super) fn unproved(&self, pod: &str, registered: Option<Timestamp>, now: Timestamp) -> Option<Reason> {
        let known = self.proofs.get(pod);
        let wrong = known.and_then(|proof| proof.last.as_ref()).filter(|proof| !self.suffices(proof.verdict));
        let told = wrong.map(|proof| Reason::new(reason(proof.verdict), summary(&proof.classes)));
        let Some(registered) = registered else { return told };
        if wrong.is_some_and(|proof| proof.verdict == IsolationVerdict::Breach) {
            return told;
        }
        let heard = known.and_then(|proof| proof.proved).map_or(registered, |proved| proved.max(registered));
        let missing = self.enforcement == Enforcement::Require && now.duration_since(heard) > SILENCE;
        let silent = || Reason::new(reasons::ISOLATION_UNPROVEN, format!("its gate has proved nothing for {} s", SILENCE.as_secs()));
        missing.then(|| told.unwrap_or_else(silent))
    }

    /// Takes over what an earlier process wrote: it holds for a while.
    pub(super) fn adopt_isolation(&mut self, stored: &[NodeIsolation], now: Timestamp) {
        if self.isolation.is_empty() && self.tried.is_empty() {
            self.isolation = stored.iter().map(|node| (node.node.clone(), node.clone())).collect();
            self.tried = stored.iter().map(|node| (node.node.clone(), (now, node.environment.clone()))).collect();
        }
    }

    /// Nodes on which it is time for a proof although no job asks for a pod there; those that were never tried first, then the others
    /// by age.
    fn due(&self, now: Timestamp) -> Vec<String> {
        let rounds = i32::try_from(self.nodes.len().div_ceil(PROVED_EVERY)).unwrap_or(i32::MAX);
        let mut due: Vec<(Option<Timestamp>, &String)> = Vec::new();
        for node in self.nodes.iter().filter(|node| node.ready) {
            let tried = self.tried.get(&node.name).filter(|(_, environment)| *environment == node.environment).map(|(at, _)| *at);
            let proved = self
                .isolation
                .get(&node.name)
                .is_some_and(|known| known.verdict == IsolationVerdict::Proved && known.environment == node.environment);
            let every = if proved { PROVE_EVERY.saturating_mul(rounds) } else { PROVE_AGAIN };
            if tried.is_none_or(|at| now.duration_since(at) > every) {
                due.push((tried, &node.name));
            }
        }
        due.sort();
        due.into_iter().take(PROBES).map(|(_, name)| name.clone()).collect()
    }

    /// Nodes that pods are kept away from: as they are now, isolation was not shown there. None where it was shown nowhere.
    pub(super) fn open_nodes(&self) -> Vec<String> {
        let open = |node: &&PoolNode| {
            self.isolation.get(&node.name).is_some_and(|known| known.environment == node.environment && !self.suffices(known.verdict))
        };
        let all_open = self.nodes.iter().filter(|node| node.ready).all(|node| open(&node));
        if all_open {
            return Vec::new();
        }
        self.nodes.iter().filter(open).take(AVOIDED).map(|node| node.name.clone()).collect()
    }

    fn suffices(&self, verdict: IsolationVerdict) -> bool {
        verdict == IsolationVerdict::Proved || self.enforcement == Enforcement::Warn
    }

    /// Notes what a pod was asked.
    fn ask(&mut self, pod: &str, challenge: Challenge, policies: String, control: Control) {
        self.proofs.entry(pod.to_owned()).or_default().asked = Some(Asked { challenge, policies, control });
    }

    /// Takes a report about the last challenge. With it comes the node's entry, if its verdicts are news.
    fn take_report(&mut self, pod: &str, node: &PoolNode, report: &Report, now: Timestamp) -> (Taken, Option<NodeIsolation>) {
        let current = self.policies_mark();
        let Some(known) = self.proofs.get_mut(pod) else { return (Taken::Stale, None) };
        let Some(asked) = known.asked.take_if(|asked| asked.challenge.nonce == report.nonce) else { return (Taken::Stale, None) };
        let Asked { challenge, policies, control } = asked;
        if current.as_ref() != Some(&policies) {
            return (Taken::Stale, None);
        }
        let classes = weigh(&challenge, report);
        let verdict = worst(&classes);
        let suffices = self.suffices(verdict);
        if let Some(known) = self.proofs.get_mut(pod) {
            known.last = Some(Proof { at: now, policies, verdict, classes: classes.clone() });
            if suffices {
                known.proved = Some(now);
            }
        }
        self.tried.insert(node.name.clone(), (now, node.environment.clone()));
        let before = self.isolation.get(&node.name).filter(|known| known.environment == node.environment);
        let starts = add(before.map(|known| known.starts).unwrap_or_default(), report.start);
        let same = before.filter(|known| known.control == control && same_verdicts(&known.classes, &classes));
        let changed = same.is_none();
        // What is no news keeps its words: which addresses answered differs from pod to pod, and would be written at every proof.
        let entry = match same {
            Some(known) => NodeIsolation { starts, ..known.clone() },
            None => {
                let (name, environment) = (node.name.clone(), node.environment.clone());
                NodeIsolation { node: name, verdict, since: stored_time(now), environment, control, classes, starts }
            }
        };
        self.isolation.insert(node.name.clone(), entry.clone());
        let registered = self.registered.get(pod).map(|runner| runner.since);
        let taken = match self.unproved(pod, registered, now) {
            None => Taken::Enough,
            Some(why) => Taken::NotEnough(why.message),
        };
        (taken, changed.then_some(entry))
    }
}

/// Counts one more start.
fn add(starts: Starts, start: Option<Start>) -> Starts {
    let Some(start) = start else { return starts };
    let leaked = start.answered > 0;
    Starts {
        pods: starts.pods.saturating_add(1),
        leaks: starts.leaks.saturating_add(leaked.into()),
        latest_milliseconds: if leaked { starts.latest_milliseconds.max(start.last_ms) } else { starts.latest_milliseconds },
    }
}

/// Nodes on which a pod is wanted for the sake of the proof alone: those that are new or changed, and all from time to time.
pub(super) fn wanted(ctx: &Context, handle: &PoolHandle) -> Vec<String> {
    let (due, probing) = {
        let state = handle.state();
        (state.due(ctx.now()), state.probing)
    };
    let others = || ctx.registry.all().iter().filter(|other| other.key != handle.key && other.state().probing).count();
    let wanted = if probing || others() < PROBING { due } else { Vec::new() };
    handle.state().probing = !wanted.is_empty();
    wanted
}

/// What a gate is to try. `None` where that cannot be told yet: the pool's policies were not applied, the pod's node is not known, or the
/// sentinel on it owes an answer.
///
/// # Errors
/// When the list of metadata endpoints cannot be read.
pub(crate) async fn ask(ctx: &Context, handle: &PoolHandle, pod: &Pod) -> Result<Option<Challenge>, String> {
    let around = surroundings(ctx, handle, Some(pod)).await;
    if around.node.is_empty() {
        // The watch has not told yet where the pod is.
        return Ok(None);
    }
    let forbidden = forbidden(&around)?;
    let endpoints: Vec<Endpoint> = forbidden.iter().map(|(_, endpoint)| *endpoint).collect();
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let seen = ctx.controls.look(node, &endpoints).await;
    let control = match seen.beside {
        Beside::Told => Control::Node,
        Beside::Absent => Control::Operator,
        // Without it the pod's silence may show nothing, and the pod would be lost for it.
        Beside::Late => return Ok(None),
    };
    let gate = gate(ctx).await;
    let mut state = handle.state();
    let Some(policies) = state.policies_mark() else { return Ok(None) };
    let nonce = format!("{:032x}", rand::random::<u128>());
    // What answers the pod shows that its silence is one of others. Before the job that is the forge, without which it need not start;
    // a forge that is away for a while is no reason to end a job that runs.
    let required = match state.registered.contains_key(&pod.name_any()) && !gate.is_empty() {
        true => gate,
        false => state.forge_endpoints.clone(),
    };
    let challenge = challenge(nonce, &forbidden, &seen.probes, required);
    state.ask(&pod.name_any(), challenge.clone(), policies, control);
    Ok(Some(challenge))
}

/// Takes a gate's report, and has told what it changes.
pub(crate) async fn take(ctx: &Context, handle: &PoolHandle, pod: &Pod, report: &Report) -> Taken {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let name = pod.name_any();
    let nodes: BTreeSet<String> = ctx.nodes.state().iter().map(|node| node.name_any()).collect();
    let (taken, news) = {
        let mut state = handle.state();
        // What was found on a node that is gone is of no interest any more.
        state.isolation.retain(|known, _| nodes.contains(known));
        state.tried.retain(|known, _| nodes.contains(known));
        let known = state.nodes.iter().find(|known| known.name == node).cloned();
        let node = known.unwrap_or_else(|| PoolNode { name: node.clone(), ..PoolNode::default() });
        state.take_report(&name, &node, report, ctx.now())
    };
    if let Some(start) = report.start {
        ctx.metrics.start(start.answered > 0);
    }
    if let Taken::NotEnough(why) = &taken {
        tracing::warn!(pool = %handle.key, pod = name, node, why, "a runner pod is not shown to be isolated");
        let payload = json!({"node": node, "why": why, "registered": handle.state().registered.contains_key(&name)});
        let target = runner_target(&name, &pod.uid().unwrap_or_default());
        ctx.record(ctx.event(Action::IsolationBreached, &handle.key, target).about(payload, false));
    }
    let warns = handle.state().enforcement == Enforcement::Warn;
    if let Some(entry) = news {
        let verdict = worst(&entry.classes);
        if warns && verdict != IsolationVerdict::Proved {
            let note = format!("{name} on node {node} runs jobs although it is not shown to be isolated: {}", summary(&entry.classes));
            ctx.io.warn(&reference_to(&handle.key, &handle.uid), reason(verdict), "Prove", &note).await;
        }
        ctx.registry.wake(handle.key.clone());
    } else if taken != Taken::Enough {
        ctx.registry.wake(handle.key.clone());
    }
    taken
}

/// Looks at the controls ahead of the first pod that needs them, on the first few nodes that it may be on.
pub(super) async fn prepare_controls(ctx: Arc<Context>, handle: Arc<PoolHandle>) {
    let around = surroundings(&ctx, &handle, None).await;
    if let Ok(forbidden) = forbidden(&around) {
        let endpoints: Vec<Endpoint> = forbidden.iter().map(|(_, endpoint)| *endpoint).collect();
        let nodes: Vec<String> = handle.state().nodes.iter().take(PREPARED).map(|node| node.name.clone()).collect();
        futures::future::join_all(nodes.iter().map(|node| ctx.controls.look(Some(node), &endpoints))).await;
    }
}

/// What is around a pod; around every node's pods where it is not known yet.
async fn surroundings(ctx: &Context, handle: &PoolHandle, pod: Option<&Pod>) -> Surroundings {
    let nodes = ctx.nodes.state();
    let own = pod.and_then(|pod| pod.spec.as_ref()?.node_name.as_ref());
    let is_own = |node: &&Arc<Node>| own.is_some_and(|own| node.name_any() == *own);
    let node: Vec<IpAddr> = nodes.iter().filter(is_own).flat_map(|node| addresses(node)).collect();
    let other_nodes = nodes.iter().filter(|node| !is_own(node)).filter_map(|node| addresses(node).next()).collect();
    let slices = ctx.api_endpoints.state();
    let endpoints = slices.iter().flat_map(|slice| {
        let ports: Vec<u16> = slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok()).collect();
        let addresses =
            slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).filter_map(|address| address.parse::<IpAddr>().ok());
        addresses.flat_map(move |address| ports.clone().into_iter().map(move |port| SocketAddr::from((address, port)))).collect::<Vec<_>>()
    });
    let forge = handle.state().forge_endpoints.clone();
    let beside_the_forge = forge.iter().map(|forge| SocketAddr::from((forge.ip(), UNUSED_PORT)));
    Surroundings {
        api_server: ctx.settings.api_server.into_iter().chain(endpoints).collect(),
        outside: ctx.settings.outside_sentinels.iter().copied().chain(beside_the_forge).collect(),
        sentinel_pods: sentinel_pods(ctx).await,
        sentinel_service: ctx.names.find(&ctx.settings.sentinel_service).await,
        node,
        other_nodes,
    }
}

/// Addresses of some sentinels.
pub(super) async fn sentinel_pods(ctx: &Context) -> Vec<IpAddr> {
    let mut found = ctx.names.find(&ctx.settings.sentinel_pods).await;
    found.truncate(SENTINELS);
    found
}

/// The gate API, as pods reach it.
async fn gate(ctx: &Context) -> Vec<SocketAddr> {
    let Some(host) = ctx.settings.gate_names.first() else { return Vec::new() };
    let port = ctx.settings.cluster.gate_port;
    ctx.names.find(host).await.into_iter().map(|address| SocketAddr::from((address, port))).collect()
}

/// Of one family or of both.
fn addresses(node: &Node) -> impl Iterator<Item = IpAddr> {
    let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    listed.filter(|address| address.type_ == "InternalIP").filter_map(|address| address.address.parse().ok())
}

/// What a report shows, by class, with what it should have shown and did not.
fn weigh(asked: &Challenge, report: &Report) -> Vec<ClassIsolation> {
    let class = |class: &str, verdict: IsolationVerdict, message: String| ClassIsolation { class: class.to_owned(), verdict, message };
    let findings = judge(&asked.forbidden, &report.forbidden);
    let missing = WHOLE.iter().filter(|class| findings.iter().all(|finding| finding.class != **class));
    let mut classes: Vec<ClassIsolation> = missing
        .map(|missing| class(missing.as_str(), IsolationVerdict::Unproven, "the operator knows no address of this class to try".to_owned()))
        .collect();
    let too_few = report.clean < asked.rounds && report.required && findings.iter().all(|finding| finding.verdict != Verdict::Breach);
    classes.extend(findings.into_iter().map(|finding| match finding.verdict {
        Verdict::Proved if too_few => {
            class(finding.class.as_str(), IsolationVerdict::Unproven, "it was closed in too few rounds in a row".to_owned())
        }
        verdict => class(finding.class.as_str(), told_as(verdict), finding.message),
    }));
    let targets = asked.required.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let required = match report.required {
        true => class("Required", IsolationVerdict::Proved, format!("{targets} answers the pod, as it has to")),
        false => class("Required", IsolationVerdict::Unproven, format!("{targets} does not answer the pod, and has to")),
    };
    classes.push(required);
    classes.sort_by(|a, b| a.class.cmp(&b.class));
    classes
}

fn told_as(verdict: Verdict) -> IsolationVerdict {
    match verdict {
        Verdict::Proved => IsolationVerdict::Proved,
        Verdict::Unproven => IsolationVerdict::Unproven,
        Verdict::Breach => IsolationVerdict::Breach,
    }
}

fn worst(classes: &[ClassIsolation]) -> IsolationVerdict {
    classes.iter().map(|class| class.verdict).max().unwrap_or(IsolationVerdict::Unproven)
}

fn same_verdicts(a: &[ClassIsolation], b: &[ClassIsolation]) -> bool {
    a.iter().map(|class| (&class.class, class.verdict)).eq(b.iter().map(|class| (&class.class, class.verdict)))
}

/// The word for a verdict that is not a proof.
fn reason(verdict: IsolationVerdict) -> &'static str {
    match verdict {
        IsolationVerdict::Breach => reasons::ISOLATION_BREACH,
        IsolationVerdict::Unproven | IsolationVerdict::Proved => reasons::ISOLATION_UNPROVEN,
    }
}

/// What is wrong, class by class, the worst first.
fn summary(classes: &[ClassIsolation]) -> String {
    let mut wrong: Vec<&ClassIsolation> = classes.iter().filter(|class| class.verdict != IsolationVerdict::Proved).collect();
    wrong.sort_by_key(|class| std::cmp::Reverse(class.verdict));
    wrong.iter().map(|class| format!("{} ({}): {}", class.class, class.verdict.as_str(), class.message)).collect::<Vec<_>>().join("; ")
}

/// The condition's verdict, reason and message, from what is known of each node.
pub(super) fn told(found: &[NodeIsolation], nodes: &[PoolNode]) -> (IsolationVerdict, &'static str, String) {
    let Some(worst) = found.iter().max_by_key(|node| node.verdict) else {
        let message = match nodes.is_empty() {
            true => "no runner pod has tried it yet, and no node fits the pool's nodeSelector and tolerations",
            false => "no runner pod has tried it yet",
        };
        return (IsolationVerdict::Unproven, reasons::NO_PROOF_YET, message.to_owned());
    };
    if worst.verdict != IsolationVerdict::Proved {
        return (worst.verdict, reason(worst.verdict), format!("node {}: {}", worst.node, summary(&worst.classes)));
    }
    let current = |node: &&PoolNode| found.iter().any(|known| known.node == node.name && known.environment == node.environment);
    let missing: Vec<&str> = nodes.iter().filter(|node| !current(node)).map(|node| node.name.as_str()).collect();
    let mut message = format!("shown by runner pods on {} node(s)", found.len());
    if !missing.is_empty() {
        let named = missing.iter().take(NODES_NAMED).copied().collect::<Vec<_>>().join(", ");
        message.push_str(&format!("; not yet on {}, as they are now: {named}", missing.len()));
    }
    let alone: Vec<&str> = found.iter().filter(|node| node.control == Control::Operator).map(|node| node.node.as_str()).collect();
    if !alone.is_empty() {
        let named = alone.iter().take(NODES_NAMED).copied().collect::<Vec<_>>().join(", ");
        message.push_str(&format!("; without a sentinel on {} of them, held against the operator alone: {named}", alone.len()));
    }
    let leaks: u32 = found.iter().map(|node| node.starts.leaks).sum();
    if leaks > 0 {
        let latest = found.iter().map(|node| node.starts.latest_milliseconds).max().unwrap_or_default();
        message.push_str(&format!("; {leaks} pod(s) were open at their start, {latest} ms after it at the latest"));
    }
    (IsolationVerdict::Proved, reasons::OK, message)
}

/// Entries for the status: what this process knows, or what an earlier one wrote.
pub(super) fn nodes_told(state: &PoolState, old: &[NodeIsolation]) -> Vec<NodeIsolation> {
    match state.isolation.is_empty() {
        true => old.to_vec(),
        false => {
            // The worst are told where not all can be.
            let mut nodes: Vec<NodeIsolation> = state.isolation.values().cloned().collect();
            nodes.sort_by_key(|node| std::cmp::Reverse(node.verdict));
            nodes.truncate(NODES_TOLD);
            nodes
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use mayfly_proof::{Answer, Class, Target};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().expect("a time")
    }

    fn state(enforcement: Enforcement) -> PoolState {
        PoolState { enforcement, policies: Some(("digest".to_owned(), BTreeMap::new())), ..PoolState::default() }
    }

    fn challenge() -> Challenge {
        let target = |class: &Class| Target {
            class: *class,
            endpoint: Endpoint::tcp("192.0.2.1:80".parse().expect("an address")),
            control: Answer::Accepted,
        };
        let forbidden = WHOLE.iter().map(target).collect();
        Challenge { nonce: "n1".to_owned(), forbidden, required: Vec::new(), rounds: 3, patience_ms: 50, within_ms: 1000 }
    }

    fn report() -> Report {
        let forbidden = vec![Answer::Silent; WHOLE.len()];
        Report { nonce: "n1".to_owned(), forbidden, required: true, clean: 3, unclean: 0, took_ms: 200, start: None }
    }

    fn node1() -> PoolNode {
        PoolNode { name: "node1".to_owned(), environment: "kernel 6.1".to_owned(), ready: true }
    }

    fn runner(since: Timestamp) -> crate::pool::registry::Registered {
        let repository = crate::forge::Repository::parse("acme/web").expect("a repository");
        let key = crate::forge::RunnerKey { repository: Some(repository), id: 1 };
        crate::pool::registry::Registered::found(key, since)
    }

    fn asked(enforcement: Enforcement) -> PoolState {
        let mut state = state(enforcement);
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark, Control::Node);
        state
    }

    /// Has the pod prove its isolation.
    pub(crate) fn prove(state: &mut PoolState, pod: &str, now: Timestamp) {
        state.policies = Some(("digest".to_owned(), BTreeMap::new()));
        let mark = state.policies_mark().expect("a mark");
        state.ask(pod, challenge(), mark, Control::Node);
        assert_eq!(state.take_report(pod, &node1(), &report(), now).0, Taken::Enough);
    }

    #[test]
    fn a_whole_report_is_a_proof_for_a_while_and_counts_once() {
        let mut state = asked(Enforcement::Require);
        assert!(!state.is_proved("p", now()), "nothing was reported");
        let (taken, news) = state.take_report("p", &node1(), &report(), now());
        assert_eq!((taken, news.map(|entry| entry.verdict)), (Taken::Enough, Some(IsolationVerdict::Proved)));
        assert!(state.is_proved("p", now()) && !state.is_proved("other", now()));
        assert!(!state.is_proved("p", now() + PROOF_AGE + SignedDuration::from_secs(1)), "too old");
        assert_eq!(state.take_report("p", &node1(), &report(), now()).0, Taken::Stale, "a replayed report");
        assert_eq!(told(&nodes_told(&state, &[]), &[]).0, IsolationVerdict::Proved);
    }

    #[test]
    fn a_proof_holds_for_the_policies_it_was_made_under() {
        let mut state = asked(Enforcement::Require);
        state.take_report("p", &node1(), &report(), now());
        state.policies = Some(("another".to_owned(), BTreeMap::new()));
        assert!(!state.is_proved("p", now()));
        let mut state = asked(Enforcement::Require);
        state.policies = Some(("another".to_owned(), BTreeMap::new()));
        assert_eq!(state.take_report("p", &node1(), &report(), now()).0, Taken::Stale);
    }

    #[test]
    fn every_way_to_fall_short_is_told_and_never_enough() {
        let open = Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() };
        let short = Report { forbidden: Vec::new(), ..report() };
        let few = Report { clean: 1, ..report() };
        let lonely = Report { required: false, clean: 0, ..report() };
        for (report, says) in [(open, "Breach"), (short, "shows nothing"), (few, "too few rounds"), (lonely, "does not answer the pod")] {
            let mut state = asked(Enforcement::Require);
            let (taken, _) = state.take_report("p", &node1(), &report, now());
            let Taken::NotEnough(why) = taken else { panic!("{report:?} was enough") };
            assert!(why.contains(says), "{why}");
            assert!(!state.is_proved("p", now()));
            assert!(state.unproved("p", None, now()).is_some(), "the pod goes");
        }
        let mut state = state(Enforcement::Require);
        let mark = state.policies_mark().expect("a mark");
        let mut without = challenge();
        without.forbidden.retain(|target| target.class != Class::Pods);
        state.ask("p", without, mark, Control::Node);
        let fewer = Report { forbidden: vec![Answer::Silent; WHOLE.len() - 1], ..report() };
        let Taken::NotEnough(why) = state.take_report("p", &node1(), &fewer, now()).0 else { panic!("a class was missing") };
        assert!(why.contains("Pods (Unproven)"), "{why}");
    }

    #[test]
    fn with_warn_it_is_enough_and_still_told() {
        let mut state = asked(Enforcement::Warn);
        let open = Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() };
        let (taken, news) = state.take_report("p", &node1(), &open, now());
        assert_eq!((taken, news.map(|entry| entry.verdict)), (Taken::Enough, Some(IsolationVerdict::Breach)));
        assert!(state.is_proved("p", now()) && state.unproved("p", Some(now()), now()).is_none());
        assert_eq!(told(&nodes_told(&state, &[]), &[]).1, reasons::ISOLATION_BREACH);
    }

    #[test]
    fn a_runner_whose_gate_fell_silent_counts_as_unproven() {
        let mut state = asked(Enforcement::Require);
        state.take_report("p", &node1(), &report(), now());
        let late = now() + SILENCE + SignedDuration::from_secs(1);
        assert!(state.unproved("p", Some(now()), late).is_some());
        assert!(state.unproved("p", None, late).is_none(), "a pod without a registration is asked again before it gets one");
        assert!(state.unproved("adopted", Some(late), late).is_none(), "an adopted runner has time to report");
    }

    #[test]
    fn a_running_job_ends_for_what_answers_and_not_for_one_proof_that_did_not_come_about() {
        let breach = Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() };
        let lonely = Report { required: false, clean: 0, ..report() };
        let soon = now() + SignedDuration::from_secs(20);
        for (report, ends) in [(breach, true), (lonely, false)] {
            let mut state = asked(Enforcement::Require);
            state.take_report("p", &node1(), &super::tests::report(), now());
            state.registered.insert("p".to_owned(), runner(now()));
            let mark = state.policies_mark().expect("a mark");
            state.ask("p", challenge(), mark, Control::Node);
            assert_eq!(matches!(state.take_report("p", &node1(), &report, soon).0, Taken::NotEnough(_)), ends, "{report:?}");
            assert_eq!(state.unproved("p", Some(now()), soon).is_some(), ends);
            let late = now() + SILENCE + SignedDuration::from_secs(1);
            assert!(state.unproved("p", Some(now()), late).is_some(), "it is missing for too long");
        }
    }

    #[test]
    fn a_node_is_due_when_it_is_new_or_changed_and_from_time_to_time_and_sooner_after_a_failure() {
        let mins = |minutes: i64| now() + SignedDuration::from_mins(minutes);
        let mut state = asked(Enforcement::Require);
        let away = PoolNode { name: "node2".to_owned(), ready: false, ..node1() };
        state.nodes = vec![node1(), away];
        assert_eq!(state.due(now()), ["node1"], "a node that takes no pods is not tried");
        state.take_report("p", &node1(), &report(), now());
        assert!(state.due(mins(59)).is_empty() && state.due(mins(61)) == ["node1"]);
        state.nodes[0].environment = "kernel 6.2".to_owned();
        assert_eq!(state.due(now()), ["node1"], "another kernel");
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark, Control::Node);
        let changed = state.nodes[0].clone();
        state.take_report("p", &changed, &Report { forbidden: Vec::new(), ..report() }, now());
        assert!(state.due(mins(4)).is_empty() && state.due(mins(6)) == ["node1"]);
    }

    #[test]
    fn many_nodes_take_longer_and_the_oldest_come_first() {
        let mut state = asked(Enforcement::Require);
        state.nodes = (0..25).map(|n| PoolNode { name: format!("n{n:02}"), ..node1() }).collect();
        assert_eq!(state.due(now()), ["n00", "n01", "n02"]);
        let stored: Vec<NodeIsolation> = (0..25)
            .map(|n| NodeIsolation {
                node: format!("n{n:02}"),
                verdict: IsolationVerdict::Proved,
                since: stored_time(now()),
                environment: node1().environment,
                control: Control::Node,
                classes: Vec::new(),
                starts: Starts::default(),
            })
            .collect();
        state.adopt_isolation(&stored, now());
        state.tried.insert("n07".to_owned(), (now() - SignedDuration::from_mins(1), node1().environment));
        assert!(state.due(now() + SignedDuration::from_mins(179)).is_empty(), "25 nodes in three hours");
        assert_eq!(state.due(now() + SignedDuration::from_mins(181))[0], "n07");
    }

    #[test]
    fn pods_are_kept_away_from_nodes_that_were_found_open_while_there_are_others() {
        let mut state = asked(Enforcement::Require);
        let other = PoolNode { name: "node2".to_owned(), ..node1() };
        state.nodes = vec![node1()];
        state.take_report("p", &node1(), &Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() }, now());
        assert!(state.open_nodes().is_empty(), "there is no other");
        state.nodes.push(other);
        assert_eq!(state.open_nodes(), ["node1"]);
        state.nodes[0].environment = "kernel 6.2".to_owned();
        assert!(state.open_nodes().is_empty(), "it changed since");
    }

    #[test]
    fn leaks_at_the_start_are_counted_and_told() {
        let mut state = asked(Enforcement::Require);
        let start = |answered: u32, last_ms: u32| Some(Start { tries: 9, answered, last_ms });
        state.take_report("p", &node1(), &Report { start: start(0, 0), ..report() }, now());
        for (answered, last_ms) in [(2, 340), (1, 12)] {
            let mark = state.policies_mark().expect("a mark");
            state.ask("p", challenge(), mark, Control::Node);
            state.take_report("p", &node1(), &Report { start: start(answered, last_ms), ..report() }, now());
        }
        assert_eq!(state.isolation["node1"].starts, Starts { pods: 3, leaks: 2, latest_milliseconds: 340 });
        let (verdict, _, message) = told(&nodes_told(&state, &[]), &[]);
        assert!(verdict == IsolationVerdict::Proved && message.contains("2 pod(s) were open at their start, 340 ms"), "{message}");
    }

    #[test]
    fn what_is_told_survives_being_stored() {
        let mut state = asked(Enforcement::Require);
        let later = now() + SignedDuration::from_millis(1_234);
        let told = state.take_report("p", &node1(), &report(), later).1.expect("news");
        let stored = serde_json::from_str(&serde_json::to_string(&told).expect("JSON")).expect("the same");
        assert_eq!(told, stored, "it would be written anew at every pass");
    }

    #[test]
    fn the_same_verdicts_are_no_news() {
        let mut state = asked(Enforcement::Require);
        assert!(state.take_report("p", &node1(), &report(), now()).1.is_some());
        let before = state.isolation["node1"].clone();
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", Challenge { required: vec!["10.96.0.9:8443".parse().expect("an address")], ..challenge() }, mark, Control::Node);
        assert!(state.take_report("p", &node1(), &report(), now() + SignedDuration::from_secs(30)).1.is_none());
        assert_eq!(state.isolation["node1"], before, "it would be written anew at every proof");
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark, Control::Operator);
        let told = state.take_report("p", &node1(), &report(), now()).1.expect("another control is news");
        assert_eq!(told.control, Control::Operator);
        assert!(super::told(&[told], &[]).2.contains("without a sentinel on 1 of them, held against the operator alone: node1"));
    }
}
