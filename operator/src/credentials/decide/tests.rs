//! Decisions: one that is yes, and every way to turn it into a no.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const NOW: i64 = 1_800_000_000;
const ISSUER: &str = "https://issuer.example";

/// Everything that a decision rests on, to be changed one thing at a time.
#[derive(Clone)]
struct Stage {
    claims: Claims,
    presenter: (String, String, String),
    pod: Option<PodFacts>,
    binding: Option<CredentialBinding>,
    lifetime: Option<u32>,
    scope: Option<String>,
    itself: bool,
    per_job_claim: bool,
    started: i64,
    alone: bool,
    now: i64,
}

fn claims(more: &[(&str, &str)]) -> Claims {
    let plain = [
        ("repository", "acme/web"),
        ("repository_id", "42"),
        ("repository_owner_id", "7"),
        ("ref", "refs/heads/main"),
        ("ref_protected", "true"),
        ("event_name", "push"),
        ("run_id", "900"),
        ("run_attempt", "1"),
        ("check_run_id", "31"),
        ("job_workflow_ref", "acme/web/.github/workflows/ci.yml@refs/heads/main"),
        ("runner_environment", "self-hosted"),
    ];
    Claims {
        issuer: ISSUER.to_owned(),
        audience: "deploy.example".to_owned(),
        subject: "repo:acme/web:ref:refs/heads/main".to_owned(),
        issued: NOW - 10,
        expires: NOW + 290,
        jti: Some("j-1".to_owned()),
        digest: [1; 32],
        all: plain.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).into())).collect(),
    }
}

fn binding(change: impl Fn(&mut Value)) -> CredentialBinding {
    let mut object = json!({
        "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding",
        "metadata": {"name": "deploy", "namespace": "ci", "uid": "b-uid", "generation": 3},
        "spec": {
            "pools": ["linux"], "token": {"issuer": ISSUER, "audience": "deploy.example"},
            "subject": {"claims": {"repository_id": {"exact": "42"}, "ref": {"exact": "refs/heads/main"}}},
            "provider": {"aws": {"roleArn": "arn:aws:iam::123456789012:role/ci", "region": "eu-central-1"}},
        },
    });
    change(&mut object);
    serde_json::from_value(object).expect("a binding")
}

fn stage() -> Stage {
    let job = json!({
        "repository": "acme/web", "repository_id": "42", "run_id": "900", "run_attempt": "1", "event_name": "push", "check_run_id": "31",
        "job_workflow_ref": "acme/web/.github/workflows/ci.yml@refs/heads/main",
    });
    Stage {
        claims: claims(&[]),
        presenter: ("ci".to_owned(), "linux-1".to_owned(), "uid-1".to_owned()),
        pod: Some(PodFacts {
            namespace: "ci".to_owned(),
            name: "linux-1".to_owned(),
            uid: "uid-1".to_owned(),
            pool: Some("linux".to_owned()),
            running: true,
            job_claims: Some(job.to_string()),
        }),
        binding: Some(binding(|_| {})),
        lifetime: None,
        scope: None,
        itself: false,
        per_job_claim: true,
        started: NOW - 3600,
        alone: false,
        now: NOW,
    }
}

impl Stage {
    fn ask(&self, replay: &mut Replay) -> Result<Grant, Denial> {
        let question = Question {
            token: &self.claims,
            presenter: Presenter { namespace: &self.presenter.0, name: &self.presenter.1, uid: &self.presenter.2 },
            pod: self.pod.as_ref(),
            binding: self.binding.as_ref(),
            lifetime: self.lifetime,
            scope: self.scope.as_deref(),
            itself: self.itself,
            per_job_claim: self.per_job_claim,
            started: self.started,
            alone: self.alone,
            now: self.now,
        };
        decide(&question, replay)
    }

    fn alone(&self) -> Result<Grant, Denial> {
        self.ask(&mut Replay::new(100))
    }

    fn pod(&mut self) -> &mut PodFacts {
        self.pod.as_mut().expect("a pod")
    }

