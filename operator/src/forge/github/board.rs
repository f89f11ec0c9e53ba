//! What is known of jobs where no scale set tells of them: hints in, jobs to look up and jobs that were looked up out. Pure, but for the
//! time, which is handed in.
//!
//! Nothing a hint says is believed but that there is a job to look at. So the order in which hints come means nothing, nor does a hint that
//! comes again: it costs one look at most, and none where the job is over, which is for good (a job that is run again has another number).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::super::{Job, JobKey, JobState, RegisteredRunner, Repository, RunnerKey};

/// Most hints kept until there is time to look.
const HINTS_KEPT: usize = 5_000;
/// Most jobs that are not over and remembered.
const JOBS_KEPT: usize = 5_000;
/// Most jobs that are over and remembered, so that whoever asks learns how they ended, and nobody looks again.
const ENDED_KEPT: usize = 5_000;
/// Most repositories remembered as places of the pool's runners.
const PLACES_KEPT: usize = 500;
/// A job that was looked up is not looked up again sooner, whatever hints say.
const SHORTEST: Duration = Duration::from_secs(1);

/// How often is looked again at what nobody hints at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    /// At the runner group.
    pub(crate) group: Duration,
    /// At a repository's queue.
    pub(crate) queue: Duration,
    /// At a job that waits, or that a runner of the pool has.
    pub(crate) job: Duration,
    /// At a job for which a runner was registered: which job it took is to be known soon.
    pub(crate) taken: Duration,
    /// A runner that took no job that is known by then may have another one.
    pub(crate) lost: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { group: seconds(600), queue: seconds(60), job: seconds(60), taken: seconds(4), lost: seconds(20) }
    }
}

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Board {
    order: u64,
    jobs: BTreeMap<JobKey, Known>,
    ended: VecDeque<JobKey>,
    hints: BTreeSet<JobKey>,
    news: BTreeSet<JobKey>,
    runners: BTreeMap<String, Own>,
    places: BTreeSet<Repository>,
    scanned: BTreeMap<Repository, Instant>,
}

#[derive(Debug)]
struct Known {
    job: Job,
    order: u64,
    looked: Instant,
}

/// A runner that may be the pool's.
#[derive(Debug)]
struct Own {
    id: u64,
    place: Option<Repository>,
    meant_for: Option<JobKey>,
    since: Instant,
}

impl Board {
    /// There may be something to see of this job.
    pub(super) fn hint(&mut self, key: JobKey) {
        let over = self.jobs.get(&key).is_some_and(|known| known.job.state == JobState::Completed);
        if !over && (self.hints.len() < HINTS_KEPT || self.hints.contains(&key)) {
            self.hints.insert(key);
        }
    }

    /// Jobs that are not over, and those that are hinted at.
    pub(super) fn open(&self) -> Vec<JobKey> {
        let open = self.jobs.values().filter(|known| known.job.state != JobState::Completed).map(|known| &known.job.key);
        open.chain(&self.hints).cloned().collect()
    }

    /// A runner of the pool may be registered at this repository.
    pub(super) fn place(&mut self, repository: &Repository) {
        if self.places.len() < PLACES_KEPT {
            self.places.insert(repository.clone());
        }
    }

    /// Where runners of the pool may be registered.
    pub(super) fn places(&self) -> impl Iterator<Item = &Repository> {
        self.places.iter()
    }

    /// This runner was registered, at a repository or at the pool's level.
    pub(super) fn registered(&mut self, name: &str, runner: &RunnerKey, meant_for: Option<JobKey>, now: Instant) {
        if let Some(place) = &runner.repository {
            self.place(place);
        }
        self.runners.insert(name.to_owned(), Own { id: runner.id, place: runner.repository.clone(), meant_for, since: now });
    }

    /// This runner is not there any more.
    pub(super) fn removed(&mut self, runner: &RunnerKey) {
        self.runners.retain(|_, own| own.id != runner.id || own.place != runner.repository);
    }

