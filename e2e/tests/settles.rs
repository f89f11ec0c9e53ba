//! When nothing happens, nothing is done.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ListParams, PostParams};
use mayfly_cluster::World as Place;
use mayfly_cluster::command::output;
use mayfly_crds::CredentialBinding;
use mayfly_e2e::stage::{PATIENCE, Stage, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_at_rest_writes_nothing() -> Result<()> {
    let stage = Stage::set("rest").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    // Numbers are written with a delay; then the object must not change any more.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let before = version(&stage).await?;
    tokio::time::sleep(Duration::from_secs(25)).await;
    assert_eq!(before, version(&stage).await?, "the pool's status was written although nothing happened");
    stage.strike().await
}

async fn version(stage: &Stage) -> Result<Option<String>> {
    use kube::ResourceExt;
    let pools = mayfly_e2e::pool::pools(&stage.world, &stage.namespace);
    Ok(pools.get(mayfly_e2e::stage::POOL).await?.resource_version())
}

/// Rules that no call of the operator's shows by itself, and why it has them.
const UNSEEN: [(&str, &str, &str); 6] = [
    ("create", "ciliumnetworkpolicies", "applying an object that is not there needs it, and is a patch in the audit log"),
    ("create", "networkpolicies", "applying an object that is not there needs it, and is a patch in the audit log"),
    ("create", "serviceaccounts", "applying an object that is not there needs it, and is a patch in the audit log"),
    ("update", "runnerpools/finalizers", "an admission plugin asks for it where a pod is owned by a pool; nobody calls it"),
    ("patch", "secrets", "the issuer's keys are renewed once a month; `a_key_is_renewed_before_its_month_is_over` shows it"),
    ("delete", "secrets", "the gate's certificate is replaced when less than a year of it is left"),
];

/// The rules of the operator's roles and its calls in the API server's audit log, held against one another: nothing it does is refused,
/// and every rule is used.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_has_the_permissions_it_uses_and_no_other() -> Result<()> {
    let stage = Stage::set("rbac").await?;
    // What a cluster on which a job ran has not seen yet: an opening that is closed again, and a warning told twice.
    stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": {"internet": true}})).await?;
    stage.pool(|pool| pool["spec"]["runner"]["image"] = json!("mayfly.test/there-is-no-such-image:1")).await?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let account = format!("system:serviceaccount:{SYSTEM}:mayfly-controller");
    eventually("a warning told twice", PATIENCE, || async { Ok(calls(&stage, &account)?.contains("patch events").then_some(())) }).await?;
    stage.pool(|_| {}).await?;
    stage.succeeds("app", jobs[0].id).await?;
    let binding = json!({
        "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding", "metadata": {"name": "untrusted"},
        "spec": {
            "pools": ["ci"], "token": {"issuer": "https://nobody.example", "audience": "a.example"},
            "subject": {"claims": {"repository_id": {"exact": "1"}}}, "provider": {"audienceToken": {}},
        },
    });
    let bindings: Api<CredentialBinding> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    bindings.create(&PostParams::default(), &serde_json::from_value(binding)?).await?;
    eventually("the binding tells", PATIENCE, || async {
        let told = bindings.get("untrusted").await?.status.unwrap_or_default().conditions;
        Ok(told.iter().any(|told| told.type_ == "Ready" && told.reason == "IssuerNotTrusted").then_some(()))
    })
    .await?;

    let made = calls(&stage, &account)?;
    let mut rules = BTreeSet::new();
    let roles = [
        &["clusterrole", "mayfly-controller"][..],
        &["-n", SYSTEM, "role", "mayfly-controller"],
        &["-n", "default", "role", "mayfly-controller-api-server"],
    ];
    for role in roles {
        let role = output(stage.world.cluster.kubectl().args(["get", "-o", "json"]).args(role))?;
        let role: Value = serde_json::from_str(&role)?;
        for rule in role["rules"].as_array().into_iter().flatten() {
            let texts =
                |key: &str| rule[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>();
            let resources = texts("resources");
            rules.extend(texts("verbs").iter().flat_map(|verb| resources.iter().map(move |resource| format!("{verb} {resource}"))));
        }
    }
    let unseen: BTreeSet<String> = UNSEEN.iter().map(|(verb, resource, _)| format!("{verb} {resource}")).collect();
    ensure!(unseen.is_subset(&rules), "no rule any more: {:?}", unseen.difference(&rules));
    let idle: Vec<&String> = rules.iter().filter(|rule| !made.contains(*rule) && !unseen.contains(*rule)).collect();
    ensure!(idle.is_empty(), "rules that no call needs: {idle:?}; calls: {made:?}");
    stage.strike().await
}

/// Calls of an account in the audit log, as verb and resource.
fn calls(stage: &Stage, account: &str) -> Result<BTreeSet<String>> {
    let log = std::fs::read_to_string(stage.world.cluster.audit_log())?;
    let mut calls = BTreeSet::new();
    for line in log.lines().filter(|line| line.contains(account)) {
        // The last line may be half written.
        let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
        // Tests do things in its name as well.
        if event["user"]["username"] != account {
            continue;
        }
        let (verb, what) = (event["verb"].as_str().unwrap_or_default(), &event["objectRef"]);
        let resource = what["resource"].as_str().unwrap_or_default();
        let resource = what["subresource"].as_str().map_or(resource.to_owned(), |sub| format!("{resource}/{sub}"));
        let refused = event["annotations"]["authorization.k8s.io/decision"] == "forbid";
        ensure!(!refused, "refused: {verb} {resource}: {line}");
        calls.insert(format!("{verb} {resource}"));
    }
    Ok(calls)
}

/// Connections to the API server of which the other end is gone without a word, as after a failover: they look quiet, and nothing fails.
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_died_without_a_word_are_noticed() -> Result<()> {
    let stage = Stage::set_alone("deaf").await?;
    let pool = stage.pool(|pool| pool["spec"]["scale"]["max"] = json!(2)).await?;
    stage.hook()?;
    let node = |script: &str| output(&mut stage.world.cluster.command_in(Place::Node, ["bash", "-ec", script]));
    let operators: Api<Pod> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let selector = ListParams::default().labels("app.kubernetes.io/component=controller");
    let operator = operators.list(&selector).await?.items.pop().context("the operator's pod")?;
    let address = operator.status.and_then(|status| status.pod_ip).context("its address")?;
    let cut = node(&format!(
        "ports=$(ss -tnH state established dst {address} | awk '$3 ~ /:6443$/ {{sub(/.*:/, \"\", $4); print $4}}' | paste -sd,)
         [ -n \"$ports\" ] || exit 1
         nft add table inet mayfly-e2e-dead
         nft add chain inet mayfly-e2e-dead in '{{ type filter hook input priority -200; }}'
         nft add chain inet mayfly-e2e-dead out '{{ type filter hook output priority -200; }}'
         nft add rule inet mayfly-e2e-dead in ip saddr {address} tcp sport \"{{ $ports }}\" drop
         nft add rule inet mayfly-e2e-dead out ip daddr {address} tcp dport \"{{ $ports }}\" drop
         echo $ports"
    ))?;
    let served = async {
        let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
        let most = Arc::new(AtomicUsize::new(0));
        let watching = {
            let (most, api) = (most.clone(), stage.pod_api());
            tokio::spawn(async move {
                while let Ok(pods) = api.list(&ListParams::default()).await {
                    most.fetch_max(pods.items.len(), Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            })
        };
        let began = Instant::now();
        stage.succeeds("app", jobs[0].id).await?;
        watching.abort();
        ensure!(most.load(Ordering::Relaxed) <= 2, "{} pods, and max is 2", most.load(Ordering::Relaxed));
        Ok(began.elapsed())
    }
    .await;
    node("nft delete table inet mayfly-e2e-dead")?;
    let took = served.with_context(|| format!("with these ports cut: {cut}"))?;
    ensure!(took < Duration::from_secs(60), "{took:?}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
