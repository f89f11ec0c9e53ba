//! The proof of a runner pod's isolation: what its gate is asked to try, and what the answer is worth.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::ResourceExt;
use mayfly_crds::conditions::reasons;
use mayfly_crds::{ClassIsolation, Enforcement, NodeIsolation};
use mayfly_proof::{Challenge, Endpoint, Report, Verdict, judge};

use super::apply::reference_to;
use super::controller::Context;
use super::registry::{PoolHandle, PoolState};
use super::status;
use crate::isolation::{Surroundings, WHOLE, challenge, forbidden};
use crate::runner::Reason;

/// How old a proof may be when a registration is made. A gate that waits proves anew whenever its question was left without an answer.
pub(super) const PROOF_AGE: SignedDuration = SignedDuration::from_secs(90);
/// A runner whose gate has not proved anything for this long counts as unproven: its job may be what keeps the gate from it.
pub(super) const SILENCE: SignedDuration = SignedDuration::from_secs(150);
/// A port nobody listens on: a host that is reached refuses it, and no rule of Mayfly's opens it.
const UNUSED_PORT: u16 = 1;
/// Most nodes told in a status.
const NODES_TOLD: usize = 50;

/// Without jobs a pod is made for the sake of the proof this often; more often where the last one was not one.
const PROVE_EVERY: SignedDuration = SignedDuration::from_hours(1);
const PROVE_AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// Pools that make such a pod at the same time.
const PROBING: usize = 5;

/// What is known of one pod's isolation.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodProof {
    /// What its gate was asked last, and under which policies.
    asked: Option<(Challenge, String)>,
    /// What it proved last.
    last: Option<Proof>,
}

#[derive(Clone, Debug)]
struct Proof {
    at: Timestamp,
    /// The policies it holds for.
    policies: String,
    verdict: Verdict,
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

    /// Why the pod has to go, if it is known not to be isolated. `registered` since when it may have a job.
    pub(super) fn unproved(&self, pod: &str, registered: Option<Timestamp>, now: Timestamp) -> Option<Reason> {
        let last = self.proofs.get(pod).and_then(|proof| proof.last.as_ref());
        if let Some(proof) = last.filter(|proof| !self.suffices(proof.verdict)) {
            return Some(Reason::new(reason(proof.verdict), summary(&proof.classes)));
        }
        let heard = last.map(|proof| proof.at).max(registered)?;
        let silent = self.enforcement == Enforcement::Require && registered.is_some() && now.duration_since(heard) > SILENCE;
        let message = || format!("its gate has proved nothing for {} s", SILENCE.as_secs());
        silent.then(|| Reason::new(reasons::ISOLATION_UNPROVEN, message()))
    }

    /// Whether it is time for a proof although no job asks for a pod.
    fn is_due(&self, now: Timestamp) -> bool {
        let proved = self.isolation.values().all(|node| parse(&node.verdict) == Verdict::Proved);
        let every = if proved { PROVE_EVERY } else { PROVE_AGAIN };
        self.proved.is_none_or(|at| now.duration_since(at) > every)
    }

    fn suffices(&self, verdict: Verdict) -> bool {
        verdict == Verdict::Proved || self.enforcement == Enforcement::Warn
    }

    /// Notes what a pod was asked.
    fn ask(&mut self, pod: &str, challenge: Challenge, policies: String) {
        self.proofs.entry(pod.to_owned()).or_default().asked = Some((challenge, policies));
    }

    /// Takes a report about the last challenge. With it comes the node's entry, if it is news.
    fn take_report(&mut self, pod: &str, node: &str, report: &Report, now: Timestamp) -> (Taken, Option<NodeIsolation>) {
        let current = self.policies_mark();
        let Some(known) = self.proofs.get_mut(pod) else { return (Taken::Stale, None) };
        let Some((asked, policies)) = known.asked.take_if(|(asked, _)| asked.nonce == report.nonce) else { return (Taken::Stale, None) };
        if current.as_ref() != Some(&policies) {
            return (Taken::Stale, None);
        }
        let classes = weigh(&asked, report);
        let verdict = worst(&classes);
        self.proved = Some(now);
        known.last = Some(Proof { at: now, policies, verdict, classes: classes.clone() });
        let entry = NodeIsolation { node: node.to_owned(), verdict: verdict.as_str().to_owned(), since: status::time(now), classes };
        let changed = self.isolation.get(node).is_none_or(|old| !same_verdicts(old, &entry));
        if changed {
            self.isolation.insert(node.to_owned(), entry.clone());
        }
        let taken = match self.suffices(verdict) {
            true => Taken::Enough,
            false => Taken::NotEnough(summary(&entry.classes)),
        };
        (taken, changed.then_some(entry))
    }
}