    /// The runners there are at GitHub. Those that were just registered may be missing.
    pub(super) fn listed<'a>(&mut self, all: impl Iterator<Item = &'a RegisteredRunner>, now: Instant) {
        let all: BTreeMap<&str, &RunnerKey> = all.map(|runner| (runner.name.as_str(), &runner.key)).collect();
        self.runners.retain(|name, own| all.contains_key(name.as_str()) || now.duration_since(own.since) < Duration::from_secs(60));
        for (name, runner) in all {
            if !self.runners.contains_key(name) {
                self.registered(name, runner, None, now);
            }
        }
    }

    /// The oldest job that waits at a repository with these labels, and for which no runner was registered yet.
    pub(super) fn meant_for(&self, repository: &Repository, labels: &[String]) -> Option<JobKey> {
        let taken = |key: &JobKey| self.runners.values().any(|own| own.meant_for.as_ref() == Some(key));
        let mut waiting: Vec<&Known> = self.jobs.values().filter(|known| known.job.state == JobState::Queued).collect();
        waiting.sort_by_key(|known| known.order);
        let fits = |job: &Job| job.key.repository == *repository && job.labels == labels && !taken(&job.key);
        waiting.into_iter().find(|known| fits(&known.job)).map(|known| known.job.key.clone())
    }

    /// Jobs to look up now, at most so many: hinted ones first, then those looked at longest ago.
    pub(super) fn due(&mut self, now: Instant, pace: &Pace, most: usize) -> Vec<JobKey> {
        let age = |known: &Known| now.saturating_duration_since(known.looked);
        let mut due: Vec<JobKey> = {
            let old_enough = |key: &&JobKey| self.jobs.get(key).is_none_or(|known| age(known) >= SHORTEST);
            self.hints.iter().filter(old_enough).take(most).cloned().collect()
        };
        for key in &due {
            self.hints.remove(key);
        }
        let mut old: Vec<&Known> = self
            .jobs
            .values()
            .filter(|known| {
                let key = &known.job.key;
                match known.job.state {
                    JobState::Completed => false,
                    JobState::Queued if self.runners.values().any(|own| own.meant_for.as_ref() == Some(key)) => age(known) >= pace.taken,
                    JobState::Queued | JobState::Blocked | JobState::InProgress => age(known) >= pace.job,
                }
            })
            .filter(|known| !due.contains(&known.job.key))
            .collect();
        old.sort_by_key(|known| known.looked);
        let room = most.saturating_sub(due.len());
        due.extend(old.into_iter().take(room).map(|known| known.job.key.clone()));
        due
    }

    /// Repositories whose queue is to be read now: of those named, and where a runner has been without a known job for long.
    pub(super) fn to_scan(&self, named: &[Repository], now: Instant, pace: &Pace) -> Vec<Repository> {
        // However many are named, there are as many calls.
        let every = pace.queue.saturating_mul(u32::try_from(named.len()).unwrap_or(u32::MAX).max(1));
        let since = |repository: &Repository| self.scanned.get(repository).map(|at| now.saturating_duration_since(*at));
        let mut due: Vec<Repository> =
            named.iter().filter(|repository| since(repository).is_none_or(|age| age >= every)).cloned().collect();
        let has_job = |name: &str| self.jobs.values().any(|known| known.job.runner.as_deref() == Some(name));
        for (name, own) in &self.runners {
            let Some(place) = own.place.as_ref().or_else(|| own.meant_for.as_ref().map(|job| &job.repository)) else { continue };
            let lost = now.saturating_duration_since(own.since) >= pace.lost && !has_job(name);
            if lost && !due.contains(place) && since(place).is_none_or(|age| age >= pace.queue) {
                due.push(place.clone());
            }
        }
        due
    }

    /// The queue of this repository was read.
    pub(super) fn scanned(&mut self, repository: &Repository, now: Instant) {
        if self.scanned.len() >= PLACES_KEPT {
            self.scanned.clear();
        }
        self.scanned.insert(repository.clone(), now);
    }

    /// Takes in a job as GitHub shows it now.
    pub(super) fn take(&mut self, job: Job, now: Instant) {
        let known = self.jobs.get(&job.key);
        if known.is_some_and(|known| known.job.state == JobState::Completed) {
            return;
        }
        let key = job.key.clone();
        let before = known.map(|known| known.job.state);
        let own = job.runner.as_ref().is_some_and(|name| self.runners.contains_key(name));
        // What somebody else's runner has is nobody's business here.
        if job.state == JobState::InProgress && !own {
            self.jobs.remove(&key);
            return;
        }
        if known.is_none() && job.state != JobState::Completed && self.jobs.len() >= JOBS_KEPT + self.ended.len() {
            return;
        }
        if before != Some(job.state) && job.state != JobState::Queued {
            self.news.insert(key.clone());
        }
        if job.state == JobState::Completed {
            self.hints.remove(&key);
            self.ended.push_back(key.clone());
            if let Some(name) = &job.runner {
                self.runners.remove(name);
            }
        }
        let order = known.map_or(self.order, |known| known.order);
        self.order += 1;
        self.jobs.insert(key, Known { job, order, looked: now });
        while self.ended.len() > ENDED_KEPT {
            let Some(oldest) = self.ended.pop_front() else { break };
            self.jobs.remove(&oldest);
        }
    }

    /// GitHub has no such job, or does not show it.
    pub(super) fn gone(&mut self, key: &JobKey) {
        if self.jobs.get(key).is_some_and(|known| known.job.state != JobState::Completed) {
            self.jobs.remove(key);
            self.news.insert(key.clone());
        }
    }

    /// Jobs in this state, in the order in which they were learned of.
    pub(super) fn jobs(&self, state: JobState) -> Vec<Job> {
        let mut found: Vec<&Known> = self.jobs.values().filter(|known| known.job.state == state).collect();
        found.sort_by_key(|known| known.order);
        found.into_iter().map(|known| known.job.clone()).collect()
    }

    /// A job that need not be looked up: it is over, or was looked at a moment ago.
    pub(super) fn job(&self, key: &JobKey, now: Instant) -> Option<Job> {
        let fresh = |known: &&Known| known.job.state == JobState::Completed || now.saturating_duration_since(known.looked) < SHORTEST;
        self.jobs.get(key).filter(fresh).map(|known| known.job.clone())
    }

    /// Jobs that began or ended since this was last asked.
    pub(super) fn news(&mut self) -> Vec<JobKey> {
        std::mem::take(&mut self.news).into_iter().collect()
    }
}

