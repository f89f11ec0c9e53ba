//! What a binding tells of itself: whether it can be used at all. What became of exchanges is told by the broker's records.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mayfly_crds::conditions::{self, ISSUER_TRUSTED, JOB_BOUND, KEY_PROTECTED, READY, Verdict, reasons};
use mayfly_crds::{Chosen, CredentialBinding, CredentialBindingStatus};

use super::broker::Guarded;
use super::issuers::IssuerConfig;
use super::providers::AppConfig;

/// What the broker was told, of which bindings tell.
#[derive(Clone, Debug, Default)]
pub(crate) struct Configured {
    /// Issuers that it trusts.
    pub(crate) issuers: Vec<IssuerConfig>,
    /// GitHub Apps that it can sign for.
    pub(crate) apps: Vec<AppConfig>,
}

/// The new status of a binding, where the broker knows this; `None` where nothing is new.
pub(crate) fn status(binding: &Guarded<CredentialBinding>, known: &Configured, now: &Time) -> Option<CredentialBindingStatus> {
    let (metadata, old, verdicts, identity) = match &binding.0 {
        Ok(binding) => {
            let identity = binding.spec.provider.chosen().map(|chosen| chosen.identity());
            (&binding.metadata, binding.status.clone().unwrap_or_default(), verdicts(binding, known), identity)
        }
        Err(invalid) => {
            let why = format!("the object cannot be read: {}", invalid.error);
            (&invalid.metadata, CredentialBindingStatus::default(), vec![Verdict::no(READY, reasons::INVALID, why)], None)
        }
    };
    let conditions = conditions::merge(&old.conditions, &verdicts, metadata.generation, now);
    let new = CredentialBindingStatus { observed_generation: metadata.generation, identity, conditions };
    (new != old).then_some(new)
}

