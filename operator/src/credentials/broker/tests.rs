//! The whole way of a request: tokens of GitHub's simulator, an API server that reviews what a test says, a stand-in for STS.

use std::net::Ipv4Addr;

use axum::body::Body;
use axum::extract::connect_info::MockConnectInfo;
use axum::http::{Request as HttpRequest, StatusCode};
use kube::runtime::reflector;
use kube::runtime::watcher::Event as WatchEvent;
use mayfly_crds::Matcher;
use mayfly_crds::names::BROKER_AUDIENCE;
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::server;
use tower::ServiceExt as _;

use super::super::http::Http;
use super::super::issuers::{Issuer, IssuerConfig, Rhythm};
use super::super::providers::stand_in::{Sts, granted as sts_grants};
use super::super::report::Refusal;
use super::*;
use crate::audit::tests::Memory;
use crate::kube_io::KubeIo;
use crate::kube_io::scripted::{Answer, Server};

/// Everything around a broker.
pub(super) struct Stage {
    _server: server::Server,
    simulator: Simulator,
    pub(super) issuer: String,
    pub(super) sts: Sts,
    audit: Memory,
    pods: reflector::store::Writer<Pod>,
    pub(super) bindings: reflector::store::Writer<Guarded<CredentialBinding>>,
    pub(super) broker: Arc<Broker>,
    left: tokio::sync::mpsc::Receiver<Refusal>,
}

pub(super) fn now() -> i64 {
    Timestamp::now().as_second()
}

fn job(check_run: &str) -> Value {
    json!({
        "repository": "acme/web", "repository_id": "42", "run_id": "900", "run_attempt": "1", "event_name": "push",
        "check_run_id": check_run,
    })
}

fn pod(name: &str, uid: &str, job: &Value) -> Pod {
    let pod = json!({
        "metadata": {
            "name": name, "namespace": "ci", "uid": uid, "labels": {LABEL_POOL: "linux"}, "annotations": {ANNOTATION_JOB_CLAIMS: job.to_string()},
            "ownerReferences": [{"apiVersion": "mayfly.dev/v1alpha1", "kind": "RunnerPool", "name": "linux", "uid": "pool-uid"}],
        },
        "status": {"phase": "Running"},
    });
    serde_json::from_value(pod).expect("a pod")
}

pub(super) fn review(name: &str, uid: &str) -> Answer {
    Answer::Object(json!({"spec": {}, "status": {
        "authenticated": true, "audiences": [BROKER_AUDIENCE],
        "user": {"username": "system:serviceaccount:ci:mayfly-runner", "extra": {
            "authentication.kubernetes.io/pod-name": [name], "authentication.kubernetes.io/pod-uid": [uid]}}}}))
}

pub(super) fn binding(issuer: &str, sts: &str) -> Guarded<CredentialBinding> {
    let binding = json!({
        "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding",
        "metadata": {"name": "deploy", "namespace": "ci", "uid": "b-uid", "generation": 1},
        "spec": {
            "pools": ["linux"], "token": {"issuer": issuer, "audience": "deploy.example"}, "lifetimeSeconds": 900,
            "subject": {"claims": {"repository_id": {"exact": "42"}, "ref": {"exact": "refs/heads/main"}}},
            "provider": {"aws": {"roleArn": "arn:aws:iam::123456789012:role/ci", "region": "eu-central-1", "endpoint": sts}},
        },
    });
    serde_json::from_value(binding).expect("a binding")
}

fn filled<K>(objects: Vec<K>) -> (Store<K>, reflector::store::Writer<K>)
where
    K: kube::Resource<DynamicType = ()> + Clone + 'static,
{
    let (store, mut writer) = reflector::store();
    writer.apply_watcher_event(&WatchEvent::Init);
    for object in objects {
        writer.apply_watcher_event(&WatchEvent::InitApply(object));
    }
    writer.apply_watcher_event(&WatchEvent::InitDone);
    (store, writer)
}

impl Stage {
    /// Two pods run two jobs of one run. The API server knows the tokens `pod-1` and `pod-2` in the order in which they come.
    pub(super) async fn set(reviews: Vec<Answer>) -> Self {
        Self::remembering(reviews, 100).await
    }

