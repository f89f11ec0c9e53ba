//! What a binding tells of itself: whether it can be used at all. What became of exchanges is told by the broker's records.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mayfly_crds::conditions::{self, ISSUER_TRUSTED, READY, Verdict, reasons};
use mayfly_crds::{CredentialBinding, CredentialBindingStatus};

use super::broker::Guarded;

/// The new status of a binding, where these issuers are trusted; `None` where nothing is new.
pub(crate) fn status(binding: &Guarded<CredentialBinding>, trusted: &[String], now: &Time) -> Option<CredentialBindingStatus> {
    let (metadata, old, verdicts) = match &binding.0 {
        Ok(binding) => (&binding.metadata, binding.status.clone().unwrap_or_default(), verdicts(binding, trusted)),
        Err(invalid) => {
            let why = format!("the object cannot be read: {}", invalid.error);
            (&invalid.metadata, CredentialBindingStatus::default(), vec![Verdict::no(READY, reasons::INVALID, why)])
        }
    };
    let conditions = conditions::merge(&old.conditions, &verdicts, metadata.generation, now);
    let new = CredentialBindingStatus { observed_generation: metadata.generation, conditions };
    (new != old).then_some(new)
}

fn verdicts(binding: &CredentialBinding, trusted: &[String]) -> Vec<Verdict> {
    let issuer = &binding.spec.token.issuer;
    let known = trusted.contains(issuer);
    let untrusted = || {
        let names = trusted.join(", ");
        format!("{issuer} is not among the issuers that this cluster trusts ({names}): whoever installs Mayfly sets broker.issuers")
    };
    let trust = match known {
        true => Verdict::yes(ISSUER_TRUSTED, reasons::OK, "the issuer is in the operator's configuration"),
        false => Verdict::no(ISSUER_TRUSTED, reasons::ISSUER_NOT_TRUSTED, untrusted()),
    };
    let ready = match binding.spec.check() {
        Err(fault) => Verdict::no(READY, reasons::INVALID, fault.to_string()),
        Ok(()) if !known => Verdict::no(READY, reasons::ISSUER_NOT_TRUSTED, untrusted()),
        Ok(()) => Verdict::yes(READY, reasons::OK, "jobs can use the binding"),
    };
    vec![ready, trust]
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

    fn told(binding: &Guarded<CredentialBinding>) -> Vec<String> {
        let status = status(binding, &["https://issuer.example".to_owned()], &at(1)).expect("something new");
        assert_eq!(status.observed_generation, Some(3));
        status.conditions.iter().map(|told| format!("{} {} {}", told.type_, told.status, told.reason)).collect()
    }

    #[test]
    fn a_binding_tells_whether_it_can_be_used() {
        assert_eq!(told(&binding(|_| {})), ["IssuerTrusted True AsExpected", "Ready True AsExpected"]);
        let foreign = binding(|binding| binding["spec"]["token"]["issuer"] = json!("https://issuer.example/"));
        assert_eq!(told(&foreign), ["IssuerTrusted False IssuerNotTrusted", "Ready False IssuerNotTrusted"]);
        let unsound = binding(|binding| binding["spec"]["subject"]["claims"] = json!({}));
        assert_eq!(told(&unsound), ["IssuerTrusted True AsExpected", "Ready False InvalidSpec"]);
        assert_eq!(told(&binding(|binding| binding["spec"]["pools"] = json!(7))), ["Ready False InvalidSpec"]);
    }

    #[test]
    fn what_is_told_already_is_not_written_again() {
        let trusted = ["https://issuer.example".to_owned()];
        let mut told = binding(|_| {});
        let first = status(&told, &trusted, &at(1)).expect("something new");
        if let Ok(binding) = &mut told.0 {
            binding.status = Some(first);
        }
        assert_eq!(status(&told, &trusted, &at(2)), None);
        assert!(status(&told, &[], &at(2)).is_some(), "the configuration changed");
    }
}
