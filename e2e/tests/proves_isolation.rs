//! A pod gets a registration when it has shown that it is isolated, not before, and keeps it while that is so.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, LogParams, PostParams};
use kube::{Api, Client, ResourceExt};
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{SYSTEM, built, repository};
use mayfly_e2e::{World, leak, pool};
use serde_json::{Value, json};

/// What every proof has to say something about on a cluster of one node.
const CLASSES: [&str; 7] = ["ApiServer", "Metadata", "Node", "Outside", "Pods", "Required", "Services"];
/// Tries every address of its arguments at once and says which of them took the connection.
const TRY: &str = "import socket,sys,threading
def go(a):
    h,p=a.rsplit(':',1); f=socket.AF_INET6 if ':' in h else socket.AF_INET
    s=socket.socket(f); s.settimeout(3)
    try: s.connect((h.strip('[]'),int(p))); print('open='+a,flush=True)
    except OSError: print('closed='+a,flush=True)
ts=[threading.Thread(target=go,args=(a,)) for a in sys.argv[1:]]
[t.start() for t in ts]; [t.join() for t in ts]; print('tried='+str(len(ts)),flush=True)";

async fn told(stage: &Stage, status: &str) -> Result<(String, String)> {
    pool::condition(&stage.world, &stage.namespace, POOL, "IsolationProved", status).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pool_proves_its_isolation_and_tells_it_by_node_and_class() -> Result<()> {
    let stage = Stage::set("proved").await?;
    let pool = stage.pool(|_| {}).await?;
    told(&stage, "True").await?;
    let nodes = stage.status().await?.isolation;
    ensure!(nodes.len() == 1 && nodes[0].verdict == "Proved", "{nodes:?}");
    let proved: Vec<&str> = nodes[0].classes.iter().filter(|class| class.verdict == "Proved").map(|class| class.class.as_str()).collect();
    assert_eq!(proved, CLASSES, "{:?}", nodes[0].classes);
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_registration_without_proof() -> Result<()> {
    let stage = Stage::set("breach").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    stage.open_wide().await?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let note = stage.event("IsolationBreach").await?;
    // Nodes and API server stay closed where the engine has denials: see `a_stray_policy_cannot_undo_the_deny`.
    for class in ["Pods (Breach)", "Services (Breach)", "Outside (Breach)"] {
        ensure!(note.contains(class), "{class} is not in the event: {note}");
    }
    let (reason, message) = told(&stage, "False").await?;
    ensure!(reason == "IsolationBreach" && message.contains("answers the pod"), "{reason}: {message}");
    let (reason, _) = pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "PodsFail", "{reason}");
    // Nothing was registered for any of the pods that came and went, and nobody took the job.
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        let registered = stage.registrations(&pool)?;
        ensure!(registered.is_empty(), "a pod without a proof was registered: {registered:?}");
        assert_eq!(stage.job("app", jobs[0].id)?.status, "queued");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // The hole is closed: the next pod proves it, and the job runs.
    stage.close_again().await?;
    stage.succeeds("app", jobs[0].id).await?;
    told(&stage, "True").await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn warn_mode_says_so() -> Result<()> {
    let stage = Stage::set("warn").await?;
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"enforcement": "Warn"})).await?;
    stage.hook()?;
    stage.open_wide().await?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    let note = stage.event("IsolationBreach").await?;
    ensure!(note.contains("runs jobs although"), "{note}");
    let (reason, _) = told(&stage, "False").await?;
    ensure!(reason == "IsolationBreach", "{reason}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn breach_ends_the_job() -> Result<()> {
    let stage = Stage::set("ends").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 300"))], 1).await?;
    stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    stage.open_wide().await?;
    let note = stage.event("IsolationBreach").await?;
    ensure!(note.contains("(Breach)"), "{note}");
    let ended = stage.job_is("app", jobs[0].id, "completed").await?;
    ensure!(ended.conclusion == "failure" || ended.conclusion == "cancelled", "{}", ended.conclusion);
    stage.nothing_left(&pool).await?;
    let failure = stage.status().await?.last_failure.context("a failure")?;
    ensure!(failure.reason == "IsolationBreach", "{failure:?}");
    stage.strike().await
}