    /// The same with a broker that remembers so many spent tokens.
    pub(super) async fn remembering(reviews: Vec<Answer>, remembered: usize) -> Self {
        let server = server::Server::start(server::Config::default()).await.expect("a simulator");
        let issuer = format!("{}/_services/token", server.url);
        let simulator = Simulator::new(&server.url, b"");
        let sts = Sts::start(vec![sts_grants(now() + 900)]).await;
        let http = Http::new(None, |_| None).expect("a client");
        let config = IssuerConfig::read_all("- issuer: https://issuer.example\n").expect("read").remove(0);
        let issuers = Issuers::new([Issuer::new(&IssuerConfig { issuer: issuer.clone(), ..config }, http.clone(), Rhythm::default())]);
        let (pod_store, pods) = filled(vec![pod("linux-1", "uid-1", &job("31")), pod("linux-2", "uid-2", &job("32"))]);
        let pool = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "RunnerPool", "metadata": {"name": "linux", "namespace": "ci", "uid": "pool-uid"},
            "spec": {"forge": {}},
        });
        let (pools, _) = filled(vec![serde_json::from_value::<Guarded<RunnerPool>>(pool).expect("a pool")]);
        let (binding_store, bindings) = filled(vec![binding(&issuer, &sts.url)]);
        let (audit, metrics) = (Memory::default(), Metrics::new());
        let (reports, left) = Reports::new();
        let io = KubeIo::new(Server::new(reviews).client(), None, metrics.clone());
        let broker = Broker::new(Parts {
            known: Known { pods: pod_store, pools, bindings: binding_store },
            identities: Identities::new(io, BROKER_AUDIENCE),
            issuers: Arc::new(issuers),
            providers: Providers::new(http, Vec::new()),
            audit: Audit::new(audit.clone()),
            metrics,
            remembered,
            alone: false,
            reports: Some(reports),
        });
        Self { _server: server, simulator, issuer, sts, audit, pods, bindings, broker: Arc::new(broker), left }
    }

    /// A token of the first pod's job, changed.
    pub(super) async fn token(&self, change: impl Fn(&mut Value)) -> String {
        let mut claims = json!({
            "iss": self.issuer, "aud": "deploy.example", "sub": "repo:acme/web:ref:refs/heads/main", "iat": now(), "nbf": now() - 600,
            "exp": now() + 300, "jti": crate::audit::uuid(), "ref": "refs/heads/main", "runner_environment": "self-hosted",
        });
        for (name, value) in job("31").as_object().expect("an object") {
            claims[name] = value.clone();
        }
        change(&mut claims);
        let answer = self.simulator.call("POST", "oidc/sign", claims.to_string().into_bytes()).await.expect("signed");
        answer["token"].as_str().expect("a token").to_owned()
    }

    /// The broker's routes, with a caller's address.
    pub(super) fn router(&self) -> Router {
        router(self.broker.clone()).layer(MockConnectInfo(SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 4711))))
    }

    /// How often the issuer's keys were fetched.
    pub(super) async fn fetches(&self) -> usize {
        let seen = self.simulator.requests(0).await.expect("requests");
        seen.iter().filter(|request| request.path.ends_with("/jwks")).count()
    }

    async fn bindings_for(&self, actor: &str) -> (StatusCode, Value) {
        let request = HttpRequest::get("/v1/bindings").header(header::AUTHORIZATION, format!("Bearer {actor}"));
        self.answer(request.body(Body::empty()).expect("a request")).await
    }

    pub(super) async fn ask(&self, actor: &str, subject: &str) -> (StatusCode, Value) {
        self.post("application/x-www-form-urlencoded", form(actor, subject)).await
    }

    async fn post(&self, kind: &str, body: String) -> (StatusCode, Value) {
        let request = HttpRequest::post("/v1/token").header(header::CONTENT_TYPE, kind);
        self.answer(request.body(Body::from(body)).expect("a request")).await
    }

    async fn answer(&self, request: HttpRequest<Body>) -> (StatusCode, Value) {
        let answer = self.router().oneshot(request).await.expect("an answer");
        let status = answer.status();
        if status != StatusCode::PAYLOAD_TOO_LARGE {
            assert_eq!(answer.headers()[header::CACHE_CONTROL], "no-store");
        }
        let bytes = axum::body::to_bytes(answer.into_body(), 1 << 20).await.expect("a body");
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }
}

