//! Bad input gets a clear error at the earliest place that can see it.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hmac::{Hmac, Mac};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{CustomResourceExt, ResourceExt};
use mayfly_crds::names::{ANNOTATION_FORGE, ANNOTATION_POOL_NAMESPACES};
use mayfly_crds::{CredentialBinding, RunnerPool};
use mayfly_e2e::install::webhook_url;
use mayfly_e2e::pool;
use mayfly_e2e::stage::{self, PATIENCE, POOL, Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use mayfly_e2e::{World, forge::Organization};
use serde_json::{Value, json};
use sha2::Sha256;

/// What is changed in a good pool, how, and what the API server says to it; an empty answer means that it is taken.
type Case = (&'static str, fn(&mut Value), &'static str);

fn cases() -> Vec<Case> {
    fn gitea(pool: &mut Value) -> &mut Value {
        &mut pool["spec"]["forge"]["gitea"]
    }
    vec![
        ("nothing changed", |_| {}, ""),
        ("no forge", |p| p["spec"]["forge"] = json!({}), "name exactly one forge"),
        ("two forges", |p| p["spec"]["forge"]["github"] = json!({"url": "https://github.com/acme"}), "name exactly one forge"),
        (
            "github without a credential",
            |p| p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme"}}),
            "exactly one credential",
        ),
        ("github", |p| p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"}}}), ""),
        ("Mayfly's tokens", |p| p["spec"]["jobIdentity"] = json!({"issuer": "Mayfly"}), ""),
        (
            "Mayfly's tokens beside GitHub's",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"}}});
                p["spec"]["jobIdentity"] = json!({"issuer": "Mayfly"});
            },
            "jobIdentity.issuer: Mayfly is for forges",
        ),
        ("an unknown issuer", |p| p["spec"]["jobIdentity"] = json!({"issuer": "Somebody"}), "spec.jobIdentity.issuer"),
        (
            "github without an organization",
            |p| p["spec"]["forge"] = json!({"github": {"url": "https://github.com/", "tokenSecretRef": {"name": "t"}}}),
            "spec.forge.github.url",
        ),
        (
            "a scale set's name that is a query",
            |p| {
                p["spec"]["forge"] =
                    json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"}, "scaleSet": {"name": "a&b"}}})
            },
            "spec.forge.github.scaleSet.name",
        ),
        (
            "a repository whose workflows a group would have to select",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme/web/", "tokenSecretRef": {"name": "t"},
                    "runnerGroup": {"requireSelectedWorkflows": true}}})
            },
            "in no runner group",
        ),
        (
            "an enterprise whose group selects workflows",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/enterprises/big", "tokenSecretRef": {"name": "t"},
                    "runnerGroup": {"name": "g", "requireSelectedRepositories": true, "requireSelectedWorkflows": true}}})
            },
            "",
        ),
        (
            "without a scale set and without a webhook",
            |p| {
                p["spec"]["forge"] =
                    json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"}, "justInTime": {"labels": ["a"]}}})
            },
            "needs webhookSecretRef",
        ),
        (
            "with and without a scale set",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"},
                    "justInTime": {"labels": ["a"]}, "webhookSecretRef": {"name": "w"}, "scaleSet": {"labels": ["b"]}}})
            },
            "at most one of justInTime and scaleSet",
        ),
        (
            "without a scale set and without labels",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"},
                    "justInTime": {"labels": []}, "webhookSecretRef": {"name": "w"}}})
            },
            "spec.forge.github.justInTime.labels",
        ),
        (
            "a restriction without the group that has it",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"},
                    "justInTime": {"labels": ["a"]}, "webhookSecretRef": {"name": "w"}, "runnerGroup": {"requireSelectedWorkflows": true}}})
            },
            "without runnerGroup.name",
        ),
        (
            "without a scale set",
            |p| {
                p["spec"]["forge"] = json!({"github": {"url": "https://github.com/acme", "tokenSecretRef": {"name": "t"},
                    "justInTime": {"labels": ["self-hosted", "a"]}, "webhookSecretRef": {"name": "w"}}})
            },
            "",
        ),
        ("no scope", |p| gitea(p)["scope"] = json!({}), "name exactly one scope"),
        ("two scopes", |p| gitea(p)["scope"]["instance"] = json!({}), "name exactly one scope"),
        ("instance scope", |p| gitea(p)["scope"] = json!({"instance": {}}), ""),
        ("a repository that is a path", |p| gitea(p)["scope"] = json!({"repository": "a/b/../c"}), "spec.forge.gitea.scope.repository"),
        ("an organization with a newline", |p| gitea(p)["scope"] = json!({"organization": "a\nb"}), "spec.forge.gitea.scope.organization"),
        ("a url with a password", |p| gitea(p)["url"] = json!("https://u:p@git.example"), "spec.forge.gitea.url"),
        ("a url of another kind", |p| gitea(p)["url"] = json!("file:///etc"), "spec.forge.gitea.url"),
        ("no labels", |p| gitea(p)["labels"] = json!([]), "spec.forge.gitea.labels"),
        ("a label with a colon", |p| gitea(p)["labels"] = json!(["linux:docker"]), "spec.forge.gitea.labels"),
        ("a label with a quote", |p| gitea(p)["labels"] = json!(["li'nux"]), "spec.forge.gitea.labels"),
        ("a label of 64 characters", |p| gitea(p)["labels"] = json!(["l".repeat(64)]), "spec.forge.gitea.labels"),
        ("a label of 63 characters", |p| gitea(p)["labels"] = json!(["l".repeat(63)]), ""),
        ("a max of 0", |p| p["spec"]["scale"] = json!({"max": 0}), "spec.scale.max"),
        ("a max of 1001", |p| p["spec"]["scale"] = json!({"max": 1001}), "spec.scale.max"),
        ("a max of 1", |p| p["spec"]["scale"] = json!({"max": 1}), ""),
        ("more warm than max", |p| p["spec"]["scale"] = json!({"max": 1, "warm": 2}), "scale.warm cannot be more than scale.max"),
        ("a negative warm", |p| p["spec"]["scale"] = json!({"warm": -1}), "spec.scale.warm"),
        ("a deadline that is no time", |p| p["spec"]["deadlines"] = json!({"job": "soon"}), "spec.deadlines.job"),
        ("a deadline in parts", |p| p["spec"]["deadlines"] = json!({"job": "1h30m"}), ""),
        (
            "a range that is none",
            |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "10.0.0.300/8", "ports": [443]}]}}),
            "not an address range",
        ),
        (
            "a range without ports",
            |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "203.0.113.0/24", "ports": []}]}}),
            "ports",
        ),
        ("port 0", |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "203.0.113.0/24", "ports": [0]}]}}), "ports"),
        (
            "a range with metadata endpoints in it",
            |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "169.254.0.0/16", "ports": [80]}]}}),
            "metadata endpoint",
        ),
        (
            "everything",
            |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "0.0.0.0/0", "ports": [443]}]}}),
            "metadata endpoint",
        ),
        (
            "a range of IPv6 with metadata endpoints in it",
            |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "fd00:ec2::/32", "ports": [80]}]}}),
            "metadata endpoint",
        ),
        (
            "ranges beside metadata endpoints",
            |p| {
                let ports = [80];
                let allow = ["169.254.170.24/29", "fd00:ec3::/32"].map(|cidr| json!({"cidr": cidr, "ports": ports}));
                p["spec"]["isolation"] = json!({"egress": {"allow": allow}});
            },
            "",
        ),
        ("a range with ports", |p| p["spec"]["isolation"] = json!({"egress": {"allow": [{"cidr": "2001:db8::/48", "ports": [443]}]}}), ""),
        (
            "a host that is everything",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "*", "ports": [443]}]}}),
            "not a host name",
        ),
        (
            "a star before a whole domain",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "*.org", "ports": [443]}]}}),
            "not a host name",
        ),
        (
            "a star in the middle",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "a.*.example.org", "ports": [443]}]}}),
            "not a host name",
        ),
        (
            "a host that is an address",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "192.0.2.1", "ports": [443]}]}}),
            "not a host name",
        ),
        (
            "a host of IPv6",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "2001:db8::1", "ports": [443]}]}}),
            "not a host name",
        ),
        (
            "a host with a newline",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "a.example.org\nb", "ports": [443]}]}}),
            "not a host name",
        ),
        ("a host", |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "registry.example.org", "ports": [443]}]}}), ""),
        (
            "names one label below",
            |p| p["spec"]["isolation"] = json!({"egress": {"hosts": [{"host": "*.example.org", "ports": [443]}]}}),
            "",
        ),
        ("an image with a space", |p| p["spec"]["runner"]["image"] = json!("busybox; rm -rf /"), "spec.runner.image"),
        ("a variable of ours", |p| p["spec"]["runner"]["env"] = json!([{"name": "MAYFLY_REGISTRATION", "value": "x"}]), "Mayfly's own"),
        ("a variable with an equals sign", |p| p["spec"]["runner"]["env"] = json!([{"name": "A=B", "value": "x"}]), "spec.runner.env"),
        ("a variable", |p| p["spec"]["runner"]["env"] = json!([{"name": "A", "value": "b"}]), ""),
        ("an unknown fork rule", |p| p["spec"]["jobs"] = json!({"forks": "Maybe"}), "spec.jobs.forks"),
        ("an event with a space", |p| p["spec"]["jobs"] = json!({"events": ["pull request"]}), "spec.jobs.events"),
        ("a name of 41 characters", |p| p["metadata"]["name"] = json!("n".repeat(41)), "at most 40 characters"),
        ("a name of 40 characters", |p| p["metadata"]["name"] = json!("n".repeat(40)), ""),
        ("a name with a dot", |p| p["metadata"]["name"] = json!("ci.linux"), "no dots"),
        ("no secret name", |p| gitea(p)["tokenSecretRef"] = json!({"key": "token"}), "tokenSecretRef.name"),
        ("a pod field that is none of ours", |p| p["spec"]["runner"]["hostNetwork"] = json!(true), "field not declared"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_tells_good_pools_from_bad_ones() -> Result<()> {
    let _turn = stage::turn().await;
    let world = World::connect().await?;
    let organization = Organization { name: "acme".to_owned(), robot: String::new(), token: String::new(), webhook_secret: String::new() };
    for (what, change, says) in cases() {
        let manifest = pool::manifest(&world, "default", POOL, &organization, change);
        let result = pool::validate::<RunnerPool>(&world, &manifest).await?;
        match (says, result) {
            ("", Ok(())) => {}
            ("", Err(why)) => anyhow::bail!("{what}: refused: {why}"),
            (says, Ok(())) => anyhow::bail!("{what}: taken, and {says:?} was expected"),
            (says, Err(why)) => ensure!(why.contains(says), "{what}: {why}"),
        }
    }
    Ok(())
}

/// The same of bindings. What must never be is refused by the broker's own rules as well, in case that the API server's were off.
fn binding_cases() -> Vec<(bool, Case)> {
    fn claims(binding: &mut Value) -> &mut Value {
        &mut binding["spec"]["subject"]["claims"]
    }
    fn aws(binding: &mut Value) -> &mut Value {
        &mut binding["spec"]["provider"]["aws"]
    }
    let by_both: Vec<Case> = vec![
        ("no pool", |b| b["spec"]["pools"] = json!([]), "spec.pools"),
        ("no claims", |b| *claims(b) = json!({}), "spec.subject.claims"),
        ("no repository", |b| *claims(b) = json!({"ref": {"exact": "refs/heads/main"}}), "no repository"),
        ("an owner alone", |b| *claims(b) = json!({"repository_owner_id": {"exact": "7"}}), "no repository"),
        ("a repository by its name alone", |b| *claims(b) = json!({"repository": {"exact": "acme/web"}}), "names can be taken over"),
        (
            "a repository and an owner's name",
            |b| *claims(b) = json!({"repository": {"exact": "acme/web"}, "repository_owner": {"exact": "acme"}}),
            "names can be taken over",
        ),
        ("a claim that nobody knows", |b| claims(b)["sub"] = json!({"exact": "repo:acme/web:ref:refs/heads/main"}), "does not know"),
        ("every value", |b| claims(b)["ref"] = json!({"exact": "*"}), "spec.subject.claims"),
        ("a wildcard in a value", |b| claims(b)["ref"] = json!({"exact": "refs/heads/release-*"}), "spec.subject.claims"),
        ("a wildcard in a list", |b| claims(b)["ref"] = json!({"oneOf": ["refs/heads/main", "refs/heads/?"]}), "spec.subject.claims"),
        ("a newline in a value", |b| claims(b)["ref"] = json!({"exact": "refs/heads/main\n"}), "spec.subject.claims"),
        ("an empty value", |b| claims(b)["ref"] = json!({"exact": ""}), "spec.subject.claims"),
        ("an empty list", |b| claims(b)["ref"] = json!({"oneOf": []}), "spec.subject.claims"),
        ("a matcher that says nothing", |b| claims(b)["ref"] = json!({}), "exactly one of exact, oneOf and prefixSegments"),
        (
            "a matcher that says two things",
            |b| claims(b)["ref"] = json!({"exact": "a", "oneOf": ["a"]}),
            "exactly one of exact, oneOf and prefixSegments",
        ),
        ("an id that is a name", |b| claims(b)["repository_id"] = json!({"exact": "web"}), "are numbers"),
        ("an id among names", |b| claims(b)["actor_id"] = json!({"oneOf": ["7", "octocat"]}), "are numbers"),
        ("every branch", |b| claims(b)["ref"] = json!({"prefixSegments": "refs/heads"}), "every branch"),
        ("every ref", |b| claims(b)["ref"] = json!({"prefixSegments": "refs"}), "every branch"),
        ("a prefix of what is no path", |b| claims(b)["environment"] = json!({"prefixSegments": "prod"}), "claims that are paths"),
        ("a prefix with an empty segment", |b| claims(b)["repository"] = json!({"prefixSegments": "acme/"}), "spec.subject.claims"),
        ("an environment without an event", |b| claims(b)["environment"] = json!({"exact": "production"}), "name event_name as well"),
        ("pull_request_target", |b| claims(b)["event_name"] = json!({"exact": "pull_request_target"}), "whoever opened the pull request"),
        (
            "pull_request_target among others",
            |b| claims(b)["event_name"] = json!({"oneOf": ["push", "pull_request_target"]}),
            "whoever opened the pull request",
        ),
        (
            "an audience of GitHub's own",
            |b| b["spec"]["token"]["audience"] = json!("https://github.com/acme"),
            "a whole organization shares",
        ),
        ("an audience at GHE.com", |b| b["spec"]["token"]["audience"] = json!("https://acme.ghe.com/acme"), "a whole organization shares"),
        (
            "an audience at the issuer",
            |b| b["spec"]["token"]["audience"] = json!("https://issuer.example/acme"),
            "a whole organization shares",
        ),
        ("two providers", |b| b["spec"]["provider"]["vault"] = vault(), "exactly one provider"),
        ("no provider", |b| b["spec"]["provider"] = json!({}), "exactly one provider"),
        (
            "less life than GitHub gives",
            |b| {
                b["spec"]["provider"] = json!({"githubApp": github_app()});
                b["spec"]["lifetimeSeconds"] = json!(900);
            },
            "live 3600 seconds",
        ),
        (
            "all that an installation has",
            |b| {
                b["spec"]["provider"] = json!({"githubApp": github_app()});
                b["spec"]["provider"]["githubApp"]["repositories"] = json!([]);
            },
            "repositories",
        ),
        ("less life than Azure gives", |b| b["spec"]["provider"] = json!({"azure": azure()}), "up to 5400 seconds"),
        ("no audience", |b| b["spec"]["token"]["audience"] = json!(""), "spec.token.audience"),
        ("production by any branch", |b| b["spec"]["production"] = json!(true), "a binding for production"),
        (
            "production by an unprotected ref",
            |b| {
                b["spec"]["production"] = json!(true);
                claims(b)["ref_protected"] = json!({"exact": "false"})
            },
            "a binding for production",
        ),
        ("two providers", |b| b["spec"]["provider"]["audienceToken"] = json!({}), "exactly one provider"),
        ("no provider", |b| b["spec"]["provider"] = json!({}), "exactly one provider"),
        ("a life of a minute", |b| b["spec"]["lifetimeSeconds"] = json!(60), "spec.lifetimeSeconds"),
        ("a life of a day", |b| b["spec"]["lifetimeSeconds"] = json!(86_400), "spec.lifetimeSeconds"),
    ];
    let by_one: Vec<Case> = vec![
        ("nothing changed", |_| {}, ""),
        (
            "a prefix below an owner",
            |b| *claims(b) = json!({"repository": {"prefixSegments": "acme"}, "repository_owner_id": {"exact": "7"}}),
            "",
        ),
        (
            "production by a protected ref",
            |b| {
                b["spec"]["production"] = json!(true);
                claims(b)["ref_protected"] = json!({"exact": "true"})
            },
            "",
        ),
        (
            "production by an environment",
            |b| {
                b["spec"]["production"] = json!(true);
                claims(b)["environment"] = json!({"exact": "production"});
                claims(b)["event_name"] = json!({"exact": "push"})
            },
            "",
        ),
        ("the token itself", |b| b["spec"]["provider"] = json!({"audienceToken": {}}), ""),
        ("an STS of one's own", |b| aws(b)["endpoint"] = json!("https://sts.example:9000"), ""),
        ("an STS in plain text", |b| aws(b)["endpoint"] = json!("http://sts.example"), "spec.provider.aws.endpoint"),
        ("an STS with a path", |b| aws(b)["endpoint"] = json!("https://sts.example/x?y"), "spec.provider.aws.endpoint"),
        ("a role that is none", |b| aws(b)["roleArn"] = json!("arn:aws:iam::123456789012:user/x"), "spec.provider.aws.roleArn"),
        ("a region that is a host", |b| aws(b)["region"] = json!("evil.example/"), "spec.provider.aws.region"),
        ("Google", |b| b["spec"]["provider"] = json!({"google": google()}), ""),
        (
            "Google with a service account",
            |b| {
                b["spec"]["provider"] = json!({"google": google()});
                b["spec"]["provider"]["google"]["serviceAccount"] = json!("deploy@acme.iam.gserviceaccount.com");
            },
            "",
        ),
        (
            "a provider of another place",
            |b| {
                b["spec"]["provider"] = json!({"google": google()});
                b["spec"]["provider"]["google"]["workloadIdentityProvider"] = json!("projects/acme/providers/x");
            },
            "workloadIdentityProvider",
        ),
        (
            "a user for a service account",
            |b| {
                b["spec"]["provider"] = json!({"google": google()});
                b["spec"]["provider"]["google"]["serviceAccount"] = json!("me@gmail.com");
            },
            "serviceAccount",
        ),
        (
            "Azure",
            |b| {
                b["spec"]["provider"] = json!({"azure": azure()});
                b["spec"]["lifetimeSeconds"] = json!(5400);
            },
            "",
        ),
        (
            "a tenant that is a path",
            |b| {
                b["spec"]["provider"] = json!({"azure": azure()});
                b["spec"]["provider"]["azure"]["tenantId"] = json!("../common");
                b["spec"]["lifetimeSeconds"] = json!(5400);
            },
            "tenantId",
        ),
        ("Vault", |b| b["spec"]["provider"] = json!({"vault": vault()}), ""),
        ("a GitHub App", |b| b["spec"]["provider"] = json!({"githubApp": github_app()}), ""),
        (
            "a permission to everything",
            |b| {
                b["spec"]["provider"] = json!({"githubApp": github_app()});
                b["spec"]["provider"]["githubApp"]["permissions"] = json!({"*": "write"});
            },
            "permissions",
        ),
        (
            "a Vault in plain text",
            |b| b["spec"]["provider"] = json!({"vault": {"address": "http://vault.example", "role": "ci"}}),
            "spec.provider.vault.address",
        ),
        (
            "a mount that climbs",
            |b| {
                b["spec"]["provider"] = json!({"vault": vault()});
                b["spec"]["provider"]["vault"]["mount"] = json!("jwt/../token");
            },
            "spec.provider.vault.mount",
        ),
        ("a session longer than the binding's life", |b| aws(b)["durationSeconds"] = json!(7200), "durationSeconds cannot be more"),
        ("an issuer with a query", |b| b["spec"]["token"]["issuer"] = json!("https://issuer.example/?x"), "spec.token.issuer"),
        ("an issuer with a password", |b| b["spec"]["token"]["issuer"] = json!("https://u:p@issuer.example"), "spec.token.issuer"),
        ("a pool that is a path", |b| b["spec"]["pools"] = json!(["../other"]), "spec.pools"),
        ("a field that does not exist", |b| b["spec"]["policy"] = json!("*"), "policy"),
    ];
    by_both.into_iter().map(|case| (true, case)).chain(by_one.into_iter().map(|case| (false, case))).collect()
}

fn github_app() -> Value {
    json!({"clientId": "Iv1.a", "installationId": 7, "repositories": ["web"], "permissions": {"contents": "read"}})
}

fn google() -> Value {
    json!({"workloadIdentityProvider": "projects/1/locations/global/workloadIdentityPools/pool/providers/mayfly"})
}

fn azure() -> Value {
    let id = "00000000-1111-2222-3333-444444444444";
    json!({"tenantId": id, "clientId": id})
}

fn vault() -> Value {
    json!({"address": "https://vault.example:8200", "role": "ci"})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_tells_good_bindings_from_bad_ones() -> Result<()> {
    let _turn = stage::turn().await;
    let world = World::connect().await?;
    for (never, (what, change, says)) in binding_cases() {
        let mut binding = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding", "metadata": {"name": "deploy", "namespace": "default"},
            "spec": {
                "pools": ["linux"], "token": {"issuer": "https://issuer.example", "audience": "deploy.example"},
                "subject": {"claims": {"repository_id": {"exact": "42"}}},
                "provider": {"aws": {"roleArn": "arn:aws:iam::123456789012:role/deploy", "region": "eu-central-1"}},
            },
        });
        change(&mut binding);
        match (says, pool::validate::<CredentialBinding>(&world, &binding).await?) {
            ("", Ok(())) => {}
            ("", Err(why)) => anyhow::bail!("{what}: refused: {why}"),
            (says, Ok(())) => anyhow::bail!("{what}: taken, and {says:?} was expected"),
            (says, Err(why)) => ensure!(why.contains(says), "{what}: {why}"),
        }
        let read: CredentialBinding = serde_json::from_value(binding).with_context(|| what.to_owned())?;
        let sound = read.spec.check();
        let agreed = match never {
            true => sound.is_err(),
            false => sound.is_ok() || !says.is_empty(),
        };
        ensure!(agreed, "{what}: the broker's rules say {sound:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_written_past_validation_is_told_so_and_harms_nobody() -> Result<()> {
    let stage = Stage::set_alone("past").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let resource = ApiResource::erase::<RunnerPool>(&());
    let untyped: Api<DynamicObject> = Api::namespaced_with(stage.world.client.clone(), &stage.namespace, &resource);
    let malformed: DynamicObject = serde_json::from_value(json!({
        "apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": "past"},
        "spec": {"forge": {"gitea": "everything"}, "scale": {"max": "many"}},
    }))?;
    ensure!(untyped.create(&PostParams::default(), &malformed).await.is_err(), "the API server took it");
    let crds: Api<CustomResourceDefinition> = Api::all(stage.world.client.clone());
    let strict = crds.get(RunnerPool::crd_name()).await?;
    set_schema(&crds, &strict, json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})).await?;
    let written = eventually("the pool written past validation", PATIENCE, || async {
        Ok(Some(untyped.create(&PostParams::default(), &malformed).await?))
    })
    .await;
    let schema = strict.spec.versions.first().and_then(|version| version.schema.as_ref()?.open_api_v3_schema.clone());
    set_schema(&crds, &strict, serde_json::to_value(schema.context("the CRD's schema")?)?).await?;
    written?;

    // Its status can be written only as long as the rules are away; later an event tells.
    let events: Api<Event> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let told = eventually("the pool told what it is", PATIENCE, || async {
        let conditions = untyped.get("past").await?.data["status"]["conditions"].clone();
        let ready = conditions
            .as_array()
            .into_iter()
            .flatten()
            .find(|condition| condition["type"] == "Ready" && condition["reason"] == "InvalidSpec");
        let by_status = ready.and_then(|condition| condition["message"].as_str()).map(str::to_owned);
        let found = events.list(&ListParams::default()).await?;
        let by_event = found.items.into_iter().find(|event| event.reason.as_deref() == Some("InvalidSpec")).and_then(|event| event.note);
        Ok(by_status.or(by_event))
    })
    .await?;
    ensure!(told.starts_with("the object cannot be read: "), "{told}");
    // The other pool, read by the same watch, goes on.
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    // And it can be deleted like any other.
    untyped.delete("past", &DeleteParams::default()).await?;
    eventually("the malformed pool gone", PATIENCE, || async { Ok(untyped.get_opt("past").await?.is_none().then_some(())) }).await?;
    stage.strike().await
}

