//! May this pod have this credential? One pure function: an ordered chain of small checks, each with a name, a reason for the binding's
//! owner, and one of a few public codes for the caller, who learns nothing of the binding.

use mayfly_crds::{Chosen, Claim, CredentialBinding};
use serde::{Deserialize, Serialize};

use super::json::{Texts, texts};
use super::matchers::{may_fit, mismatch};
use super::replay::{Replay, Spent};
use super::token::{Claims, LEEWAY};

/// Claims that the record of a pod's job has to have: without them anything of the repository would fit.
const NEEDED: [&str; 2] = ["repository_id", "run_id"];
/// The claim that tells one job of a run from the others.
const PER_JOB: &str = "check_run_id";
/// Longest record of a job, in bytes.
const MAX_JOB_CLAIMS: usize = 16 << 10;

/// The checks, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Check {
    /// The request itself is sound.
    Request,
    /// The pod's own token is good.
    PodToken,
    /// The workflow's token is one of a trusted issuer's.
    Token,
    /// The pod is a living runner pod of a pool.
    Pod,
    /// The token is about the job that the pod runs.
    Job,
    /// The binding exists, is sound, and is for the pod's pool.
    Binding,
    /// The token is by the binding's issuer for the binding's audience.
    Audience,
    /// The claims are those the binding asks for.
    Claims,
    /// Nobody else showed the token.
    Replay,
    /// The cloud gave a credential.
    Provider,
    /// What happened was written down.
    Audit,
}

/// What a caller is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Public {
    /// The request, or one of its tokens, is not acceptable (RFC 8693, section 2.2.2).
    InvalidRequest,
    /// Another grant type than token exchange.
    UnsupportedGrantType,
    /// A scope was asked for that the binding does not have.
    InvalidScope,
    /// The caller is no living runner pod.
    InvalidClient,
    /// There is no such binding for this job. Whether there is one at all is not told.
    InvalidTarget,
    /// The provider refuses.
    AccessDenied,
    /// Try again in a moment, with a new token.
    TemporarilyUnavailable,
}

/// Why nothing is given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Denial {
    /// The check that failed.
    pub(crate) check: Check,
    /// Why, for the binding's owner. Holds no secret.
    pub(crate) reason: String,
    /// What the caller is told.
    pub(crate) public: Public,
    /// It looks like theft rather than a mistake.
    pub(crate) alarm: bool,
}

impl Denial {
    /// A denial that is no alarm.
    pub(crate) fn new(check: Check, public: Public, reason: impl Into<String>) -> Self {
        Self { check, reason: reason.into(), public, alarm: false }
    }

    fn alarm(check: Check, public: Public, reason: impl Into<String>) -> Self {
        Self { alarm: true, ..Self::new(check, public, reason) }
    }
}

/// The pod that calls, as the watch knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodFacts {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    /// The pool of its label, where a RunnerPool of that name owns it.
    pub(crate) pool: Option<String>,
    /// It runs, is not being deleted, and its runner has not ended.
    pub(crate) running: bool,
    /// The annotation with what the token of its job has to say.
    pub(crate) job_claims: Option<String>,
}

/// Who asks, by the token that Kubernetes gave the pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Presenter<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    pub(crate) uid: &'a str,
}

/// Everything a decision rests on, but for the tokens spent so far.
#[derive(Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) token: &'a Claims,
    pub(crate) presenter: Presenter<'a>,
    pub(crate) pod: Option<&'a PodFacts>,
    /// The binding of the name asked for, in the pod's namespace.
    pub(crate) binding: Option<&'a CredentialBinding>,
    /// Longest life the caller wants, in seconds.
    pub(crate) lifetime: Option<u32>,
    /// The scopes that the caller wants, with spaces between them.
    pub(crate) scope: Option<&'a str>,
    /// The caller wants the token itself.
    pub(crate) itself: bool,
    /// The issuer's tokens say which job of their run they are of.
    pub(crate) per_job_claim: bool,
    /// When this process began to remember spent tokens.
    pub(crate) started: i64,
    /// No other process gives out credentials: what is remembered here is all there is.
    pub(crate) alone: bool,
    pub(crate) now: i64,
}

/// What may be given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Grant {
    /// UID of the binding.
    pub(crate) binding_uid: String,
    /// Its generation, by which the decision was made.
    pub(crate) generation: i64,
    /// Longest life of the credential, in seconds.
    pub(crate) lifetime: u32,
    /// Scopes of the credential, where the provider has such.
    pub(crate) scopes: Vec<String>,
    /// What is given is the token itself.
    pub(crate) itself: bool,
    /// Claims that had to fit, by name.
    pub(crate) matched: Vec<String>,
    /// The same pod asked for the same before.
    pub(crate) again: bool,
    /// The token is bound to this one job of its run by a claim, not only by having been shown here first.
    pub(crate) per_job: bool,
}

