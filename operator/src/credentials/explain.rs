//! Why a job gets a credential or does not, for people: what the broker will look at, as far as the cluster tells. Decides nothing.

use std::fmt::Write as _;

use mayfly_crds::{Chosen, Claim, CredentialBinding, CredentialBindingSpec, DEFAULT_EVENTS, Matcher, NEVER_EVENTS};

use super::decide::{PodFacts, Presenter, Public, job_claims, living_pod};
use super::json::Texts;
use super::matchers::fits;

/// Whether one thing is as the binding asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    /// Only the job's token says.
    Open,
}

/// One thing that the broker looks at.
struct Row {
    what: String,
    answer: Answer,
    why: String,
}

/// A binding as it stands, and each of these pods against it.
pub(crate) fn explain(binding: &CredentialBinding, pods: &[PodFacts]) -> String {
    let spec = &binding.spec;
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let mut text = format!("CredentialBinding {}/{}\n", name(&binding.metadata.namespace), name(&binding.metadata.name));
    let mut about =
        vec![("pools", spec.pools.join(", ")), ("issuer", spec.token.issuer.clone()), ("audience", spec.token.audience.clone())];
    about.push(("gives", gives(spec)));
    let conditions = binding.status.iter().flat_map(|status| &status.conditions).filter(|told| told.status != "True");
    about.extend(conditions.map(|told| ("not ready", format!("{}: {}", told.reason, told.message))));
    about.extend(spec.check().err().map(|fault| ("not used", fault.to_string())));
    for (what, value) in about {
        let _ = writeln!(text, "  {what:<22}{value}");
    }
    if pods.is_empty() {
        text.push_str("\nNo pod of these pools runs.\n");
    }
    for pod in pods {
        let rows = rows(spec, pod);
        let _ = writeln!(text, "\npod {}/{}", pod.namespace, pod.name);
        for Row { what, answer, why } in &rows {
            let word = match answer {
                Answer::Yes => "yes",
                Answer::No => "NO",
                Answer::Open => "?",
            };
            let _ = writeln!(text, "  {what:<22}{word:<5}{why}");
        }
        let wrong: Vec<&str> = rows.iter().filter(|row| row.answer == Answer::No).map(|row| row.what.as_str()).collect();
        let open = rows.iter().any(|row| row.answer == Answer::Open);
        let end = match (wrong.as_slice(), open || spec.check().is_err()) {
            ([], false) => "its job gets the credential, for a token of this issuer and audience".to_owned(),
            ([], true) => "nothing speaks against it yet".to_owned(),
            (wrong, _) => format!("its job gets nothing: {}", wrong.join(", ")),
        };
        let _ = writeln!(text, "  => {end}");
    }
    text
}

fn gives(spec: &CredentialBindingSpec) -> String {
    let Some(chosen) = spec.provider.chosen() else { return "nothing: it names no provider, or more than one".to_owned() };
    let what = match chosen {
        Chosen::AudienceToken => return chosen.identity(),
        Chosen::Aws(_) => "a session",
        Chosen::Google(_) | Chosen::Azure(_) => "an access token",
        Chosen::Vault(_) | Chosen::GithubApp(_) => "a token",
    };
    format!("{what} of {} for {} s at most", chosen.identity(), spec.lifetime_seconds)
}

fn rows(spec: &CredentialBindingSpec, pod: &PodFacts) -> Vec<Row> {
    let row = |what: &str, answer: Answer, why: String| Row { what: what.to_owned(), answer, why };
    let itself = Presenter { namespace: &pod.namespace, name: &pod.name, uid: &pod.uid };
    let mut rows = Vec::new();
    match living_pod(itself, Some(pod)) {
        Ok((_, pool)) if spec.pools.iter().any(|name| name == pool) => rows.push(row("pool", Answer::Yes, pool.to_owned())),
        Ok((_, pool)) => rows.push(row("pool", Answer::No, format!("{pool} is not one of the binding's pools"))),
        Err(denial) => rows.push(row("pod", Answer::No, denial.reason)),
    }
    match job_claims(pod) {
        Ok(known) => rows.extend(claims(spec, &known)),
        Err(denial) if denial.public == Public::TemporarilyUnavailable => rows.push(row("job", Answer::Open, denial.reason)),
        Err(denial) => rows.push(row("job", Answer::No, denial.reason)),
    }
    rows
}

fn claims(spec: &CredentialBindingSpec, known: &Texts<'_>) -> Vec<Row> {
    let mut rows: Vec<Row> =
        spec.subject.claims.iter().map(|(name, matcher)| claim(name, matcher, known.get(name.as_str()).map(AsRef::as_ref))).collect();
    let event = Claim::EventName.as_str();
    if !spec.subject.claims.contains_key(event) {
        let taken = DEFAULT_EVENTS.join(", ");
        rows.push(match known.get(event).map(AsRef::as_ref) {
            Some(value) if DEFAULT_EVENTS.contains(&value) => Row { what: event.to_owned(), answer: Answer::Yes, why: value.to_owned() },
            Some(value) if NEVER_EVENTS.contains(&value) => {
                Row { what: event.to_owned(), answer: Answer::No, why: format!("{value} is never taken") }
            }
            Some(value) => {
                Row { what: event.to_owned(), answer: Answer::No, why: format!("{value}; a binding that names no event takes {taken}") }
            }
            None => Row { what: event.to_owned(), answer: Answer::Open, why: format!("only the job's token says; taken are {taken}") },
        });
    }
    rows
}

