//! A pod gets a registration when it has shown that it is isolated, not before, and keeps it while that is so.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams, ValidationDirective,
};
use kube::{Api, Client, ResourceExt};
use mayfly_cluster::World as Place;
use mayfly_cluster::command::output;
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_crds::{Control, IsolationVerdict};
use mayfly_e2e::install::helm_command;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{built, repository};
use mayfly_e2e::{World, leak, pool};
use serde_json::{Value, json};

/// What every proof has to say something about on a cluster of one node.
const CLASSES: [&str; 7] = ["ApiServer", "Metadata", "Node", "Outside", "Pods", "Required", "Services"];
/// Rows that a program of the node itself answers: the agents of ECS, of EKS Pod Identity and of GKE.
const AGENTS: [&str; 4] = ["169.254.170.2", "169.254.170.23", "169.254.169.252", "fd00:ec2::23"];
/// The row that no decoy can answer: it needs a link's name beside it, and is of that link alone, which ends at the pod's node.
const LINK_LOCAL: &str = "fe80::a9fe:a9fe";
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
    ensure!(nodes.len() == 1 && nodes[0].verdict == IsolationVerdict::Proved, "{nodes:?}");
    let proved = nodes[0].classes.iter().filter(|class| class.verdict == IsolationVerdict::Proved);
    assert_eq!(proved.map(|class| class.class.as_str()).collect::<Vec<_>>(), CLASSES, "{:?}", nodes[0].classes);
    ensure!(nodes[0].environment.contains("containerd://"), "{:?}", nodes[0].environment);
    // A sentinel of the node told as well, from the time on that it reached this process.
    eventually("a proof against the node's own sentinel", PATIENCE, || async {
        Ok(stage.status().await?.isolation.iter().all(|node| node.control == Control::Node).then_some(()))
    })
    .await?;
    ensure!(nodes[0].starts.pods > 0 && nodes[0].starts.leaks == 0, "{:?}", nodes[0].starts);
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

