//! Positive controls: what answers the operator, where no policy stands in the way. A runner pod's silence is held against it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_proof::{Endpoint, Probe, probe};

/// How long an answer counts as one of a moment ago.
const FRESH: Duration = Duration::from_secs(10);
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(400);
/// Endpoints nobody has asked for this long are forgotten.
const FORGET: Duration = Duration::from_secs(600);

/// The answers.
#[derive(Default)]
pub(crate) struct Controls {
    known: Mutex<HashMap<Endpoint, (Probe, Instant)>>,
    /// Whoever looks holds it: those who come meanwhile find the result.
    looking: tokio::sync::Mutex<()>,
}

impl Controls {
    /// What these endpoints answer, or answered a moment ago; in their order.
    pub(crate) async fn look(&self, endpoints: &[Endpoint]) -> Vec<Probe> {
        let _turn = self.looking.lock().await;
        let now = Instant::now();
        let stale: Vec<Endpoint> = {
            let mut known = self.known();
            known.retain(|_, (_, at)| now.duration_since(*at) < FORGET);
            let fresh = |endpoint: &Endpoint| known.get(endpoint).is_some_and(|(_, at)| now.duration_since(*at) < FRESH);
            endpoints.iter().filter(|endpoint| !fresh(endpoint)).copied().collect()
        };
        if !stale.is_empty() {
            let tried = stale.clone();
            // A task that died shows nothing, and so do endpoints without an answer.
            let probes = tokio::task::spawn_blocking(move || probe(&tried, PATIENCE)).await.unwrap_or_default();
            let mut known = self.known();
            let now = Instant::now();
            known.extend(stale.into_iter().zip(probes).map(|(endpoint, probe)| (endpoint, (probe, now))));
        }
        let known = self.known();
        let silence = Probe { answer: mayfly_proof::Answer::Silent, took: PATIENCE };
        endpoints.iter().map(|endpoint| known.get(endpoint).map_or(silence, |(probe, _)| *probe)).collect()
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Endpoint, (Probe, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use mayfly_proof::Answer;

    use super::*;

    #[tokio::test]
    async fn an_answer_counts_for_a_while_and_is_asked_for_once() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let endpoint = Endpoint::tcp(listener.local_addr().expect("an address"));
        let controls = Controls::default();
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Accepted);
        drop(listener);
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Accepted, "an answer of a moment ago");
        controls.known().values_mut().for_each(|(_, at)| *at -= FRESH);
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Refused);
    }
}