/// The body of an exchange by the binding `deploy`.
pub(super) fn form(actor: &str, subject: &str) -> String {
    let kind = "urn:ietf:params:oauth:token-type:jwt";
    form_urlencoded::Serializer::new(String::new())
        .extend_pairs([
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("subject_token", subject),
            ("subject_token_type", kind),
            ("actor_token", actor),
            ("actor_token_type", kind),
            ("resource", "deploy"),
        ])
        .finish()
}

fn exact(value: &str) -> Matcher {
    Matcher { exact: Some(value.to_owned()), ..Matcher::default() }
}

/// Both pods are known to the API server, the first by the first token that comes.
fn both() -> Vec<Answer> {
    vec![review("linux-1", "uid-1"), review("linux-2", "uid-2")]
}

#[tokio::test]
async fn a_job_gets_its_credential_and_the_record_is_there_before_it() {
    let stage = Stage::set(both()).await;
    let token = stage.token(|_| {}).await;
    let (status, answer) = stage.ask("pod-1", &token).await;
    assert_eq!((status, &answer["token_type"]), (StatusCode::OK, &json!("N_A")), "{answer}");
    assert_eq!(answer["issued_token_type"], "urn:mayfly:params:oauth:token-type:aws-credentials");
    assert!(answer["expires_in"].as_i64().is_some_and(|left| (880..=900).contains(&left)));
    let keys: Value = serde_json::from_str(answer["access_token"].as_str().expect("text")).expect("JSON");
    assert_eq!((&keys["Version"], &keys["SecretAccessKey"]), (&json!(1), &json!("key-of-the-job")));

    let records = stage.audit.records();
    assert_eq!(records.len(), 1);
    let record = &records[0];
    assert_eq!((&record["action"], &record["success"]), (&json!("credential.granted"), &json!(true)));
    assert_eq!((&record["actor"]["uid"], &record["target"]["uid"]), (&json!("uid-1"), &json!("b-uid")));
    assert_eq!(record["scope"], json!({"namespace": "ci", "pool": "linux"}));
    assert_eq!(record["request"]["ip_address"], "192.0.2.1");
    assert_eq!(record["payload"]["token"]["job"]["run_id"], "900");
    assert_eq!(record["payload"]["credential"]["about"]["session"], "mayfly-900-1-31");
    let text = record.to_string();
    for secret in [token.as_str(), "pod-1", "key-of-the-job", "session-of-the-job"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[tokio::test]
async fn where_the_record_cannot_be_written_nothing_leaves() {
    let stage = Stage::set(both()).await;
    stage.audit.fails.store(true, std::sync::atomic::Ordering::SeqCst);
    let token = stage.token(|_| {}).await;
    let (status, answer) = stage.ask("pod-1", &token).await;
    assert_eq!((status, &answer["error"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("temporarily_unavailable")));
    assert!(answer.get("access_token").is_none() && !answer.to_string().contains("of-the-job"));
    stage.audit.fails.store(false, std::sync::atomic::Ordering::SeqCst);
    let (status, _) = stage.ask("pod-1", &token).await;
    assert_eq!(status, StatusCode::OK, "the same pod may try again");
    assert_eq!(stage.sts.calls(), 1, "with the credential that did not leave");
    let last = stage.audit.records().pop().expect("a record");
    assert_eq!(last["action"], "credential.granted", "it had none before");
}

#[tokio::test]
async fn a_stolen_token_is_worth_nothing_in_another_pod() {
    let stage = Stage::set(both()).await;
    let token = stage.token(|_| {}).await;
    assert_eq!(stage.ask("pod-1", &token).await.0, StatusCode::OK);
    let (status, answer) = stage.ask("pod-2", &token).await;
    assert_eq!((status, &answer["error"]), (StatusCode::BAD_REQUEST, &json!("invalid_target")));
    let record = stage.audit.records().pop().expect("a record");
    assert_eq!((&record["action"], &record["actor"]["uid"]), (&json!("credential.denied"), &json!("uid-2")));
    assert_eq!((&record["payload"]["denial"]["check"], &record["payload"]["denial"]["alarm"]), (&json!("job"), &json!(true)));
    assert!(stage.broker.metrics.encode().contains(r#"mayfly_exchanges_total{outcome="alarm"} 1"#));
    assert_eq!(stage.sts.calls(), 1);
}

#[tokio::test]
async fn a_pod_that_asks_a_hundred_times_at_once_gets_one_credential() {
    let stage = Stage::set(both()).await;
    let token = stage.token(|_| {}).await;
    stage.broker.identities.identify_token("pod-1").await.expect("reviewed");
    let answers = futures::future::join_all((0..100).map(|_| stage.ask("pod-1", &token))).await;
    assert!(answers.iter().all(|(status, answer)| *status == StatusCode::OK && answer["access_token"] == answers[0].1["access_token"]));
    assert_eq!((stage.sts.calls(), stage.audit.records().len()), (1, 100));
    let records = stage.audit.records();
    let told = |action: &str| records.iter().filter(|record| record["action"] == action).count();
    assert_eq!((told("credential.granted"), told("credential.refreshed")), (1, 99));
}

#[tokio::test]
async fn what_holds_now_counts() {
    let mut stage = Stage::set(both()).await;
    let token = stage.token(|_| {}).await;
    assert_eq!(stage.ask("pod-1", &token).await.0, StatusCode::OK);
    let mut narrowed = binding(&stage.issuer, &stage.sts.url);
    if let Ok(binding) = &mut narrowed.0 {
        binding.spec.pools = vec!["other".to_owned()];
    }
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(narrowed));
    assert_eq!(stage.ask("pod-1", &token).await.1["error"], "invalid_target", "the binding was narrowed");
    stage.bindings.apply_watcher_event(&WatchEvent::Delete(binding(&stage.issuer, &stage.sts.url)));
    assert_eq!(stage.ask("pod-1", &token).await.1["error"], "invalid_target", "the binding was deleted");
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(binding(&stage.issuer, &stage.sts.url)));
    assert_eq!(stage.ask("pod-1", &token).await.0, StatusCode::OK);
    let mut over = pod("linux-1", "uid-1", &job("31"));
    over.status.as_mut().expect("a status").phase = Some("Succeeded".to_owned());
    stage.pods.apply_watcher_event(&WatchEvent::Apply(over));
    assert_eq!(stage.ask("pod-1", &token).await.1["error"], "invalid_client", "the job is over");
    stage.pods.apply_watcher_event(&WatchEvent::Apply(pod("linux-1", "uid-3", &job("31"))));
    assert_eq!(stage.ask("pod-1", &token).await.1["error"], "invalid_client", "a pod of the same name");
    stage.pods.apply_watcher_event(&WatchEvent::Delete(pod("linux-1", "uid-3", &job("31"))));
    assert_eq!(stage.ask("pod-1", &token).await.1["error"], "invalid_client", "no pod");
    assert_eq!(stage.sts.calls(), 1);
}

#[tokio::test]
async fn a_pod_learns_of_the_bindings_for_its_job_and_of_no_other() {
    let mut stage = Stage::set(both()).await;
    let known = json!({"bindings": [{"name": "deploy", "audience": "deploy.example", "provider": {"aws": {"region": "eu-central-1"}}}]});
    assert_eq!(stage.bindings_for("pod-1").await, (StatusCode::OK, known.clone()));
    let good = || binding(&stage.issuer, &stage.sts.url);
    let changes: [fn(&mut CredentialBinding); 5] = [
        |binding| binding.spec.pools = vec!["other".to_owned()],
        |binding| binding.metadata.namespace = Some("elsewhere".to_owned()),
        |binding| binding.spec.subject.claims = [("repository_id".to_owned(), exact("43"))].into(),
        |binding| drop(binding.spec.subject.claims.insert("event_name".to_owned(), exact("schedule"))),
        // One that is not used.
        |binding| binding.spec.subject.claims.clear(),
    ];
    for (n, change) in changes.into_iter().enumerate() {
        stage.bindings.apply_watcher_event(&WatchEvent::Delete(good()));
        let mut other = good();
        change(other.0.as_mut().expect("a binding"));
        stage.bindings.apply_watcher_event(&WatchEvent::Apply(other.clone()));
        assert_eq!(stage.bindings_for("pod-1").await, (StatusCode::OK, json!({"bindings": []})), "change {n}");
        stage.bindings.apply_watcher_event(&WatchEvent::Delete(other));
    }
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(good()));
    assert_eq!(stage.bindings_for("pod-1").await, (StatusCode::OK, known));
    let mut unknown = pod("linux-1", "uid-1", &job("31"));
    unknown.metadata.annotations = None;
    stage.pods.apply_watcher_event(&WatchEvent::Apply(unknown));
    assert_eq!(stage.bindings_for("pod-1").await.0, StatusCode::SERVICE_UNAVAILABLE, "the job is not known yet");
    stage.bindings.apply_watcher_event(&WatchEvent::Delete(binding(&stage.issuer, &stage.sts.url)));
    assert_eq!(stage.bindings_for("pod-1").await, (StatusCode::OK, json!({"bindings": []})), "nobody asks which job it is");
    stage.pods.apply_watcher_event(&WatchEvent::Delete(pod("linux-1", "uid-1", &job("31"))));
    assert_eq!(stage.bindings_for("pod-1").await.0, StatusCode::UNAUTHORIZED, "the pod is gone");
    assert!(stage.audit.records().is_empty() && stage.sts.calls() == 0);
}

/// The first pod asks, and is deleted while the provider has not answered yet.
async fn ask_and_end(stage: &mut Stage) -> (StatusCode, Value) {
    let token = stage.token(|_| {}).await;
    let mut pods = std::mem::replace(&mut stage.pods, reflector::store().1);
    let stage = &*stage;
    let hold = stage.sts.hold.clone();
    let held = hold.write().await;
    let end = async {
        while stage.sts.calls() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        pods.apply_watcher_event(&WatchEvent::Delete(pod("linux-1", "uid-1", &job("31"))));
        drop(held);
    };
    tokio::join!(stage.ask("pod-1", &token), end).0
}

#[tokio::test]
async fn a_pod_that_ends_while_the_cloud_takes_its_time_gets_nothing() {
    let mut stage = Stage::set(both()).await;
    let (status, answer) = ask_and_end(&mut stage).await;
    assert_eq!((status, &answer["error"]), (StatusCode::UNAUTHORIZED, &json!("invalid_client")));
    assert_eq!(stage.audit.records()[0]["action"], "credential.denied");
}

#[tokio::test]
async fn callers_learn_a_word_and_a_number_and_no_more() {
    let stage = Stage::set(both()).await;
    let mut stage = stage;
    let cases = [
        (stage.token(|claims| claims["aud"] = json!("other.example")).await, "invalid_target"),
        (stage.token(|claims| claims["ref"] = json!("refs/heads/x")).await, "invalid_target"),
        (stage.token(|claims| claims["run_id"] = json!("901")).await, "invalid_target"),
        (stage.token(|claims| claims["exp"] = json!(now() - 60)).await, "invalid_request"),
        (stage.token(|claims| claims["iss"] = json!("https://evil.example")).await, "invalid_request"),
        ("nonsense".to_owned(), "invalid_request"),
    ];
    for (token, word) in cases {
        let (_, answer) = stage.ask("pod-1", &token).await;
        assert_eq!(answer["error"], word);
        let names: Vec<&String> = answer.as_object().expect("an object").keys().collect();
        assert_eq!(names, ["correlation_id", "error"]);
        let record = stage.audit.records().pop().expect("a record");
        assert_eq!(record["request"]["id"], answer["correlation_id"], "the owner finds it");
        assert!(record["payload"]["denial"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
        assert!(!record.to_string().contains(&token), "no record holds a token");
        let told = stage.left.try_recv().expect("the controller is told");
        assert_eq!(
            (json!(told.correlation_id), json!(told.reason)),
            (answer["correlation_id"].clone(), record["payload"]["denial"]["reason"].clone())
        );
        assert_eq!((told.namespace.as_str(), told.pod.as_str(), told.binding.as_str()), ("ci", "linux-1", "deploy"));
    }
    assert_eq!(stage.sts.calls(), 0);
}

#[tokio::test]
async fn a_caller_that_is_no_pod_of_ours_is_told_so_before_anything_else_is_looked_at() {
    let stage =
        Stage::set(vec![Answer::Object(json!({"spec": {}, "status": {"authenticated": false}})), Answer::Refusal(500, "Down")]).await;
    let token = stage.token(|_| {}).await;
    let (status, answer) = stage.ask("stranger", &token).await;
    assert_eq!((status, &answer["error"]), (StatusCode::UNAUTHORIZED, &json!("invalid_client")));
    let (status, answer) = stage.ask("unlucky", &token).await;
    assert_eq!((status, &answer["error"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("temporarily_unavailable")), "the API server is down");
    assert!(stage.audit.records().is_empty(), "strangers write nothing into the trail");
}

#[tokio::test]
async fn what_sts_says_reaches_the_owner_and_not_the_caller() {
    let stage = Stage::set(both()).await;
    stage.sts.then(vec![(403, "<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>".to_owned())]);
    let token = stage.token(|_| {}).await;
    let (status, answer) = stage.ask("pod-1", &token).await;
    assert_eq!((status, &answer["error"]), (StatusCode::FORBIDDEN, &json!("access_denied")));
    assert!(stage.audit.records()[0]["payload"]["denial"]["reason"].as_str().is_some_and(|reason| reason.contains("AccessDenied")));
    stage.sts.then(vec![sts_grants(now() + 7200)]);
    let (status, _) = stage.ask("pod-1", &token).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "more life than was ordered");
}

#[tokio::test]
async fn bodies_are_forms_of_a_bounded_size() {
    let stage = Stage::set(Vec::new()).await;
    assert_eq!(stage.post("application/json", "{}".to_owned()).await.1["error"], "invalid_request");
    let form = "application/x-www-form-urlencoded";
    assert_eq!(stage.post(form, "x".repeat(10 << 20)).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(stage.post(form, String::new()).await.1["error"], "unsupported_grant_type");
    assert_eq!(stage.post(form, "%ff%fe=%00".to_owned()).await.1["error"], "unsupported_grant_type");
}

/// A binding whose tokens Vault gives, and revokes.
fn for_vault(stage: &Stage) -> Guarded<CredentialBinding> {
    let mut changed = serde_json::to_value(binding(&stage.issuer, &stage.sts.url).0.expect("a binding")).expect("JSON");
    changed["spec"]["provider"] = json!({"vault": {"address": stage.sts.url, "role": "deploy"}});
    serde_json::from_value(changed).expect("a binding")
}

fn vault_grants() -> (u16, String) {
    let auth =
        json!({"client_token": "token-of-vault", "accessor": "a", "policies": ["deploy"], "lease_duration": 900, "token_type": "service"});
    (200, json!({"auth": auth}).to_string())
}

#[tokio::test]
async fn what_can_be_revoked_is_revoked_when_its_pod_ends() {
    let mut stage = Stage::set(both()).await;
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(for_vault(&stage)));
    stage.sts.then(vec![vault_grants()]);
    let token = stage.token(|_| {}).await;
    for _ in 0..2 {
        let (status, answer) = stage.ask("pod-1", &token).await;
        assert_eq!((status, &answer["access_token"]), (StatusCode::OK, &json!("token-of-vault")), "{answer}");
    }
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (1, 1), "one credential, and its job runs");

    stage.pods.apply_watcher_event(&WatchEvent::Delete(pod("linux-1", "uid-1", &job("31"))));
    stage.sts.then(vec![(503, String::new())]);
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (4, 1), "tried three times, and due again");
    stage.sts.then(vec![(204, String::new())]);
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (4, 1), "not at once");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    stage.broker.revoke_what_is_due().await;
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (5, 0), "once");
    assert_eq!(stage.sts.call(4).headers["x-vault-token"], "token-of-vault");
    let record = stage.audit.records().pop().expect("a record");
    assert_eq!(
        (&record["action"], &record["success"], &record["actor"]["uid"]),
        (&json!("credential.revoked"), &json!(true), &json!("uid-1"))
    );
    assert!(!record.to_string().contains("token-of-vault"));
}

