//! A pass against an API server that answers by script: what a pass does when the cluster refuses, and what it does not do.

use clap::Parser;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::reflector::{self, store::Writer};
use mayfly_crds::names::LABEL_POOL;
use serde_json::{Value, json};

use super::*;
use crate::audit::tests::Memory;
use crate::cli::{Cli, Command};
use crate::forge::gitea::Giteas;
use crate::forge::http_client;
use crate::isolation::Beside;
use crate::kube_io::scripted::{Answer, Server};
use crate::pool::gather::gather_blind;
use crate::pool::plan::Deletion;
use crate::pool::registry::Spawned;
use crate::runner::Reason;

const FINALIZED: [&str; 1] = [FINALIZER_REGISTRATIONS];

/// A pool whose spec no version of Mayfly can read.
fn malformed(finalizers: &[&str]) -> Value {
    json!({
        "apiVersion": "mayfly.dev/v1alpha1", "kind": "RunnerPool",
        "metadata": {"name": "ci", "namespace": "team", "uid": "u-1", "generation": 3, "finalizers": finalizers},
        "spec": {"forge": {"gitea": "everything"}, "scale": {"max": "many"}},
    })
}

fn guarded(pool: &Value) -> Arc<Guarded> {
    Arc::new(serde_json::from_value(pool.clone()).expect("anything with metadata can be read"))
}

fn pod(name: &str, owner: &str, phase: &str) -> Pod {
    let owner = json!({"apiVersion": "mayfly.dev/v1alpha1", "kind": "RunnerPool", "name": "ci", "uid": owner});
    let pod = json!({"metadata": {"name": name, "namespace": "team", "uid": format!("uid-{name}"), "ownerReferences": [owner]},
        "status": {"phase": phase}});
    serde_json::from_value(pod).expect("a pod")
}

/// What a pass needs, with these pods in the cluster.
pub(crate) fn context(server: &Server, pods: &[Pod]) -> Arc<Context> {
    // The first test to come installs it.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let arguments = ["mayfly", "controller", "--namespace", "m", "--gate-image", "g", "--runner-image", "r"];
    let Ok(Cli { command: Command::Controller(arguments) }) = Cli::try_parse_from(arguments) else { panic!("a command line") };
    let mut writer: Writer<Pod> = Writer::default();
    for pod in pods {
        writer.apply_watcher_event(&watcher::Event::Apply(pod.clone()));
    }
    let (metrics, tasks) = (Metrics::new(), TaskTracker::new());
    Arc::new(Context {
        settings: arguments.settings().expect("settings"),
        io: KubeIo::new(server.client(), None, metrics.clone()),
        http: http_client(None, None, |_| None).expect("a client"),
        giteas: Giteas::default(),
        metrics,
        registry: Arc::new(Pools::new().0),
        pools: reflector::store().0,
        pods: writer.as_reader(),
        deaf: Arc::default(),
        secrets: reflector::store().0,
        policies: reflector::store().0,
        bindings: None,
        dialects: Arc::new(Dialects::new(reflector::store().0)),
        nodes: reflector::store().0,
        daemon_sets: reflector::store().0,
        quotas: reflector::store().0,
        api_endpoints: reflector::store().0,
        controls: Controls::default(),
        issuer: None,
        names: Names::new(tasks.clone()),
        validated: Validated::default(),
        tasks,
        audit: Audit::new(Memory::default()),
    })
}

fn what(server: &Server) -> Vec<String> {
    server.calls().into_iter().map(|call| call.what).collect()
}

#[tokio::test]
async fn a_malformed_pool_is_told_so_once_and_gets_nothing() {
    let server = Server::new([Answer::Object(malformed(&FINALIZED))]);
    let ctx = context(&server, &[]);
    reconcile(guarded(&malformed(&FINALIZED)), ctx.clone()).await.expect("a pass");
    let calls = server.calls();
    assert_eq!(what(&server), ["PATCH /apis/mayfly.dev/v1alpha1/namespaces/team/runnerpools/ci/status"]);
    let conditions = calls[0].body["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready").expect("Ready");
    assert_eq!((&ready["status"], &ready["reason"], &ready["observedGeneration"]), (&json!("False"), &json!("InvalidSpec"), &json!(3)));
    let message = ready["message"].as_str().unwrap_or_default();
    assert!(message.starts_with("the object cannot be read: "), "{message}");
}

