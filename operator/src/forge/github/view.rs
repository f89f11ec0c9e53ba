//! What is known of a scale set's jobs: messages and numbers in, jobs out. Pure.
//!
//! The numbers are the truth about how many jobs there are; messages say which. Messages can be lost (they are acknowledged before their
//! work is done), come twice, or come late: whatever they say, no more jobs are told than the numbers allow, and jobs that no message
//! named are told as a number.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::{Job, JobKey, JobState, Repository, Run};
use super::wire::{JobMessage, Statistics};

/// Most jobs that are over and remembered, so that whoever asks learns how they ended.
const ENDED_KEPT: usize = 500;
/// Most jobs that are not over and remembered. The numbers tell of those beyond.
const JOBS_KEPT: usize = 5_000;

/// What is known.
#[derive(Debug, Default)]
pub(super) struct View {
    /// In the order in which they came.
    order: u64,
    jobs: BTreeMap<JobKey, Known>,
    ended: VecDeque<JobKey>,
    statistics: Statistics,
    news: BTreeSet<JobKey>,
}

#[derive(Debug, Clone)]
struct Known {
    job: Job,
    /// `None` for one of an earlier process.
    run: Option<Run>,
    /// The workflow as the message names it; empty for one of an earlier process.
    reference: String,
    order: u64,
    /// The number by which an older server wants it to be asked for; `None` where it was given out already.
    offered: Option<i64>,
}

impl View {
    /// Takes in a message's entries, in their order.
    pub(super) fn take(&mut self, messages: &[JobMessage]) {
        for message in messages {
            let Some(key) = message.key() else { continue };
            let state = match message.message_type.as_str() {
                "JobAvailable" | "JobAssigned" => JobState::Queued,
                "JobStarted" => JobState::InProgress,
                "JobCompleted" => JobState::Completed,
                // Further kinds may come.
                _ => continue,
            };
            let known = self.jobs.get(&key);
            let running = known.is_some_and(|known| known.job.state == JobState::InProgress);
            // Assigned and available come before the start; after it they are late news.
            if state == JobState::Queued && running {
                continue;
            }
            if known.is_none() && self.jobs.len() >= JOBS_KEPT {
                continue;
            }
            let order = known.filter(|known| known.job.state != JobState::Completed).map_or(self.order, |known| known.order);
            self.order += 1;
            let mut job = message.job(key.clone(), state);
            if job.runner.is_none() {
                // The end does not always say who had it.
                let had = known.filter(|_| state == JobState::Completed);
                (job.runner, job.runner_id) = had.map(|known| (known.job.runner.clone(), known.job.runner_id)).unwrap_or_default();
            }
            let offered = (message.message_type == "JobAvailable" && message.runner_request_id > 0).then_some(message.runner_request_id);
            let run = Some(message.run(&key.repository));
            let reference = message.job_workflow_ref.clone();
            self.jobs.insert(key.clone(), Known { job, run, reference, order, offered });
            if state == JobState::Completed {
                self.ended.push_back(key.clone());
            }
            self.news.insert(key);
        }
        while self.ended.len() > ENDED_KEPT {
            let Some(key) = self.ended.pop_front() else { break };
            if self.jobs.get(&key).is_some_and(|known| known.job.state == JobState::Completed) {
                self.jobs.remove(&key);
            }
        }
    }

    /// Takes in the numbers.
    pub(super) fn count(&mut self, statistics: Statistics) {
        self.statistics = statistics;
        if statistics.total_assigned_jobs == 0 {
            // Nothing is given out: what seemed to wait was taken back.
            self.jobs.retain(|_, known| known.job.state != JobState::Queued || known.offered.is_some());
        }
    }

    /// A runner of an earlier process has this job.
    pub(super) fn remember(&mut self, job: Job) {
        let order = self.order;
        self.order += 1;
        self.jobs.entry(job.key.clone()).or_insert(Known { job, run: None, reference: String::new(), order, offered: None });
    }

    /// Jobs in this state, oldest first. No more wait than the numbers say; the last to come count.
    pub(super) fn jobs(&self, state: JobState) -> Vec<Job> {
        let mut found: Vec<&Known> = self.jobs.values().filter(|known| known.job.state == state).collect();
        found.sort_by_key(|known| known.order);
        if state == JobState::Queued {
            let given_out = found.iter().filter(|known| known.offered.is_none()).count();
            let mut stale = given_out.saturating_sub(self.waiting());
            found.retain(|known| {
                let drop = known.offered.is_none() && stale > 0;
                stale -= usize::from(drop);
                !drop
            });
        }
        found.into_iter().map(|known| known.job.clone()).collect()
    }

    /// Jobs that wait and that no message named.
    pub(super) fn unnamed(&self) -> u32 {
        let named = self.jobs.values().filter(|known| known.job.state == JobState::Queued && known.offered.is_none()).count();
        u32::try_from(self.waiting().saturating_sub(named)).unwrap_or(u32::MAX)
    }

    /// One job.
    pub(super) fn job(&self, key: &JobKey) -> Option<Job> {
        self.jobs.get(key).map(|known| known.job.clone())
    }

    /// What a message said of a run.
    pub(super) fn run(&self, repository: &Repository, run: u64) -> Option<Run> {
        let of_run = |known: &&Known| known.job.run == run && known.job.key.repository == *repository;
        self.jobs.values().find(of_run).and_then(|known| known.run.clone())
    }

    /// The workflow of a job, as a message named it.
    pub(super) fn reference(&self, job: &JobKey) -> Option<String> {
        self.jobs.get(job).map(|known| known.reference.clone()).filter(|reference| !reference.is_empty())
    }

    /// The numbers by which these jobs have to be asked for.
    pub(super) fn offers(&self, jobs: &[JobKey]) -> Vec<i64> {
        jobs.iter().filter_map(|key| self.jobs.get(key)?.offered).collect()
    }