/// Decides, and spends the token where the answer is yes.
pub(crate) fn decide(question: &Question<'_>, replay: &mut Replay) -> Result<Grant, Denial> {
    let (pod, pool) = living_pod(question.presenter, question.pod)?;
    let mut job = job_claims(pod)?;
    let unsaid = question.token.get(PER_JOB).is_none() && job.remove(PER_JOB).is_some();
    same_job(question.token, &job)?;
    if unsaid && question.per_job_claim {
        let reason =
            "the token does not say which job of its run it is of (check_run_id); an issuer whose tokens never do is configured so";
        return Err(Denial::new(Check::Job, Public::InvalidTarget, reason));
    }
    let binding = sound_binding(question.binding, pool)?;
    for_this_binding(question.token, binding)?;
    if let Some(claim) = mismatch(&binding.spec, question.token) {
        let reason = format!("the claim {claim} is not what the binding asks for");
        return Err(Denial::new(Check::Claims, Public::InvalidTarget, reason));
    }
    let scopes = scopes(question, binding)?;
    let per_job = job.contains_key(PER_JOB);
    if !per_job {
        remembered(question)?;
    }
    let binding_uid = binding.metadata.uid.clone().unwrap_or_default();
    let again = spend(question, pod, &binding_uid, replay)?;
    Ok(Grant {
        binding_uid,
        generation: binding.metadata.generation.unwrap_or_default(),
        lifetime: lifetime(question.lifetime, binding),
        scopes,
        itself: question.itself,
        matched: binding.spec.subject.claims.keys().cloned().collect(),
        again,
        per_job,
    })
}

/// The bindings that the job of this pod may use, as far as can be said before its token is seen; those that some job of
/// its pool may use where `any_job`. Decides nothing.
pub(crate) fn offers<'a>(
    presenter: Presenter<'_>,
    pod: Option<&PodFacts>,
    bindings: impl Iterator<Item = &'a CredentialBinding>,
    any_job: bool,
) -> Result<Vec<&'a CredentialBinding>, Denial> {
    let (pod, pool) = living_pod(presenter, pod)?;
    let mut sound: Vec<_> = bindings.filter(|binding| sound_binding(Some(binding), pool).is_ok()).collect();
    // For a pool without bindings nobody asks the forge which job it is.
    if !sound.is_empty() && !any_job {
        let job = job_claims(pod)?;
        sound.retain(|binding| may_fit(&binding.spec, &job));
    }
    Ok(sound)
}

pub(super) fn living_pod<'a>(presenter: Presenter<'_>, pod: Option<&'a PodFacts>) -> Result<(&'a PodFacts, &'a str), Denial> {
    let refuse = |reason: &str| Denial::new(Check::Pod, Public::InvalidClient, reason);
    let pod = pod.ok_or_else(|| refuse("no runner pod of this name is known"))?;
    if pod.uid != presenter.uid || pod.uid.is_empty() {
        return Err(refuse("the pod's token is of an earlier pod of that name"));
    }
    if pod.namespace != presenter.namespace || pod.name != presenter.name {
        return Err(refuse("the pod's token is another pod's"));
    }
    if !pod.running {
        return Err(refuse("the pod does not run, or not any more"));
    }
    let pool = pod.pool.as_deref().ok_or_else(|| refuse("the pod is of no RunnerPool"))?;
    Ok((pod, pool))
}

/// What the controller wrote down about the pod's job.
pub(super) fn job_claims(pod: &PodFacts) -> Result<Texts<'_>, Denial> {
    let wait = |reason: &str| Denial::new(Check::Job, Public::TemporarilyUnavailable, reason);
    let refuse = |reason: &str| Denial::new(Check::Job, Public::InvalidTarget, reason);
    let text = pod.job_claims.as_deref().ok_or_else(|| wait("it is not known yet which job the pod runs"))?;
    if text.len() > MAX_JOB_CLAIMS {
        return Err(refuse("the record of the pod's job is too long"));
    }
    let claims = texts(text.as_bytes()).map_err(|_| refuse("the record of the pod's job cannot be read"))?;
    if claims.values().any(|value| value.is_empty()) {
        return Err(refuse("the record of the pod's job has an empty value"));
    }
    match NEEDED.iter().find(|name| !claims.contains_key(**name)) {
        Some(name) => Err(refuse(&format!("the record of the pod's job lacks {name}"))),
        None => Ok(claims),
    }
}

