//! Positive controls: what answers where no policy stands in the way. A runner pod's silence is held against it.
//!
//! There are two: the operator itself, wherever it is, and a sentinel on the runner pod's own node, which asks the operator what to try
//! (`POST /v1/control` of the gate API). What is bound to a node, as the credential agents of some clouds are, answers only there. What
//! counts is the more open answer of the two.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mayfly_proof::{Answer, Endpoint, Look, Looked, Probe, probe};
use tokio::sync::Notify;

/// How long an answer counts as one of a moment ago, from when it was asked for.
const FRESH: Duration = Duration::from_secs(30);
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long those who ask wait for a sentinel beyond that. Its answer is taken later as well.
const ON_THE_WAY: Duration = Duration::from_millis(600);
/// How long a sentinel's question for something to try is kept open.
const OPEN: Duration = Duration::from_secs(50);
/// A sentinel that was not heard for this long is not there. Before, one that owes an answer is late: on a busy node that says nothing.
const GONE: Duration = Duration::from_secs(60);
const SILENCE: Probe = Probe { answer: Answer::Silent, took: PATIENCE };

/// What was answered, and since when it was asked for.
#[derive(Default)]
struct Answers(HashMap<Endpoint, (Probe, Instant)>);

impl Answers {
    /// Those of which nothing is known from a moment ago.
    fn stale(&mut self, endpoints: &[Endpoint]) -> Vec<Endpoint> {
        let now = Instant::now();
        self.0.retain(|_, (_, at)| now.duration_since(*at) < FRESH);
        endpoints.iter().filter(|endpoint| !self.0.contains_key(endpoint)).copied().collect()
    }

    fn keep(&mut self, endpoints: Vec<Endpoint>, probes: Vec<Probe>, at: Instant) {
        self.0.extend(endpoints.into_iter().zip(probes).map(|(endpoint, probe)| (endpoint, (probe, at))));
    }

    fn of(&self, endpoint: &Endpoint) -> Probe {
        self.0.get(endpoint).map_or(SILENCE, |(probe, _)| *probe)
    }
}

/// All controls. Each is asked one thing at a time, and those who come meanwhile find the result.
#[derive(Default)]
pub(crate) struct Controls {
    own: tokio::sync::Mutex<Answers>,
    nodes: Mutex<HashMap<String, Arc<Sentinel>>>,
}

/// What a sentinel on the node had to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    /// It told.
    Told,
    /// One is there, and has not told yet.
    Late,
    /// None is there.
    Absent,
}

/// What endpoints answered.
pub(crate) struct Seen {
    /// The more open answer of each, in their order.
    pub(crate) probes: Vec<Probe>,
    /// Whether a sentinel on the node told as well.
    pub(crate) beside: Beside,
}

/// The sentinel on one node.
#[derive(Default)]
struct Sentinel {
    known: Mutex<Known>,
    /// There is a question.
    asked: Notify,
    /// A question was answered.
    told: Notify,
}

#[derive(Default)]
struct Known {
    answers: Answers,
    number: u64,
    /// It stays until it is answered: a sentinel that begins anew gets it again.
    question: Option<Question>,
    /// When a sentinel was there last.
    there: Option<Instant>,
}

struct Question {
    look: Look,
    /// When a sentinel got it first.
    fetched: Option<Instant>,
}

impl Controls {
    /// What these endpoints answer, or answered a moment ago, to the operator and on this node.
    pub(crate) async fn look(&self, node: Option<&str>, endpoints: &[Endpoint]) -> Seen {
        let sentinel = node.and_then(|node| lock(&self.nodes).get(node).cloned());
        let beside = async {
            match sentinel {
                Some(sentinel) => sentinel.look(endpoints).await,
                None => Err(Beside::Absent),
            }
        };
        let (mut probes, beside) = tokio::join!(self.look_itself(endpoints), beside);
        for (own, other) in probes.iter_mut().zip(beside.iter().flatten()) {
            if other.answer > own.answer {
                *own = *other;
            }
        }
        Seen { probes, beside: beside.err().unwrap_or(Beside::Told) }
    }

    async fn look_itself(&self, endpoints: &[Endpoint]) -> Vec<Probe> {
        let mut known = self.own.lock().await;
        let stale = known.stale(endpoints);
        if !stale.is_empty() {
            let (tried, at) = (stale.clone(), Instant::now());
            // A task that died shows nothing, and so do endpoints without an answer.
            let probes = tokio::task::spawn_blocking(move || probe(&tried, PATIENCE)).await.unwrap_or_default();
            known.keep(stale, probes, at);
        }
        endpoints.iter().map(|endpoint| known.of(endpoint)).collect()
    }

