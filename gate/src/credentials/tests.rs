//! The whole way: the hook that users have, a forge and a broker that answer as told, and a client on loopback.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use axum::extract::{RawForm, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use axum_server::tls_rustls::RustlsConfig;
use serde_json::{Value, json};

use super::desk::tests::SESSION;
use super::*;

/// What forge and broker were asked, and what they answer.
#[derive(Default)]
struct Seen {
    exchanges: AtomicU64,
    /// The broker says no.
    refuses: AtomicBool,
    /// The broker does not know the job yet, so many times.
    waits: AtomicU64,
    /// The broker has not seen its issuer's keys yet, so many times.
    blind: AtomicU64,
    asked: Mutex<Vec<String>>,
}

impl Seen {
    fn note(&self, what: String) {
        self.asked.lock().expect("no panic").push(what);
    }
}

type Shared = State<Arc<Seen>>;

fn header(headers: &HeaderMap) -> String {
    headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

async fn forge(State(seen): Shared, headers: HeaderMap, RawQuery(query): RawQuery) -> Json<Value> {
    seen.note(format!("forge {} {}", query.unwrap_or_default(), header(&headers)));
    Json(json!({"count": 1, "value": "a.b.c"}))
}

/// The operator's word, as the gate API gives it.
async fn id_token(State(seen): Shared, headers: HeaderMap, body: String) -> (StatusCode, &'static str) {
    if seen.waits.load(Ordering::SeqCst) > 0 {
        seen.waits.fetch_sub(1, Ordering::SeqCst);
        return (StatusCode::SERVICE_UNAVAILABLE, "it is not known yet which job the pod has");
    }
    seen.note(format!("operator {body} {}", header(&headers)));
    match seen.refuses.load(Ordering::SeqCst) {
        true => (StatusCode::FORBIDDEN, "the job runs a fork's code, or may do so"),
        false => (StatusCode::OK, "d.e.f"),
    }
}

async fn bindings(State(seen): Shared, headers: HeaderMap) -> (StatusCode, Json<Value>) {
    if seen.waits.load(Ordering::SeqCst) > 0 {
        seen.waits.fetch_sub(1, Ordering::SeqCst);
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "temporarily_unavailable", "correlation_id": "x"})));
    }
    seen.note(format!("bindings {}", header(&headers)));
    let provider = json!({"aws": {"region": "eu-central-1"}});
    (StatusCode::OK, Json(json!({"bindings": [{"name": "deploy", "audience": "deploy.example/x", "provider": provider}]})))
}

async fn token(State(seen): Shared, RawForm(form): RawForm) -> (StatusCode, Json<Value>) {
    if seen.blind.load(Ordering::SeqCst) > 0 {
        seen.blind.fetch_sub(1, Ordering::SeqCst);
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"error": "temporarily_unavailable", "correlation_id": "x"})));
    }
    let number = seen.exchanges.fetch_add(1, Ordering::SeqCst);
    seen.note(format!("token {}", String::from_utf8_lossy(&form)));
    if seen.refuses.load(Ordering::SeqCst) {
        return (StatusCode::BAD_REQUEST, Json(json!({"error": "invalid_target", "correlation_id": "0-1"})));
    }
    let session = SESSION.replace("AKIA", &format!("AKIA{number}"));
    (StatusCode::OK, Json(json!({"access_token": session, "issued_token_type": "urn:x", "token_type": "N_A", "expires_in": 3600})))
}

/// Forge and broker, as long as the runtime lives.
struct World {
    runtime: tokio::runtime::Runtime,
    seen: Arc<Seen>,
    forge: SocketAddr,
    settings: Settings,
    folder: PathBuf,
}

