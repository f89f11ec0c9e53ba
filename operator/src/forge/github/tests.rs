//! The client against a GitHub simulator that was written without it, and that other people's clients agree with.

mod just_in_time;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::{Enqueue, NewApp, NewGroup, NewOrganization, NewRepository};
use mayfly_github_simulator::model::{Event, Fault, Flow, Settings};
use mayfly_github_simulator::{runner, server};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::super::{Members, http_client};
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const SET: &str = "ci";

/// A GitHub with organization `acme`, its private repository `acme/web` and an installed App.
struct Stage {
    server: server::Server,
    simulator: Simulator,
    app: NewApp,
    installation: u64,
    wakes: Arc<AtomicU32>,
    tasks: TaskTracker,
    proxy: Option<String>,
}

/// A client and the task that follows the scale set for it.
struct Client {
    forge: GitHub,
    listening: JoinHandle<()>,
}

impl Client {
    /// As `kill -9` would: nothing is ended in good order.
    async fn kill(self) -> Option<ScaleSet> {
        let known = self.forge.scale_set();
        self.listening.abort();
        let _ = self.listening.await;
        known
    }

    /// As at the end of the process.
    async fn end(self) {
        drop(self.forge);
        self.listening.await.expect("it ends by itself");
    }

    /// Jobs that wait, and how many of them have a name.
    async fn queued(&self) -> Result<(Vec<Job>, usize), ForgeError> {
        let named = self.forge.jobs(JobState::Queued).await?;
        let count = named.len() + self.forge.unnamed() as usize;
        Ok((named, count))
    }
}

impl Stage {
    async fn set(settings: Settings) -> Self {
        // Shown where a test fails.
        let _ = tracing_subscriber::fmt().with_test_writer().try_init();
        let settings = Settings { poll: 1.0, ..settings };
        Self::set_at(server::Config { settings, ..server::Config::default() }).await
    }

    async fn set_at(config: server::Config) -> Self {
        let server = server::Server::start(config).await.expect("a simulator");
        let simulator = Simulator::new(&format!("http://{}", server.address), b"");
        simulator.organization(&NewOrganization { login: "acme".to_owned(), enterprise: None }).await.expect("an organization");
        let repository = NewRepository { owner: "acme".to_owned(), name: "web".to_owned(), ..NewRepository::default() };
        simulator.repository(&repository).await.expect("a repository");
        let group = NewGroup { place: "acme".to_owned(), name: "runners".to_owned(), ..NewGroup::default() };
        simulator.runner_group(&group).await.expect("a runner group");
        let workflow = "on: [push, pull_request]\njobs:\n  build:\n    runs-on: ci\n    steps: [{run: 'true'}]\n";
        simulator.workflow("acme/web", "ci.yml", workflow).await.expect("a workflow");
        let (app, installation) = simulator.app("acme").await.expect("an App");
        let installation = u64::try_from(installation).expect("a number");
        Self { server, simulator, app, installation, wakes: Arc::default(), tasks: TaskTracker::new(), proxy: None }
    }

    fn config(&self, path: &str) -> Config {
        Config {
            url: ConfigUrl::parse(&format!("{}/{path}", self.server.url)).expect("an address"),
            scale_set: SET.to_owned(),
            labels: vec![SET.to_owned()],
            group: Group { name: Some("runners".to_owned()), ..Group::default() },
            owner: "mayfly team/ci".to_owned(),
            poll: Duration::from_secs(3),
            look: Duration::from_millis(1500),
        }
    }

    fn credential(&self) -> Credential {
        Credential::App {
            client_id: self.app.client_id.clone(),
            installation_id: self.installation,
            key: Secret::new(self.app.private_key.clone()),
        }
    }

