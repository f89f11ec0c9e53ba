//! Condition types and reasons of Mayfly's resources, and how conditions are merged without needless writes.
//!
//! Conditions describe state, not phase (Kubernetes API conventions, "Typical status properties").

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The pool can run jobs.
pub const READY: &str = "Ready";
/// The forge answered the last time it was asked, and the pool's token is good for what the pool needs.
pub const FORGE_REACHABLE: &str = "ForgeReachable";
/// What no job may reach was tried from runner pods, and is closed to them.
pub const ISOLATION_PROVED: &str = "IsolationProved";
/// Runner pods run in a user namespace of their own.
pub const USER_NAMESPACES: &str = "UserNamespaces";
/// Another pool accepts jobs that this pool accepts as well.
pub const OVERLAPPING: &str = "Overlapping";

/// The network engine opens the host names of `isolation.egress.hosts`, and no others. Absent where there are none.
pub const EGRESS_HOSTS: &str = "EgressHostsEnforced";

/// At GitHub, the pool's runner group lets in no repositories and workflows that the pool refuses. Absent where the pool is in no group.
pub const RUNNER_GROUP: &str = "RunnerGroupMatches";

/// The ResourceQuotas of the namespace have room for the pods that the pool wants. Absent where none counts runner pods.
pub const QUOTA: &str = "QuotaSuffices";

/// Jobs get OIDC tokens of Mayfly's. Absent where the pool does not ask for that.
pub const JOB_IDENTITY: &str = "JobIdentity";

/// The binding's issuer is one of those in the operator's configuration.
pub const ISSUER_TRUSTED: &str = "IssuerTrusted";

/// Tokens of the binding's issuer say which job of their run they are of, so that no other job can use them. Absent where the issuer is
/// not trusted.
pub const JOB_BOUND: &str = "JobBound";

/// The key that the binding's credentials are signed with is where nobody can copy it.
pub const KEY_PROTECTED: &str = "KeyProtected";

/// Reasons, each used with one or more of the condition types.
pub mod reasons {
    /// All is as it should be.
    pub const OK: &str = "AsExpected";
    /// The object cannot be understood or breaks a rule; the message says which.
    pub const INVALID: &str = "InvalidSpec";
    /// The Secret or the key in it that the pool names does not exist in the operator's namespace.
    pub const SECRET_NOT_FOUND: &str = "SecretNotFound";
    /// The Secret does not allow its use for this forge or by pools of this namespace.
    pub const SECRET_NOT_ALLOWED: &str = "SecretNotAllowed";
    /// The pool's namespace could not be prepared (policies, ServiceAccount, the forge's address); the message says why.
    pub const NOT_PREPARED: &str = "NotPrepared";
    /// The forge cannot be reached.
    pub const UNREACHABLE: &str = "Unreachable";
    /// The forge refuses the pool's token, or the token lacks a permission.
    pub const UNAUTHORIZED: &str = "Unauthorized";
    /// The organization or repository does not exist, or the token may not see it.
    pub const SCOPE_NOT_FOUND: &str = "ScopeNotFound";
    /// At the forge, others may use the pool's runners than the pool says.
    pub const RUNNER_GROUP_TOO_OPEN: &str = "RunnerGroupTooOpen";
    /// At GitHub, the runner group lets in repositories or workflows whose jobs the pool refuses.
    pub const RUNNER_GROUP_WIDER: &str = "RunnerGroupWider";
    /// At GitHub, who may use the runner group is not told.
    pub const RUNNER_GROUP_UNKNOWN: &str = "RunnerGroupUnknown";
    /// The forge answers to a personal access token.
    pub const PERSONAL_ACCESS_TOKEN: &str = "PersonalAccessToken";
    /// The forge answered something that Mayfly does not understand.
    pub const UNEXPECTED_ANSWER: &str = "UnexpectedAnswer";
    /// Pods could not be started; the message says why.
    pub const PODS_FAIL: &str = "PodsFail";
    /// A ResourceQuota has room for fewer runner pods than `scale.max`, whoever uses it.
    pub const QUOTA_BELOW_MAX: &str = "QuotaBelowMax";
    /// Jobs wait because a ResourceQuota is used up.
    pub const QUOTA_USED_UP: &str = "QuotaUsedUp";
    /// No runner pod has proved its isolation since the pool was made.
    pub const NO_PROOF_YET: &str = "NoProofYet";
    /// Something that no job may reach answered a runner pod.
    pub const ISOLATION_BREACH: &str = "IsolationBreach";
    /// Whether a runner pod is isolated could not be shown.
    pub const ISOLATION_UNPROVEN: &str = "IsolationUnproven";
    /// Some schedulable node cannot run pods in user namespaces.
    pub const NODES_LACK_SUPPORT: &str = "NodesLackSupport";
    /// No engine of the cluster's can do what the pool asks for.
    pub const ENGINE_CANNOT: &str = "EngineCannot";
    /// The issuer is not in the operator's configuration.
    pub const ISSUER_NOT_TRUSTED: &str = "IssuerNotTrusted";
    /// The issuer's tokens say nothing that only one job of a run has.
    pub const NO_JOB_CLAIM: &str = "NoJobClaim";
    /// The broker can sign for no GitHub App of that client ID.
    pub const APP_NOT_CONFIGURED: &str = "AppNotConfigured";
    /// A private key is kept in a Secret.
    pub const KEY_IN_SECRET: &str = "KeyInSecret";
    /// The operator has no address as an issuer.
    pub const NO_ISSUER: &str = "NoIssuer";
    /// Mayfly vouches for the pool's jobs, and their forge does not.
    pub const MAYFLY_VOUCHES: &str = "MayflyVouches";
    /// Older pools are served first.
    pub const OLDER_POOL_FIRST: &str = "OlderPoolFirst";
    /// No other pool takes the same jobs.
    pub const NO_OVERLAP: &str = "NoOverlap";
}

