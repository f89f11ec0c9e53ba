use proptest::prelude::*;

use super::*;
use crate::forge::{Reach, Repository};

fn now() -> Timestamp {
    Timestamp::from_second(1_000_000).expect("a time")
}

fn ago(seconds: i64) -> Timestamp {
    now() - SignedDuration::from_secs(seconds)
}

fn job(id: u64) -> OwedJob {
    let repository = Repository::parse(&format!("acme/r{}", id % 2)).expect("a repository");
    let reach = Reach { repository: Some(repository.clone()), labels: vec!["linux".to_owned()] };
    OwedJob { key: Some(JobKey { repository, id: id.into() }), reach }
}

fn pod(name: &str, role: Role) -> PodFacts {
    PodFacts {
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        created: ago(10),
        phase: Phase::Alive { waits: None },
        role,
        unproved: None,
        node: Some("node1".to_owned()),
        only_on: None,
    }
}

fn input(max: u32, queued: Vec<OwedJob>, pods: Vec<PodFacts>) -> Input {
    let deadlines =
        Deadlines { start: SignedDuration::from_mins(5), idle: SignedDuration::from_mins(5), job: SignedDuration::from_hours(6) };
    Input { now: now(), max, warm: 0, probe: Vec::new(), deadlines, queued, pods, quota: None, not_before: None }
}

fn busy(refused: Option<Refusal>) -> Role {
    Role::Busy { job: job(1).key.expect("a key"), since: ago(5), refused }
}

fn idle_for(job: OwedJob, seconds: i64) -> Role {
    Role::Idle { since: ago(seconds), meant_for: Some(job), paused: None, lost: false }
}

#[test]
fn a_queued_job_gets_a_pod_and_a_pod_that_waits_serves_it() {
    let plan_ = plan(&input(10, vec![job(1), job(2)], vec![]));
    assert_eq!((plan_.create, plan_.owed.len()), (2, 2));
    let plan_ = plan(&input(10, vec![job(1), job(2)], vec![pod("a", Role::Waiting { ready: false })]));
    assert_eq!(plan_.create, 1);
}

#[test]
fn no_pod_is_made_that_a_quota_would_refuse() {
    let rows = [
        // What quotas leave, pods wanted, pods there; pods made, pods that a quota keeps away.
        (None, 3, 0, 3, 0),
        (Some(5), 3, 0, 3, 0),
        (Some(2), 3, 0, 2, 1),
        (Some(0), 3, 0, 0, 3),
        (Some(2), 3, 9, 1, 0),
        (Some(0), 3, 9, 0, 1),
        (Some(0), 3, 10, 0, 0),
        (Some(0), 0, 0, 0, 0),
    ];
    for (quota, jobs, there, create, beyond) in rows {
        let pods = (0..there).map(|at| pod(&format!("p{at}"), busy(None))).collect();
        let planned = plan(&Input { quota, ..input(10, (1..=jobs).map(job).collect(), pods) });
        assert_eq!((planned.create, planned.beyond_quota), (create, beyond), "{quota:?} {jobs} {there}");
    }
    let probe = plan(&Input { quota: Some(0), probe: vec!["node1".to_owned()], ..input(10, vec![], vec![]) });
    assert_eq!((probe.probe.len(), probe.beyond_quota), (0, 0));
}

#[test]
fn a_registered_runner_serves_the_job_it_was_made_for_and_no_other_repository() {
    let plan_ = plan(&input(10, vec![job(1)], vec![pod("a", idle_for(job(3), 1))]));
    assert_eq!((plan_.create, plan_.owed), (0, vec![]));
    let plan_ = plan(&input(10, vec![job(2)], vec![pod("a", idle_for(job(3), 1))]));
    assert_eq!(plan_.create, 1);
}

#[test]
fn a_pod_for_the_proof_is_made_where_none_waits_and_goes_when_it_has_served() {
    let probe = |nodes: &[&str], queued: Vec<OwedJob>, pods: Vec<PodFacts>| {
        plan(&Input { probe: nodes.iter().map(|node| (*node).to_owned()).collect(), ..input(10, queued, pods) })
    };
    let new = probe(&["node1", "node2"], vec![], vec![]);
    assert_eq!((new.create, new.probe), (0, vec!["node1".to_owned(), "node2".to_owned()]));
    let with_jobs = probe(&["node1"], vec![job(1), job(2)], vec![]);
    assert_eq!((with_jobs.create, with_jobs.probe.len()), (2, 0), "the jobs' pods prove it as well");
    let coming = PodFacts { node: None, ..pod("a", Role::Waiting { ready: false }) };
    assert_eq!(probe(&["node1"], vec![job(1)], vec![coming]).probe.len(), 0, "where it will be is not known yet");
    let waits = || vec![pod("a", Role::Waiting { ready: false })];
    let there = probe(&["node1", "node2"], vec![], waits());
    assert_eq!((there.probe, there.delete.len()), (vec!["node2".to_owned()], 0));
    let after = probe(&[], vec![], waits());
    assert!(after.delete[0].unless_taken && after.delete[0].failure.is_none());
    let full = plan(&Input { max: 1, probe: vec!["node2".to_owned()], ..input(1, vec![], vec![pod("a", busy(None))]) });
    assert_eq!(full.probe.len(), 0, "there is no room");
}

