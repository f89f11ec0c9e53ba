//! Credentials that end with their pod rather than by themselves. This process keeps those that it gave, in memory alone: what a process
//! that ends has not revoked lives as long as it was ordered to.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mayfly_crds::Provider;

use super::providers::Credential;
use crate::audit::Event;
use crate::runner::identity::PodIdentity;

/// After a try that failed, and at most: a provider that is down is not asked for each of its credentials at every look.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A credential that is to be revoked.
pub(super) struct Owed {
    /// Who has it.
    pub(super) pod: PodIdentity,
    /// Name and UID of the binding.
    pub(super) binding: (String, String),
    /// What the binding said.
    pub(super) provider: Provider,
    pub(super) credential: Arc<Credential>,
    /// The record of its end, but for how that went.
    pub(super) event: Event,
    /// When it may be tried again, and how long the pause before was.
    pub(super) again: Option<(Instant, Duration)>,
}

impl Owed {
    /// After a try that failed.
    pub(super) fn later(self) -> Self {
        let pause = self.again.map_or(FIRST_PAUSE, |(_, before)| (before * 2).min(LONGEST_PAUSE));
        Self { again: Some((Instant::now() + pause, pause)), ..self }
    }
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
        let at = Instant::now();
        all.extract_if(.., |owed| owed.again.is_none_or(|(again, _)| again <= at) && ended(owed)).collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