/// A node without room, which only pools that tolerate its taint look at: the proof there is tried and told to be missing, and keeps
/// nothing from running elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn every_node_is_proved_ahead_of_jobs() -> Result<()> {
    let stage = Stage::set("nodes").await?;
    let api: Api<Node> = Api::all(stage.world.client.clone());
    let name = stage.namespace.clone();
    let taint = json!({"key": "mayfly.test/stage", "value": name, "effect": "NoSchedule"});
    let node = json!({"metadata": {"name": name}, "spec": {"taints": [taint]}});
    api.create(&PostParams::default(), &serde_json::from_value(node)?).await?;
    let ready = json!({"type": "Ready", "status": "True", "reason": "Test", "message": ""});
    let none = json!({"cpu": "0", "memory": "0", "ephemeral-storage": "0", "pods": "0"});
    let status = json!({"status": {"conditions": [ready], "capacity": none, "allocatable": none,
        "runtimeHandlers": [{"name": "", "features": {"userNamespaces": true}}]}});
    api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;

    let tolerate = json!({"tolerations": [{"key": "mayfly.test/stage", "value": name}]});
    let pool = stage.pool(|pool| pool["spec"]["runner"] = tolerate).await?;
    let message = eventually("the missing proof told", PATIENCE, || async {
        let (_, message) = told(&stage, "True").await?;
        Ok(message.contains(&name).then_some(message))
    })
    .await?;
    ensure!(message.contains("not yet on 1"), "{message}");
    let events: Api<Event> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let refused = |event: &Event| event.reason.as_deref() == Some("FailedScheduling");
    eventually("a pod for that node", PATIENCE, || async {
        Ok(events.list(&ListParams::default()).await?.items.iter().any(refused).then_some(()))
    })
    .await?;
    stage.nothing_left(&pool).await?;
    let failure = stage.status().await?.last_failure;
    ensure!(failure.is_none(), "no room is no failure: {failure:?}");
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    api.delete(&name, &DeleteParams::default()).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_network_plugin_is_a_reason_for_a_new_proof() -> Result<()> {
    // Every pool of the cluster proves anew.
    let stage = Stage::set_alone("plugin").await?;
    let pool = stage.pool(|_| {}).await?;
    let starts = async || Ok::<_, anyhow::Error>(stage.status().await?.isolation.first().map_or(0, |node| node.starts.pods));
    ensure!(starts().await? > 0);
    let api: Api<DaemonSet> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let (labels, none) = (json!({"app": "net"}), json!({"mayfly.test/nowhere": "yes"}));
    let container = json!({"name": "agent", "image": "mayfly.test/none:1"});
    let volume = json!({"name": "cni", "hostPath": {"path": "/etc/cni/net.d"}});
    let template = json!({"metadata": {"labels": labels}, "spec": {"nodeSelector": none, "containers": [container], "volumes": [volume]}});
    let set = json!({"metadata": {"name": "net"}, "spec": {"selector": {"matchLabels": labels}, "template": template}});
    api.create(&PostParams::default(), &serde_json::from_value(set)?).await?;
    for generation in 1..=2 {
        let named = format!("{}/net@{generation}", stage.namespace);
        eventually(format!("a proof with {named}"), PATIENCE, || async {
            let nodes = stage.status().await?.isolation;
            Ok((nodes.len() == 1 && nodes[0].environment.contains(&named) && nodes[0].starts.pods > 0).then_some(()))
        })
        .await?;
        told(&stage, "True").await?;
        let image = json!({"spec": {"template": {"spec": {"containers": [{"name": "agent", "image": "mayfly.test/none:2"}]}}}});
        api.patch("net", &PatchParams::default(), &Patch::Strategic(image)).await?;
    }
    // It goes while this test is alone: that is a change as well.
    api.delete("net", &DeleteParams::background()).await?;
    eventually("a proof without it", PATIENCE, || async {
        let nodes = stage.status().await?.isolation;
        Ok((nodes.len() == 1 && !nodes[0].environment.contains("/net@") && nodes[0].starts.pods > 0).then_some(()))
    })
    .await?;
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

/// The rows of the operator's list.
fn endpoints() -> Result<BTreeSet<SocketAddr>> {
    let list = std::fs::read_to_string(repository().join("operator/src/isolation/metadata-endpoints.yaml"))?;
    let mut all = BTreeSet::new();
    for row in list.lines().filter(|line| line.contains("address: ")) {
        let field = |name: &str| {
            let rest = row.split(&format!("{name}: ")).nth(1)?;
            Some(rest.split([',', '}']).next()?.trim().trim_matches('"').to_owned())
        };
        let (address, port) = field("address").zip(field("port")).with_context(|| row.to_owned())?;
        let port: u16 = port.parse()?;
        all.insert(SocketAddr::new(address.parse()?, if port == 0 { 80 } else { port }));
    }
    ensure!(all.len() > 20 && all.iter().any(SocketAddr::is_ipv6), "{all:?}");
    Ok(all)
}

/// Runs [`TRY`] in a pod that no policy selects; returns what answers there.
async fn unpoliced(world: &World, name: &str, targets: &BTreeSet<SocketAddr>) -> Result<BTreeSet<SocketAddr>> {
    let mut command = vec!["python3".to_owned(), "-c".to_owned(), TRY.to_owned()];
    command.extend(targets.iter().map(ToString::to_string));
    Ok(opened(&world.unpoliced(name, &command, "tried=").await?))
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

/// Every row of the list, IPv4 and IPv6, against decoys that answer whoever has no policy: those of [`AGENTS`] bound on the node, the
/// others routed to the outside world. [`LINK_LOCAL`] is tried and has none.
#[tokio::test(flavor = "multi_thread")]
async fn metadata_is_unreachable() -> Result<()> {
    let stage = Stage::set("meta").await?;
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": {"internet": true}})).await?;
    stage.hook()?;
    let rows = endpoints()?;
    let mut decoys = rows.clone();
    decoys.retain(|row| row.ip().to_string() != LINK_LOCAL);
    assert_eq!(decoys.len(), rows.len() - 1);
    for row in &decoys {
        // An IPv4-mapped address is a way to write the other one, and no packet has it.
        let address = SocketAddr::new(row.ip().to_canonical(), row.port());
        let bound = AGENTS.contains(&address.ip().to_string().as_str());
        stage.world.decoy(if bound { Place::Node } else { Place::Outside }, address).await?;
    }
    let answers = unpoliced(&stage.world, &stage.namespace, &decoys).await?;
    assert_eq!(answers, decoys, "the decoys answer where no policy stands in the way");
    let open = in_a_job(&stage, &rows).await?;
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
    stage.world.decoy(Place::Outside, SocketAddr::new(metadata.parse()?, 80)).await?;
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

/// Pods of a runner's shape whose very first instruction connects to an address that is closed to them. So many starts take the whole
/// node: other tests' pods would start several times slower beside them.
#[tokio::test(flavor = "multi_thread")]
async fn no_leak_at_start() -> Result<()> {
    let stage = Stage::set_alone("leak").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let control = leak::control(&stage).await?;
    ensure!(!control.is_empty(), "a pod without policy does not get out either");
    let found = leak::leaks(&stage, leak::STARTS).await?;
    ensure!(found.visits.is_empty(), "{} tries of {} starts got through: {:?}", found.visits.len(), found.starts, found.visits);
    ensure!(found.starts >= leak::STARTS, "{} pods ran", found.starts);
    stage.nothing_left(&pool).await?;
    // Their gates tried the sentinels as well, from their own first instruction on.
    let starts = eventually("what gates told of their starts", PATIENCE, || async {
        let starts = stage.status().await?.isolation.first().map(|node| node.starts);
        Ok(starts.filter(|starts| starts.pods as usize >= leak::STARTS / 2))
    })
    .await?;
    ensure!(starts.leaks == 0, "{starts:?}");
    stage.strike().await
}

/// Policies are the pool's, not the pods': they stand as long as the namespace has pods, even while it goes.
#[tokio::test(flavor = "multi_thread")]
async fn policies_outlive_pods() -> Result<()> {
    let stage = Stage::set("outlive").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    // Some with their job, some on the way.
    for repository in ["one", "two", "three", "four"] {
        stage.push(repository, &[("ci.yml", &workflow("push", "sleep 300"))], 1).await?;
    }
    eventually("two pods with their jobs", PATIENCE, || async {
        let busy = stage.pods().await?.iter().filter(|pod| pod.annotations().contains_key(ANNOTATION_JOB)).count();
        Ok((busy >= 2).then_some(()))
    })
    .await?;
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
        stage.world.decoy(Place::Outside, *address).await?;
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
        stage.world.cluster.start(Place::Outside, &format!("decoy-outside-{port}"), &[&demo, "decoy", &format!("{outside}:{port}")])?;
    }
    for address in ["100.100.100.203:8097", "169.254.169.254:80"] {
        stage.world.decoy(Place::Outside, address.parse()?).await?;
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

    // An agent without its proxy would not take the policy.
    let policies = cilium(&stage, stage.world.client.clone());
    let name = format!("mayfly-{POOL}-hosts");
    ensure!(policies.get_opt(&name).await?.is_some(), "{name} is not there");
    let settings: Api<ConfigMap> = Api::namespaced(stage.world.client.clone(), "kube-system");
    let off = json!({"metadata": {"name": "cilium-config"}, "data": {"enable-l7-proxy": "false"}});
    settings.create(&PostParams::default(), &serde_json::from_value(off)?).await?;
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "EgressHostsEnforced", "False").await?;
    ensure!(reason == "EngineCannot" && message.contains("L7 proxy is off"), "{reason}: {message}");
    eventually("the policy gone", PATIENCE, || async { Ok(policies.get_opt(&name).await?.is_none().then_some(())) }).await?;
    settings.delete("cilium-config", &DeleteParams::default()).await?;
    pool::condition(&stage.world, &stage.namespace, POOL, "EgressHostsEnforced", "True").await?;

    // Without names the policy for them goes.
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

/// No engine here serves ClusterNetworkPolicies: what can be shown is that the chart applies its object where the API server has the kind,
/// and that the kind's own definition takes all of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_denial_of_cluster_scope_is_taken_by_its_definition() -> Result<()> {
    let world = World::connect().await?;
    let mut download = Command::new("go");
    download.args(["mod", "download", "-json", "sigs.k8s.io/network-policy-api"]).current_dir(repository().join("e2e/tools/policy-api"));
    let module: Value = serde_json::from_str(&output(&mut download)?)?;
    let folder = Path::new(module["Dir"].as_str().context("the module's folder")?).join("config/crd/standard");
    let file = folder.join("policy.networking.k8s.io_clusternetworkpolicies.yaml");

    let render = |versions: &[&str]| {
        let mut helm = helm_command(&world.cluster)?;
        helm.args(["template", "mayfly"]).arg(repository().join("charts/mayfly")).args(["--show-only", "templates/cluster-denial.yaml"]);
        for version in versions {
            helm.args(["--api-versions", version]);
        }
        // The comment at the file's head is a document as well.
        output(&mut helm).map(|text| text.rsplit("---\n").next().unwrap_or_default().to_owned())
    };
    ensure!(render(&[]).is_ok_and(|text| !text.contains("kind:")), "nothing of it without the kind");
    let calico: Value = serde_saphyr::from_str(&render(&["projectcalico.org/v3/GlobalNetworkPolicy"])?)?;
    ensure!(calico["kind"] == "GlobalNetworkPolicy", "{calico}");
    let denial: Value = serde_saphyr::from_str(&render(&["policy.networking.k8s.io/v1alpha2/ClusterNetworkPolicy"])?)?;

    let crds: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    let crd: CustomResourceDefinition = serde_saphyr::from_str(&std::fs::read_to_string(&file)?)?;
    let name = crd.name_any();
    crds.patch(&name, &PatchParams::apply("mayfly-e2e").force(), &Patch::Apply(&crd)).await?;
    let kind = GroupVersionKind::gvk("policy.networking.k8s.io", "v1alpha2", "ClusterNetworkPolicy");
    let api: Api<DynamicObject> = Api::all_with(world.client.clone(), &ApiResource::from_gvk_with_plural(&kind, "clusternetworkpolicies"));
    let stored = eventually("the API server takes the denial", PATIENCE, || async {
        let params = PatchParams { dry_run: true, field_validation: Some(ValidationDirective::Strict), ..PatchParams::apply("mayfly-e2e") };
        match api.patch("mayfly-metadata", &params, &Patch::Apply(&denial)).await {
            Ok(stored) => Ok(Some(stored)),
            // The kind is not served yet.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    crds.delete(&name, &DeleteParams::default()).await?;
    ensure!(stored.data["spec"] == denial["spec"], "nothing of it is dropped: {}", stored.data);
    Ok(())
}