/// Whether a pod is wanted for the sake of the proof alone: for a pool that is new, and from time to time.
pub(super) fn is_wanted(ctx: &Context, handle: &PoolHandle) -> bool {
    let now = ctx.now();
    let (due, probing) = {
        let state = handle.state();
        (state.is_due(now), state.probing)
    };
    let others = || ctx.registry.all().iter().filter(|other| other.key != handle.key && other.state().probing).count();
    let wanted = due && (probing || others() < PROBING);
    handle.state().probing = wanted;
    wanted
}

/// What a gate is to try. `None` where the pool is not ready to tell: its policies were not applied yet.
///
/// # Errors
/// When the list of metadata endpoints cannot be read.
pub(crate) async fn ask(ctx: &Context, handle: &PoolHandle, pod: &Pod) -> Result<Option<Challenge>, String> {
    let around = surroundings(ctx, handle, Some(pod)).await;
    let forbidden = forbidden(&around)?;
    let endpoints: Vec<Endpoint> = forbidden.iter().map(|(_, endpoint)| *endpoint).collect();
    let controls = ctx.controls.look(&endpoints).await;
    let mut state = handle.state();
    let Some(policies) = state.policies_mark() else { return Ok(None) };
    let nonce = format!("{:032x}", rand::random::<u128>());
    let challenge = challenge(nonce, &forbidden, &controls, state.forge_endpoints.clone());
    state.ask(&pod.name_any(), challenge.clone(), policies);
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
        state.take_report(&name, &node, report, ctx.now())
    };
    if let Taken::NotEnough(why) = &taken {
        tracing::warn!(pool = %handle.key, pod = name, node, why, "a runner pod is not shown to be isolated");
    }
    let warns = handle.state().enforcement == Enforcement::Warn;
    if let Some(entry) = news {
        let verdict = worst(&entry.classes);
        if warns && verdict != Verdict::Proved {
            let note = format!("{name} on node {node} runs jobs although it is not shown to be isolated: {}", summary(&entry.classes));
            ctx.io.warn(&reference_to(&handle.key, &handle.uid), reason(verdict), "Prove", &note).await;
        }
        ctx.registry.wake(handle.key.clone());
    } else if taken != Taken::Enough {
        ctx.registry.wake(handle.key.clone());
    }
    taken
}

/// Looks at the controls ahead of the first pod that needs them.
pub(super) async fn prepare_controls(ctx: Arc<Context>, handle: Arc<PoolHandle>) {
    let around = surroundings(&ctx, &handle, None).await;
    if let Ok(forbidden) = forbidden(&around) {
        let endpoints: Vec<Endpoint> = forbidden.iter().map(|(_, endpoint)| *endpoint).collect();
        ctx.controls.look(&endpoints).await;
    }
}

/// What is around a pod; around every node's pods where it is not known yet.
async fn surroundings(ctx: &Context, handle: &PoolHandle, pod: Option<&Pod>) -> Surroundings {
    let status = pod.and_then(|pod| pod.status.as_ref());
    let listed = status.iter().flat_map(|status| status.host_ips.iter().flatten()).map(|host| host.ip.as_str());
    let node: Vec<IpAddr> = listed.chain(status.and_then(|status| status.host_ip.as_deref())).filter_map(|ip| ip.parse().ok()).collect();
    let nodes = ctx.nodes.state();
    let other_nodes = nodes.iter().filter_map(|node| address(node)).filter(|address| !node.contains(address)).collect();
    let slices = ctx.api_endpoints.state();
    let endpoints = slices.iter().flat_map(|slice| {
        let ports: Vec<u16> = slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok()).collect();
        let addresses =
            slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses).filter_map(|address| address.parse::<IpAddr>().ok());
        addresses.flat_map(move |address| ports.clone().into_iter().map(move |port| SocketAddr::from((address, port)))).collect::<Vec<_>>()
    });
    let sentinels = ctx.sentinels.find(&ctx.settings.sentinel_service, &ctx.settings.sentinel_pods).await;
    let forge = handle.state().forge_endpoints.clone();
    let beside_the_forge = forge.iter().map(|forge| SocketAddr::from((forge.ip(), UNUSED_PORT)));
    Surroundings {
        api_server: ctx.settings.api_server.into_iter().chain(endpoints).collect(),
        outside: ctx.settings.outside_sentinels.iter().copied().chain(beside_the_forge).collect(),
        sentinel_pods: sentinels.pods,
        sentinel_service: sentinels.service,
        node,
        other_nodes,
    }
}

fn address(node: &Node) -> Option<IpAddr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    addresses.iter().find(|address| address.type_ == "InternalIP")?.address.parse().ok()
}

