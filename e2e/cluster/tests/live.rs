//! Against a cluster that is up: `cargo test -p mayfly-cluster -- --ignored`.

use std::time::{Duration, Instant};

use mayfly_cluster::command::feed;
use mayfly_cluster::dns::lookup_at;
use mayfly_cluster::forge::Scope;
use mayfly_cluster::{Cluster, World};
use serde_json::json;

const WORKFLOW: &str = "on: [push, workflow_dispatch]
jobs:
  hello:
    runs-on: nobody-has-this-label
    steps:
      - run: echo hello
";

#[test]
#[ignore = "needs a cluster that is up"]
fn the_forge_does_what_its_client_promises() {
    let cluster = Cluster::connect().unwrap();
    let access = cluster.forge().unwrap();
    let forge = access.client();
    let (org, repo) = ("cluster-live-test", "hello");
    forge.delete_org(org).unwrap();
    forge.create_org(org).unwrap();
    forge.create_org(org).unwrap();
    forge.create_repo(org, repo, true).unwrap();
    forge.create_repo(org, repo, true).unwrap();
    assert!(forge.create_hook(&Scope::Organization(org.into()), "http://10.96.0.1/", "s", &["workflow_job"]).unwrap() > 0);
    assert!(forge.create_hook(&Scope::repository(org, repo), "http://10.96.0.1/", "s", &["workflow_job"]).unwrap() > 0);

    // A first commit in an empty repository, and a second one over the same file.
    let first = forge.put_file(org, repo, "main", ".gitea/workflows/hello.yaml", WORKFLOW.as_bytes(), "Say hello").unwrap();
    let pushed = until(|| forge.jobs(&Scope::repository(org, repo), Some("queued")).unwrap().pop());
    assert_eq!((pushed.name.as_str(), pushed.labels.as_slice()), ("hello", &["nobody-has-this-label".to_owned()][..]));
    assert_eq!(pushed.head_sha, first);
    let changed = format!("{WORKFLOW}# changed\n");
    let second = forge.put_file(org, repo, "main", ".gitea/workflows/hello.yaml", changed.as_bytes(), "Say it again").unwrap();
    assert_ne!(first, second);

    let run = forge.dispatch(org, repo, "hello.yaml", "main", &json!({})).unwrap();
    let job = until(|| forge.run_jobs(org, repo, run).unwrap().pop());
    assert_eq!(forge.job(org, repo, job.id).unwrap().status, "queued");
    assert!(forge.jobs(&Scope::Organization(org.into()), None).unwrap().len() >= 2);
    assert!(forge.jobs(&Scope::Instance, Some("queued")).unwrap().iter().any(|queued| queued.id == job.id));
    assert_eq!(forge.run(org, repo, run).unwrap().event, "workflow_dispatch");
    assert!(forge.runs(&Scope::repository(org, repo)).unwrap().len() >= 2);

    forge.cancel_run((&access.admin, &access.admin_password), org, repo, run).unwrap();
    let cancelled = until(|| Some(forge.job(org, repo, job.id).unwrap()).filter(|job| job.status == "completed"));
    assert_eq!(cancelled.conclusion, "cancelled");

    for scope in [Scope::Instance, Scope::Organization(org.into()), Scope::repository(org, repo)] {
        assert!(forge.runners(&scope).unwrap().is_empty());
        forge.delete_runner(&scope, 987_654).unwrap();
    }

    // A token that may read one organization may not write it.
    let by = (access.admin.as_str(), access.admin_password.as_str());
    let name = format!("live-{}", std::process::id());
    let token = forge.create_token(by, &access.admin, &name, &["read:organization"]).unwrap();
    let reader = forge.with_token(token);
    reader.call("GET", &format!("/orgs/{org}"), None).unwrap();
    assert!(reader.create_org("cluster-live-test-2").is_err());

    forge.delete_org(org).unwrap();
    forge.delete_org(org).unwrap();
    assert!(forge.call("GET", &format!("/orgs/{org}"), None).is_err());
}