#[test]
fn what_one_node_cannot_do_keeps_nothing_from_starting_elsewhere() {
    let bound = |role: Role| PodFacts { node: None, only_on: Some("node2".to_owned()), ..pod("a", role) };
    let no_room =
        PodFacts { phase: Phase::Alive { waits: Some(Reason::new("Unschedulable", "0/1")) }, ..bound(Role::Waiting { ready: false }) };
    let late = PodFacts { created: ago(301), ..bound(Role::Waiting { ready: false }) };
    let open = PodFacts { unproved: Some(Reason::new("IsolationBreach", "Node")), ..bound(Role::Waiting { ready: true }) };
    for (facts, told) in [(no_room, false), (late, true), (open, true)] {
        let plan = plan(&Input { probe: vec!["node2".to_owned()], ..input(10, vec![], vec![facts]) });
        assert_eq!((plan.delete[0].failure.is_some(), plan.delete[0].start_failure), (told, false));
        assert_eq!(plan.probe.len(), 0, "not before it has gone");
    }
}

#[test]
fn a_pod_that_is_not_isolated_goes_whatever_it_does() {
    for (role, start_failure) in [(Role::Waiting { ready: true }, true), (busy(None), false), (idle_for(job(1), 1), false)] {
        let reason = Reason::new("IsolationBreach", "Node (Breach)");
        let facts = PodFacts { unproved: Some(reason.clone()), ..pod("a", role) };
        for plan in [plan(&input(10, vec![job(1)], vec![facts.clone()])), plan_blind(&input(10, vec![], vec![facts.clone()]))] {
            assert_eq!((plan.delete[0].failure.as_ref(), plan.delete[0].start_failure), (Some(&reason), start_failure));
        }
    }
}

#[test]
fn a_runner_without_a_job_is_paused_first_and_removed_after() {
    let plan_ = plan(&input(10, vec![], vec![pod("a", idle_for(job(1), 60))]));
    assert_eq!((plan_.pause, plan_.delete), (vec!["a".to_owned()], vec![]));
    let paused = Role::Idle { since: ago(60), meant_for: None, paused: Some(ago(3)), lost: false };
    let plan_ = plan(&input(10, vec![], vec![pod("a", paused)]));
    assert!(plan_.delete[0].deregister);
}

#[test]
fn a_cancelled_job_takes_its_waiting_pod_with_it() {
    let plan_ = plan(&input(10, vec![], vec![pod("a", Role::Waiting { ready: true })]));
    assert!(plan_.delete[0].unless_taken && plan_.delete[0].failure.is_none());
}

#[test]
fn warm_pods_are_kept() {
    let mut facts = input(10, vec![], vec![pod("a", Role::Waiting { ready: true })]);
    facts.warm = 2;
    let plan_ = plan(&facts);
    assert_eq!((plan_.create, plan_.delete.len()), (1, 0));
}

#[test]
fn a_refused_job_loses_its_pod_and_the_reason_is_told() {
    let refusal = Refusal { reason: "EventNotServed", message: "not for this pool".to_owned() };
    let plan_ = plan(&input(10, vec![], vec![pod("a", busy(Some(refusal)))]));
    let failure = plan_.delete[0].failure.clone().expect("a reason");
    assert_eq!(failure.reason, "JobRefused");
    assert!(failure.message.contains("acme/r1#1"), "{}", failure.message);
}

#[test]
fn a_pod_that_cannot_start_is_removed_and_counted() {
    let mut stuck = pod("a", Role::Waiting { ready: false });
    stuck.phase = Phase::Stuck(Reason::new("ImagePullBackOff", "no such image"));
    let mut late = pod("b", Role::Waiting { ready: false });
    late.created = ago(301);
    late.phase = Phase::Alive { waits: Some(Reason::new("Unschedulable", "0/1 nodes are available")) };
    let plan_ = plan(&input(10, vec![job(1)], vec![stuck, late]));
    assert!(plan_.delete.iter().all(|deletion| deletion.start_failure));
    let late = plan_.delete[1].failure.clone().expect("a reason");
    assert!(late.message.contains("0/1 nodes"), "{}", late.message);
}

#[test]
fn a_runner_whose_registration_got_lost_is_taken_back_at_once() {
    let lost = Role::Idle { since: ago(1), meant_for: None, paused: None, lost: true };
    let plan_ = plan(&input(10, vec![job(1)], vec![pod("a", lost)]));
    assert_eq!((plan_.pause.len(), plan_.create), (1, 1));
}