/// The IPv4 rows of the operator's list, and all rows.
fn endpoints() -> Result<(BTreeSet<SocketAddr>, BTreeSet<SocketAddr>)> {
    let list = std::fs::read_to_string(repository().join("operator/src/isolation/metadata-endpoints.yaml"))?;
    let mut all = BTreeSet::new();
    for row in list.lines().filter(|line| line.contains("address: ")) {
        let field = |name: &str| {
            let rest = row.split(&format!("{name}: ")).nth(1)?;
            Some(rest.split([',', '}']).next()?.trim().trim_matches('"').to_owned())
        };
        let (address, port) = field("address").zip(field("port")).with_context(|| row.to_owned())?;
        let port: u16 = port.parse()?;
        all.insert(SocketAddr::from((address.parse::<IpAddr>()?, if port == 0 { 80 } else { port })));
    }
    ensure!(all.len() > 20, "{all:?}");
    Ok((all.iter().filter(|address| address.is_ipv4()).copied().collect(), all))
}

/// Runs [`TRY`] in a pod that no policy selects; returns what answers there.
async fn unpoliced(world: &World, name: &str, targets: &BTreeSet<SocketAddr>) -> Result<BTreeSet<SocketAddr>> {
    let api: Api<Pod> = Api::namespaced(world.client.clone(), SYSTEM);
    let mut command = vec!["python3".to_owned(), "-c".to_owned(), TRY.to_owned()];
    command.extend(targets.iter().map(ToString::to_string));
    let pod: Pod =
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "try", "image": "mayfly.test/gitea-runner:dev", "imagePullPolicy": "Never", "command": command}]}}))?;
    api.create(&PostParams::default(), &pod).await?;
    let log = eventually("the control's word", PATIENCE, || async {
        let log = api.logs(name, &LogParams::default()).await?;
        Ok(log.contains("tried=").then_some(log))
    })
    .await?;
    api.delete(name, &DeleteParams::default()).await?;
    Ok(opened(&log))
}

/// The same in a job.
async fn in_a_job(stage: &Stage, targets: &BTreeSet<SocketAddr>) -> Result<BTreeSet<SocketAddr>> {
    let list = targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let script = format!("cat > /tmp/try.py <<'E'\n{TRY}\nE\npython3 /tmp/try.py {list}");
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", &script))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    let tried = said(&log, "tried=").context("the job says how many it tried")?;
    assert_eq!(tried, targets.len().to_string());
    Ok(log
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(_, text)| text.strip_prefix("open="))
        .filter_map(|a| a.trim().parse().ok())
        .collect())
}

fn opened(log: &str) -> BTreeSet<SocketAddr> {
    log.lines().filter_map(|line| line.strip_prefix("open=")).filter_map(|address| address.trim().parse().ok()).collect()
}

/// Has something answer at an address of the outside world.
fn decoy(stage: &Stage, address: &SocketAddr) -> Result<()> {
    stage.world.cluster.add_outside_address(&format!("{}/32", address.ip()))?;
    let name = format!("decoy-{}", address.to_string().replace(['.', ':'], "-"));
    stage.world.cluster.start_outside(&name, &[&built()?.join("demo").display().to_string(), "decoy", &address.to_string()])
}

/// Every row of the list, against decoys that answer whoever has no policy. The cluster has no IPv6: those rows are tried, and that
/// they are silent shows nothing here.
#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_unreachable() -> Result<()> {
    let stage = Stage::set("meta").await?;
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": {"internet": true}})).await?;
    stage.hook()?;
    let (ipv4, all) = endpoints()?;
    for address in &ipv4 {
        decoy(&stage, address)?;
    }
    let answers = unpoliced(&stage.world, &stage.namespace, &ipv4).await?;
    assert_eq!(answers, ipv4, "the decoys answer where no policy stands in the way");
    let open = in_a_job(&stage, &all).await?;
    ensure!(open.is_empty(), "a job reached {open:?}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

/// Services without a selector that lead to the node's kubelet and to a metadata address.
#[tokio::test(flavor = "multi_thread")]
async fn service_redirect_is_blocked() -> Result<()> {
    let stage = Stage::set("redir").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let metadata = "100.100.100.200";
    decoy(&stage, &SocketAddr::from((metadata.parse::<IpAddr>()?, 80)))?;
    let node = stage.world.cluster.layout().addresses().node.to_string();
    let mut targets = BTreeSet::new();
    for (name, address, port) in [("kubelet", node.as_str(), 10_250), ("metadata", metadata, 80)] {
        targets.insert(redirect(&stage, name, address, port).await?);
    }
    let answers = unpoliced(&stage.world, &stage.namespace, &targets).await?;
    assert_eq!(answers, targets, "the Services lead somewhere");
    let open = in_a_job(&stage, &targets).await?;
    ensure!(open.is_empty(), "a job reached {open:?} through a Service");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

async fn redirect(stage: &Stage, name: &str, address: &str, port: u16) -> Result<SocketAddr> {
    let services: Api<Service> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let slices: Api<EndpointSlice> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let service: Service = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}}))?;
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
        "ports": [{"name": "", "port": port, "protocol": "TCP"}], "endpoints": [{"addresses": [address], "conditions": {"ready": true}}]}))?;
    let made = services.create(&PostParams::default(), &service).await?;
    slices.create(&PostParams::default(), &slice).await?;
    let ip: Value = serde_json::to_value(made.spec.and_then(|spec| spec.cluster_ip))?;
    Ok(SocketAddr::from((ip.as_str().context("a ClusterIP")?.parse::<IpAddr>()?, 80)))
}