/// How many calls may be made for hints and looks: what a flood of deliveries can cost is bounded, as GitHub bounds the calls of an hour.
#[derive(Debug)]
pub(super) struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    /// Most calls at once.
    const MOST: f64 = 300.0;
    /// Calls that come back in a second.
    const EACH_SECOND: f64 = 1.0;

    pub(super) fn new(now: Instant) -> Self {
        Self { left: Self::MOST, at: now }
    }

    /// Calls that were not needed after all.
    #[expect(clippy::cast_precision_loss, reason = "between 0 and 300")]
    pub(super) fn give_back(&mut self, calls: usize) {
        self.left = (self.left + calls as f64).min(Self::MOST);
    }

    /// So many of the calls that are wanted may be made.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "between 0 and 300")]
    pub(super) fn take(&mut self, wanted: usize, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.left, self.at) = ((self.left + passed * Self::EACH_SECOND).min(Self::MOST), now);
        let may = wanted.min(self.left as usize);
        self.left -= may as f64;
        may
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn repository() -> Repository {
        Repository::parse("acme/web").expect("a repository")
    }

    fn key(id: u64) -> JobKey {
        JobKey { repository: repository(), id: id.into() }
    }

    fn job(id: u64, state: JobState, runner: Option<&str>) -> Job {
        let runner = runner.map(str::to_owned);
        Job { key: key(id), run: 1, state, labels: vec!["linux".to_owned()], runner_id: runner.as_ref().map(|_| 9), runner }
    }

    fn runner(repository: Option<Repository>) -> RunnerKey {
        RunnerKey { repository, id: 9 }
    }

    fn later(seconds: u64) -> Instant {
        // Tests cannot make an instant; this one is never compared with another.
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *START.get_or_init(Instant::now) + Duration::from_secs(seconds)
    }

    #[test]
    fn a_hint_is_looked_at_once_however_often_it_comes() {
        let (mut board, pace) = (Board::default(), Pace::default());
        for _ in 0..1000 {
            board.hint(key(1));
        }
        assert_eq!(board.due(later(0), &pace, 10), [key(1)]);
        assert_eq!(board.due(later(0), &pace, 10), []);
        board.take(job(1, JobState::Queued, None), later(0));
        board.hint(key(1));
        assert_eq!(board.due(later(0), &pace, 10), [], "it was looked at just now");
        assert_eq!(board.due(later(1), &pace, 10), [key(1)]);
        board.take(job(1, JobState::Completed, None), later(1));
        board.hint(key(1));
        assert_eq!(board.due(later(1000), &pace, 10), [], "over is over");
    }

    #[test]
    fn hints_are_bounded_and_come_before_what_is_old() {
        let (mut board, pace) = (Board::default(), Pace::default());
        board.take(job(1, JobState::Queued, None), later(0));
        for id in 0..2 * HINTS_KEPT as u64 {
            board.hint(key(id + 10));
        }
        assert_eq!(board.hints.len(), HINTS_KEPT);
        assert!(!board.due(later(100), &pace, HINTS_KEPT).contains(&key(1)));
        assert_eq!(board.due(later(100), &pace, 10), [key(1)]);
    }

    #[test]
    fn a_job_of_which_no_hint_comes_is_looked_at_when_it_gets_old() {
        let (mut board, pace) = (Board::default(), Pace::default());
        board.take(job(1, JobState::Queued, None), later(0));
        assert_eq!((board.due(later(59), &pace, 10).len(), board.due(later(60), &pace, 10).len()), (0, 1));
        board.registered("ci-a", &runner(Some(repository())), board.meant_for(&repository(), &["linux".to_owned()]), later(0));
        assert_eq!(board.due(later(4), &pace, 10), [key(1)], "a runner was registered for it");
        board.removed(&runner(Some(repository())));
        assert_eq!(board.due(later(5), &pace, 10), [], "it is gone");
        board.registered("ci-a", &runner(Some(repository())), None, later(4));
        board.take(job(1, JobState::InProgress, Some("ci-a")), later(4));
        assert_eq!(board.news(), [key(1)]);
        assert_eq!((board.due(later(60), &pace, 10).len(), board.due(later(64), &pace, 10).len()), (0, 1));
        board.gone(&key(1));
        assert_eq!((board.news(), board.due(later(1000), &pace, 10)), (vec![key(1)], vec![]));
    }

    #[test]
    fn what_a_strangers_runner_has_is_forgotten() {
        let mut board = Board::default();
        board.take(job(1, JobState::Queued, None), later(0));
        board.take(job(1, JobState::InProgress, Some("stranger")), later(0));
        assert!(board.jobs.is_empty());
        board.take(job(2, JobState::InProgress, None), later(0));
        assert!(board.jobs.is_empty());
    }

    #[test]
    fn a_repository_is_read_at_the_start_then_seldom_and_where_a_runner_has_no_known_job() {
        let (mut board, pace) = (Board::default(), Pace::default());
        let api = Repository::parse("acme/api").expect("a repository");
        let named = [repository(), api.clone()];
        assert_eq!(board.to_scan(&named, later(0), &pace), named);
        named.iter().for_each(|repository| board.scanned(repository, later(0)));
        assert_eq!((board.to_scan(&named, later(119), &pace).len(), board.to_scan(&named, later(120), &pace).len()), (0, 2));
        board.registered("ci-a", &runner(Some(api.clone())), None, later(100));
        assert_eq!(board.to_scan(&named, later(119), &pace), []);
        assert_eq!(board.to_scan(&[repository()], later(59), &pace), []);
        assert_eq!(board.to_scan(&[], later(121), &pace).first(), Some(&api));
        board.take(Job { key: JobKey { repository: api, id: 5.into() }, ..job(5, JobState::InProgress, Some("ci-a")) }, later(121));
        assert_eq!(board.to_scan(&[], later(500), &pace), []);
    }

    #[test]
    fn a_flood_costs_no_more_calls_than_come_back() {
        let mut budget = Budget::new(later(0));
        let calls: usize = (0..3600).map(|second| budget.take(1000, later(second))).sum();
        assert!((3600..=3900).contains(&calls), "{calls}");
    }

    proptest! {
        /// Whatever hints come and in whatever order, what GitHub shows is what is known.
        #[test]
        fn the_order_of_hints_means_nothing(hints in proptest::collection::vec(0u64..6, 0..60), states in proptest::collection::vec(0usize..3, 6)) {
            let (mut board, pace) = (Board::default(), Pace::default());
            board.registered("ci-a", &runner(None), None, later(0));
            let all = [JobState::Queued, JobState::InProgress, JobState::Completed];
            let shown = |id: u64| {
                let state = all[states[usize::try_from(id).expect("small")]];
                job(id, state, (state != JobState::Queued).then_some("ci-a"))
            };
            for (at, id) in hints.iter().enumerate() {
                board.hint(key(*id));
                let now = later(at as u64);
                for due in board.due(now, &pace, 10) {
                    let id: u64 = due.id.to_string().parse().expect("a number");
                    board.registered("ci-a", &runner(None), None, now);
                    board.take(shown(id), now);
                }
            }
            for state in all {
                for found in board.jobs(state) {
                    let id: u64 = found.key.id.to_string().parse().expect("a number");
                    prop_assert_eq!(found, shown(id));
                }
            }
        }
    }
}