fn claim(name: &str, matcher: &Matcher, value: Option<&str>) -> Row {
    let wanted = match matcher {
        Matcher { exact: Some(exact), .. } => exact.clone(),
        Matcher { one_of: Some(list), .. } => format!("one of {}", list.join(", ")),
        Matcher { prefix_segments: Some(prefix), .. } => format!("{prefix}/..."),
        _ => "nothing".to_owned(),
    };
    let (answer, why) = match value {
        Some(value) if fits(matcher, value) => (Answer::Yes, value.to_owned()),
        Some(value) => (Answer::No, format!("{value}; the binding asks for {wanted}")),
        None => (Answer::Open, format!("only the job's token says; the binding asks for {wanted}")),
    };
    Row { what: name.to_owned(), answer, why }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn binding(change: impl Fn(&mut Value)) -> CredentialBinding {
        let mut binding = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding", "metadata": {"name": "deploy", "namespace": "ci"},
            "spec": {
                "pools": ["linux"], "token": {"issuer": "https://issuer.example", "audience": "deploy.example"}, "lifetimeSeconds": 900,
                "subject": {"claims": {"repository_id": {"exact": "42"}, "ref": {"prefixSegments": "refs/heads/release"}}},
                "provider": {"audienceToken": {}},
            },
        });
        change(&mut binding);
        serde_json::from_value(binding).expect("a binding")
    }

    fn pod(job: Value) -> PodFacts {
        let text = |text: &str| text.to_owned();
        let job_claims = (!job.is_null()).then(|| job.to_string());
        PodFacts { namespace: text("ci"), name: text("linux-1"), uid: text("u"), pool: Some(text("linux")), running: true, job_claims }
    }

    /// The answers about one pod, and the end.
    fn told(binding: &CredentialBinding, pod: &PodFacts) -> (Vec<String>, String) {
        let text = explain(binding, std::slice::from_ref(pod));
        let (_, about) = text.split_once("\npod ci/linux-1\n").expect("the pod");
        let (rows, end) = about.split_once("  => ").expect("an end");
        let row = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        (rows.lines().map(row).collect(), end.trim().to_owned())
    }

    fn job(git_ref: &str, event: &str) -> Value {
        json!({"repository_id": "42", "run_id": "900", "ref": git_ref, "event_name": event})
    }

    #[test]
    fn what_fits_and_what_does_not_is_told_by_name() {
        let (rows, end) = told(&binding(|_| {}), &pod(job("refs/heads/release/1", "push")));
        assert_eq!(rows, ["pool yes", "ref yes", "repository_id yes", "event_name yes"]);
        assert!(end.starts_with("its job gets the credential"), "{end}");
        let (rows, end) = told(&binding(|_| {}), &pod(job("refs/heads/main", "pull_request")));
        assert_eq!(rows, ["pool yes", "ref NO", "repository_id yes", "event_name NO"]);
        assert_eq!(end, "its job gets nothing: ref, event_name");
    }

    #[test]
    fn what_only_the_token_says_is_open() {
        let asked = binding(|binding| binding["spec"]["subject"]["claims"]["environment"] = json!({"exact": "production"}));
        let (rows, end) = told(&asked, &pod(json!({"repository_id": "42", "run_id": "900", "ref": "refs/heads/release/1"})));
        assert_eq!(rows, ["pool yes", "environment ?", "ref yes", "repository_id yes", "event_name ?"]);
        assert_eq!(end, "nothing speaks against it yet");
        let (rows, end) = told(&binding(|_| {}), &pod(Value::Null));
        assert_eq!((rows, end.as_str()), (vec!["pool yes".to_owned(), "job ?".to_owned()], "nothing speaks against it yet"));
    }

    #[test]
    fn a_pod_that_is_over_or_of_another_pool_and_a_binding_that_is_not_used_are_told() {
        let fine = || job("refs/heads/release/1", "push");
        let (rows, _) = told(&binding(|_| {}), &PodFacts { running: false, ..pod(fine()) });
        assert_eq!(rows[0], "pod NO");
        let (rows, _) = told(&binding(|_| {}), &PodFacts { pool: Some("other".to_owned()), ..pod(fine()) });
        assert_eq!(rows[0], "pool NO");
        let unsound = binding(|binding| binding["spec"]["subject"]["claims"] = json!({"ref": {"exact": "refs/heads/main"}}));
        assert!(explain(&unsound, &[]).contains("not used              no repository"), "{}", explain(&unsound, &[]));
        assert!(explain(&unsound, &[]).ends_with("No pod of these pools runs.\n"));
    }
}