#[tokio::test]
async fn a_spec_is_recorded_once_and_again_when_it_changes() {
    let trail = Memory::default();
    let answer = || Answer::Object(malformed(&FINALIZED));
    let server = Server::new([answer(), answer(), answer()]);
    let ctx = Arc::into_inner(context(&server, &[])).expect("one");
    let ctx = Arc::new(Context { audit: Audit::new(trail.clone()), ..ctx });
    let mut changed = malformed(&FINALIZED);
    changed["metadata"]["generation"] = json!(4);
    for pool in [malformed(&FINALIZED), malformed(&FINALIZED), changed] {
        reconcile(guarded(&pool), ctx.clone()).await.expect("a pass");
    }
    ctx.tasks.close();
    ctx.tasks.wait().await;
    let told: Vec<Value> = trail.records().iter().map(|record| json!([record["action"], record["payload"]["generation"]])).collect();
    assert_eq!(told, [json!(["pool.created", 3]), json!(["pool.changed", 4])]);
    let record = &trail.records()[0];
    assert_eq!((&record["target"]["uid"], &record["success"]), (&json!("u-1"), &json!(false)), "it cannot be read");
}

#[tokio::test]
async fn a_pool_whose_status_cannot_be_written_is_told_by_an_event_and_left_alone() {
    let server = Server::new([Answer::Refusal(422, "Invalid"), Answer::Object(json!({"metadata": {}}))]);
    reconcile(guarded(&malformed(&[])), context(&server, &[])).await.expect("a pass");
    let calls = server.calls();
    assert_eq!(calls.len(), 2, "{calls:?}");
    assert_eq!((&calls[1].body["reason"], &calls[1].body["regarding"]["name"]), (&json!("InvalidSpec"), &json!("ci")));
    assert!(calls[1].body["note"].as_str().is_some_and(|note| note.starts_with("the object cannot be read: ")), "{calls:?}");
}

#[tokio::test]
async fn a_pool_that_became_malformed_keeps_its_jobs_and_loses_what_is_over() {
    let server = Server::new([Answer::Object(json!({"kind": "Pod", "metadata": {}})), Answer::Object(malformed(&FINALIZED))]);
    let ctx = context(&server, &[pod("busy", "u-1", "Running"), pod("over", "u-1", "Succeeded"), pod("other", "u-2", "Succeeded")]);
    reconcile(guarded(&malformed(&FINALIZED)), ctx).await.expect("a pass");
    assert_eq!(what(&server)[0], "DELETE /api/v1/namespaces/team/pods/over");
    assert_eq!(server.calls().len(), 2, "{:?}", server.calls());
}

#[tokio::test]
async fn a_malformed_pool_gets_no_finalizer_which_could_not_be_taken_off_again() {
    let server = Server::new([Answer::Object(malformed(&[]))]);
    reconcile(guarded(&malformed(&[])), context(&server, &[])).await.expect("a pass");
    assert_eq!(what(&server), ["PATCH /apis/mayfly.dev/v1alpha1/namespaces/team/runnerpools/ci/status"]);
    let mut going = malformed(&["example.com/another"]);
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let server = Server::new([]);
    reconcile(guarded(&going), context(&server, &[])).await.expect("nothing to do");
    assert_eq!(server.calls(), []);
}

#[tokio::test]
async fn without_its_finalizer_a_pool_is_not_served() {
    let gitea =
        json!({"url": "https://git.example", "scope": {"organization": "acme"}, "tokenSecretRef": {"name": "t"}, "labels": ["linux"]});
    let mut valid = malformed(&[]);
    valid["spec"] = json!({"forge": {"gitea": gitea}});
    let server = Server::new([Answer::Refusal(403, "Forbidden")]);
    let error = reconcile(guarded(&valid), context(&server, &[])).await.expect_err("refused");
    assert!(matches!(error, Error::Finalizer(_)), "{error}");
    assert_eq!(what(&server), ["PATCH /apis/mayfly.dev/v1alpha1/namespaces/team/runnerpools/ci"]);
}