/// Pods of a runner's shape whose very first instruction connects to an address that is closed to them.
#[tokio::test(flavor = "multi_thread")]
async fn no_leak_at_start() -> Result<()> {
    let stage = Stage::set("leak").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let control = leak::control(&stage).await?;
    ensure!(!control.is_empty(), "a pod without policy does not get out either");
    let found = leak::leaks(&stage, 30).await?;
    ensure!(found.visits.is_empty(), "{} tries of {} starts got through: {:?}", found.visits.len(), found.starts, found.visits);
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

/// Policies are the pool's, not the pods': they stand as long as the namespace has pods, even while it goes.
#[tokio::test(flavor = "multi_thread")]
async fn policies_outlive_pods() -> Result<()> {
    let stage = Stage::set("outlive").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    stage.push("app", &[("ci.yml", &workflow("push", "sleep 300"))], 1).await?;
    stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(stage.world.client.clone());
    let policies: Api<NetworkPolicy> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    namespaces.delete(&stage.namespace, &DeleteParams::background()).await?;
    let began = Instant::now();
    loop {
        // Policies first: a pod that is seen after them was there while they were.
        let standing = policies.get_opt(&format!("mayfly-{POOL}-deny")).await?.is_some();
        let pods = stage.pods().await?;
        ensure!(standing || pods.is_empty(), "the policies went before {:?}", pods.iter().map(ResourceExt::name_any).collect::<Vec<_>>());
        if pods.is_empty() {
            break;
        }
        ensure!(began.elapsed() < PATIENCE, "the pods stay");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eventually("the namespace gone", PATIENCE, || async { Ok(namespaces.get_opt(&stage.namespace).await?.is_none().then_some(())) })
        .await?;
    stage.strike().await
}

/// NetworkPolicies add up, so one of somebody else's undoes ours. Cilium's denials hold against it, and come back when they are taken
/// away.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_policy_cannot_undo_the_deny() -> Result<()> {
    let stage = Stage::set("stray").await?;
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"enforcement": "Warn"})).await?;
    stage.hook()?;
    let addresses = stage.world.cluster.layout().addresses();
    let node: IpAddr = addresses.node.parse()?;
    let stray: SocketAddr = "100.100.100.202:8098".parse()?;
    let metadata = ["169.254.169.254:80", "169.254.42.42:80", "100.100.100.200:80", "168.63.129.16:80"];
    let mut targets: BTreeSet<SocketAddr> = metadata.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    targets.insert(stray);
    for address in &targets {
        decoy(&stage, address)?;
    }
    let service = SocketAddr::from((addresses.api_service.parse::<IpAddr>()?, 443));
    targets.extend([SocketAddr::from((node, 10_250)), SocketAddr::from((node, 6_443)), service]);
    let answers = unpoliced(&stage.world, &stage.namespace, &targets).await?;
    assert_eq!(answers, targets, "all of them answer where no policy stands in the way");

    stage.open_wide().await?;
    let open = in_a_job(&stage, &targets).await?;
    assert_eq!(open, BTreeSet::from([stray]), "the stray policy opens what Mayfly does not deny, and nothing else");
    stage.close_again().await?;
    stage.nothing_left(&pool).await?;

    let deny = format!("mayfly-{POOL}-deny");
    let before = cilium(&stage, stage.world.client.clone()).get(&deny).await?;
    cilium(&stage, stage.world.as_operator()?).delete(&deny, &DeleteParams::default()).await?;
    eventually("the denial back again", PATIENCE, || async {
        let now = cilium(&stage, stage.world.client.clone()).get_opt(&deny).await?;
        Ok(now.filter(|now| now.uid() != before.uid() && now.data["spec"] == before.data["spec"]))
    })
    .await?;
    stage.strike().await
}