impl World {
    fn new(name: &str) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let folder = std::env::temp_dir().join(format!("mayfly-gate-way-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("broker-token"), "token-of-the-pod\n").expect("a file");
        fs::write(folder.join("github-env"), "").expect("a file");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let seen = Arc::new(Seen::default());
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let (forge, broker) = runtime.block_on(async {
            let open = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let forge = open.local_addr().expect("an address");
            let router = Router::new().route("/token", get(self::forge)).with_state(seen.clone());
            tokio::spawn(async { axum::serve(open, router).await });
            let closed = TcpListener::bind("127.0.0.1:0").expect("a port");
            closed.set_nonblocking(true).expect("a socket");
            let broker = closed.local_addr().expect("an address");
            let pem = (certified.cert.pem().into_bytes(), certified.signing_key.serialize_pem().into_bytes());
            let tls = RustlsConfig::from_pem(pem.0, pem.1).await.expect("a certificate");
            let router = Router::new()
                .route("/v1/bindings", get(bindings))
                .route("/v1/token", post(token))
                .route("/v1/id-token", post(id_token))
                .route("/token", get(self::forge))
                .with_state(seen.clone());
            let server = axum_server::from_tcp_rustls(closed, tls).expect("a server");
            tokio::spawn(server.serve(router.into_make_service()));
            (forge, broker)
        });
        let settings = Settings {
            broker_url: format!("https://localhost:{}", broker.port()),
            broker_ca: certified.cert.pem(),
            broker_token_file: folder.join("broker-token"),
            forge_ca: None,
        };
        Self { runtime, seen, forge, settings, folder }
    }

    /// Runs the hook of a job against a gate; returns what the hook said and set. The gate goes on serving.
    fn begin(&self) -> (String, String) {
        self.begin_at(&format!("http://{}/token?v=1", self.forge))
    }

    /// The same, with tokens from this address.
    fn begin_at(&self, tokens: &str) -> (String, String) {
        let counter = Counter::open(&self.folder).expect("a pipe");
        crate::tell(&self.folder.join("job"), b"job 7").expect("told");
        let settings = self.settings.clone();
        thread::spawn(move || counter.serve(&settings));
        let mut hook = Command::new("bash");
        hook.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../images/github-runner/mayfly-job-started"));
        hook.env("MAYFLY_JOB", self.folder.join("job")).env("GITHUB_ENV", self.folder.join("github-env"));
        hook.env("ACTIONS_ID_TOKEN_REQUEST_URL", tokens);
        hook.env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "hunter1").env_remove("AWS_REGION");
        let output = hook.stdout(Stdio::piped()).output().expect("bash");
        assert!(output.status.success());
        (String::from_utf8(output.stdout).expect("text"), fs::read_to_string(self.folder.join("github-env")).expect("the file"))
    }

    fn asked(&self) -> Vec<String> {
        self.seen.asked.lock().expect("no panic").clone()
    }

    fn end(self) {
        self.runtime.shutdown_background();
        fs::remove_dir_all(&self.folder).expect("removed");
    }
}

/// What the hook set, by name.
fn variable<'a>(set: &'a str, name: &str) -> &'a str {
    set.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
}

