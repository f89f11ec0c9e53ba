//! The race at a pod's start. Some network plugins enforce a pod's policies only a while after its first instruction; how often and how
//! long is measured in every pod: sentinels, which no pool opens, are tried again and again from the gate's first instruction on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mayfly_proof::{Answer, Endpoint, Start, probe};

/// How long a try waits for an answer.
const PATIENCE: Duration = Duration::from_millis(10);
/// Between a try that was answered and the next.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest the tries go on.
const LONGEST: Duration = Duration::from_secs(10);

/// Tries that go on beside everything else.
pub(crate) struct Race {
    over: Arc<AtomicBool>,
    tries: Option<JoinHandle<Start>>,
}

impl Race {
    /// Begins. Without sentinels there is nothing to try.
    pub(crate) fn begin(sentinels: &[SocketAddr]) -> Self {
        let began = Instant::now();
        let over = Arc::new(AtomicBool::new(false));
        let endpoints: Vec<Endpoint> = sentinels.iter().copied().map(Endpoint::tcp).collect();
        let until = over.clone();
        let tries = (!endpoints.is_empty()).then(|| thread::spawn(move || run(&endpoints, began, &until)));
        Self { over, tries }
    }

    /// Ends, with what was found.
    pub(crate) fn end(self) -> Option<Start> {
        self.over.store(true, Ordering::Relaxed);
        self.tries?.join().ok()
    }
}

fn run(endpoints: &[Endpoint], began: Instant, over: &AtomicBool) -> Start {
    let mut start = Start::default();
    while !over.load(Ordering::Relaxed) && began.elapsed() < LONGEST {
        let at = began.elapsed();
        let answered = probe(endpoints, PATIENCE).iter().filter(|probe| probe.answer == Answer::Accepted).count();
        start.tries = start.tries.saturating_add(u32::try_from(endpoints.len()).unwrap_or(u32::MAX));
        if answered > 0 {
            start.answered = start.answered.saturating_add(u32::try_from(answered).unwrap_or(u32::MAX));
            start.last_ms = u32::try_from(at.as_millis()).unwrap_or(u32::MAX);
            thread::sleep(PAUSE);
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn what_answers_is_counted_with_its_last_time() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        let race = Race::begin(&[address]);
        thread::sleep(Duration::from_millis(60));
        drop(listener);
        thread::sleep(Duration::from_millis(60));
        let start = race.end().expect("it ran");
        assert!(start.answered > 0 && start.answered < start.tries, "{start:?}");
        assert!((1..=100).contains(&start.last_ms), "{start:?}");
    }

    #[test]
    fn without_sentinels_nothing_is_said() {
        assert_eq!(Race::begin(&[]).end(), None);
    }
}