    /// Changes what the controller wrote about the job.
    fn job(&mut self, change: impl Fn(&mut Value)) {
        let mut job: Value = serde_json::from_str(self.pod().job_claims.as_deref().expect("a job")).expect("JSON");
        change(&mut job);
        self.pod().job_claims = Some(job.to_string());
    }
}

#[test]
fn the_pod_that_runs_the_job_gets_what_the_binding_says() {
    let grant = stage().alone().expect("granted");
    assert_eq!((grant.binding_uid.as_str(), grant.generation, grant.lifetime), ("b-uid", 3, 3600));
    assert!(grant.per_job && !grant.again);
    assert_eq!(grant.matched, ["ref", "repository_id"]);
}

/// The check that fails, what the caller is told, whether it is an alarm, and what was changed.
type Row = (Check, Public, bool, &'static str, fn(&mut Stage));

#[test]
fn every_way_to_no() {
    use Check::{Audience, Binding, Claims, Job, Pod, Replay};
    use Public::{InvalidClient, InvalidTarget, TemporarilyUnavailable};
    let rows: [Row; 35] = [
        (Pod, InvalidClient, false, "no pod", |s| s.pod = None),
        (Pod, InvalidClient, false, "recreated under the same name", |s| s.pod().uid = "uid-2".to_owned()),
        (Pod, InvalidClient, false, "no UID at all", |s| (s.pod().uid, s.presenter.2) = (String::new(), String::new())),
        (Pod, InvalidClient, false, "another pod's token", |s| s.presenter.1 = "linux-2".to_owned()),
        (Pod, InvalidClient, false, "another namespace's token", |s| s.presenter.0 = "other".to_owned()),
        (Pod, InvalidClient, false, "completed or deleted", |s| s.pod().running = false),
        (Pod, InvalidClient, false, "of no pool", |s| s.pod().pool = None),
        (Job, TemporarilyUnavailable, false, "the job is not known yet", |s| s.pod().job_claims = None),
        (Job, InvalidTarget, false, "nonsense", |s| s.pod().job_claims = Some("x".to_owned())),
        (Job, InvalidTarget, false, "a name twice", |s| {
            s.pod().job_claims = Some(r#"{"repository_id":"1","repository_id":"42","run_id":"900"}"#.to_owned());
        }),
        (Job, InvalidTarget, false, "nothing", |s| s.pod().job_claims = Some("{}".to_owned())),
        (Job, InvalidTarget, false, "too long", |s| s.pod().job_claims = Some(" ".repeat(20_000))),
        (Job, InvalidTarget, false, "no repository_id", |s| s.job(|j| drop(j.as_object_mut().map(|j| j.remove("repository_id"))))),
        (Job, InvalidTarget, false, "no run_id", |s| s.job(|j| drop(j.as_object_mut().map(|j| j.remove("run_id"))))),
        (Job, InvalidTarget, false, "a number that is no text", |s| s.job(|j| j["run_id"] = json!(900))),
        (Job, InvalidTarget, false, "an empty value", |s| s.job(|j| j["run_id"] = json!(""))),
        (Job, InvalidTarget, true, "another run", |s| s.job(|j| j["run_id"] = json!("901"))),
        (Job, InvalidTarget, true, "another attempt", |s| s.job(|j| j["run_attempt"] = json!("2"))),
        (Job, InvalidTarget, true, "another job of the run", |s| s.job(|j| j["check_run_id"] = json!("32"))),
        (Job, InvalidTarget, true, "a repository that was made anew", |s| s.job(|j| j["repository_id"] = json!("43"))),
        (Job, InvalidTarget, true, "a claim the token lacks", |s| drop(s.claims.all.remove("event_name"))),
        (Job, InvalidTarget, false, "which job of its run, the token does not say", |s| drop(s.claims.all.remove("check_run_id"))),
        (Job, InvalidTarget, true, "a hosted runner's token", |s| {
            drop(s.claims.all.insert("runner_environment".to_owned(), "github-hosted".into()));
        }),
        (Binding, InvalidTarget, false, "no binding", |s| s.binding = None),
        (Binding, InvalidTarget, false, "being deleted", |s| {
            s.binding = Some(binding(|b| b["metadata"]["deletionTimestamp"] = json!("2026-11-22T00:00:00Z")));
        }),
        (Binding, InvalidTarget, false, "another pool", |s| s.binding = Some(binding(|b| b["spec"]["pools"] = json!(["other"])))),
        (Binding, InvalidTarget, false, "a shape that admission refuses", |s| {
            s.binding = Some(binding(|b| b["spec"]["subject"]["claims"] = json!({"ref": {"exact": "refs/heads/main"}})));
        }),
        (Audience, InvalidTarget, false, "another issuer", |s| s.claims.issuer = "https://issuer.example/".to_owned()),
        (Audience, InvalidTarget, false, "another audience", |s| s.claims.audience = "other.example".to_owned()),
        (Claims, InvalidTarget, false, "another branch", |s| drop(s.claims.all.insert("ref".to_owned(), "refs/heads/x".into()))),
        (Claims, InvalidTarget, false, "no event", |s| {
            s.claims.all.remove("event_name");
            s.job(|j| drop(j.as_object_mut().map(|j| j.remove("event_name"))));
        }),
        (Claims, InvalidTarget, false, "an event that was not named", |s| {
            s.claims.all.insert("event_name".to_owned(), "pull_request".into());
            s.job(|j| j["event_name"] = json!("pull_request"));
        }),
        (Claims, InvalidTarget, false, "an event that nobody may name", |s| {
            s.claims.all.insert("event_name".to_owned(), "pull_request_target".into());
            s.job(|j| j["event_name"] = json!("pull_request_target"));
        }),
        (Replay, InvalidTarget, false, "no claim of this job alone, and other replicas", |s| {
            s.job(|j| drop(j.as_object_mut().map(|j| j.remove("check_run_id"))));
        }),
        (Replay, TemporarilyUnavailable, false, "no claim of this job alone, and older than the memory", |s| {
            s.job(|j| drop(j.as_object_mut().map(|j| j.remove("check_run_id"))));
            (s.alone, s.started) = (true, s.claims.issued - 29);
        }),
    ];
    for (check, public, alarm, what, change) in rows {
        let mut changed = stage();
        change(&mut changed);
        let denial = changed.alone().expect_err(what);
        assert_eq!((denial.check, denial.public, denial.alarm), (check, public, alarm), "{what}: {}", denial.reason);
    }
}

#[test]
fn a_token_is_its_first_pods_for_one_binding() {
    let mut replay = Replay::new(100);
    let first = stage();
    assert!(!first.ask(&mut replay).expect("granted").again);
    assert!(first.ask(&mut replay).expect("granted again").again);
    let mut elsewhere = first.clone();
    elsewhere.binding = Some(binding(|b| b["metadata"]["uid"] = json!("b-uid-2")));
    assert_eq!(elsewhere.ask(&mut replay).expect_err("another binding").check, Check::Replay);
    let mut thief = first;
    (thief.pod().name, thief.pod().uid) = ("linux-2".to_owned(), "uid-2".to_owned());
    thief.presenter = ("ci".to_owned(), "linux-2".to_owned(), "uid-2".to_owned());
    let denial = thief.ask(&mut replay).expect_err("another pod");
    assert!(denial.alarm && denial.check == Check::Replay);
}

#[test]
fn a_refused_token_is_not_spent() {
    let mut replay = Replay::new(100);
    let mut wrong = stage();
    wrong.claims.audience = "other.example".to_owned();
    assert!(wrong.ask(&mut replay).is_err());
    assert_eq!(replay.len(), 0);
}

#[test]
fn without_a_claim_of_the_job_alone_the_memory_has_to_be_all_there_is() {
    let mut one = stage();
    one.job(|job| drop(job.as_object_mut().map(|job| job.remove("check_run_id"))));
    (one.alone, one.started) = (true, one.claims.issued - LEEWAY);
    assert!(!one.alone().expect("granted").per_job);
}

#[test]
fn a_token_without_its_job_is_taken_of_an_issuer_whose_tokens_never_have_it_and_once() {
    let mut one = stage();
    one.claims.all.remove("check_run_id");
    let denial = one.alone().expect_err("the issuer's tokens say which job they are of");
    assert_eq!((denial.check, denial.alarm), (Check::Job, false));
    one.per_job_claim = false;
    assert_eq!(one.alone().expect_err("there may be another broker").check, Check::Replay);
    (one.alone, one.started) = (true, one.claims.issued - LEEWAY);
    let mut replay = Replay::new(100);
    assert!(!one.ask(&mut replay).expect("granted").per_job);
    // Another job of the same run: nothing but having been first tells the two apart.
    let mut other = stage();
    (other.claims, other.alone, other.started, other.per_job_claim) = (one.claims.clone(), true, one.started, false);
    other.presenter = ("ci".to_owned(), "linux-2".to_owned(), "uid-2".to_owned());
    (other.pod().name, other.pod().uid) = ("linux-2".to_owned(), "uid-2".to_owned());
    other.job(|job| job["check_run_id"] = json!("32"));
    let denial = other.ask(&mut replay).expect_err("it is spent");
    assert_eq!((denial.check, denial.alarm), (Check::Replay, true));
    // One that says which job it is of is held to it all the same.
    let mut named = stage();
    (named.per_job_claim, named.alone, named.started) = (false, true, one.started);
    named.job(|job| job["check_run_id"] = json!("32"));
    assert_eq!(named.alone().expect_err("another job's").check, Check::Job);
}

#[test]
fn nobody_gets_more_life_than_the_binding_says() {
    let life = |asked: Option<u32>, duration: Option<u32>| {
        let mut one = stage();
        one.lifetime = asked;
        one.binding = Some(binding(|b| {
            if let Some(duration) = duration {
                b["spec"]["provider"]["aws"]["durationSeconds"] = json!(duration);
            }
        }));
        one.alone().expect("granted").lifetime
    };
    assert_eq!((life(None, None), life(Some(900), None), life(Some(40_000), None)), (3600, 900, 3600));
    assert_eq!((life(None, Some(1200)), life(Some(900), Some(1200)), life(Some(40_000), Some(1200))), (1200, 900, 1200));
}

#[test]
fn no_reason_quotes_the_token_or_the_binding_to_the_caller() {
    // The caller gets `Public`, which has no text of its own; the names are the ones the wire uses.
    let all = [Public::InvalidRequest, Public::InvalidTarget, Public::InvalidClient, Public::TemporarilyUnavailable, Public::AccessDenied];
    let names: Vec<String> = all.iter().map(|public| serde_json::to_string(public).expect("JSON")).collect();
    assert_eq!(names.join(" "), r#""invalid_request" "invalid_target" "invalid_client" "temporarily_unavailable" "access_denied""#);
}

proptest! {
    /// Whatever token comes: where it is of another repository, another run or another audience, there is no credential.
    #[test]
    fn no_token_of_another_job_ever_passes(
        name in prop::sample::select(vec!["repository_id", "run_id", "run_attempt", "check_run_id", "job_workflow_ref", "repository", "event_name"]),
        value in "\\PC{0,12}",
    ) {
        let mut one = stage();
        prop_assume!(one.claims.get(name) != Some(value.as_str()));
        one.claims.all.insert(name.to_owned(), value.into());
        prop_assert!(one.alone().is_err());
    }

    #[test]
    fn only_the_binding_s_own_audience_passes(audience in "[a-z.:/]{0,20}") {
        let mut one = stage();
        one.claims.audience.clone_from(&audience);
        prop_assert_eq!(one.alone().is_ok(), audience == "deploy.example");
    }
}