/// Gives the CRD another schema in the name of who owns it, so that its owner finds nothing of a stranger's in it.
async fn set_schema(crds: &Api<CustomResourceDefinition>, crd: &CustomResourceDefinition, schema: Value) -> Result<()> {
    let owner = crd.managed_fields().iter().find(|fields| fields.operation.as_deref() == Some("Apply"));
    let owner = owner.and_then(|fields| fields.manager.as_deref()).unwrap_or("helm");
    let mut changed = serde_json::to_value(crd)?;
    changed["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = schema;
    let wanted = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": crd.name_any(), "labels": crd.labels(), "annotations": crd.annotations()}, "spec": changed["spec"]});
    crds.patch(&crd.name_any(), &PatchParams::apply(owner).force(), &Patch::Apply(&wanted)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn url_and_scope_cannot_change() -> Result<()> {
    let stage = Stage::set("fixed").await?;
    stage.unready_pool(|_| {}).await?;
    let other = stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["url"] = json!("http://other.mayfly.test")).await;
    ensure!(other.is_err_and(|error| format!("{error:#}").contains("cannot be changed")));
    let other = stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["scope"] = json!({"organization": "other"})).await;
    ensure!(other.is_err_and(|error| format!("{error:#}").contains("cannot be changed")));
    stage.strike().await
}

/// What GitHub keeps for a scale set would be left behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_cannot_change_between_a_scale_set_and_none() -> Result<()> {
    let stage = Stage::set("jitfixed").await?;
    let github = |just_in_time: bool| {
        move |pool: &mut Value| {
            let mut github =
                json!({"url": "http://forge.mayfly.test/acme", "tokenSecretRef": {"name": "t"}, "webhookSecretRef": {"name": "w"}});
            if just_in_time {
                github["justInTime"] = json!({"labels": ["linux"]});
            }
            pool["spec"]["forge"] = json!({"github": github});
        }
    };
    stage.unready_pool(github(false)).await?;
    let other = stage.unready_pool(github(true)).await;
    ensure!(other.is_err_and(|error| format!("{error:#}").contains("cannot change between")));
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_forge_is_told() -> Result<()> {
    let stage = Stage::set("told").await?;
    let wrong = |pool: &mut Value, key: &str| pool["spec"]["forge"]["gitea"]["tokenSecretRef"]["key"] = json!(key);
    // A wrong token: the webhook secret is text, but no token.
    stage.unready_pool(|pool| wrong(pool, "webhook")).await?;
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "False").await?;
    ensure!(reason == "Unauthorized" && !message.contains(&stage.organization.webhook_secret), "{reason}: {message}");
    // It is mended by the right key.
    stage.pool(|_| {}).await?;
    stage.unready_pool(|pool| wrong(pool, "nothing")).await?;
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "SecretNotFound" && message.contains("nothing"), "{reason}: {message}");
    pool::delete(&stage.world, &stage.namespace, POOL).await?;

    let nobody = json!({"organization": "no-such-organization"});
    stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["scope"] = nobody).await?;
    let (reason, _) = pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "False").await?;
    assert_eq!(reason, "ScopeNotFound");
    pool::delete(&stage.world, &stage.namespace, POOL).await?;

    let nowhere = "http://forge.mayfly.test:3999";
    pool::meant_for(&stage.world, &stage.organization, nowhere).await?;
    stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["url"] = json!(nowhere)).await?;
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "False").await?;
    ensure!(reason == "Unreachable", "{reason}: {message}");
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_goes_to_its_own_forge_and_to_pools_of_its_own_namespaces_only() -> Result<()> {
    let mine = Stage::set("mine").await?;
    // A Secret as another team would have it: for its own namespace.
    let theirs = Organization { name: format!("{}-other", mine.organization.name), ..mine.organization.clone() };
    pool::secret(&mine.world, &theirs, "another-team").await?;
    // Another team's Secret, named by a pool of this namespace.
    let secret = format!("forge-{}", theirs.name);
    mine.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["tokenSecretRef"] = json!({"name": secret})).await?;
    let (reason, message) = pool::condition(&mine.world, &mine.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "SecretNotAllowed" && message.contains("mayfly.dev/pool-namespaces"), "{reason}: {message}");
    pool::delete(&mine.world, &mine.namespace, POOL).await?;
    // The own Secret, to be sent to somebody else's server.
    mine.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["url"] = json!("http://evil.mayfly.test")).await?;
    let (reason, message) = pool::condition(&mine.world, &mine.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "SecretNotAllowed" && message.contains("mayfly.dev/forge"), "{reason}: {message}");
    pool::delete(&mine.world, &mine.namespace, POOL).await?;
    // A Secret of the operator's own.
    mine.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["tokenSecretRef"] = json!({"name": "mayfly-gate-tls", "key": "tls.key"}))
        .await?;
    let (reason, _) = pool::condition(&mine.world, &mine.namespace, POOL, "Ready", "False").await?;
    assert_eq!(reason, "SecretNotAllowed");
    mine.strike().await
}