    /// A sentinel on this node tells what it found, if it was asked, and gets what it is to try next. `None`: nothing for now.
    pub(crate) async fn serve(&self, node: &str, found: Option<Looked>) -> Option<Look> {
        let sentinel = lock(&self.nodes).entry(node.to_owned()).or_default().clone();
        if let Some(took) = sentinel.there(found).filter(|took| *took >= FRESH) {
            tracing::warn!(node, seconds = took.as_secs(), "the node's sentinel answers too late: no pod proves its isolation there");
        }
        let look = tokio::time::timeout(OPEN, sentinel.next()).await;
        sentinel.there(None);
        look.ok()
    }
}

impl Sentinel {
    /// It was heard. With an answer to the open question comes how long it took.
    fn there(&self, found: Option<Looked>) -> Option<Duration> {
        let now = Instant::now();
        let mut known = lock(&self.known);
        known.there = Some(now);
        let found = found?;
        let Question { look, fetched } = known.question.take_if(|question| question.look.number == found.number)?;
        let at = fetched.unwrap_or(now);
        if found.probes.len() == look.endpoints.len() {
            known.answers.keep(look.endpoints, found.probes, at);
        }
        self.told.notify_waiters();
        Some(now.duration_since(at))
    }

    async fn next(&self) -> Look {
        loop {
            let mut asked = pin!(self.asked.notified());
            asked.as_mut().enable();
            if let Some(question) = &mut lock(&self.known).question {
                question.fetched.get_or_insert_with(Instant::now);
                return question.look.clone();
            }
            asked.await;
        }
    }

    /// An error where it does not tell in time. What it is asked stays open: who comes back finds the answer.
    async fn look(&self, endpoints: &[Endpoint]) -> Result<Vec<Probe>, Beside> {
        let told = async {
            loop {
                let mut told = pin!(self.told.notified());
                told.as_mut().enable();
                if let Some(known) = self.known_or_asked(endpoints) {
                    return known;
                }
                told.await;
            }
        };
        tokio::time::timeout(PATIENCE + ON_THE_WAY, told).await.unwrap_or(Err(Beside::Late))
    }

