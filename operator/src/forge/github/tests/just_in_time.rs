//! Runners without a scale set, against the same simulator.

use super::super::super::JobId;
use super::*;

/// A pool's UID, and names of its runners.
const POOL: &str = "u-1";
const LABELS: [&str; 2] = ["self-hosted", "ci"];

fn name(number: u8) -> String {
    mayfly_crds::names::RunnerName::new("ci", POOL, [number; 8]).to_string()
}

fn pace() -> Pace {
    let millis = Duration::from_millis;
    Pace { group: millis(1500), queue: millis(1500), job: millis(1500), taken: millis(200), lost: millis(1000) }
}

impl Stage {
    fn jit_config(&self, path: &str) -> JitConfig {
        let url = ConfigUrl::parse(&format!("{}/{path}", self.server.url)).expect("an address");
        let repositories = url.repository().cloned().into_iter().collect();
        let labels = LABELS.map(str::to_owned).to_vec();
        JitConfig { url, labels, group: Group::default(), pool: POOL.to_owned(), repositories, pace: pace() }
    }

    fn just_in_time(&self, config: JitConfig) -> JustInTime {
        let http = http_client(None, None, |_| None).expect("a client");
        JustInTime::new(http, config, self.credential(), |_| None)
    }

    /// Jobs that run on these labels, without a workflow file.
    async fn enqueue(&self, labels: &[&str], count: usize) -> Vec<JobKey> {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        let jobs = Enqueue { repository: "acme/web".to_owned(), labels, count, ..Enqueue::default() };
        let run = self.simulator.enqueue(&jobs).await.expect("jobs");
        let jobs = self.simulator.jobs(run).await.expect("jobs");
        jobs.iter().map(|job| JobKey { repository: web(), id: JobId::from(u64::try_from(job.id).expect("a number")) }).collect()
    }

    /// Calls to REST since the last time.
    async fn calls(&self, path: &str) -> usize {
        let requests = self.simulator.requests(0).await.expect("requests");
        requests.iter().filter(|seen| seen.path.contains(path)).count()
    }
}

fn web() -> Repository {
    Repository::parse("acme/web").expect("a repository")
}

async fn ids(forge: &JustInTime, state: JobState) -> Vec<JobKey> {
    forge.jobs(state).await.expect("jobs").into_iter().map(|job| job.key).collect()
}

/// The queue of a repository can be read: no webhook is needed to find a job there, nor to know what became of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_repositorys_job_is_found_served_and_followed_to_its_end() {
    let stage = Stage::set(Settings::default()).await;
    let script = json!({"runs-on": ["ci"], "steps": [{"run": "sleep 3"}]});
    let later = json!({"runs-on": ["ci"], "needs": "one", "steps": [{"run": "true"}]});
    let workflow = json!({"on": "push", "jobs": {"one": script, "two": later}}).to_string();
    stage.simulator.workflow("acme/web", "ci.yml", &workflow).await.expect("a workflow");
    stage.push().await;
    let forge = stage.just_in_time(stage.jit_config("acme/web"));
    let jobs = forge.jobs(JobState::Queued).await.expect("jobs");
    let [job] = &jobs[..] else { panic!("one waits, the other not yet: {jobs:?}") };
    let run = forge.run(&job.key.repository, job.run).await.expect("a run");
    assert_eq!((run.event.as_str(), run.workflow.as_str(), run.fork, run.public), ("push", "ci.yml", Some(false), Some(false)));

    let reach = forge.reach(job);
    let made = forge.register(&reach, &name(1)).await.expect("a registration");
    assert_eq!(made.key.repository, Some(web()), "as narrow as there is");
    assert_eq!(forge.runners().await.expect("runners"), [RegisteredRunner { key: made.key.clone(), name: name(1) }]);
    let root = std::env::temp_dir().join(format!("mayfly-jit-{}", std::process::id()));
    std::fs::create_dir_all(&root).expect("a folder");
    let options = runner::Options { root: root.clone(), authorities: Vec::new(), ending: Arc::default() };
    let configuration = made.hand_over.clone();
    let running = tokio::task::spawn_blocking(move || runner::run(configuration.reveal(), &options));
    let taken = eventually("the job runs", || async { forge.jobs(JobState::InProgress).await.ok()?.pop() }).await;
    assert_eq!((taken.key.clone(), taken.runner.clone(), taken.runner_id), (job.key.clone(), Some(name(1)), Some(made.key.id)));
    assert!(forge.news().contains(&job.key));
    assert_eq!(forge.pause(&made.key).await, Ok(Removal::Busy));
    let claims = forge.claims(&taken).await.expect("claims");
    assert_eq!((claims["check_run_id"].clone(), claims["repository"].as_str()), (job.key.id.to_string(), "acme/web"));

    assert_eq!(running.await.expect("it ends"), runner::Exit::Success);
    eventually("its end", || async { forge.job(&job.key).await.ok()?.filter(|job| job.state == JobState::Completed) }).await;
    assert_eq!(forge.deregister(&made.key).await, Ok(Removal::Gone));
    let next = eventually("the next job", || async { forge.jobs(JobState::Queued).await.ok()?.pop() }).await;
    assert_ne!(next.key, job.key);
    std::fs::remove_dir_all(root).expect("removed");
}

