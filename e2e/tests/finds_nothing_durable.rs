//! A job that looks everywhere finds what this file lists, and nothing else: `job/search.py` does the looking.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use mayfly_cluster::command::{hex, random_hex};
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::stage::{Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{SYSTEM, repository};
use serde_json::json;

const SEARCH: &str = "e2e/tests/job/search.py";
/// Longer than it takes itself: it reads some hundred megabytes.
const SEARCH_TIME: Duration = Duration::from_secs(360);
/// What the search is masked with, so that nothing it looks for is in the job for its sake.
const MASK: u8 = 0x5a;

/// Whether something is found in every search.
#[derive(PartialEq)]
enum When {
    Always,
    /// It hangs on what a program happened to read, and whether it used the memory anew since.
    Sometimes,
}
use When::{Always, Sometimes};

/// What a job may find: the kind, the place, when, and why. docs/security.md has the same list.
#[rustfmt::skip]
const EXPECTED: [(&str, &str, When, &str); 26] = [
    ("addresses that the gate tries", "connections of the pod", Always, "the gate shares the pod's network namespace, whose table of connections everybody in it can read"),
    ("private key", "file /usr/lib/x86_64-linux-gnu/libgnutls.so", Always, "the self-test key that GnuTLS publishes in its sources"),
    ("socket or pipe", "file /run/mayfly/identity", Sometimes, "the gate makes it when the job is accepted; it can be written and not read"),
    ("the address of the API server", "environment of a step", Always, "the kubelet sets KUBERNETES_... in every container"),
    ("the address of the API server", "environment of the runner", Always, "the same"),
    ("the address of the API server", "memory of a step", Always, "an environment is in the memory of its process"),
    ("the address of the API server", "memory of the runner", Always, "the same"),
    ("the job's token", "environment of a step", Always, "the forge gives it to the job, for this job"),
    ("the job's token", "memory of a step", Always, "the same"),
    ("the job's token", "memory of the runner", Always, "the same"),
    ("the namespace", "file /etc/resolv.conf", Always, "the search path of the cluster's DNS"),
    ("the namespace", "memory of the runner", Sometimes, "it has read that file"),
    ("the pod's UID", "memory of the runner", Sometimes, "it has read its mounts"),
    ("the pod's UID", "mounts of a step", Always, "the folders of the pod's volumes on the node are named by it"),
    ("the pod's UID", "mounts of the runner", Always, "the same"),
    ("the pod's own name", "environment of a step", Always, "HOSTNAME"),
    ("the pod's own name", "environment of the runner", Always, "the same"),
    ("the pod's own name", "file /etc/hostname", Always, "the name of the host is the pod's"),
    ("the pod's own name", "file /etc/hosts", Always, "the same"),
    ("the pod's own name", "memory of a step", Always, "an environment is in the memory of its process"),
    ("the pod's own name", "memory of the runner", Always, "the runner knows its name"),
    ("the runner's registration", "memory of the runner", Always, "it speaks to the forge with it, and steps run as its user"),
    ("variables of the cluster", "environment of a step", Always, "the kubelet sets KUBERNETES_... in every container"),
    ("variables of the cluster", "environment of the runner", Always, "the same"),
    ("variables of the cluster", "memory of a step", Always, "an environment is in the memory of its process"),
    ("variables of the cluster", "memory of the runner", Always, "the same"),
];

/// Where every hidden thing has to be found.
const HIDING_PLACES: [&str; 7] = [
    "file /tmp",
    "file /dev/shm",
    "environment of environment holder",
    "arguments of arguments holder",
    "memory of memory holder",
    "open file of open files holder",
    "pipe of open files holder",
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_durable_in_the_pod() -> Result<()> {
    let stage = Stage::set("finds").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    // Another job, so that there is another pod to learn of.
    stage.push("other", &[("ci.yml", &workflow("push", "sleep 600"))], 1).await?;
    let neighbour = stage.a_pod("of another job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let needles = needles(&stage, &neighbour).await?;
    let mut canaries: BTreeMap<&str, String> = BTreeMap::new();
    for kind in needles.keys() {
        canaries.insert(kind, format!("hidden{}", random_hex(20)?));
    }
    let wanted = json!({"needles": needles, "canaries": canaries}).to_string();
    let masked = hex(&wanted.bytes().map(|byte| byte ^ MASK).collect::<Vec<_>>());
    let search = fs::read_to_string(repository().join(SEARCH))?;
    let script = format!("cat > /tmp/search.py <<'E'\n{search}\nE\npython3 /tmp/search.py {masked}");
    let step = json!({"run": script, "env": {"TOKEN_ASKED_FOR": "${{ github.token }}"}});
    let text = json!({"on": "push", "jobs": {"job": {"runs-on": "linux", "steps": [step]}}}).to_string();
    let jobs = stage.push("app", &[("ci.yml", &text)], 1).await?;
    eventually("the end of the search", SEARCH_TIME, || async { Ok((stage.job("app", jobs[0].id)?.status == "completed").then_some(())) })
        .await?;
    let log = stage.succeeds("app", jobs[0].id).await?;

    let lines = |key: &str| -> BTreeSet<&str> {
        let texts = log.lines().filter_map(|line| line.split_once(' ')).filter_map(|(_, text)| text.strip_prefix(key));
        texts.map(str::trim).collect()
    };
    for secret in needles.values().flatten() {
        ensure!(secret.len() < 16 || !log.contains(secret.as_str()), "the search said what it found");
    }
    looked_everywhere(&log, &lines("canary="), canaries.keys().copied().chain(["token", "private key", "kubeconfig"]))?;

    let found: BTreeSet<&str> = lines("found=").into_iter().filter_map(|line| line.rsplit_once(" | ").map(|(what, _)| what)).collect();
    let expected = expected(|_| true);
    let unexpected: Vec<&&str> = found.iter().filter(|what| !expected.contains(**what)).collect();
    ensure!(unexpected.is_empty(), "a job finds what it should not: {unexpected:#?}");
    let stale: Vec<String> = self::expected(|when| *when == Always).into_iter().filter(|what| !found.contains(what.as_str())).collect();
    ensure!(stale.is_empty(), "this is not found any more: {stale:#?}");

    // The environment that the runner was given, and nothing that listens or that it speaks to but the forge and the gate API.
    assert_eq!(said(&log, "variables="), Some("HOME HOSTNAME PATH PWD SHLVL"));
    assert_eq!(said(&log, "listening="), Some("[]"));
    let gate = Api::<Service>::namespaced(stage.world.client.clone(), SYSTEM).get("mayfly-gate").await?;
    let gate = gate.spec.and_then(|spec| spec.cluster_ip).context("the gate API's address")?;
    let peers = lines("peer=");
    let foreign: Vec<&&str> =
        peers.iter().filter(|peer| !(peer.starts_with(&gate) || stage.world.access.local_url.ends_with(**peer))).collect();
    ensure!(!peers.is_empty() && foreign.is_empty(), "the pod speaks to {foreign:?}");
    // Keyrings are closed. The memory of its own user's processes is not, on a kernel without Yama or with its mildest setting.
    for closed in ["add_key=", "keyctl="] {
        assert_eq!(said(&log, closed), Some("Operation not permitted"), "{closed}");
    }
    assert_eq!(said(&log, "keys="), Some("0"));
    for tried in ["process_vm_readv=", "ptrace="] {
        ensure!(matches!(said(&log, tried), Some("yes" | "Operation not permitted")), "{tried} {:?}", said(&log, tried));
    }
    stage.strike().await
}

fn expected(which: impl Fn(&When) -> bool) -> BTreeSet<String> {
    EXPECTED.iter().filter(|(_, _, when, _)| which(when)).map(|(kind, place, ..)| format!("{kind} | {place}")).collect()
}

/// What a job must not find, and what it may know of the cluster, by kind.
async fn needles(stage: &Stage, neighbour: &Pod) -> Result<BTreeMap<&'static str, Vec<String>>> {
    let client = &stage.world.client;
    let owner = &stage.organization.name;
    stage.forge.create_repo(owner, "app", false)?;
    let registration = stage.forge.call("POST", &format!("/repos/{owner}/app/actions/runners/registration-token"), None)?;
    let kubernetes = Api::<Service>::namespaced(client.clone(), "default").get("kubernetes").await?;
    let operators = Api::<Pod>::namespaced(client.clone(), SYSTEM).list(&ListParams::default()).await?.items;
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?.items;
    let cluster = Api::<ConfigMap>::namespaced(client.clone(), &stage.namespace).get("kube-root-ca.crt").await?;
    let cluster = cluster.data.unwrap_or_default().remove("ca.crt").context("the cluster's authority")?;
    let gate = Api::<Secret>::namespaced(client.clone(), SYSTEM).get("mayfly-gate-tls").await?.data.unwrap_or_default();
    let gate = String::from_utf8(gate.get("ca.crt").context("the gate API's authority")?.0.clone())?;
    let others: Vec<&Pod> = operators.iter().chain([neighbour]).collect();
    let address = |pod: &&Pod| pod.status.as_ref().and_then(|status| status.pod_ip.clone());
    let node_addresses = nodes.iter().filter_map(|node| node.status.as_ref()).flat_map(|status| status.addresses.iter().flatten());
    Ok(BTreeMap::from([
        ("the API token of the forge", vec![stage.organization.token.clone()]),
        ("the webhook secret", vec![stage.organization.webhook_secret.clone()]),
        ("the registration token", vec![registration["token"].as_str().context("a registration token")?.to_owned()]),
        ("the authority of the cluster", vec![first_line(&cluster)?]),
        ("the authority of the gate API", vec![first_line(&gate)?]),
        ("the address of the API server", kubernetes.spec.and_then(|spec| spec.cluster_ip).into_iter().collect()),
        (
            "the address of the node",
            node_addresses.filter(|found| found.type_ == "InternalIP").map(|found| found.address.clone()).collect(),
        ),
        ("the name of another pod", others.iter().map(|pod| pod.name_any()).collect()),
        ("the address of another pod", others.iter().filter_map(address).collect()),
        // The forge's organization, which the job knows, has the same name.
        ("the namespace", vec![format!("{}.svc", stage.namespace)]),
    ]))
}

/// The first line of a certificate's own text, which is the same in no two certificates of the same length.
fn first_line(pem: &str) -> Result<String> {
    Ok(pem.lines().nth(2).context("a certificate of three lines")?.to_owned())
}

/// Whether the search found what it hid itself, and came to its end.
fn looked_everywhere<'a>(log: &str, canaries: &BTreeSet<&str>, kinds: impl Iterator<Item = &'a str>) -> Result<()> {
    for kind in kinds {
        for place in HIDING_PLACES {
            let what = format!("{kind} | {place}");
            ensure!(canaries.iter().any(|line| line.starts_with(&what)), "the search missed its own {what}: {canaries:#?}");
        }
    }
    ensure!(canaries.contains("the API token of the forge | abstract socket"), "{canaries:#?}");
    let looked: BTreeMap<String, u64> = serde_json::from_str(said(log, "looked=").context("how much it looked at")?)?;
    let at_least = |what: &str, least: u64| looked.get(what).is_some_and(|count| *count >= least);
    ensure!(
        at_least("files", 5_000) && at_least("memory", 16 << 20) && at_least("processes", 7) && !looked.contains_key("unfinished"),
        "{looked:?}"
    );
    Ok(())
}

/// docs/security.md tells of everything that is found, in a table with a row for each kind: its places, and why.
#[test]
fn what_a_job_can_find_is_in_the_documentation() -> Result<()> {
    let page = fs::read_to_string(repository().join("docs/security.md"))?;
    let section = page.split("## What a job can find").nth(1).context("the section")?.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")).skip(1);
    let mut told = BTreeSet::new();
    for row in rows {
        let [kind, places, _] = row.split(" | ").collect::<Vec<_>>()[..] else { bail!("a row is a kind, places and a reason: {row}") };
        told.extend(places.split("; ").map(|place| format!("{kind} | {place}")));
    }
    assert_eq!(told, expected(|_| true));
    Ok(())
}
