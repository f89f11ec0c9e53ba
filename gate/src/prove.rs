//! The proof: what the operator asks to be tried is tried from inside the pod's network namespace, and told.

use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_proof::{Answer, Challenge, Endpoint, Report, Verdict, judge, overall, probe};

use crate::operator::{Client, Taken};
use crate::race::Race;
use crate::say;

/// Between two proofs while a job runs; up to a third of it is added, so that the gates of many pods do not fall into step.
const EVERY: Duration = Duration::from_secs(15);
/// Pause after a round that was not clean.
const PAUSE: Duration = Duration::from_millis(20);

/// The first proof; with it goes what was open at the start.
///
/// # Errors
/// When the operator wants nothing more of this pod: the text says why.
pub(crate) fn first(client: &Client, race: Race) -> Result<(), String> {
    prove_with(client, Some(race))
}

/// Proves once.
///
/// # Errors
/// When the operator wants nothing more of this pod: the text says why.
pub(crate) fn prove(client: &Client) -> Result<(), String> {
    prove_with(client, None)
}

fn prove_with(client: &Client, mut race: Option<Race>) -> Result<(), String> {
    let mut start = None;
    loop {
        let challenge = client.challenge()?;
        let mut report = meet(&challenge);
        // It ran until here: what is open only until the first clean round is seen as well.
        start = start.or(race.take().and_then(Race::end));
        report.start = start;
        if report.unclean > 0 {
            say(&format!("{} rounds were not clean; {} ms until {} in a row were", report.unclean, report.took_ms, report.clean));
        }
        match client.report(&report)? {
            Taken::Yes => return Ok(()),
            // Something changed in between.
            Taken::Stale => {}
        }
    }
}

/// Proves again and again.
///
/// # Errors
/// When the operator wants nothing more of this pod.
pub(crate) fn go_on(client: &Client) -> Result<Infallible, String> {
    // The keys of a fresh hasher are random.
    let random = || RandomState::new().build_hasher().finish();
    loop {
        thread::sleep(EVERY + Duration::from_millis(random() % (EVERY.as_secs() * 1_000 / 3)));
        prove(client)?;
    }
}

/// Tries everything until as many rounds in a row are clean as were asked for, or the time is over.
fn meet(challenge: &Challenge) -> Report {
    let began = Instant::now();
    let mut seen = Seen::default();
    loop {
        seen.take(challenge, Round::run(challenge));
        let over = began.elapsed() >= Duration::from_millis(challenge.within_ms.into());
        if seen.clean >= challenge.rounds || over {
            break;
        }
        if seen.clean == 0 {
            thread::sleep(PAUSE);
        }
    }
    let took = u32::try_from(began.elapsed().as_millis()).unwrap_or(u32::MAX);
    Report {
        nonce: challenge.nonce.clone(),
        forbidden: seen.answers,
        required: seen.required,
        clean: seen.clean,
        unclean: seen.unclean,
        took_ms: took,
        start: None,
    }
}

/// What one round showed.
struct Round {
    answers: Vec<Answer>,
    required: bool,
}

impl Round {
    fn run(challenge: &Challenge) -> Self {
        let forbidden = challenge.forbidden.iter().map(|target| target.endpoint);
        let endpoints: Vec<Endpoint> = forbidden.chain(challenge.required.iter().map(|address| Endpoint::tcp(*address))).collect();
        let mut answers: Vec<Answer> =
            probe(&endpoints, Duration::from_millis(challenge.patience_ms.into())).into_iter().map(|probe| probe.answer).collect();
        let required = answers.split_off(challenge.forbidden.len());
        let required = required.is_empty() || required.contains(&Answer::Accepted);
        Self { answers, required }
    }
}

/// What the last rounds showed together.
#[derive(Default)]
struct Seen {
    answers: Vec<Answer>,
    required: bool,
    clean: u8,
    unclean: u32,
}

impl Seen {
    fn take(&mut self, challenge: &Challenge, round: Round) {
        let open = overall(&judge(&challenge.forbidden, &round.answers)) == Verdict::Breach;
        if open || !round.required {
            *self = Self { answers: round.answers, required: round.required, clean: 0, unclean: self.unclean + 1 };
            return;
        }
        if self.clean == 0 {
            self.answers = round.answers;
        } else {
            self.answers = self.answers.iter().zip(&round.answers).map(|(before, now)| *before.max(now)).collect();
        }
        self.required = true;
        self.clean += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use mayfly_proof::{Class, Target};

    use super::*;

    fn challenge(forbidden: &[SocketAddr], required: &[SocketAddr]) -> Challenge {
        let target = |address: &SocketAddr| Target { class: Class::Pods, endpoint: Endpoint::tcp(*address), control: Answer::Accepted };
        Challenge {
            nonce: "n".to_owned(),
            forbidden: forbidden.iter().map(target).collect(),
            required: required.to_vec(),
            rounds: 3,
            patience_ms: 50,
            within_ms: 300,
        }
    }

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        (listener, address)
    }

    #[test]
    fn three_clean_rounds_end_it() {
        let (_forge, required) = listener();
        let closed = listener().1;
        let report = meet(&challenge(&[closed], &[required]));
        assert_eq!((report.clean, report.unclean, report.required), (3, 0, true));
        assert_eq!(report.forbidden, [Answer::Refused]);
    }

    #[test]
    fn what_stays_open_is_told_when_the_time_is_over() {
        let (_open, address) = listener();
        let report = meet(&challenge(&[address], &[]));
        assert_eq!((report.clean, report.forbidden.as_slice()), (0, &[Answer::Accepted][..]));
        assert!(report.unclean > 1 && report.took_ms >= 300, "{report:?}");
    }

    #[test]
    fn without_what_is_required_no_round_is_clean() {
        let (gone, closed) = (listener().1, listener().1);
        let report = meet(&challenge(&[closed], &[gone]));
        assert_eq!((report.clean, report.required), (0, false));
    }

    #[test]
    fn one_open_round_starts_the_count_anew() {
        let open = Round { answers: vec![Answer::Accepted], required: true };
        let closed = || Round { answers: vec![Answer::Silent], required: true };
        let challenge = challenge(&[([127, 0, 0, 1], 1).into()], &[]);
        let mut seen = Seen::default();
        seen.take(&challenge, closed());
        seen.take(&challenge, open);
        seen.take(&challenge, closed());
        assert_eq!((seen.clean, seen.unclean, seen.answers.as_slice()), (1, 1, &[Answer::Silent][..]));
    }
}