    /// These were given out.
    pub(super) fn claimed(&mut self, offers: &[i64]) {
        for known in self.jobs.values_mut() {
            if known.offered.is_some_and(|offer| offers.contains(&offer)) {
                known.offered = None;
            }
        }
    }

    /// Jobs of which there was news since this was last asked.
    pub(super) fn news(&mut self) -> Vec<JobKey> {
        std::mem::take(&mut self.news).into_iter().collect()
    }

    /// Given out, and not begun.
    fn waiting(&self) -> usize {
        let Statistics { total_assigned_jobs: assigned, total_running_jobs: running } = self.statistics;
        assigned.saturating_sub(running) as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: &str, job: u64, runner: &str) -> JobMessage {
        JobMessage {
            message_type: kind.to_owned(),
            owner_name: "acme".to_owned(),
            repository_name: "web".to_owned(),
            job_id: format!("job-{job}"),
            job_workflow_ref: "acme/web/.github/workflows/ci.yml@refs/heads/main".to_owned(),
            workflow_run_id: job,
            event_name: "push".to_owned(),
            request_labels: vec!["linux".to_owned()],
            runner_id: if runner.is_empty() { 0 } else { 9 },
            runner_name: runner.to_owned(),
            ..JobMessage::default()
        }
    }

    fn numbers(assigned: u32, running: u32) -> Statistics {
        Statistics { total_assigned_jobs: assigned, total_running_jobs: running }
    }

    fn ids(view: &View, state: JobState) -> Vec<String> {
        view.jobs(state).iter().map(|job| job.key.id.to_string()).collect()
    }

    #[test]
    fn a_job_is_followed_from_its_assignment_to_its_end() {
        let mut view = View::default();
        view.take(&[message("JobAssigned", 1, ""), message("JobAssigned", 2, "")]);
        view.count(numbers(2, 0));
        assert_eq!(ids(&view, JobState::Queued), ["job-1", "job-2"]);
        view.take(&[message("JobStarted", 2, "ci-a")]);
        view.count(numbers(2, 1));
        assert_eq!((ids(&view, JobState::Queued), ids(&view, JobState::InProgress)), (vec!["job-1".to_owned()], vec!["job-2".to_owned()]));
        view.take(&[message("JobCompleted", 2, "")]);
        view.count(numbers(1, 0));
        let key = message("", 2, "").key().expect("a job");
        let ended = view.job(&key).expect("remembered");
        assert_eq!((ended.state, ended.runner.as_deref(), ended.runner_id), (JobState::Completed, Some("ci-a"), Some(9)));
        assert_eq!(view.news().len(), 2);
        assert!(view.news().is_empty());
        assert_eq!(view.run(&key.repository, 1).map(|run| run.workflow).as_deref(), Some("ci.yml"));
    }

    #[test]
    fn messages_that_come_again_or_late_change_nothing() {
        let mut view = View::default();
        view.take(&[message("JobAssigned", 1, ""), message("JobStarted", 1, "ci-a")]);
        view.count(numbers(1, 1));
        view.take(&[message("JobAssigned", 1, "")]);
        assert_eq!(ids(&view, JobState::InProgress), ["job-1"]);
        assert!(ids(&view, JobState::Queued).is_empty() && view.unnamed() == 0);
    }

    #[test]
    fn a_job_that_was_given_out_anew_waits_anew() {
        let mut view = View::default();
        view.take(&[message("JobAssigned", 1, ""), message("JobCompleted", 1, ""), message("JobAssigned", 1, "")]);
        view.count(numbers(1, 0));
        assert_eq!(ids(&view, JobState::Queued), ["job-1"]);
    }

    #[test]
    fn the_numbers_bound_what_the_messages_say() {
        let mut view = View::default();
        view.take(&[message("JobAssigned", 1, ""), message("JobAssigned", 2, ""), message("JobAssigned", 3, "")]);
        view.count(numbers(1, 0));
        assert_eq!(ids(&view, JobState::Queued), ["job-3"], "two ends were lost");
        view.count(numbers(5, 1));
        assert_eq!((ids(&view, JobState::Queued).len(), view.unnamed()), (3, 1), "one assignment was lost");
        view.count(numbers(0, 0));
        assert!(ids(&view, JobState::Queued).is_empty() && view.unnamed() == 0);
    }

    #[test]
    fn an_offered_job_waits_until_it_was_asked_for() {
        let mut view = View::default();
        view.take(&[JobMessage { runner_request_id: 77, ..message("JobAvailable", 1, "") }]);
        view.count(numbers(0, 0));
        let jobs: Vec<JobKey> = view.jobs(JobState::Queued).into_iter().map(|job| job.key).collect();
        assert_eq!((view.offers(&jobs), view.unnamed()), (vec![77], 0));
        view.claimed(&[77]);
        view.count(numbers(1, 0));
        assert!(view.offers(&jobs).is_empty());
        assert_eq!((ids(&view, JobState::Queued).len(), view.unnamed()), (1, 0));
    }

    proptest! {
        #[test]
        fn named_and_unnamed_jobs_are_as_many_as_the_numbers_say(
            events in proptest::collection::vec((0u64..8, 0usize..4), 0..40), assigned in 0u32..12, running in 0u32..12,
        ) {
            let mut view = View::default();
            for (job, kind) in events {
                view.take(&[message(["JobAssigned", "JobStarted", "JobCompleted", "JobUnheardOf"][kind], job, "ci-a")]);
            }
            view.count(numbers(assigned, running));
            let told = view.jobs(JobState::Queued).len() + view.unnamed() as usize;
            prop_assert_eq!(told, assigned.saturating_sub(running) as usize);
        }
    }
}