#[tokio::test]
async fn what_came_of_a_binding_ends_with_it_and_what_cannot_be_revoked_is_recorded() {
    let mut stage = Stage::set(both()).await;
    let binding = for_vault(&stage);
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(binding.clone()));
    stage.sts.then(vec![vault_grants(), (403, String::new())]);
    let token = stage.token(|_| {}).await;
    assert_eq!(stage.ask("pod-1", &token).await.0, StatusCode::OK);
    stage.bindings.apply_watcher_event(&WatchEvent::Delete(binding));
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (2, 0));
    let record = stage.audit.records().pop().expect("a record");
    assert_eq!((&record["action"], &record["success"]), (&json!("credential.revoked"), &json!(false)));
    assert!(record["payload"]["error"].as_str().is_some_and(|error| error.contains("403")), "{record}");
}

#[tokio::test]
async fn a_pod_that_ends_while_vault_takes_its_time_has_its_token_revoked() {
    let mut stage = Stage::set(both()).await;
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(for_vault(&stage)));
    stage.sts.then(vec![vault_grants(), (204, String::new())]);
    let (status, _) = ask_and_end(&mut stage).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    stage.broker.revoke_what_is_due().await;
    assert_eq!((stage.sts.calls(), stage.broker.unrevoked()), (2, 0));
}

