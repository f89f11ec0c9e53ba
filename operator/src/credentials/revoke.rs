//! Credentials that end with their pod rather than by themselves. This process keeps those that it gave, in memory alone: what a process
//! that ends has not revoked lives as long as it was ordered to.

use std::sync::{Mutex, PoisonError};

use mayfly_crds::Provider;

use super::providers::Credential;
use crate::audit::Event;
use crate::runner::identity::PodIdentity;

/// A credential that is to be revoked.
pub(super) struct Owed {
    /// Who has it.
    pub(super) pod: PodIdentity,
    /// Name and UID of the binding.
    pub(super) binding: (String, String),
    /// What the binding said.
    pub(super) provider: Provider,
    pub(super) credential: Credential,
    /// The record of its end, but for how that went.
    pub(super) event: Event,
}

/// All that this process gave and has not revoked.
#[derive(Default)]
pub(super) struct Revocations(Mutex<Vec<Owed>>);

impl Revocations {
    /// To be revoked one day.
    pub(super) fn owe(&self, owed: Owed) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(owed);
    }

    /// Takes out what is due. What has ended by itself by `now`, in seconds since 1970, is forgotten.
    pub(super) fn due(&self, now: i64, ended: impl Fn(&Owed) -> bool) -> Vec<Owed> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|owed| owed.credential.expires > now);
        all.extract_if(.., |owed| ended(owed)).collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