/// A name of the outside world on the port that the pool names: not by its address before anybody asked for the name, not on another
/// port, not another address. A name that leads to a metadata endpoint opens nothing.
#[tokio::test(flavor = "multi_thread")]
async fn host_names_open_what_they_name_and_nothing_else() -> Result<()> {
    let stage = Stage::set("hosts").await?;
    // A name that nobody asked for before: Cilium remembers answers.
    let domain = format!("{}.mayfly.test", stage.namespace);
    let hosts = json!([{"host": format!("mirror.{domain}"), "ports": [8097]}, {"host": "*.rebind.mayfly.test", "ports": [80]}]);
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": {"hosts": hosts}})).await?;
    stage.hook()?;
    pool::condition(&stage.world, &stage.namespace, POOL, "EgressHostsEnforced", "True").await?;
    let outside = &stage.world.cluster.layout().addresses().outside;
    let demo = built()?.join("demo").display().to_string();
    for port in [8097, 8098] {
        stage.world.cluster.start_outside(&format!("decoy-outside-{port}"), &[&demo, "decoy", &format!("{outside}:{port}")])?;
    }
    for address in ["100.100.100.203:8097", "169.254.169.254:80"] {
        decoy(&stage, &address.parse()?)?;
    }
    // The first two before the name was asked for, the others at once.
    let tries = [
        (format!("{outside}:8097"), false),
        (format!("other.{domain}:8097"), false),
        (format!("mirror.{domain}:8097"), true),
        (format!("mirror.{domain}:8098"), false),
        ("100.100.100.203:8097".to_owned(), false),
        ("a.rebind.mayfly.test:80".to_owned(), false),
        ("169.254.169.254:80".to_owned(), false),
    ];
    let (first, rest) = tries.split_at(2);
    let list = |tries: &[(String, bool)]| tries.iter().map(|(address, _)| address.clone()).collect::<Vec<_>>().join(" ");
    let script = format!("cat > /tmp/try.py <<'E'\n{TRY}\nE\npython3 /tmp/try.py {}; python3 /tmp/try.py {}", list(first), list(rest));
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", &script))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    for (address, open) in &tries {
        let word = if *open { "open" } else { "closed" };
        ensure!(log.lines().any(|line| line.ends_with(&format!(" {word}={address}"))), "{address} is not {word}:\n{log}");
    }
    told(&stage, "True").await?;
    stage.nothing_left(&pool).await?;

    // Without names the policy for them goes.
    let policies = cilium(&stage, stage.world.client.clone());
    let name = format!("mayfly-{POOL}-hosts");
    ensure!(policies.get_opt(&name).await?.is_some(), "{name} is not there");
    stage.unready_pool(|pool| pool["spec"]["isolation"] = json!({})).await?;
    eventually("the policy gone", PATIENCE, || async { Ok(policies.get_opt(&name).await?.is_none().then_some(())) }).await?;
    stage.strike().await
}

/// The namespace's CiliumNetworkPolicies.
fn cilium(stage: &Stage, client: Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNetworkPolicy");
    Api::namespaced_with(client, &stage.namespace, &ApiResource::from_gvk_with_plural(&kind, "ciliumnetworkpolicies"))
}

/// The operator finds out whom the kubelet tells pods to ask for names, and opens that, on port 53.
#[tokio::test(flavor = "multi_thread")]
async fn whom_pods_are_told_to_ask_for_names_is_open() -> Result<()> {
    let stage = Stage::set("names").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let script = "sed -n 's/^nameserver /told=/p' /etc/resolv.conf; getent hosts other.mayfly.test && echo found=yes";
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", script))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    ensure!(said(&log, "found=") == Some("yes"), "{log}");
    let server = said(&log, "told=").context("the job says whom it was told to ask")?;
    let policies: Api<NetworkPolicy> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let policy = serde_json::to_value(policies.get(&format!("mayfly-{POOL}-dns")).await?)?;
    let rule = &policy["spec"]["egress"][0];
    let peers = rule["to"].as_array().context("peers")?;
    ensure!(peers.iter().any(|peer| peer["ipBlock"]["cidr"] == format!("{server}/32")), "{server} is not open: {policy}");
    ensure!(rule["ports"].as_array().is_some_and(|ports| ports.iter().all(|port| port["port"] == 53)), "{policy}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
