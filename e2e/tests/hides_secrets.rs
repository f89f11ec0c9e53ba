//! No secret is where it can be read, and nobody but a pod of ours gets a registration.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use mayfly_cluster::command::output;
use mayfly_crds::names::{ANNOTATION_JOB, GATE_AUDIENCE, RUNNER_SERVICE_ACCOUNT};
use mayfly_e2e::stage::{Stage, workflow};
use mayfly_e2e::world::SYSTEM;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_an_object_an_event_or_a_log() -> Result<()> {
    let stage = Stage::set("hide").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let owner = &stage.organization.name;
    stage.forge.create_repo(owner, "app", false)?;
    let registration = stage.forge.call("POST", &format!("/repos/{owner}/app/actions/runners/registration-token"), None)?;
    let registration = registration["token"].as_str().context("a registration token")?.to_owned();
    // What the job itself can find: files, arguments and environments of every process it can see.
    let script = "set +eo pipefail; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; find / -xdev -name .runner 2>/dev/null; \
                  ls -AR /run /var/run/secrets 2>/dev/null || true; cat /proc/mounts; sleep 3";
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", script))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;

    let events: Api<Event> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let events = serde_json::to_string(&events.list(&ListParams::default()).await?.items)?;
    let status = serde_json::to_string(&stage.status().await?)?;
    let mut logs = stage.world.cluster.kubectl();
    let operator = output(logs.args(["-n", SYSTEM, "logs", "deployment/mayfly-controller"]))?;
    let pod = serde_json::to_string(&pod)?;
    let places = [("pod", &pod), ("events", &events), ("status", &status), ("operator's log", &operator), ("job's log", &log)];
    let secrets = [
        ("the forge token", &stage.organization.token),
        ("the webhook secret", &stage.organization.webhook_secret),
        ("the registration token", &registration),
    ];
    for (place, text) in places {
        for (what, secret) in secrets {
            ensure!(!text.contains(secret.as_str()), "{what} is in the {place}");
        }
        ensure!(!text.contains("eyJhbGciOi"), "a token is in the {place}");
    }
    ensure!(!log.contains("\"uuid\"") && !log.contains("x-runner-token"), "the job found the registration:\n{log}");
    ensure!(!log.lines().any(|line| line.ends_with("/.runner")), "the job found a registration file:\n{log}");
    stage.strike().await
}

/// `kubectl port-forward` to the gate API, which network policy closes to this machine.
struct Forward {
    child: Child,
    /// kubectl writes a line per connection and ends when nobody reads.
    _output: BufReader<ChildStdout>,
    port: u16,
}

impl Forward {
    fn open(stage: &Stage) -> Result<Self> {
        let mut command = stage.world.cluster.kubectl();
        command.args(["-n", SYSTEM, "port-forward", "service/mayfly-gate", ":8443"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().context("its output")?);
        output.read_line(&mut line)?;
        let port = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()).and_then(|port| port.parse().ok());
        Ok(Self { child, _output: output, port: port.with_context(|| format!("kubectl port-forward said {line:?}"))? })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It is our own child; it may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_a_waiting_pod_gets_a_registration() -> Result<()> {
    let stage = Stage::set("gate").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 20"))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let forward = Forward::open(&stage)?;
    let secrets: Api<Secret> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let tls = secrets.get("mayfly-gate-tls").await?.data.unwrap_or_default();
    let authority = Certificate::from_pem(&tls.get("ca.crt").context("ca.crt")?.0)?;
    let ask = |token: Option<&str>| -> Result<(u16, String)> {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(std::sync::Arc::new(vec![authority.clone()])))
            .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let host = format!("mayfly-gate.{SYSTEM}.svc");
        let agent = ureq::Agent::with_parts(
            ureq::Agent::config_builder().tls_config(tls).http_status_as_error(false).build(),
            ureq::unversioned::transport::DefaultConnector::default(),
            Loopback,
        );
        let mut request = agent.post(format!("https://{host}:{}/v1/registration", forward.port));
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let mut answer = request.send_empty()?;
        Ok((answer.status().as_u16(), answer.body_mut().read_to_string()?))
    };
    let token = |arguments: &[&str]| -> Result<String> {
        let mut create = stage.world.cluster.kubectl();
        create.args(["-n", &stage.namespace, "create", "token"]).args(arguments);
        Ok(output(&mut create)?.trim().to_owned())
    };
    let audience = format!("--audience={GATE_AUDIENCE}");
    let (name, uid) = (format!("--bound-object-name={}", pod.name_any()), format!("--bound-object-uid={}", pod.uid().unwrap_or_default()));
    let bound = ["--bound-object-kind=Pod", &name, &uid];

    assert_eq!(ask(None)?.0, 401);
    assert_eq!(ask(Some("nonsense"))?.0, 401);
    assert_eq!(ask(Some(&token(&[RUNNER_SERVICE_ACCOUNT])?))?.0, 401, "a token for the API server");
    assert_eq!(ask(Some(&token(&[RUNNER_SERVICE_ACCOUNT, &audience])?))?.0, 401, "a token that no pod stands behind");
    assert_eq!(ask(Some(&token(&["default", &audience])?))?.0, 401, "a token of another account");
    let (status, why) = ask(Some(&token(&[&[RUNNER_SERVICE_ACCOUNT, &audience][..], &bound].concat())?))?;
    assert_eq!(status, 410, "the very pod, asking a second time: {why}");
    ensure!(why.contains("already"), "{why}");
    assert_eq!(stage.registrations(&pool)?.len(), 1);
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

/// Every name is this machine: the certificate is checked against the name all the same.
#[derive(Debug)]
struct Loopback;

impl ureq::unversioned::resolver::Resolver for Loopback {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        _: &ureq::config::Config,
        _: ureq::unversioned::transport::NextTimeout,
    ) -> Result<ureq::unversioned::resolver::ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(([127, 0, 0, 1], uri.port_u16().unwrap_or(443)).into());
        Ok(addresses)
    }
}