#[test]
#[ignore = "needs a cluster that is up"]
fn names_of_the_cluster_resolve_in_both_worlds_and_real_names_do_not() {
    let cluster = Cluster::connect().unwrap();
    for world in [World::Node, World::Outside] {
        let ask = |name: &str| cluster.command_in(world, ["getent", "hosts", name]).output().unwrap();
        assert!(ask("kubernetes.default.svc.cluster.local").status.success(), "{world:?}");
        assert!(ask("anything.mayfly.test").status.success(), "{world:?}");
        assert!(!ask("github.com").status.success(), "{world:?}");
    }
}

#[test]
#[ignore = "needs a cluster that is up"]
fn a_program_of_the_outside_world_starts_once_and_stops() {
    let cluster = Cluster::connect().unwrap();
    let answers = || cluster.run_in(World::Node, ["bash", "-c", "exec 3<>/dev/tcp/198.51.100.77/8099"]).unwrap().success();
    cluster.add_address(World::Outside, "198.51.100.77".parse().unwrap()).unwrap();
    let argv = ["python3", "-m", "http.server", "8099", "--bind", "198.51.100.77"];
    cluster.start(World::Outside, "live-decoy", &argv).unwrap();
    cluster.start(World::Outside, "live-decoy", &argv).unwrap();
    until(|| answers().then_some(()));
    cluster.stop("live-decoy").unwrap();
    cluster.stop("live-decoy").unwrap();
    assert!(!answers());
}

/// A DNS server that answers every question with the asker's address, behind a Service.
const MIRROR: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: mirror}
data:
  Corefile: |
    .:53 {
        template IN A . {
            answer "{{ .Name }} 1 IN A {{ .Remote }}"
        }
    }
---
apiVersion: v1
kind: Pod
metadata: {name: mirror, labels: {app: mirror}}
spec:
  hostUsers: false
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: mirror
    image: mayfly.test/coredns:dev
    imagePullPolicy: Never
    args: [-conf, /etc/coredns/Corefile]
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: config, mountPath: /etc/coredns}]
  volumes: [{name: config, configMap: {name: mirror}}]
---
apiVersion: v1
kind: Service
metadata: {name: mirror}
spec: {selector: {app: mirror}, ports: [{port: 53, protocol: UDP}]}
"#;

const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny}
spec: {podSelector: {}, policyTypes: [Ingress]}
";

#[test]
#[ignore = "needs a cluster that is up"]
fn a_client_keeps_its_address_through_a_service_and_a_policy_stops_it_there() {
    let cluster = Cluster::connect().unwrap();
    let namespace = "cluster-live-test";
    let kubectl = |args: &[&str], input: &str| feed(cluster.kubectl().args(["-n", namespace]).args(args), input).unwrap();
    kubectl(&["delete", "namespace", namespace, "--ignore-not-found", "--wait"], "");
    kubectl(&["create", "namespace", namespace], "");
    kubectl(&["apply", "-f", "-"], MIRROR);
    kubectl(&["wait", "--for=condition=Ready", "pod/mirror", "--timeout=30s"], "");
    let service = kubectl(&["get", "service", "mirror", "-o", "jsonpath={.spec.clusterIP}"], "");
    let ask = || lookup_at(&service, "who.am.i");

    // Behind the node's address every pod would have to let it in.
    let host = until(|| ask().ok()?).to_string();
    assert_eq!(host, cluster.layout().addresses().host);
    if cluster.enforces_policies() == Some(true) {
        kubectl(&["apply", "-f", "-"], DENY);
        until(|| ask().is_err().then_some(()));
        assert!(ask().is_err() && ask().is_err());
        kubectl(&["delete", "networkpolicy", "deny"], "");
        until(|| ask().ok()?);
    }
    kubectl(&["delete", "namespace", namespace, "--wait=false"], "");
}

fn until<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "nothing came");
        std::thread::sleep(Duration::from_millis(100));
    }
}
