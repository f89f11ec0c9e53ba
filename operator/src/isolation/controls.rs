//! Positive controls: what answers the operator, where no policy stands in the way. A runner pod's silence is held against it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mayfly_proof::{Answer, Endpoint, Probe, probe};
use tokio::sync::Mutex;

/// How long an answer counts as one of a moment ago.
const FRESH: Duration = Duration::from_secs(10);
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(400);

/// The answers. Whoever looks holds the lock: those who come meanwhile find the result.
#[derive(Default)]
pub(crate) struct Controls(Mutex<HashMap<Endpoint, (Probe, Instant)>>);

impl Controls {
    /// What these endpoints answer, or answered a moment ago; in their order.
    pub(crate) async fn look(&self, endpoints: &[Endpoint]) -> Vec<Probe> {
        let mut known = self.0.lock().await;
        let now = Instant::now();
        known.retain(|_, (_, at)| now.duration_since(*at) < FRESH);
        let stale: Vec<Endpoint> = endpoints.iter().filter(|endpoint| !known.contains_key(endpoint)).copied().collect();
        if !stale.is_empty() {
            let tried = stale.clone();
            // A task that died shows nothing, and so do endpoints without an answer.
            let probes = tokio::task::spawn_blocking(move || probe(&tried, PATIENCE)).await.unwrap_or_default();
            let now = Instant::now();
            known.extend(stale.into_iter().zip(probes).map(|(endpoint, probe)| (endpoint, (probe, now))));
        }
        let silence = Probe { answer: Answer::Silent, took: PATIENCE };
        endpoints.iter().map(|endpoint| known.get(endpoint).map_or(silence, |(probe, _)| *probe)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_answer_counts_for_a_while_and_is_asked_for_once() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let endpoint = Endpoint::tcp(listener.local_addr().expect("an address"));
        let controls = Controls::default();
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Accepted);
        drop(listener);
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Accepted, "an answer of a moment ago");
        controls.0.lock().await.values_mut().for_each(|(_, at)| *at -= FRESH);
        assert_eq!(controls.look(&[endpoint]).await[0].answer, Answer::Refused);
    }
}
