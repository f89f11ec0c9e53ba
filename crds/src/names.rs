//! Labels, annotations, finalizers and object names: the marks by which everything Mayfly made is found again.

use std::fmt;

use sha2::{Digest, Sha256};

/// API group of Mayfly's resources.
pub const GROUP: &str = "mayfly.dev";
/// Value of `app.kubernetes.io/managed-by` on everything the operator creates.
pub const MANAGED_BY: &str = "mayfly";
/// Kubernetes' recommended label that names the tool which manages an object.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label on every runner pod: the name of its RunnerPool.
pub const LABEL_POOL: &str = "mayfly.dev/pool";
/// Annotation on a runner pod: the job it runs, as the forge names it (`owner/repository#id`).
pub const ANNOTATION_JOB: &str = "mayfly.dev/job";
/// Annotation on a runner pod: the workflow run and file the job belongs to (`run/path@ref`).
pub const ANNOTATION_WORKFLOW: &str = "mayfly.dev/workflow";
/// Annotation on a runner pod: what the OIDC token of its job has to say, as a JSON object of claim names and strings. The controller
/// writes it when the forge tells which job the pod runs; admission lets nobody else.
pub const ANNOTATION_JOB_CLAIMS: &str = "mayfly.dev/job-claims";
/// Annotation that a Secret must carry before the operator uses it: the URL of the one forge its content may be sent to.
pub const ANNOTATION_FORGE: &str = "mayfly.dev/forge";
/// Annotation that a Secret must carry before the operator uses it: the namespaces whose pools may name it, comma-separated, with
/// `*` and `?`.
pub const ANNOTATION_POOL_NAMESPACES: &str = "mayfly.dev/pool-namespaces";
/// Finalizer of a RunnerPool: its registrations are still to be removed from the forge.
pub const FINALIZER_REGISTRATIONS: &str = "mayfly.dev/registrations";
/// ServiceAccount of runner pods in a pool's namespace. It has no permissions and no token is mounted for the runner.
pub const RUNNER_SERVICE_ACCOUNT: &str = "mayfly-runner";
/// Audience of the token with which a pod's gate asks the operator for its registration.
pub const GATE_AUDIENCE: &str = "gate.mayfly.dev";
/// Audience of the token with which a pod's gate asks the broker for a credential.
pub const BROKER_AUDIENCE: &str = "broker.mayfly.dev";
/// Name of the runner container in a runner pod.
pub const RUNNER_CONTAINER: &str = "runner";
/// Name of the gate container (a native sidecar) in a runner pod.
pub const GATE_CONTAINER: &str = "gate";

/// Longest name a RunnerPool may have, in characters, so that pod names built from it stay within 63.
pub const POOL_NAME_MAX: usize = 40;
const HASH_LEN: usize = 8;
const SUFFIX_LEN: usize = 8;
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// The name of a runner, which is the name of its pod: `<pool>-<pool hash>-<random>`.
///
/// The hash is of the pool's UID, so that a name tells which pool of which cluster it belongs to even at the forge; the
/// random part makes a name that is never used twice. At most 58 characters, a valid DNS label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunnerName(String);

impl RunnerName {
    /// Makes the name from the pool's name and UID and eight random bytes.
    pub fn new(pool: &str, pool_uid: &str, random: [u8; SUFFIX_LEN]) -> Self {
        let pool: String = pool.chars().take(POOL_NAME_MAX).collect();
        let suffix: String = random.iter().map(|byte| letter(*byte)).collect();
        Self(format!("{pool}-{}-{suffix}", pool_hash(pool_uid)))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `name` has the form of a runner name of the pool with this UID.
    pub fn is_of_pool(name: &str, pool_uid: &str) -> bool {
        let mut parts = name.rsplitn(3, '-');
        let (suffix, hash, pool) = (parts.next(), parts.next(), parts.next());
        let suffix_fits = suffix.is_some_and(|s| s.len() == SUFFIX_LEN && s.bytes().all(|b| ALPHABET.contains(&b)));
        suffix_fits && pool.is_some_and(|p| !p.is_empty()) && hash == Some(pool_hash(pool_uid).as_str())
    }
}

impl fmt::Display for RunnerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Eight letters that stand for a pool's UID in the names of its runners.
pub fn pool_hash(pool_uid: &str) -> String {
    Sha256::digest(pool_uid.as_bytes()).iter().take(HASH_LEN).map(|byte| letter(*byte)).collect()
}

fn letter(byte: u8) -> char {
    char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])
}

/// The label selector that finds every object the operator made.
pub fn managed_selector() -> String {
    format!("{LABEL_MANAGED_BY}={MANAGED_BY}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_runner_name_is_a_dns_label_and_belongs_to_its_pool_only(
            pool in "[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?",
            uid in "[0-9a-f-]{36}",
            other in "[0-9a-f-]{36}",
            random: [u8; 8],
        ) {
            let name = RunnerName::new(&pool, &uid, random);
            prop_assert!(name.as_str().len() <= 63);
            prop_assert!(name.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!(RunnerName::is_of_pool(name.as_str(), &uid));
            prop_assume!(pool_hash(&uid) != pool_hash(&other));
            prop_assert!(!RunnerName::is_of_pool(name.as_str(), &other));
        }
    }

    #[test]
    fn foreign_names_belong_to_no_pool() {
        let hash = pool_hash("uid");
        for name in ["", "runner", "-", &format!("-{hash}-abcdefgh"), &format!("ci-{hash}-abc"), &format!("ci-{hash}-ABCDEFGH")] {
            assert!(!RunnerName::is_of_pool(name, "uid"), "{name}");
        }
    }
}