    fn open(&self, config: Config, credential: Credential, earlier: Option<ScaleSet>) -> Client {
        let http = http_client(None, self.proxy.as_deref(), |_| None).expect("a client");
        let wakes = self.wakes.clone();
        let wake = move || {
            wakes.fetch_add(1, Ordering::SeqCst);
        };
        let (forge, listening) = GitHub::new(http, config, credential, |_| None, earlier, 10, wake);
        Client { forge, listening: self.tasks.spawn(listening) }
    }

    fn client(&self) -> Client {
        self.open(self.config("acme"), self.credential(), None)
    }

    async fn push(&self) {
        self.simulator.dispatch("acme/web", &Event::default()).await.expect("a run");
    }

    async fn sets(&self) -> Vec<Value> {
        self.simulator.scale_sets().await.expect("scale sets")
    }

    async fn fault(&self, path: &str, fault: Fault) {
        self.simulator.fault(&Fault { path: path.to_owned(), ..fault }).await.expect("a fault");
    }
}

async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, look: impl Fn() -> F) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// So many jobs wait, named or not.
async fn waiting(client: &Client, count: usize) -> Vec<Job> {
    let begun = Instant::now();
    loop {
        let queued = client.queued().await;
        match queued {
            Ok((jobs, found)) if found == count => return jobs,
            other => assert!(begun.elapsed() < PATIENCE, "not {count} jobs within {PATIENCE:?}: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_seen_with_its_run_and_gets_a_runner_of_the_scale_set() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    stage.push().await;
    let job = waiting(&client, 1).await.remove(0);
    let run = client.forge.run(&job.key.repository, job.run).await.expect("a run");
    assert_eq!((run.event.as_str(), run.workflow.as_str(), run.git_ref.as_str()), ("push", "ci.yml", "refs/heads/main"));
    assert_eq!((run.fork, job.key.repository.as_str(), job.labels.as_slice()), (Some(false), "acme/web", &["ci".to_owned()][..]));
    assert!(stage.wakes.load(Ordering::SeqCst) > 0, "the pool is told at once");

    let made = client.forge.register(&client.forge.reach(&job), "ci-1-a").await.expect("a registration");
    assert!(made.hand_over.reveal().len() > 1000, "a JIT configuration");
    let runners = client.forge.runners().await.expect("runners");
    assert_eq!(runners, [RegisteredRunner { key: made.key.clone(), name: "ci-1-a".to_owned() }]);
    let again = client.forge.register(&Reach::default(), "ci-1-a").await.expect_err("a name is used once");
    assert!(again.to_string().contains("AgentExists"), "{again}");
    assert_eq!(client.forge.pause(&made.key).await, Ok(Removal::Done));
    assert_eq!(client.forge.deregister(&made.key).await, Ok(Removal::Gone));
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_server_gives_out_the_jobs_that_were_claimed_and_no_others() {
    let stage = Stage::set(Settings { flow: Flow::Acquire, byte_order_mark: true, ..Settings::default() }).await;
    let client = stage.client();
    stage.push().await;
    stage.push().await;
    let jobs = waiting(&client, 2).await;
    client.forge.claim(&[jobs[0].key.clone()]).await.expect("claimed");
    let assigned = eventually("one is assigned", || async {
        let numbers = stage.sets().await.remove(0)["statistics"].clone();
        (numbers["totalAssignedJobs"] == 1).then_some(numbers)
    })
    .await;
    assert_eq!(assigned["totalAssignedJobs"], 1, "the other was not asked for");
    assert_eq!(waiting(&client, 2).await.len(), 2, "both are told: one waits for a runner, one for being claimed");
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_takes_the_session_over_where_the_process_was_killed() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    let known = client.kill().await;
    assert!(known.as_ref().is_some_and(|set| set.session.is_some()));
    stage.push().await;

    let begun = Instant::now();
    let successor = stage.open(stage.config("acme"), stage.credential(), known.clone());
    waiting(&successor, 1).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(successor.forge.scale_set(), known, "it is the same session");
    successor.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_somebody_else_holds_is_waited_for_and_told() {
    let stage = Stage::set(Settings { session_hold: 6.0, ..Settings::default() }).await;
    let client = stage.client();
    waiting(&client, 0).await;
    client.kill().await;
    let stranger = stage.client();
    let error = stranger.forge.jobs(JobState::Queued).await.expect_err("the session is held");
    assert!(error.to_string().contains("somebody else holds the session"), "{error}");
    stage.push().await;
    waiting(&stranger, 1).await;
    stranger.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_end_lets_go_of_the_session() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    client.end().await;
    assert!(stage.sets().await[0]["session"].is_null());
    let next = stage.client();
    waiting(&next, 0).await;
    next.forge.retire().await.expect("the pool goes");
    assert!(stage.sets().await.is_empty(), "and with it its scale set");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_away_at_github_is_made_anew() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    let set = stage.sets().await[0]["id"].as_i64().expect("a number");
    stage.simulator.drop_session(set).await.expect("dropped");
    stage.push().await;
    waiting(&client, 1).await;
    stage.simulator.delete_scale_set(set).await.expect("deleted");
    eventually("a new scale set with a session", || async {
        let sets = stage.sets().await;
        sets.first().filter(|new| new["id"] != set && !new["session"].is_null()).map(drop)
    })
    .await;
    stage.push().await;
    eventually("jobs come to it", || async { client.queued().await.ok().filter(|(_, count)| *count >= 1) }).await;
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_and_message_ids_begin_anew_and_nothing_is_missed() {
    let stage = Stage::set(Settings { admin_token: 2.0, queue_token: 2.0, ..Settings::default() }).await;
    let client = stage.client();
    for count in 1..=4 {
        stage.push().await;
        waiting(&client, count).await;
        let set = stage.sets().await[0]["id"].as_i64().expect("a number");
        match count {
            1 => stage.simulator.restart_message_ids(set).await.expect("restarted"),
            2 => stage.simulator.expire("queue").await.expect("expired"),
            _ => {
                stage.simulator.expire("admin").await.expect("expired");
                stage.simulator.expire("installation").await.expect("expired");
            }
        }
    }
    let made =
        eventually("a runner is registered with a new token", || async { client.forge.register(&Reach::default(), "ci-1-b").await.ok() });
    made.await;
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_answers_are_survived_and_told() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    let mut jobs = 0;
    let polls = "/_services/messages/**";
    let faults = [
        (polls, Fault { empty_body: true, times: Some(3), ..Fault::default() }),
        (polls, Fault { status: Some(500), times: Some(3), ..Fault::default() }),
        (polls, Fault { status: Some(200), body: Some("<html>".to_owned()), times: Some(1), ..Fault::default() }),
        (polls, Fault { drop: true, times: Some(2), ..Fault::default() }),
        // Longer than a poll may take: the client is not deaf for ever.
        (polls, Fault { hang: true, times: Some(1), ..Fault::default() }),
        ("/**/sessions/**", Fault { empty_queue_url: true, times: Some(1), ..Fault::default() }),
    ];
    for (path, fault) in faults {
        stage.fault(path, fault).await;
        if path != polls {
            stage.simulator.expire("queue").await.expect("expired");
        }
        stage.push().await;
        jobs += 1;
        waiting(&client, jobs).await;
        // The pause grows with each failure until a poll succeeds, also where the numbers came with a new session.
        let before = stage.simulator.requests(0).await.expect("requests").last().map_or(0, |seen| seen.number);
        eventually("a poll without a fault, which brings nothing", || async {
            let since = stage.simulator.requests(before).await.expect("requests");
            since.iter().any(|seen| seen.path.starts_with("/_services/messages/") && seen.status == 202).then_some(())
        })
        .await;
    }
    stage.fault("/**", Fault { status: Some(503), method: Some("GET".to_owned()), ..Fault::default() }).await;
    let error = eventually("it is told that GitHub is away", || async { client.forge.jobs(JobState::Queued).await.err() }).await;
    assert!(matches!(error, ForgeError::Unreachable(_)), "{error}");
    stage.simulator.clear_faults().await.expect("no faults");
    waiting(&client, jobs).await;
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn github_is_left_alone_for_as_long_as_it_asks() {
    let stage = Stage::set(Settings::default()).await;
    let headers = [("Retry-After".to_owned(), "2".to_owned())].into();
    stage.fault("/api/v3/**", Fault { status: Some(403), headers, times: Some(1), ..Fault::default() }).await;
    let client = stage.client();
    let begun = Instant::now();
    waiting(&client, 0).await;
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    let refused = stage.simulator.requests(0).await.expect("requests").into_iter().filter(|seen| seen.status == 403).count();
    assert_eq!(refused, 1);
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_rotated_while_jobs_come() {
    let stage = Stage::set(Settings { admin_token: 2.0, ..Settings::default() }).await;
    let client = stage.client();
    waiting(&client, 0).await;
    let new = stage.simulator.rotate_app_key(stage.app.app_id, false).await.expect("a key");
    stage.simulator.expire("installation").await.expect("expired");
    stage.simulator.expire("admin").await.expect("expired");
    let credential = |key: &str| Credential::App {
        client_id: new.client_id.clone(),
        installation_id: stage.installation,
        key: Secret::new(key.to_owned()),
    };
    assert!(client.forge.register(&Reach::default(), "ci-1-a").await.is_err(), "the old key is void");
    client.forge.renew(credential(&new.private_key));
    stage.push().await;
    waiting(&client, 1).await;
    client.forge.register(&Reach::default(), "ci-1-b").await.expect("with the new key");
    client.end().await;

    let broken = stage.open(stage.config("acme"), credential("no key"), None);
    let error = broken.forge.jobs(JobState::Queued).await.expect_err("no key");
    assert!(matches!(&error, ForgeError::Unauthorized { what } if what.contains("no RSA key")), "{error}");
    broken.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_too_open_is_refused_unless_the_pool_says_so() {
    let stage = Stage::set(Settings::default()).await;
    let group = |name: Option<&str>, default: bool, public: bool| Group {
        name: name.map(str::to_owned),
        allow_default_group: default,
        allow_public_repositories: public,
        ..Group::default()
    };
    let public = NewGroup { place: "acme".to_owned(), name: "open".to_owned(), allows_public_repositories: true, ..NewGroup::default() };
    stage.simulator.runner_group(&public).await.expect("a runner group");
    let repository = NewRepository { owner: "acme".to_owned(), name: "oss".to_owned(), private: false, ..NewRepository::default() };
    stage.simulator.repository(&repository).await.expect("a repository");
    for (path, group, wrong) in [
        ("acme", group(None, false, false), Some("default runner group")),
        ("acme", group(None, true, false), None),
        ("acme", group(Some("open"), false, false), Some("public repositories")),
        ("acme", group(Some("open"), false, true), None),
        ("acme", group(Some("nobody's"), false, false), Some("no runner group")),
        ("acme/oss", group(None, false, false), Some("acme/oss is public")),
        ("acme/oss", group(None, false, true), None),
        ("acme/web", group(None, false, false), None),
    ] {
        let client = stage.open(Config { group: group.clone(), ..stage.config(path) }, stage.credential(), None);
        let jobs = client.forge.jobs(JobState::Queued).await;
        match wrong {
            Some(says) => assert!(jobs.as_ref().is_err_and(|error| error.to_string().contains(says)), "{path} {group:?}: {jobs:?}"),
            None => assert!(jobs.is_ok(), "{path} {group:?}: {jobs:?}"),
        }
        client.end().await;
    }
}

/// The group's rules are read, and looked at again while the session goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_required_to_be_restricted_and_what_it_lets_in_is_known() {
    let stage = Stage::set(Settings::default()).await;
    let workflow = "acme/web/.github/workflows/ci.yml@refs/heads/main".to_owned();
    let closed = NewGroup {
        place: "acme".to_owned(),
        name: "runners".to_owned(),
        visibility: "selected".to_owned(),
        repositories: vec!["acme/web".to_owned()],
        restricted_to_workflows: true,
        selected_workflows: vec![workflow.clone()],
        ..NewGroup::default()
    };
    let group = Group {
        name: Some("runners".to_owned()),
        require_selected_repositories: true,
        require_selected_workflows: true,
        ..Group::default()
    };
    let config = || Config { group: group.clone(), ..stage.config("acme") };
    let refused = stage.open(config(), stage.credential(), None);
    let error = refused.forge.jobs(JobState::Queued).await.expect_err("the group is open");
    assert!(matches!(&error, ForgeError::TooOpen(why) if why.contains("repository access")), "{error}");
    assert!(stage.sets().await.is_empty(), "nothing was made");
    refused.end().await;

    stage.simulator.runner_group(&NewGroup { restricted_to_workflows: false, ..closed.clone() }).await.expect("changed");
    let refused = stage.open(config(), stage.credential(), None);
    let error = refused.forge.jobs(JobState::Queued).await.expect_err("the group is open");
    assert!(matches!(&error, ForgeError::TooOpen(why) if why.contains("workflow access")), "{error}");
    refused.end().await;

    stage.simulator.runner_group(&closed).await.expect("changed");
    let client = stage.open(config(), stage.credential(), None);
    waiting(&client, 0).await;
    let web = Repository::parse("acme/web").expect("a repository");
    let told = RunnerGroup { name: "runners".to_owned(), members: Members::Repositories(vec![web]), workflows: Some(vec![workflow]) };
    assert_eq!(client.forge.runner_group(), Some(told));
    stage.simulator.runner_group(&NewGroup { visibility: "all".to_owned(), ..closed.clone() }).await.expect("changed");
    eventually("it is noticed", || async {
        matches!(client.forge.jobs(JobState::Queued).await, Err(ForgeError::TooOpen(_))).then_some(())
    })
    .await;
    stage.simulator.runner_group(&closed).await.expect("changed");
    stage.push().await;
    waiting(&client, 1).await;
    client.end().await;
}

/// Groups of an enterprise select organizations.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_an_enterprise_is_known_by_its_organizations() {
    let stage = Stage::set(Settings::default()).await;
    stage.simulator.enterprise("big").await.expect("an enterprise");
    stage.simulator.organization(&NewOrganization { login: "acme".to_owned(), enterprise: Some("big".to_owned()) }).await.expect("changed");
    let group = NewGroup {
        place: "enterprises/big".to_owned(),
        name: "runners".to_owned(),
        visibility: "selected".to_owned(),
        organizations: vec!["acme".to_owned()],
        ..NewGroup::default()
    };
    stage.simulator.runner_group(&group).await.expect("a group");
    let credential = Credential::Token(Secret::new(stage.simulator.personal_token().await.expect("a token")));
    let client = stage.open(stage.config("enterprises/big"), credential, None);
    stage.push().await;
    waiting(&client, 1).await;
    let members = client.forge.runner_group().map(|group| group.members);
    assert_eq!(members, Some(Members::Organizations(vec!["acme".to_owned()])));
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_that_a_server_drops_are_told() {
    let stage = Stage::set(Settings { drop_custom_labels: true, ..Settings::default() }).await;
    let labels = vec![SET.to_owned(), "gpu".to_owned()];
    let client = stage.open(Config { labels, ..stage.config("acme") }, stage.credential(), None);
    let error = client.forge.jobs(JobState::Queued).await.expect_err("a label is missing");
    assert!(error.to_string().contains("\"gpu\""), "{error}");
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_request_of_a_fork_is_told_from_others() {
    let stage = Stage::set(Settings::default()).await;
    let fork = NewRepository { owner: "eve".to_owned(), name: "web".to_owned(), fork: true, ..NewRepository::default() };
    stage.simulator.repository(&fork).await.expect("a fork");
    let client =
        stage.open(stage.config("acme"), Credential::Token(Secret::new(stage.simulator.personal_token().await.expect("a token"))), None);
    for (head, is_fork) in [(Some("eve/web"), true), (None, false)] {
        let event = Event {
            name: "pull_request".to_owned(),
            git_ref: "refs/pull/3/merge".to_owned(),
            head_repository: head.map(str::to_owned),
            ..Event::default()
        };
        stage.simulator.dispatch("acme/web", &event).await.expect("a run");
        let job = waiting(&client, 1).await.remove(0);
        let run = client.forge.run(&job.key.repository, job.run).await.expect("a run");
        assert_eq!((run.event.as_str(), run.fork), ("pull_request", Some(is_fork)));
        stage.simulator.cancel(i64::try_from(job.run).expect("a number")).await.expect("cancelled");
        waiting(&client, 0).await;
    }
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn github_gives_out_no_more_than_there_is_room_for() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    client.forge.note_room(3);
    eventually("the room is told", || async { (stage.sets().await[0]["capacity"] == json!(3)).then_some(()) }).await;
    let many = Enqueue { repository: "acme/web".to_owned(), labels: vec![SET.to_owned()], count: 8, ..Enqueue::default() };
    stage.simulator.enqueue(&many).await.expect("jobs");
    waiting(&client, 3).await;
    client.forge.note_room(5);
    waiting(&client, 5).await;
    client.end().await;
}

/// GitHub reads the room at the beginning of a poll, and holds that for most of a minute.
#[tokio::test(flavor = "multi_thread")]
async fn more_room_is_told_while_github_holds_a_poll() {
    let config = server::Config { settings: Settings { poll: 50.0, ..Settings::default() }, ..server::Config::default() };
    let stage = Stage::set_at(config).await;
    let client = stage.open(Config { poll: Duration::from_secs(70), ..stage.config("acme") }, stage.credential(), None);
    waiting(&client, 0).await;
    // The poll is on its way with the room that there was at first.
    eventually("a poll", || async { (stage.sets().await[0]["capacity"] == json!(10)).then_some(()) }).await;
    client.forge.note_room(0);
    let many = Enqueue { repository: "acme/web".to_owned(), labels: vec![SET.to_owned()], count: 20, ..Enqueue::default() };
    stage.simulator.enqueue(&many).await.expect("jobs");
    waiting(&client, 10).await;
    for room in [12, 15] {
        client.forge.note_room(room);
        waiting(&client, room as usize).await;
    }
    let polls = || async {
        let requests = stage.simulator.requests(0).await.expect("requests");
        requests.iter().filter(|seen| seen.path.starts_with("/_services/messages") && seen.method == "GET").count()
    };
    let before = polls().await;
    for room in [14, 15, 13, 15] {
        client.forge.note_room(room);
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert_eq!(polls().await, before, "what GitHub knows already costs no poll");
    client.end().await;
}

/// github.com's own shape, with REST at a host of its own: the simulator is the proxy, as nobody here can resolve the names.
#[tokio::test(flavor = "multi_thread")]
async fn a_hosted_github_is_reached_through_a_proxy() {
    let settings = Settings { poll: 1.0, ..Settings::default() };
    let config = server::Config { public_url: Some("http://github.localhost".to_owned()), settings, ..server::Config::default() };
    let mut stage = Stage::set_at(config).await;
    stage.proxy = Some(format!("http://{}", stage.server.address));
    let client = stage.client();
    stage.push().await;
    waiting(&client, 1).await;
    client.forge.register(&Reach::default(), "ci-1-a").await.expect("a registration");
    client.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_has_a_job_is_kept() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    waiting(&client, 0).await;
    let made = client.forge.register(&Reach::default(), "ci-1-a").await.expect("a registration");
    let refusal = json!({"typeName": "GitHub.DistributedTask.WebApi.JobStillRunningException", "message": "no"}).to_string();
    let headers = [("Content-Type".to_owned(), "application/json".to_owned())].into();
    let fault =
        Fault { method: Some("DELETE".to_owned()), status: Some(400), body: Some(refusal), headers, times: Some(1), ..Fault::default() };
    stage.fault("/**/agents/*", fault).await;
    assert_eq!(client.forge.pause(&made.key).await, Ok(Removal::Busy));
    assert_eq!(client.forge.runners().await.expect("runners").len(), 1);
    assert_eq!(client.forge.deregister(&made.key).await, Ok(Removal::Done));
    client.end().await;
}

/// The runner's stand-in has the job: GitHub says which it is, keeps its runner, and gives it a token that says what we were told.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_known_by_what_its_token_says() {
    let stage = Stage::set(Settings::default()).await;
    let client = stage.client();
    let ask = "import json,os,time,urllib.request as u; e=os.environ; r=u.Request(e['ACTIONS_ID_TOKEN_REQUEST_URL']+'&audience=x', \
               headers={'Authorization': 'bearer '+e['ACTIONS_ID_TOKEN_REQUEST_TOKEN']}); \
               print('payload='+json.load(u.urlopen(r))['value'].split('.')[1]); time.sleep(3)";
    let job = json!({"runs-on": SET, "permissions": {"id-token": "write"}, "steps": [{"run": ask, "shell": "python3 {0}"}]});
    // Two of a kind: their names are all that tells them apart.
    let workflow = json!({"on": "push", "jobs": {"one": job, "other": job}}).to_string();
    stage.simulator.workflow("acme/web", "ci.yml", &workflow).await.expect("a workflow");
    stage.push().await;
    waiting(&client, 2).await;

    let made = client.forge.register(&Reach::default(), "ci-1-a").await.expect("a registration");
    let root = std::env::temp_dir().join(format!("mayfly-claims-{}", std::process::id()));
    std::fs::create_dir_all(&root).expect("a folder");
    let options = runner::Options { root: root.clone(), authorities: Vec::new(), ending: Arc::default() };
    let configuration = made.hand_over.clone();
    let running = tokio::task::spawn_blocking(move || runner::run(configuration.reveal(), &options));
    let job = eventually("the job runs", || async { client.forge.jobs(JobState::InProgress).await.ok()?.pop() }).await;
    assert_eq!(job.runner.as_deref(), Some("ci-1-a"));
    assert_eq!(client.forge.deregister(&made.key).await, Ok(Removal::Busy), "a runner with a job is kept");
    let claims = client.forge.claims(&job).await.expect("claims");

    assert_eq!(running.await.expect("it ends"), runner::Exit::Success);
    let run = i64::try_from(job.run).expect("a number");
    let jobs = stage.simulator.jobs(run).await.expect("jobs");
    let own = jobs.iter().find(|listed| listed.runner.as_deref() == Some("ci-1-a")).expect("its job");
    let log = stage.simulator.job(own.id).await.expect("its log").log;
    assert_eq!(claims["check_run_id"], own.id.to_string());
    let (_, payload) = log.lines().rev().find_map(|line| line.split_once("payload=")).expect(&log);
    let token: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload.trim()).expect("base64")).expect("claims");
    for (name, value) in &claims {
        let told = token[name].as_str().map_or_else(|| token[name].to_string(), str::to_owned);
        assert_eq!(&told, value, "{name}");
    }
    assert!(claims.len() >= 7, "{claims:?}");
    let key = job.key.clone();
    eventually("its end", || async { client.forge.job(&key).await.ok()?.filter(|job| job.state == JobState::Completed) }).await;
    assert_eq!(client.forge.deregister(&made.key).await, Ok(Removal::Gone));
    std::fs::remove_dir_all(root).expect("removed");
    client.end().await;
}