#[tokio::test]
async fn a_pool_that_goes_waits_for_its_pods_and_only_then_lets_its_finalizer_go() {
    let mut pool = malformed(&FINALIZED);
    pool["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let server = Server::new([Answer::Object(json!({"kind": "Pod", "metadata": {}}))]);
    let error = reconcile(guarded(&pool), context(&server, &[pod("busy", "u-1", "Running")])).await.expect_err("a pod is left");
    assert!(matches!(error, Error::PodsLeft(_)), "{error}");
    assert_eq!(what(&server), ["DELETE /api/v1/namespaces/team/pods/busy"]);

    let server = Server::new([Answer::Object(pool.clone())]);
    reconcile(guarded(&pool), context(&server, &[pod("other", "u-2", "Running")])).await.expect("nothing is left");
    assert_eq!(what(&server), ["PATCH /apis/mayfly.dev/v1alpha1/namespaces/team/runnerpools/ci"]);
    assert!(server.calls()[0].body.to_string().contains("remove"), "{:?}", server.calls());
}

/// A pool of which these pods did not start, and the plan to delete them.
fn pods_that_did_not_start(ctx: &Context, names: &[&str]) -> (Pool, Arc<PoolHandle>, Plan) {
    let gitea =
        json!({"url": "https://git.example", "scope": {"organization": "acme"}, "tokenSecretRef": {"name": "t"}, "labels": ["linux"]});
    let pool = crate::pool::validate::tests::runner_pool(&json!({"forge": {"gitea": gitea}}).to_string());
    let pool = validate(&pool).expect("valid");
    let handle = ctx.registry.open(&pool.key, &pool.uid);
    let delete = names.iter().map(|name| {
        let uid = format!("uid-{name}");
        let waits =
            Spawned { uid: uid.clone(), created: ctx.now(), seen: true, asked: None, registering: None, burnt: None, only_on: None };
        handle.state().spawned.insert((*name).to_owned(), waits);
        Deletion {
            name: (*name).to_owned(),
            uid,
            grace: 1,
            deregister: false,
            unless_taken: false,
            failure: Some(Reason::new("StartDeadlineExceeded", "late")),
            start_failure: true,
        }
    });
    let plan = Plan { delete: delete.collect(), ..Plan::default() };
    (pool, handle, plan)
}

#[tokio::test]
async fn a_deletion_the_api_server_refuses_is_not_told_as_done() {
    let server = Server::new([Answer::Refusal(500, "InternalError")]);
    let ctx = context(&server, &[]);
    let (pool, handle, plan) = pods_that_did_not_start(&ctx, &["p"]);
    apply::apply_blind(&ctx, &pool, &handle, &plan).await;
    assert_eq!(what(&server), ["DELETE /api/v1/namespaces/team/pods/p"], "no event about what did not happen");
    let state = handle.state();
    assert!(state.spawned.contains_key("p"), "the pod is still ours");
    assert_eq!((state.start_failures, state.last_failure.as_ref()), (0, None));
}

#[tokio::test]
async fn a_deleted_pod_leaves_before_the_watch_tells_and_is_deleted_once() {
    // A deletion and an event.
    let server = Server::new((0..2).map(|_| Answer::Object(json!({"kind": "Pod", "metadata": {}}))));
    let mut shown = pod("p", "u-1", "Running");
    shown.labels_mut().insert(LABEL_POOL.to_owned(), "ci".to_owned());
    let ctx = context(&server, &[shown]);
    let (pool, handle, plan) = pods_that_did_not_start(&ctx, &["p"]);
    let leaves = || gather_blind(&ctx, &pool, &handle).pods[0].phase == Phase::Leaving;
    assert!(!leaves());
    apply::apply_blind(&ctx, &pool, &handle, &plan).await;
    assert!(leaves());
    handle.state().deleted.values_mut().for_each(|at| *at -= SignedDuration::from_mins(1));
    assert!(!leaves(), "a deletion that came to nothing is tried again");
}

#[tokio::test]
async fn runners_that_were_made_together_and_did_not_start_are_one_failure() {
    // A deletion and an event for each.
    let server = Server::new((0..10).map(|_| Answer::Object(json!({"kind": "Pod", "metadata": {}}))));
    let ctx = context(&server, &[]);
    let (pool, handle, plan) = pods_that_did_not_start(&ctx, &["p", "q", "r"]);
    apply::apply_blind(&ctx, &pool, &handle, &plan).await;
    let pause = handle.state().not_before.expect("a pause");
    assert_eq!(handle.state().start_failures, 1);
    assert!(pause.duration_since(ctx.now()) <= SignedDuration::from_secs(5));
    handle.state().not_before = Some(ctx.now());
    let (pool, handle, plan) = pods_that_did_not_start(&ctx, &["late"]);
    handle.state().spawned.values_mut().for_each(|pod| pod.created -= SignedDuration::from_mins(1));
    apply::apply_blind(&ctx, &pool, &handle, &plan).await;
    assert_eq!(handle.state().start_failures, 1, "it was made with the others");
    let (pool, handle, plan) = pods_that_did_not_start(&ctx, &["s"]);
    apply::apply_blind(&ctx, &pool, &handle, &plan).await;
    assert_eq!(handle.state().start_failures, 2, "that was after the pause");
}

#[tokio::test]
async fn only_a_sentinel_tells_what_answers_on_its_node_and_only_of_its_own() {
    use axum::body::Body;
    use tower::ServiceExt;

    const NODE: &str = "authentication.kubernetes.io/node-name";
    let review = |account: &str, audience: &str, node: Option<&str>| {
        let extra = node.map_or_else(|| json!({}), |node| json!({NODE: [node]}));
        let user = json!({"username": format!("system:serviceaccount:{account}"), "extra": extra});
        Answer::Object(json!({"spec": {}, "status": {"authenticated": true, "audiences": [audience], "user": user}}))
    };
    let ours = mayfly_crds::names::GATE_AUDIENCE;
    let server = Server::new([
        review("team:mayfly-runner", ours, Some("node1")),
        review("team:mayfly-sentinel", ours, Some("node1")),
        review("m:mayfly-sentinel", "another", Some("node1")),
        review("m:mayfly-sentinel", ours, None),
        review("m:mayfly-sentinel", ours, Some("node1")),
        review("m:mayfly-sentinel", ours, Some("node1")),
    ]);
    let ctx = context(&server, &[]);
    let router = crate::runner::handoff::router(ctx.clone());
    let call = async |token: u8, body: &'static str| {
        let request = axum::http::Request::post("/v1/control").header("Authorization", format!("Bearer {token}"));
        router.clone().oneshot(request.body(Body::from(body)).expect("a request")).await.expect("an answer").status().as_u16()
    };
    for token in 0..4 {
        assert_eq!(call(token, "").await, 401, "token {token}");
    }
    assert_eq!(call(4, "{}").await, 400, "not what was asked for");
    let endpoint = mayfly_proof::Endpoint::tcp(([127, 0, 0, 1], 1).into());
    let look = async {
        loop {
            // It asks once the sentinel is there, which does not tell what it found.
            assert_ne!(ctx.controls.look(Some("node1"), &[endpoint]).await.beside, Beside::Told);
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        status = call(5, "") => assert_eq!(status, 200, "a question"),
        () = look => {}
    }
}

/// Every pool is always due, and there are fewer turns than pools.
#[tokio::test]
async fn a_pool_has_its_turn_however_many_are_due() {
    const POOLS: usize = 40;
    let (pools, mut writer) = reflector::store();
    let all = (0..POOLS).map(|n| {
        let mut pool = malformed(&FINALIZED);
        pool["metadata"]["name"] = json!(format!("p{n}"));
        serde_json::from_value::<Guarded>(pool).expect("anything with metadata can be read")
    });
    let all: Vec<Guarded> = all.collect();
    writer.apply_watcher_event(&watcher::Event::Init);
    all.iter().for_each(|pool| writer.apply_watcher_event(&watcher::Event::InitApply(pool.clone())));
    writer.apply_watcher_event(&watcher::Event::InitDone);
    let (turns, passes) = (Turns::new(2), Arc::new(std::sync::Mutex::new(std::collections::BTreeMap::new())));
    let (counted, taken) = (passes.clone(), turns.clone());
    let controller = Controller::for_stream(futures::stream::iter(all.into_iter().map(Ok)).chain(futures::stream::pending()), pools)
        .with_config(Config::default().concurrency(UNLIMITED));
    let pass = move |pool: Arc<Guarded>, _| {
        let counted = counted.clone();
        taken.clone().take(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            *counted.lock().expect("no panic").entry(pool.name_any()).or_insert(0_u32) += 1;
            Ok(Action::requeue(Duration::ZERO))
        })
    };
    let run = controller.run(pass, |_, _, _| Action::await_change(), Arc::new(()));
    let _ = tokio::time::timeout(Duration::from_secs(2), run.for_each(|_| async {})).await;
    let passes = passes.lock().expect("no panic").clone();
    let (least, most) = (passes.values().min().copied(), passes.values().max().copied());
    assert!(passes.len() == POOLS && least.zip(most).is_some_and(|(least, most)| least > 0 && most - least <= 2), "{passes:?}");
    turns.end();
    assert!(turns.take(async { Err(Error::PodsLeft("it ran".to_owned())) }).await.is_ok(), "nothing begins once it has ended");
}