fn verdicts(binding: &CredentialBinding, known: &Configured) -> Vec<Verdict> {
    let (trusted, apps) = (&known.issuers, &known.apps);
    let issuer = &binding.spec.token.issuer;
    let known = trusted.iter().find(|known| known.issuer == *issuer);
    let is_trusted = known.is_some();
    let untrusted = || {
        let names: Vec<&str> = trusted.iter().map(|known| known.issuer.as_str()).collect();
        let names = names.join(", ");
        format!("{issuer} is not among the issuers that this cluster trusts ({names}): whoever installs Mayfly sets broker.issuers")
    };
    let trust = match is_trusted {
        true => Verdict::yes(ISSUER_TRUSTED, reasons::OK, "the issuer is in the operator's configuration"),
        false => Verdict::no(ISSUER_TRUSTED, reasons::ISSUER_NOT_TRUSTED, untrusted()),
    };
    let bound = known.map(|known| match known.per_job_claim {
        true => Verdict::yes(JOB_BOUND, reasons::OK, "the issuer's tokens say which job of their run they are of"),
        false => Verdict::no(
            JOB_BOUND,
            reasons::NO_JOB_CLAIM,
            "the issuer's tokens do not say which job of their run they are of: each is good for the pod that shows it first, and for none \
             where the broker has more than one replica",
        ),
    });
    let app = match binding.spec.provider.chosen() {
        Some(Chosen::GithubApp(app)) => Some((app, apps.iter().find(|known| known.client_id == app.client_id))),
        _ => None,
    };
    let ready = match binding.spec.check() {
        Err(fault) => Verdict::no(READY, reasons::INVALID, fault.to_string()),
        Ok(()) if !is_trusted => Verdict::no(READY, reasons::ISSUER_NOT_TRUSTED, untrusted()),
        Ok(()) => match app {
            Some((app, None)) => {
                let why =
                    format!("the broker cannot sign for the GitHub App {}: whoever installs Mayfly sets broker.githubApps", app.client_id);
                Verdict::no(READY, reasons::APP_NOT_CONFIGURED, why)
            }
            _ => Verdict::yes(READY, reasons::OK, "jobs can use the binding"),
        },
    };
    let key = app.and_then(|(_, known)| known).map(|known| match known.key_is_protected() {
        true => Verdict::yes(KEY_PROTECTED, reasons::OK, "the App's private key does not leave Vault"),
        false => Verdict::no(
            KEY_PROTECTED,
            reasons::KEY_IN_SECRET,
            "the App's private key, which outlives every job, is in a Secret of the operator's namespace: Vault's transit engine could keep it",
        ),
    });
    [ready, trust].into_iter().chain(bound).chain(key).collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).expect("a time"))
    }

    fn binding(change: impl Fn(&mut Value)) -> Guarded<CredentialBinding> {
        let mut binding = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding", "metadata": {"name": "deploy", "namespace": "ci", "generation": 3},
            "spec": {
                "pools": ["linux"], "token": {"issuer": "https://issuer.example", "audience": "deploy.example"}, "lifetimeSeconds": 900,
                "subject": {"claims": {"repository_id": {"exact": "42"}}}, "provider": {"audienceToken": {}},
            },
        });
        change(&mut binding);
        serde_json::from_value(binding).expect("a binding")
    }

    fn known(apps: &str) -> Configured {
        let issuers = "- issuer: https://issuer.example\n- {issuer: https://ghes.example/_services/token, perJobClaim: false}\n";
        Configured { issuers: IssuerConfig::read_all(issuers).expect("issuers"), apps: AppConfig::read_all(apps).expect("apps") }
    }

    fn told(binding: &Guarded<CredentialBinding>) -> Vec<String> {
        told_knowing("[]", binding)
    }

    fn told_knowing(apps: &str, binding: &Guarded<CredentialBinding>) -> Vec<String> {
        let status = status(binding, &known(apps), &at(1)).expect("something new");
        assert_eq!(status.observed_generation, Some(3));
        assert_eq!(status.identity.is_some(), binding.0.is_ok());
        status.conditions.iter().map(|told| format!("{} {} {}", told.type_, told.status, told.reason)).collect()
    }

    #[test]
    fn a_binding_tells_whether_it_can_be_used() {
        let [trusted, bound, ready] = ["IssuerTrusted True AsExpected", "JobBound True AsExpected", "Ready True AsExpected"];
        assert_eq!(told(&binding(|_| {})), [trusted, bound, ready]);
        let server = binding(|binding| binding["spec"]["token"]["issuer"] = json!("https://ghes.example/_services/token"));
        assert_eq!(told(&server), [trusted, "JobBound False NoJobClaim", ready]);
        let foreign = binding(|binding| binding["spec"]["token"]["issuer"] = json!("https://issuer.example/"));
        assert_eq!(told(&foreign), ["IssuerTrusted False IssuerNotTrusted", "Ready False IssuerNotTrusted"]);
        let unsound = binding(|binding| binding["spec"]["subject"]["claims"] = json!({}));
        assert_eq!(told(&unsound), [trusted, bound, "Ready False InvalidSpec"]);
        assert_eq!(told(&binding(|binding| binding["spec"]["pools"] = json!(7))), ["Ready False InvalidSpec"]);
    }

    #[test]
    fn a_binding_for_a_github_app_tells_where_its_key_is() {
        let provider = json!({"githubApp": {
            "clientId": "Iv1.a", "installationId": 7, "repositories": ["web"], "permissions": {"contents": "read"}}});
        let binding = binding(|binding| {
            binding["spec"]["provider"] = provider.clone();
            binding["spec"]["lifetimeSeconds"] = json!(3600);
        });
        let [trusted, bound] = ["IssuerTrusted True AsExpected", "JobBound True AsExpected"];
        assert_eq!(told(&binding), [trusted, bound, "Ready False AppNotConfigured"]);
        let with = |key: &str| told_knowing(&format!("- {{clientId: Iv1.a, {key}}}"), &binding);
        assert_eq!(with("keyFile: /k"), [trusted, bound, "KeyProtected False KeyInSecret", "Ready True AsExpected"]);
        let transit = "vaultTransit: {address: https://vault.example, key: app, tokenFile: /t}";
        assert_eq!(with(transit), [trusted, bound, "KeyProtected True AsExpected", "Ready True AsExpected"]);
    }

    #[test]
    fn what_is_told_already_is_not_written_again() {
        let known = known("[]");
        let mut told = binding(|_| {});
        let first = status(&told, &known, &at(1)).expect("something new");
        if let Ok(binding) = &mut told.0 {
            binding.status = Some(first);
        }
        assert_eq!(status(&told, &known, &at(2)), None);
        assert!(status(&told, &Configured::default(), &at(2)).is_some(), "the configuration changed");
    }
}