#[test]
fn without_the_forge_only_what_is_over_stuck_or_overdue_goes() {
    let over = PodFacts { phase: Phase::Over { success: true, reason: None }, ..pod("over", busy(None)) };
    let late =
        PodFacts { role: Role::Busy { job: job(1).key.expect("a key"), since: ago(7 * 3600), refused: None }, ..pod("late", Role::Done) };
    let pods = vec![over, late, pod("idle", idle_for(job(1), 60)), pod("waits", Role::Waiting { ready: true }), pod("old", Role::Unknown)];
    let plan_ = plan_blind(&input(10, vec![], pods));
    let names: Vec<_> = plan_.delete.iter().map(|deletion| deletion.name.as_str()).collect();
    assert_eq!(names, ["over", "late"]);
    assert_eq!((plan_.create, plan_.pause.len()), (0, 0));
}

#[test]
fn nothing_is_created_before_its_time() {
    let mut facts = input(10, vec![job(1)], vec![]);
    facts.not_before = Some(now() + SignedDuration::from_secs(1));
    assert_eq!(plan(&facts).create, 0);
}

fn any_role() -> impl Strategy<Value = Role> {
    prop_oneof![
        any::<bool>().prop_map(|ready| Role::Waiting { ready }),
        (0u64..6).prop_map(|id| Role::Registering(job(id))),
        Just(Role::Burnt("no answer".to_owned())),
        (0u64..6, 0i64..600).prop_map(|(id, age)| idle_for(job(id), age)),
        Just(busy(None)),
        Just(Role::Done),
        Just(Role::Stray),
    ]
}

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![
        4 => Just(Phase::Alive { waits: None }),
        1 => Just(Phase::Stuck(Reason::new("ErrImageNeverPull", "no image"))),
        1 => any::<bool>().prop_map(|success| Phase::Over { success, reason: None }),
        1 => Just(Phase::Leaving),
    ]
}

fn any_input() -> impl Strategy<Value = Input> {
    let pods = proptest::collection::vec((any_role(), any_phase()), 0..12);
    (1u32..10, 0u32..3, proptest::collection::vec(0u64..20, 0..12), pods).prop_map(|(max, warm, jobs, pods)| {
        let pods = pods.into_iter().enumerate().map(|(n, (role, phase))| PodFacts { phase, ..pod(&format!("p{n}"), role) });
        let mut facts = input(max, jobs.into_iter().map(job).collect(), pods.collect());
        facts.warm = warm.min(max);
        facts
    })
}

/// The world after a plan was carried out and the cluster had time to follow.
fn after(facts: &Input, plan: &Plan) -> Input {
    let mut next = facts.clone();
    next.pods.retain(|pod| pod.phase != Phase::Leaving && !plan.delete.iter().any(|d| d.name == pod.name));
    for pod in &mut next.pods {
        if let Role::Idle { paused, .. } = &mut pod.role
            && plan.pause.contains(&pod.name)
        {
            *paused = Some(next.now);
        }
    }
    let made = (0..plan.create).map(|n| pod(&format!("new{n}-{}", next.pods.len()), Role::Waiting { ready: false }));
    next.pods.extend(made.collect::<Vec<_>>());
    next
}

proptest! {
    #[test]
    fn there_are_never_more_pods_than_max(facts in any_input()) {
        let plan = plan(&facts);
        prop_assert!(plan.create == 0 || facts.pods.len() + plan.create as usize <= facts.max as usize);
    }

    #[test]
    fn a_running_job_that_is_accepted_keeps_its_pod(facts in any_input()) {
        let plan = plan(&facts);
        for pod in &facts.pods {
            let runs = matches!(pod.role, Role::Busy { refused: None, .. }) && matches!(pod.phase, Phase::Alive { .. });
            prop_assert!(!runs || !plan.delete.iter().any(|d| d.name == pod.name));
        }
    }

    #[test]
    fn a_runner_that_may_take_a_job_is_never_deleted_without_a_pause(facts in any_input()) {
        let plan = plan(&facts);
        for pod in &facts.pods {
            let open = matches!(pod.role, Role::Idle { paused: None, .. }) && matches!(pod.phase, Phase::Alive { .. });
            prop_assert!(!open || !plan.delete.iter().any(|d| d.name == pod.name));
        }
    }

    #[test]
    fn every_pod_that_is_over_goes(facts in any_input()) {
        let plan = plan(&facts);
        for pod in &facts.pods {
            let over = matches!(pod.phase, Phase::Over { .. });
            prop_assert!(!over || plan.delete.iter().any(|d| d.name == pod.name));
        }
    }

    #[test]
    fn after_enough_passes_nothing_is_left_to_do(facts in any_input()) {
        let mut facts = facts;
        for _ in 0..4 {
            let plan = plan(&facts);
            facts = after(&facts, &plan);
        }
        let plan = plan(&facts);
        prop_assert_eq!(plan.create, 0);
        prop_assert!(plan.delete.is_empty() && plan.pause.is_empty(), "{:?}", plan);
    }
}