    /// What is known of a moment ago. `None`: a question is open.
    fn known_or_asked(&self, endpoints: &[Endpoint]) -> Option<Result<Vec<Probe>, Beside>> {
        let mut known = lock(&self.known);
        let stale = known.answers.stale(endpoints);
        if stale.is_empty() {
            return Some(Ok(endpoints.iter().map(|endpoint| known.answers.of(endpoint)).collect()));
        }
        if known.there.is_none_or(|there| there.elapsed() >= GONE) {
            return Some(Err(Beside::Absent));
        }
        if known.question.is_none() {
            known.number += 1;
            let patience_ms = u16::try_from(PATIENCE.as_millis()).unwrap_or(u16::MAX);
            known.question = Some(Question { look: Look { number: known.number, endpoints: stale, patience_ms }, fetched: None });
            self.asked.notify_waiters();
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn endpoint(port: u16) -> Endpoint {
        Endpoint::tcp(([127, 0, 0, 1], port).into())
    }

    #[tokio::test]
    async fn an_answer_counts_for_a_while_and_is_asked_for_once() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let endpoint = Endpoint::tcp(listener.local_addr().expect("an address"));
        let controls = Controls::default();
        let look = async || controls.look(None, &[endpoint]).await.probes[0].answer;
        assert_eq!(look().await, Answer::Accepted);
        drop(listener);
        assert_eq!(look().await, Answer::Accepted, "an answer of a moment ago");
        controls.own.lock().await.0.values_mut().for_each(|(_, at)| *at -= FRESH);
        assert_eq!(look().await, Answer::Refused);
    }

    /// A sentinel that answers this, so many times, and then tells nothing more.
    async fn sentinel(controls: &Controls, node: &str, times: usize, answer: Answer) -> Vec<Look> {
        let (mut found, mut looks) = (None, Vec::new());
        for _ in 0..times {
            let look = controls.serve(node, found).await.expect("a question");
            let probe = Probe { answer, took: Duration::from_millis(1) };
            found = Some(Looked { number: look.number, probes: vec![probe; look.endpoints.len()] });
            looks.push(look);
        }
        // It tells, and asks on.
        let _ = tokio::time::timeout(Duration::from_millis(50), controls.serve(node, found)).await;
        looks
    }

    async fn there(controls: &Controls, node: &str) {
        while lock(&controls.nodes).get(node).is_none_or(|sentinel| lock(&sentinel.known).there.is_none()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn what_answers_on_the_node_alone_counts_and_is_asked_for_once() {
        let controls = Controls::default();
        let both = [endpoint(1), endpoint(2)];
        let twice = async {
            there(&controls, "node1").await;
            tokio::join!(controls.look(Some("node1"), &both), controls.look(Some("node1"), &both))
        };
        let (asked, (first, second)) = tokio::join!(sentinel(&controls, "node1", 1, Answer::Accepted), twice);
        for seen in [first, second] {
            assert!(seen.beside == Beside::Told && seen.probes.iter().all(|probe| probe.answer == Answer::Accepted));
        }
        let elsewhere = controls.look(Some("node2"), &both).await;
        assert!(elsewhere.beside == Beside::Absent && elsewhere.probes.iter().all(|probe| probe.answer == Answer::Refused));
        assert_eq!(asked[0].endpoints, both);
    }

    #[tokio::test]
    async fn the_more_open_answer_counts() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let open = [Endpoint::tcp(listener.local_addr().expect("an address"))];
        let controls = Controls::default();
        let look = async {
            there(&controls, "node1").await;
            controls.look(Some("node1"), &open).await
        };
        let (_, seen) = tokio::join!(sentinel(&controls, "node1", 1, Answer::Silent), look);
        assert!(seen.beside == Beside::Told && seen.probes[0].answer == Answer::Accepted);
    }

    #[tokio::test]
    async fn a_late_answer_is_there_for_who_comes_back_and_what_is_never_answered_is_gone() {
        let controls = Controls::default();
        let asked = [endpoint(1)];
        let beside = async || controls.look(Some("node1"), &asked).await.beside;
        let late = async {
            there(&controls, "node1").await;
            let began = Instant::now();
            assert_eq!(beside().await, Beside::Late);
            began.elapsed()
        };
        let (look, took) = tokio::join!(controls.serve("node1", None), late);
        assert!(took >= PATIENCE);
        let look = look.expect("a question");
        // A sentinel that began anew is asked the same.
        assert_eq!(controls.serve("node1", None).await.as_ref(), Some(&look));
        let probe = Probe { answer: Answer::Accepted, took: Duration::ZERO };
        let found = Looked { number: look.number, probes: vec![probe] };
        let _ = tokio::time::timeout(Duration::from_millis(50), controls.serve("node1", Some(found))).await;
        let seen = controls.look(Some("node1"), &asked).await;
        assert_eq!((seen.beside, seen.probes[0].answer), (Beside::Told, Answer::Accepted));

        let sentinel = lock(&controls.nodes).get("node1").cloned().expect("it was there");
        let age = |by: Duration| {
            let mut known = lock(&sentinel.known);
            known.answers.0.values_mut().for_each(|(_, at)| *at -= by);
            known.there = known.there.and_then(|there| there.checked_sub(by));
        };
        age(FRESH);
        assert_eq!(beside().await, Beside::Late, "what was asked for too long ago does not count");
        age(GONE);
        assert_eq!(beside().await, Beside::Absent);
        // It comes back, and answers what is still open.
        let (_, back) = tokio::join!(self::sentinel(&controls, "node1", 1, Answer::Silent), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            beside().await
        });
        assert_eq!(back, Beside::Told);
    }

    #[tokio::test]
    async fn an_answer_is_as_old_as_its_question() {
        let controls = Controls::default();
        let asked = [endpoint(1)];
        let look = async {
            there(&controls, "node1").await;
            controls.look(Some("node1"), &asked).await
        };
        let (question, _) = tokio::join!(controls.serve("node1", None), look);
        let sentinel = lock(&controls.nodes).get("node1").cloned().expect("it was there");
        if let Some(question) = &mut lock(&sentinel.known).question {
            question.fetched = question.fetched.and_then(|fetched| fetched.checked_sub(FRESH));
        }
        let probe = Probe { answer: Answer::Accepted, took: Duration::ZERO };
        let took = sentinel.there(Some(Looked { number: question.expect("a question").number, probes: vec![probe] }));
        assert!(took.is_some_and(|took| took >= FRESH));
        assert_eq!(controls.look(Some("node1"), &asked).await.beside, Beside::Late);
    }

    #[tokio::test]
    async fn an_answer_to_another_question_or_of_another_length_is_none() {
        for (off, length) in [(1, 1), (0, 2), (0, 0)] {
            let controls = Controls::default();
            let wrong = async {
                let look = controls.serve("node1", None).await.expect("a question");
                let probe = Probe { answer: Answer::Accepted, took: Duration::ZERO };
                let found = Looked { number: look.number + off, probes: vec![probe; length] };
                let _ = tokio::time::timeout(Duration::from_secs(2), controls.serve("node1", Some(found))).await;
            };
            let look = async {
                there(&controls, "node1").await;
                controls.look(Some("node1"), &[endpoint(1)]).await
            };
            let ((), seen) = tokio::join!(wrong, look);
            assert_eq!(seen.beside, Beside::Late, "{off} {length}");
        }
    }
}