/// A condition without its time: what a decision says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Condition type, one of the constants of this module.
    pub type_: &'static str,
    /// `True`, `False` or `Unknown`.
    pub status: Status,
    /// One of [`reasons`].
    pub reason: &'static str,
    /// For a person; says what to do where something is wrong.
    pub message: String,
}

/// The status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The state named by the type holds.
    True,
    /// It does not hold.
    False,
    /// It is not known.
    Unknown,
}

impl Status {
    /// As Kubernetes spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl Verdict {
    /// A condition that holds.
    pub fn yes(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, status: Status::True, reason, message: message.into() }
    }

    /// A condition that does not hold.
    pub fn no(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, status: Status::False, reason, message: message.into() }
    }

    /// A condition of which nothing is known.
    pub fn unknown(type_: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { type_, status: Status::Unknown, reason, message: message.into() }
    }
}

/// The new list of conditions: `lastTransitionTime` changes only where the status does, so that an unchanged state compares
/// equal and is not written again. Conditions nobody reported this time are dropped.
pub fn merge(old: &[Condition], verdicts: &[Verdict], generation: Option<i64>, now: &Time) -> Vec<Condition> {
    let mut merged: Vec<Condition> = verdicts
        .iter()
        .map(|verdict| {
            let status = verdict.status.as_str();
            let since = old.iter().find(|c| c.type_ == verdict.type_ && c.status == status);
            Condition {
                type_: verdict.type_.to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.to_owned(),
                message: truncate(&verdict.message, 1024),
                observed_generation: generation,
                last_transition_time: since.map_or_else(|| now.clone(), |c| c.last_transition_time.clone()),
            }
        })
        .collect();
    merged.sort_by(|a, b| a.type_.cmp(&b.type_));
    merged
}

/// The first `max` bytes of `text`, cut at a character's edge.
pub fn truncate(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let mut end = max.saturating_sub('…'.len_utf8());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Time {
        Time(k8s_openapi::jiff::Timestamp::from_second(seconds).expect("a time"))
    }

    #[test]
    fn an_unchanged_verdict_keeps_its_time_and_a_changed_one_gets_a_new_one() {
        let ready = [Verdict::yes(READY, reasons::OK, "fine")];
        let first = merge(&[], &ready, Some(1), &at(1));
        assert_eq!(first, merge(&first, &ready, Some(1), &at(2)));
        let broken = merge(&first, &[Verdict::no(READY, reasons::PODS_FAIL, "bad image")], Some(1), &at(3));
        assert_eq!(broken[0].last_transition_time, at(3));
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let cut = truncate(&"ä".repeat(600), 1024);
        assert!(cut.len() <= 1024 && cut.ends_with('…'));
    }
}
