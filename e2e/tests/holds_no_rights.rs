//! The accounts of runners and of the operator may do what they need, and the gate's token is good for the gate API alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, ResourceExt};
use mayfly_cluster::command::{feed, output};
use mayfly_crds::names::{GATE_AUDIENCE, RUNNER_SERVICE_ACCOUNT};
use mayfly_e2e::stage::{Stage, turn, workflow};
use mayfly_e2e::world::{SYSTEM, repository};
use mayfly_e2e::{World, install};
use serde_json::{Value, json};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

/// What everybody who is known to an API server may do by default: ask about itself.
const REVIEWS: [&str; 3] = ["selfsubjectaccessreviews", "selfsubjectreviews", "selfsubjectrulesreviews"];
/// What everybody who is known may read by default, and what is below: what the API server offers, how it is, and its public keys.
const DISCOVERY: [&str; 9] =
    ["/.well-known/openid-configuration", "/api", "/apis", "/healthz", "/livez", "/openapi", "/openid/v1/jwks", "/readyz", "/version"];
/// What nobody but the cluster's own administrators needs; resource, verb.
const NEVER: [(&str, &str); 12] = [
    ("pods/exec", ""),
    ("pods/attach", ""),
    ("pods/portforward", ""),
    ("pods/ephemeralcontainers", ""),
    ("nodes/proxy", ""),
    ("serviceaccounts/token", ""),
    ("certificatesigningrequests", ""),
    ("", "bind"),
    ("", "escalate"),
    ("", "impersonate"),
    ("clusterroles", ""),
    ("clusterrolebindings", ""),
];

/// Role and account of the broker.
const BROKER: &str = "mayfly-broker";