/// What a report shows, by class, with what it should have shown and did not.
fn weigh(asked: &Challenge, report: &Report) -> Vec<ClassIsolation> {
    let class = |class: &str, verdict: Verdict, message: String| ClassIsolation {
        class: class.to_owned(),
        verdict: verdict.as_str().to_owned(),
        message,
    };
    let findings = judge(&asked.forbidden, &report.forbidden);
    let missing = WHOLE.iter().filter(|class| findings.iter().all(|finding| finding.class != **class));
    let mut classes: Vec<ClassIsolation> = missing
        .map(|missing| class(missing.as_str(), Verdict::Unproven, "the operator knows no address of this class to try".to_owned()))
        .collect();
    let too_few = report.clean < asked.rounds && report.required && findings.iter().all(|finding| finding.verdict != Verdict::Breach);
    classes.extend(findings.into_iter().map(|finding| match finding.verdict {
        Verdict::Proved if too_few => {
            class(finding.class.as_str(), Verdict::Unproven, "it was closed in too few rounds in a row".to_owned())
        }
        verdict => class(finding.class.as_str(), verdict, finding.message),
    }));
    let required = match report.required {
        true => class("Required", Verdict::Proved, "the forge answers the pod".to_owned()),
        false => class("Required", Verdict::Unproven, "the forge does not answer the pod".to_owned()),
    };
    classes.push(required);
    classes.sort_by(|a, b| a.class.cmp(&b.class));
    classes
}

fn parse(verdict: &str) -> Verdict {
    [Verdict::Proved, Verdict::Breach].into_iter().find(|known| known.as_str() == verdict).unwrap_or(Verdict::Unproven)
}

fn worst(classes: &[ClassIsolation]) -> Verdict {
    classes.iter().map(|class| parse(&class.verdict)).max().unwrap_or(Verdict::Unproven)
}

fn same_verdicts(a: &NodeIsolation, b: &NodeIsolation) -> bool {
    let verdicts = |node: &NodeIsolation| node.classes.iter().map(|class| (class.class.clone(), class.verdict.clone())).collect::<Vec<_>>();
    verdicts(a) == verdicts(b)
}

/// The word for a verdict that is not a proof.
fn reason(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Breach => reasons::ISOLATION_BREACH,
        Verdict::Unproven | Verdict::Proved => reasons::ISOLATION_UNPROVEN,
    }
}

/// What is wrong, class by class, the worst first.
fn summary(classes: &[ClassIsolation]) -> String {
    let mut wrong: Vec<&ClassIsolation> = classes.iter().filter(|class| parse(&class.verdict) != Verdict::Proved).collect();
    wrong.sort_by_key(|class| std::cmp::Reverse(parse(&class.verdict)));
    wrong.iter().map(|class| format!("{} ({}): {}", class.class, class.verdict, class.message)).collect::<Vec<_>>().join("; ")
}

/// The condition's verdict, reason and message, from what is known of each node.
pub(super) fn told(nodes: &[NodeIsolation]) -> (Verdict, &'static str, String) {
    let Some(worst) = nodes.iter().max_by_key(|node| parse(&node.verdict)) else {
        return (Verdict::Unproven, reasons::NO_PROOF_YET, "no runner pod has tried it yet".to_owned());
    };
    match parse(&worst.verdict) {
        Verdict::Proved => (Verdict::Proved, reasons::OK, format!("shown by runner pods on {} node(s)", nodes.len())),
        verdict => (verdict, reason(verdict), format!("node {}: {}", worst.node, summary(&worst.classes))),
    }
}