fn same_job(token: &Claims, job: &Texts<'_>) -> Result<(), Denial> {
    let alarm = |reason: String| Denial::alarm(Check::Job, Public::InvalidTarget, reason);
    if let Some((name, _)) = job.iter().find(|(name, value)| token.get(name) != Some(&**value)) {
        return Err(alarm(format!("the token is another job's: its claim {name} is not that of the job in this pod")));
    }
    match token.get(Claim::RunnerEnvironment.as_str()) {
        None | Some("self-hosted") => Ok(()),
        Some(_) => Err(alarm("the token is of a job on another kind of runner".to_owned())),
    }
}

fn sound_binding<'a>(binding: Option<&'a CredentialBinding>, pool: &str) -> Result<&'a CredentialBinding, Denial> {
    let refuse = |reason: String| Denial::new(Check::Binding, Public::InvalidTarget, reason);
    let binding = binding.ok_or_else(|| refuse("the pod's namespace has no such binding, or it cannot be read".to_owned()))?;
    if binding.metadata.deletion_timestamp.is_some() || binding.metadata.uid.as_ref().is_none_or(String::is_empty) {
        return Err(refuse("the binding is being deleted".to_owned()));
    }
    binding.spec.check().map_err(|fault| refuse(format!("the binding is not used: {fault}")))?;
    match binding.spec.pools.iter().any(|name| name == pool) {
        true => Ok(binding),
        false => Err(refuse("the binding is not for the pod's pool".to_owned())),
    }
}

fn for_this_binding(token: &Claims, binding: &CredentialBinding) -> Result<(), Denial> {
    let refuse = |reason: &str| Denial::new(Check::Audience, Public::InvalidTarget, reason);
    if token.issuer != binding.spec.token.issuer {
        return Err(refuse("the token is by another issuer"));
    }
    if token.audience != binding.spec.token.audience {
        return Err(refuse("the token is for another audience"));
    }
    Ok(())
}

/// Where no claim tells the jobs of a run apart, a token is worth what the memory of spent ones is worth: it has to be all there is, and
/// to go back to before the token was made. Clocks may be apart, so that a token from about the start counts as older.
fn remembered(question: &Question<'_>) -> Result<(), Denial> {
    if !question.alone {
        let reason = "the forge tells nothing that only this job has, so that its tokens are taken only where the broker has one replica";
        return Err(Denial::new(Check::Replay, Public::InvalidTarget, reason));
    }
    match question.token.issued < question.started + LEEWAY {
        true => Err(Denial::new(Check::Replay, Public::TemporarilyUnavailable, "the token may have been spent before the broker started")),
        false => Ok(()),
    }
}

fn spend(question: &Question<'_>, pod: &PodFacts, binding: &str, replay: &mut Replay) -> Result<bool, Denial> {
    match replay.spend(question.token.spent_as(), &pod.uid, binding, question.token.expires, question.now) {
        Spent::First => Ok(false),
        Spent::Again => Ok(true),
        Spent::ElsewhereBound => {
            Err(Denial::new(Check::Replay, Public::InvalidRequest, "the token was spent for another binding: each needs its own"))
        }
        Spent::ByAnother => Err(Denial::alarm(Check::Replay, Public::InvalidRequest, "another pod showed the same token before")),
        Spent::Full => Err(Denial::new(Check::Replay, Public::TemporarilyUnavailable, "more tokens are remembered than there is room for")),
    }
}

/// What the caller may ask a provider with scopes for: no more than the binding has. Azure's are asked for one at a time.
fn scopes(question: &Question<'_>, binding: &CredentialBinding) -> Result<Vec<String>, Denial> {
    let refuse = |reason: &str| Denial::new(Check::Binding, Public::InvalidScope, reason);
    let chosen = binding.spec.provider.chosen();
    let all = chosen.as_ref().map_or(&[][..], Chosen::scopes);
    let Some(wanted) = question.scope else {
        let first = if matches!(chosen, Some(Chosen::Azure(_))) { 1 } else { all.len() };
        return Ok(all.iter().take(first).filter(|_| !question.itself).cloned().collect());
    };
    let wanted: Vec<String> = wanted.split(' ').map(str::to_owned).collect();
    if question.itself || wanted.iter().any(|scope| !all.contains(scope)) {
        return Err(refuse("a scope is asked for that is not one of the binding's"));
    }
    match (chosen, wanted.len()) {
        (Some(Chosen::Azure(_)), 2..) => Err(refuse("more than one scope is asked for, and Azure gives a token for one")),
        _ => Ok(wanted),
    }
}

/// The shortest of what binding, provider and caller say.
fn lifetime(asked: Option<u32>, binding: &CredentialBinding) -> u32 {
    let aws = binding.spec.provider.aws.as_ref().and_then(|aws| aws.duration_seconds);
    asked.into_iter().chain(aws).fold(binding.spec.lifetime_seconds, u32::min)
}

#[cfg(test)]
mod tests;