/// The token of the runners' account is in no pod; whoever makes one can do nothing with it.
#[tokio::test(flavor = "multi_thread")]
async fn the_runners_account_may_do_nothing() -> Result<()> {
    let stage = Stage::set("account").await?;
    stage.pool(|_| {}).await?;
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": stage.namespace}});
    let account = format!("--as=system:serviceaccount:{}:{RUNNER_SERVICE_ACCOUNT}", stage.namespace);
    let of_namespace = format!("--as-group=system:serviceaccounts:{}", stage.namespace);
    let mut kubectl = stage.world.cluster.kubectl();
    kubectl.args(["create", "--validate=false", "-f", "-", "-o", "json", &account, &of_namespace]);
    kubectl.args(["--as-group=system:serviceaccounts", "--as-group=system:authenticated"]);
    let answer: Value = serde_json::from_str(&feed(&mut kubectl, &review.to_string())?)?;
    let rules = |kind: &str| answer["status"][kind].as_array().cloned().unwrap_or_default();
    ensure!(!rules("nonResourceRules").is_empty(), "the review tells nothing: {answer}");
    for rule in rules("resourceRules") {
        let resources = words(&rule["resources"]);
        ensure!(resources.iter().all(|resource| REVIEWS.contains(&resource.as_str())), "a runner's account may more: {rule}");
    }
    for rule in rules("nonResourceRules") {
        let known = |url: &String| {
            DISCOVERY.iter().any(|known| url.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        };
        ensure!(words(&rule["nonResourceURLs"]).iter().all(known), "a runner's account may read more: {rule}");
        ensure!(words(&rule["verbs"]) == BTreeSet::from(["get".to_owned()]), "{rule}");
    }
    stage.strike().await
}

/// A stolen one, bound to a living pod, opens nothing at the API server.
#[tokio::test(flavor = "multi_thread")]
async fn the_gates_token_is_none_for_the_api_server() -> Result<()> {
    let stage = Stage::set("stolen").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    stage.push("app", &[("ci.yml", &workflow("push", "sleep 600"))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(mayfly_crds::names::ANNOTATION_JOB)).await?;
    let token = |audience: &[&str]| -> Result<String> {
        let mut create = stage.world.cluster.kubectl();
        create.args(["-n", &stage.namespace, "create", "token", RUNNER_SERVICE_ACCOUNT, "--bound-object-kind=Pod"]);
        create.args([format!("--bound-object-name={}", pod.name_any()), format!("--bound-object-uid={}", pod.uid().unwrap_or_default())]);
        Ok(output(create.args(audience))?.trim().to_owned())
    };
    let known = Api::<ConfigMap>::namespaced(stage.world.client.clone(), &stage.namespace).get("kube-root-ca.crt").await?;
    let known = known.data.unwrap_or_default().remove("ca.crt").context("the cluster's authority")?;
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(RootCerts::Specific(Arc::new(vec![Certificate::from_pem(known.as_bytes())?])))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .build();
    let agent = ureq::Agent::config_builder().tls_config(tls).http_status_as_error(false).build().new_agent();
    let url = format!("{}/apis/authorization.k8s.io", stage.world.cluster.layout().addresses().api_url());
    let ask =
        |token: &str| -> Result<u16> { Ok(agent.get(&url).header("Authorization", format!("Bearer {token}")).call()?.status().as_u16()) };
    assert_eq!(ask(&token(&[])?)?, 200, "the same account with a token for the API server is let in");
    assert_eq!(ask(&token(&[&format!("--audience={GATE_AUDIENCE}")])?)?, 401, "the gate's token");
    stage.strike().await
}

/// Over the chart as it is rendered, for the operator and for people.
#[tokio::test(flavor = "multi_thread")]
async fn no_role_of_the_chart_is_wider_than_it_must_be() -> Result<()> {
    let _turn = turn().await;
    let world = World::connect().await?;
    let mut helm = install::helm_command(&world.cluster)?;
    helm.args(["template", "mayfly", "--namespace", SYSTEM]).arg(repository().join("charts/mayfly"));
    let rendered = output(&mut helm)?;
    let mut roles = 0;
    for document in rendered.split("\n---") {
        let object: Value = serde_saphyr::from_str(document).with_context(|| document.to_owned())?;
        let (kind, name) = (object["kind"].as_str().unwrap_or_default(), object["metadata"]["name"].as_str().unwrap_or_default());
        if kind == "ClusterRoleBinding" || kind == "RoleBinding" {
            // Whoever else is bound has what the operator has.
            let subjects = object["subjects"].as_array().context("subjects")?;
            let account = if object["roleRef"]["name"] == BROKER { BROKER } else { "mayfly-controller" };
            let own = |subject: &Value| subject["kind"] == "ServiceAccount" && subject["name"] == account && subject["namespace"] == SYSTEM;
            ensure!(subjects.len() == 1 && own(&subjects[0]), "{name} binds {subjects:?}");
        }
        if kind != "ClusterRole" && kind != "Role" {
            continue;
        }
        roles += 1;
        for rule in object["rules"].as_array().context("rules")? {
            let [groups, resources, verbs] = ["apiGroups", "resources", "verbs"].map(|field| words(&rule[field]));
            ensure!([&groups, &resources, &verbs].iter().all(|list| !list.is_empty() && !list.contains("*")), "{name}: {rule}");
            for (resource, verb) in NEVER {
                ensure!(!resources.contains(resource) && !verbs.contains(verb), "{name}: {rule}");
            }
            ensure!(kind == "Role" || !resources.contains("secrets"), "{name} reaches the Secrets of every namespace: {rule}");
            ensure!(!resources.iter().any(|resource| resource.starts_with("nodes/")), "{name}: {rule}");
            // The broker looks, and has tokens judged.
            let looks = verbs.iter().all(|verb| verb == "list" || verb == "watch") && !resources.contains("secrets");
            let judged = resources.len() == 1 && resources.contains("tokenreviews");
            ensure!(name != BROKER || looks || judged, "{name}: {rule}");
        }
    }
    ensure!(roles >= 4, "{roles} roles are in the chart");
    Ok(())
}

fn words(list: &Value) -> BTreeSet<String> {
    list.as_array().into_iter().flatten().filter_map(|word| word.as_str().map(str::to_owned)).collect()
}