fn session(set: &str) -> Value {
    let url = variable(set, "AWS_CONTAINER_CREDENTIALS_FULL_URI");
    let shown = fs::read_to_string(variable(set, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")).expect("the local token");
    assert_eq!(shown, variable(set, "AWS_CONTAINER_AUTHORIZATION_TOKEN"), "to the letter, without a line feed");
    let body = ureq::get(url).header("Authorization", shown).call().expect("an answer").body_mut().read_to_string().expect("a body");
    serde_json::from_str(&body).expect("JSON")
}

#[test]
fn a_job_gets_one_session_however_often_it_asks() {
    let world = World::new("session");
    world.seen.waits.store(2, Ordering::SeqCst);
    world.seen.blind.store(2, Ordering::SeqCst);
    let (said, set) = world.begin();
    assert!(said.contains("::add-mask::hunter2\n::add-mask::hunter3\n"), "{said}");
    assert!(said.ends_with("Mayfly: AWS SDKs find the credentials of CredentialBinding deploy\n"), "{said}");
    assert_eq!(variable(&set, "AWS_REGION"), "eu-central-1");
    assert!(!set.contains("hunter"), "no cloud key is set: {set}");
    let all: Vec<Value> = thread::scope(|scope| {
        let asking: Vec<_> = (0..50).map(|_| scope.spawn(|| session(&set))).collect();
        asking.into_iter().map(|asking| asking.join().expect("no panic")).collect()
    });
    assert!(all.iter().all(|one| one["AccessKeyId"] == "AKIA0" && one["Token"] == "hunter3"), "{all:?}");
    assert_eq!(world.seen.exchanges.load(Ordering::SeqCst), 1);
    let asked = world.asked();
    assert_eq!(asked[0], "bindings Bearer token-of-the-pod");
    assert_eq!(asked[1], "forge v=1&audience=deploy.example%2Fx Bearer hunter1");
    let exchange = asked.last().expect("an exchange");
    for part in ["subject_token=a.b.c", "actor_token=token-of-the-pod", "resource=deploy", "grant_type=urn%3Aietf%3Aparams%3Aoauth"] {
        assert!(exchange.contains(part), "{part} is not in {exchange}");
    }
    world.end();
}

#[test]
fn a_forge_of_a_private_authority_is_known_by_it_and_by_no_other() {
    let mut world = World::new("private");
    let tokens = format!("{}/token?v=1", world.settings.broker_url);
    world.settings.forge_ca = Some(world.settings.broker_ca.clone());
    let (said, _) = world.begin_at(&tokens);
    assert!(said.ends_with("Mayfly: AWS SDKs find the credentials of CredentialBinding deploy\n"), "{said}");
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate").cert.pem();
    for authorities in [None, Some(other)] {
        let identity = format!("{tokens}\nhunter1\n");
        let read = HandedOver::read(identity.as_bytes(), authorities.as_deref().unwrap_or_default()).expect("an identity");
        let error = read.token_for("deploy.example/x").expect_err("another authority's");
        assert!(error.starts_with("the forge gives no token: ") && !error.contains("hunter1"), "{error}");
    }
    world.end();
}

#[test]
fn a_job_that_is_refused_is_told_and_finds_nothing() {
    let world = World::new("refused");
    world.seen.refuses.store(true, Ordering::SeqCst);
    let (said, set) = world.begin();
    let why = "Mayfly: CredentialBinding deploy gives nothing: the broker answers 400 invalid_target (correlation id 0-1)\n";
    assert!(said.ends_with(why), "{said}");
    assert!(!set.contains("AWS_"), "{set}");
    let shown = fs::read_to_string(variable(&set, "MAYFLY_CREDENTIALS_TOKEN_FILE")).expect("the local token");
    let url = format!("{}/v1/aws/deploy", variable(&set, "MAYFLY_CREDENTIALS_URL"));
    let answer = ureq::get(url).config().http_status_as_error(false).build().header("Authorization", shown).call().expect("an answer");
    assert_eq!(answer.status().as_u16(), 403);
    world.end();
}

/// The way of forges without tokens: nobody hands anything over, and the variables are there before the job is known.
#[test]
fn a_job_of_a_forge_without_tokens_gets_the_operators() {
    let world = World::new("operator");
    let operator = Client::new(&world.settings.broker_url, &world.settings.broker_ca, &world.settings.broker_token_file);
    let arranged = Arranged::open(&world.folder, Arc::new(operator.expect("a client")), Some(&world.settings)).expect("arranged");
    let set = fs::read_to_string(world.folder.join("environment")).expect("variables");
    let desk = arranged.desk();
    thread::spawn(move || arranged.serve());
    assert_eq!(variable(&set, "AWS_REGION"), "eu-central-1");
    let ask = |audience: &str, token: &str| {
        let url = format!("{}{audience}", variable(&set, "ACTIONS_ID_TOKEN_REQUEST_URL"));
        let request = ureq::get(url).config().http_status_as_error(false).build().header("Authorization", format!("Bearer {token}"));
        let mut answer = request.call().expect("an answer");
        let body: Value = serde_json::from_str(&answer.body_mut().read_to_string().expect("a body")).expect("JSON");
        (answer.status().as_u16(), body)
    };
    let token = variable(&set, "ACTIONS_ID_TOKEN_REQUEST_TOKEN");

    // As a client of GitHub's asks: what it was told, and the audience behind it.
    world.seen.waits.store(2, Ordering::SeqCst);
    assert_eq!(ask("&audience=vault.example%2Fx", token), (200, json!({"count": 1, "value": "d.e.f"})));
    assert_eq!(ask("&audience=vault.example", "another").0, 401);
    assert_eq!((ask("", token).0, ask("&audience=a&audience=b", token).0), (400, 400));

    // Credentials wait until it is known which job it is.
    let session = thread::scope(|scope| {
        let asking = scope.spawn(|| session(&set));
        thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(world.seen.exchanges.load(Ordering::SeqCst), 0);
        desk.learn().expect("bindings");
        asking.join().expect("no panic")
    });
    assert_eq!(session["Token"], "hunter3");
    let asked = world.asked();
    assert!(asked.contains(&r#"operator {"audience":"vault.example/x"} Bearer token-of-the-pod"#.to_owned()), "{asked:?}");
    let exchange = asked.iter().find(|asked| asked.contains("subject_token=")).expect("an exchange");
    assert!(exchange.contains("subject_token=d.e.f") && exchange.contains("actor_token=token-of-the-pod"), "{exchange}");

    world.seen.refuses.store(true, Ordering::SeqCst);
    let (status, body) = ask("&audience=vault.example", token);
    assert_eq!((status, &body["message"]), (403, &json!("the operator gives no token: the job runs a fork's code, or may do so")));
    world.end();
}