#[tokio::test]
async fn the_token_itself_and_scopes_are_asked_for_by_their_names() {
    let mut stage = Stage::set(both()).await;
    let scopes = ["https://management.azure.com/.default", "https://storage.azure.com/.default"];
    let id = "00000000-1111-2222-3333-444444444444";
    let mut changed = serde_json::to_value(binding(&stage.issuer, &stage.sts.url).0.expect("a binding")).expect("JSON");
    changed["spec"]["lifetimeSeconds"] = json!(5400);
    changed["spec"]["provider"] = json!({"azure": {"tenantId": id, "clientId": id, "scopes": scopes, "authorityHost": stage.sts.url}});
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(serde_json::from_value(changed).expect("a binding")));
    stage.sts.then(vec![(200, json!({"access_token": "token-of-entra", "expires_in": 4000}).to_string())]);
    let token = stage.token(|_| {}).await;
    let kind = "application/x-www-form-urlencoded";
    for scope in scopes {
        let (status, answer) = stage.post(kind, format!("{}&scope={scope}", form("pod-1", &token))).await;
        assert_eq!((status, &answer["token_type"]), (StatusCode::OK, &json!("Bearer")), "{answer}");
    }
    let asked: Vec<_> = (0..2).map(|number| stage.sts.call(number).parameter("scope").expect("a scope")).collect();
    assert_eq!(asked, scopes, "each for its own");
    let (status, answer) = stage.ask("pod-1", &token).await;
    assert_eq!((status, stage.sts.calls()), (StatusCode::OK, 2), "the first, again: {answer}");
    for wrong in
        ["https://vault.azure.net/.default", "https%3A%2F%2Fmanagement.azure.com%2F.default+https%3A%2F%2Fstorage.azure.com%2F.default"]
    {
        let (status, answer) = stage.post(kind, format!("{}&scope={wrong}", form("pod-1", &token))).await;
        assert_eq!((status, &answer["error"]), (StatusCode::BAD_REQUEST, &json!("invalid_scope")), "{answer}");
    }
    let itself = format!("{}&requested_token_type=urn:ietf:params:oauth:token-type:jwt", form("pod-1", &token));
    let (status, answer) = stage.post(kind, itself).await;
    assert_eq!((status, &answer["access_token"]), (StatusCode::OK, &json!(token)));
    assert_eq!(stage.sts.calls(), 2);
}