/// Entries for the status: what this process knows, or what an earlier one wrote.
pub(super) fn nodes_told(state: &PoolState, old: &[NodeIsolation]) -> Vec<NodeIsolation> {
    match state.isolation.is_empty() {
        true => old.to_vec(),
        false => state.isolation.values().take(NODES_TOLD).cloned().collect(),
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
        Report { nonce: "n1".to_owned(), forbidden, required: true, clean: 3, unclean: 0, took_ms: 200 }
    }

    fn asked(enforcement: Enforcement) -> PoolState {
        let mut state = state(enforcement);
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark);
        state
    }

    /// Has the pod prove its isolation.
    pub(crate) fn prove(state: &mut PoolState, pod: &str, now: Timestamp) {
        state.policies = Some(("digest".to_owned(), BTreeMap::new()));
        let mark = state.policies_mark().expect("a mark");
        state.ask(pod, challenge(), mark);
        assert_eq!(state.take_report(pod, "node1", &report(), now).0, Taken::Enough);
    }

    #[test]
    fn a_whole_report_is_a_proof_for_a_while_and_counts_once() {
        let mut state = asked(Enforcement::Require);
        assert!(!state.is_proved("p", now()), "nothing was reported");
        let (taken, news) = state.take_report("p", "node1", &report(), now());
        assert_eq!((taken, news.map(|entry| entry.verdict)), (Taken::Enough, Some("Proved".to_owned())));
        assert!(state.is_proved("p", now()) && !state.is_proved("other", now()));
        assert!(!state.is_proved("p", now() + PROOF_AGE + SignedDuration::from_secs(1)), "too old");
        assert_eq!(state.take_report("p", "node1", &report(), now()).0, Taken::Stale, "a replayed report");
        assert_eq!(told(&nodes_told(&state, &[])).0, Verdict::Proved);
    }

    #[test]
    fn a_proof_holds_for_the_policies_it_was_made_under() {
        let mut state = asked(Enforcement::Require);
        state.take_report("p", "node1", &report(), now());
        state.policies = Some(("another".to_owned(), BTreeMap::new()));
        assert!(!state.is_proved("p", now()));
        let mut state = asked(Enforcement::Require);
        state.policies = Some(("another".to_owned(), BTreeMap::new()));
        assert_eq!(state.take_report("p", "node1", &report(), now()).0, Taken::Stale);
    }

    #[test]
    fn every_way_to_fall_short_is_told_and_never_enough() {
        let open = Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() };
        let short = Report { forbidden: Vec::new(), ..report() };
        let few = Report { clean: 1, ..report() };
        let lonely = Report { required: false, clean: 0, ..report() };
        for (report, says) in [(open, "Breach"), (short, "shows nothing"), (few, "too few rounds"), (lonely, "the forge does not answer")] {
            let mut state = asked(Enforcement::Require);
            let (taken, _) = state.take_report("p", "node1", &report, now());
            let Taken::NotEnough(why) = taken else { panic!("{report:?} was enough") };
            assert!(why.contains(says), "{why}");
            assert!(!state.is_proved("p", now()));
            assert!(state.unproved("p", None, now()).is_some(), "the pod goes");
        }
        let mut state = state(Enforcement::Require);
        let mark = state.policies_mark().expect("a mark");
        let mut without = challenge();
        without.forbidden.retain(|target| target.class != Class::Pods);
        state.ask("p", without, mark);
        let fewer = Report { forbidden: vec![Answer::Silent; WHOLE.len() - 1], ..report() };
        let Taken::NotEnough(why) = state.take_report("p", "node1", &fewer, now()).0 else { panic!("a class was missing") };
        assert!(why.contains("Pods (Unproven)"), "{why}");
    }

    #[test]
    fn with_warn_it_is_enough_and_still_told() {
        let mut state = asked(Enforcement::Warn);
        let open = Report { forbidden: vec![Answer::Accepted; WHOLE.len()], clean: 0, ..report() };
        let (taken, news) = state.take_report("p", "node1", &open, now());
        assert_eq!((taken, news.map(|entry| entry.verdict)), (Taken::Enough, Some("Breach".to_owned())));
        assert!(state.is_proved("p", now()) && state.unproved("p", Some(now()), now()).is_none());
        assert_eq!(told(&nodes_told(&state, &[])).1, reasons::ISOLATION_BREACH);
    }

    #[test]
    fn a_runner_whose_gate_fell_silent_counts_as_unproven() {
        let mut state = asked(Enforcement::Require);
        state.take_report("p", "node1", &report(), now());
        let late = now() + SILENCE + SignedDuration::from_secs(1);
        assert!(state.unproved("p", Some(now()), late).is_some());
        assert!(state.unproved("p", None, late).is_none(), "a pod without a registration is asked again before it gets one");
        assert!(state.unproved("adopted", Some(late), late).is_none(), "an adopted runner has time to report");
    }

    #[test]
    fn a_proof_is_due_at_first_from_time_to_time_and_sooner_after_a_failure() {
        let mut state = asked(Enforcement::Require);
        assert!(state.is_due(now()));
        state.take_report("p", "node1", &report(), now());
        assert!(!state.is_due(now() + SignedDuration::from_mins(59)) && state.is_due(now() + SignedDuration::from_mins(61)));
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark);
        state.take_report("p", "node1", &Report { forbidden: Vec::new(), ..report() }, now());
        assert!(!state.is_due(now() + SignedDuration::from_mins(4)) && state.is_due(now() + SignedDuration::from_mins(6)));
    }

    #[test]
    fn what_is_told_survives_being_stored() {
        let mut state = asked(Enforcement::Require);
        let later = now() + SignedDuration::from_millis(1_234);
        let told = state.take_report("p", "node1", &report(), later).1.expect("news");
        let stored = serde_json::from_str(&serde_json::to_string(&told).expect("JSON")).expect("the same");
        assert_eq!(told, stored, "it would be written anew at every pass");
    }

    #[test]
    fn the_same_verdicts_are_no_news() {
        let mut state = asked(Enforcement::Require);
        assert!(state.take_report("p", "node1", &report(), now()).1.is_some());
        let mark = state.policies_mark().expect("a mark");
        state.ask("p", challenge(), mark);
        assert!(state.take_report("p", "node1", &report(), now() + SignedDuration::from_secs(30)).1.is_none());
    }
}