/// Nothing is believed of a hint: what GitHub shows counts, in whatever order hints come, and a hint that comes again costs nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_hinted_job_is_looked_up_and_served_once() {
    let stage = Stage::set(Settings::default()).await;
    let jobs = stage.enqueue(&["ci"], 2).await;
    let labels = vec!["ci".to_owned()];
    let forge = stage.just_in_time(JitConfig { pace: Pace::default(), ..stage.jit_config("acme") });
    assert_eq!(ids(&forge, JobState::Queued).await, [], "nobody told, and an organization's queue cannot be read");
    for _ in 0..50 {
        // `completed`, `in_progress` and `queued` look the same here.
        forge.hint(jobs[1].clone(), Some(&labels));
    }
    assert_eq!(ids(&forge, JobState::Queued).await, [jobs[1].clone()]);
    for _ in 0..50 {
        forge.hint(jobs[1].clone(), Some(&labels));
        forge.jobs(JobState::Queued).await.expect("jobs");
    }
    let calls = stage.calls("/actions/jobs/").await;
    assert!((1..=3).contains(&calls), "{calls} calls for one job");

    // Somebody else's labels, a job that is not there, another organization.
    let before = stage.calls("/api/v3").await;
    forge.hint(jobs[0].clone(), Some(&["gpu".to_owned()]));
    forge.hint(jobs[0].clone(), Some(&[]));
    forge.hint(JobKey { repository: Repository::parse("eve/web").expect("a repository"), id: 1.into() }, Some(&labels));
    forge.jobs(JobState::Queued).await.expect("jobs");
    assert!(stage.calls("/api/v3").await <= before + 1, "but for the job that was hinted at");
    forge.hint(JobKey { repository: web(), id: 999_999.into() }, Some(&labels));
    assert_eq!(ids(&forge, JobState::Queued).await, [jobs[1].clone()]);

    // A lie about the labels is found out.
    let gpu = stage.enqueue(&["gpu"], 1).await;
    forge.hint(gpu[0].clone(), Some(&labels));
    assert_eq!(ids(&forge, JobState::Queued).await, [jobs[1].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_no_webhook_told_are_found_where_the_pool_names_their_repository() {
    let stage = Stage::set(Settings::default()).await;
    let jobs = stage.enqueue(&["ci"], 3).await;
    let strange = Repository::parse("acme/misspelled").expect("a repository");
    let config = JitConfig { repositories: vec![strange, web()], ..stage.jit_config("acme") };
    let forge = stage.just_in_time(config);
    assert_eq!(ids(&forge, JobState::Queued).await, jobs);
    let more = stage.enqueue(&["ci"], 1).await;
    eventually("it is read again", || async { ids(&forge, JobState::Queued).await.contains(&more[0]).then_some(()) }).await;
    // One that is cancelled is not served for ever.
    let run = forge.jobs(JobState::Queued).await.expect("jobs").iter().find(|job| job.key == more[0]).map(|job| job.run).expect("its run");
    stage.simulator.cancel(i64::try_from(run).expect("a number")).await.expect("cancelled");
    eventually("it is looked at again", || async { (!ids(&forge, JobState::Queued).await.contains(&more[0])).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_is_registered_as_narrowly_as_the_credential_may() {
    let stage = Stage::set(Settings::default()).await;
    let reach = Reach { repository: Some(web()), labels: vec!["ci".to_owned()] };
    let forge = stage.just_in_time(stage.jit_config("acme"));
    assert_eq!(forge.register(&reach, &name(1)).await.expect("at the repository").key.repository, Some(web()));
    assert_eq!(forge.runners().await.expect("runners").len(), 1, "where one was registered, it is looked for");

    // The App may not administer repositories.
    stage.fault("/api/v3/repos/**/generate-jitconfig", Fault { status: Some(403), body: Some("{}".to_owned()), ..Fault::default() }).await;
    let error = forge.register(&reach, &name(2)).await.expect_err("refused");
    assert!(matches!(error, ForgeError::Unauthorized { .. }), "{error}");
    let open = Group { allow_default_group: true, ..Group::default() };
    let forge = stage.just_in_time(JitConfig { group: open, ..stage.jit_config("acme") });
    let made = forge.register(&reach, &name(3)).await.expect("at the organization");
    assert_eq!(made.key.repository, None);
    assert_eq!(forge.deregister(&made.key).await, Ok(Removal::Done));
    assert_eq!(forge.deregister(&made.key).await, Ok(Removal::Gone));

    // In a group, where the pool names one: it says who may use the runner.
    let named = Group { name: Some("runners".to_owned()), ..Group::default() };
    let config = || JitConfig { group: named.clone(), ..stage.jit_config("acme") };
    let forge = stage.just_in_time(config());
    forge.jobs(JobState::Queued).await.expect("jobs");
    let made = forge.register(&reach, &name(4)).await.expect("in the group");
    let runners = stage.simulator.runners().await.expect("runners");
    let own = runners.iter().find(|runner| runner["name"] == name(4)).expect("the runner");
    assert_eq!((made.key.repository, &own["place"]), (None, &json!("acme")));
    assert_ne!(own["group"], json!(1));
    assert_eq!(forge.runner_group().map(|group| group.name).as_deref(), Some("runners"));
    let open = NewGroup { place: "acme".to_owned(), name: "runners".to_owned(), allows_public_repositories: true, ..NewGroup::default() };
    stage.simulator.runner_group(&open).await.expect("changed");
    let forge = stage.just_in_time(config());
    assert!(matches!(forge.jobs(JobState::Queued).await, Err(ForgeError::TooOpen(_))));
    let again = forge.register(&reach, &name(1)).await;
    assert!(again.is_err(), "a name is used once: {again:?}");
}

/// After a restart nothing is known of runners but what GitHub lists, and places of living pods.
#[tokio::test(flavor = "multi_thread")]
async fn runners_of_an_earlier_process_are_found_where_they_may_be() {
    let stage = Stage::set(Settings::default()).await;
    let reach = Reach { repository: Some(web()), labels: vec!["ci".to_owned()] };
    let made = stage.just_in_time(stage.jit_config("acme")).register(&reach, &name(1)).await.expect("a registration");
    let forge = stage.just_in_time(stage.jit_config("acme"));
    assert_eq!(forge.runners().await, Ok(vec![]));
    forge.note_place(&web());
    assert_eq!(forge.runners().await.expect("runners"), [RegisteredRunner { key: made.key, name: name(1) }]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_hints_costs_a_bounded_number_of_calls_and_a_limit_is_told() {
    let stage = Stage::set(Settings::default()).await;
    let forge = stage.just_in_time(stage.jit_config("acme"));
    for id in 0..3000_u64 {
        forge.hint(JobKey { repository: web(), id: (1_000_000 + id).into() }, Some(&["ci".to_owned()]));
    }
    for _ in 0..20 {
        forge.jobs(JobState::Queued).await.expect("jobs");
    }
    let calls = stage.calls("/actions/jobs/").await;
    assert!((200..=330).contains(&calls), "{calls}");
    let headers = [("Retry-After".to_owned(), "60".to_owned())].into();
    stage.fault("/api/v3/**", Fault { status: Some(403), headers, times: Some(1), ..Fault::default() }).await;
    let other = stage.just_in_time(stage.jit_config("acme/web"));
    assert!(matches!(other.jobs(JobState::Queued).await, Err(ForgeError::Unreachable(_))));
    let before = stage.calls("/api/v3").await;
    assert!(matches!(other.jobs(JobState::Queued).await, Err(ForgeError::Unreachable(_))));
    assert_eq!(stage.calls("/api/v3").await, before, "GitHub is left alone");
}