/// Neither by its address nor by a name that leads there is the operator's own node, or a metadata endpoint, taken for a forge: nothing
/// is sent there, no token above all.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_no_forges_is_never_asked() -> Result<()> {
    let stage = Stage::set("nowhere").await?;
    for (n, url) in ["http://169.254.169.254", "http://localhost:8081", "http://[::1]:8081"].into_iter().enumerate() {
        let name = format!("nowhere-{n}");
        let secret = format!("{}-{name}", stage.namespace);
        let api: Api<Secret> = Api::namespaced(stage.world.client.clone(), SYSTEM);
        let annotations = json!({ANNOTATION_FORGE: url, ANNOTATION_POOL_NAMESPACES: stage.namespace});
        let made = json!({"metadata": {"name": secret, "annotations": annotations}, "stringData": {"token": "t"}});
        api.create(&PostParams::default(), &serde_json::from_value(made)?).await?;
        let manifest = pool::manifest(&stage.world, &stage.namespace, &name, &stage.organization, |pool| {
            pool["spec"]["forge"]["gitea"] = json!({"url": url, "scope": {"organization": "any"}, "labels": ["linux"], "tokenSecretRef": {"name": secret, "key": "token"}});
        });
        pool::apply(&stage.world, &manifest).await?;
        let (reason, message) = pool::condition(&stage.world, &stage.namespace, &name, "ForgeReachable", "False").await?;
        ensure!(reason == "Unreachable" && message.contains("no job may reach it"), "{url}: {reason}: {message}");
        pool::delete(&stage.world, &stage.namespace, &name).await?;
        api.delete(&secret, &DeleteParams::default()).await?;
    }
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_are_taken_only_when_signed_and_a_replay_does_no_harm() -> Result<()> {
    let stage = Stage::set("hooks").await?;
    let pool = stage.pool(|_| {}).await?;
    let url = webhook_url(&stage.world.cluster, &stage.namespace, POOL)?;
    let elsewhere = webhook_url(&stage.world.cluster, &stage.namespace, "no-such-pool")?;
    let secret = stage.organization.webhook_secret.clone();
    let body =
        json!({"action": "completed", "workflow_job": {"id": 1}, "repository": {"full_name": format!("{}/app", stage.organization.name)}});
    let body = body.to_string().into_bytes();
    let good = sign(&secret, &body)?;

    assert_eq!(deliver(&url, None, &body)?, 401);
    assert_eq!(deliver(&url, Some("sha256=00"), &body)?, 401);
    assert_eq!(deliver(&url, Some(&sign("another secret", &body)?), &body)?, 401);
    assert_eq!(deliver(&url, Some(&sign("", &body)?), &body)?, 401);
    assert_eq!(deliver(&url, Some(&good), b"{}")?, 401);
    assert_eq!(deliver(&elsewhere, Some(&good), &body)?, 401);
    assert_eq!(deliver(&url, Some(&sign(&secret, b"not json")?), b"not json")?, 400);
    let hostile = json!({"repository": {"full_name": "../../etc/$(id)\n"}}).to_string().into_bytes();
    assert_eq!(deliver(&url, Some(&sign(&secret, &hostile)?), &hostile)?, 400);
    let huge = vec![b'a'; 10 << 20];
    assert_eq!(deliver(&url, Some(&sign(&secret, &huge)?), &huge)?, 413);
    for _ in 0..20 {
        assert_eq!(deliver(&url, Some(&good), &body)?, 202);
    }
    // Whoever says half a request, or promises a body that does not come, is not waited for.
    let half = "POST / HTTP/1.1\r\nHost: a\r\n";
    let promise = format!("POST {} HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{{", path_of(&url)?);
    for begun in [half, promise.as_str()] {
        let waited = dropped_after(&url, begun)?;
        ensure!(waited < Duration::from_secs(20), "{begun:?} was waited for: {waited:?}");
    }
    // A replayed "completed" of a job that runs: the forge is asked, and the job goes on.
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 5; echo whole"))], 1).await?;
    stage.job_is("app", jobs[0].id, "in_progress").await?;
    let lie = json!({"action": "completed", "workflow_job": {"id": jobs[0].id}, "repository": {"full_name": format!("{}/app", stage.organization.name)}});
    let lie = lie.to_string().into_bytes();
    assert_eq!(deliver(&url, Some(&sign(&secret, &lie)?), &lie)?, 202);
    let log = stage.succeeds("app", jobs[0].id).await?;
    ensure!(said(&log, "whole").is_some(), "{log}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

fn path_of(url: &str) -> Result<&str> {
    let (_, rest) = url.split_once("://").context("a URL")?;
    rest.find('/').map(|slash| &rest[slash..]).context("a path")
}

/// Sends the beginning of a request and waits until the server ends the connection.
fn dropped_after(url: &str, begun: &str) -> Result<Duration> {
    let (_, rest) = url.split_once("://").context("a URL")?;
    let host = rest.split('/').next().unwrap_or_default();
    let address = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(Duration::from_secs(30)))?;
    connection.write_all(begun.as_bytes())?;
    let began = Instant::now();
    std::io::copy(&mut connection, &mut std::io::sink())?;
    Ok(began.elapsed())
}

fn sign(secret: &str, body: &[u8]) -> Result<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())?;
    mac.update(body);
    let digest = mac.finalize().into_bytes();
    Ok(format!("sha256={}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
}

fn deliver(url: &str, signature: Option<&str>, body: &[u8]) -> Result<u16> {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let mut request = agent.post(url).header("X-GitHub-Event", "workflow_job");
    if let Some(signature) = signature {
        request = request.header("X-Hub-Signature-256", signature);
    }
    match request.send(body) {
        Ok(answer) => Ok(answer.status().as_u16()),
        // The server answers before it has read ten megabytes and closes; whoever still writes sees a broken pipe.
        Err(ureq::Error::Io(_)) if body.len() > (1 << 20) => Ok(413),
        Err(error) => Err(error.into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_names_do_no_harm() -> Result<()> {
    let stage = Stage::set("names").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let name = format!("'\"; $(touch /tmp/x) `id` ${{{{ 1 }}}} \n---\n{{{{a}}}}: [{}", "n".repeat(300));
    let text = json!({"name": name, "on": "push", "jobs": {"job": {"name": name, "runs-on": "linux", "steps": [{"name": name, "run": "echo fine"}]}}});
    let branch = "we'ird;$(id)&branch";
    stage.forge.create_repo(&stage.organization.name, "app.git-1_x", false)?;
    stage.forge.put_file(&stage.organization.name, "app.git-1_x", branch, ".gitea/workflows/ci.yml", text.to_string().as_bytes(), &name)?;
    let job = eventually("the job", PATIENCE, || async { Ok(stage.jobs("app.git-1_x")?.pop()) }).await?;
    let log = stage.succeeds("app.git-1_x", job.id).await?;
    ensure!(said(&log, "fine").is_some(), "{log}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
