//! The crate `scaleset` against the simulator: another client that nobody here wrote.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking, in its helpers as well")]

mod common;

use std::time::Duration;

use common::{PATIENCE, Ran, quick, runner, start};
use mayfly_github_simulator::control::Enqueue;
use mayfly_github_simulator::model::{Fault, Flow, Settings};
use scaleset::listener::{Event, Listener, Scaler};
use scaleset::{Client, Credentials, ExposeSecret, JitRunnerSetting, RunnerGroupId, RunnerScaleSetSpec, ScaleSetId};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// Makes a runner for every job that wants one.
struct Pool {
    client: Client,
    set: ScaleSetId,
    made: u32,
    done: u32,
    runners: UnboundedSender<JoinHandle<Ran>>,
    completed: UnboundedSender<String>,
}

impl Scaler for Pool {
    type Error = scaleset::Error;

    async fn scale(&mut self, event: Event<'_>) -> Result<(), Self::Error> {
        for job in event.message().into_iter().flat_map(|message| message.jobs_completed()) {
            self.done += 1;
            self.completed.send(job.result.to_string()).unwrap();
        }
        while self.made - self.done < event.statistics().total_assigned_jobs {
            let made = self.client.generate_jit_config(self.set, &JitRunnerSetting::unique("rust")).await?;
            self.runners.send(runner(made.encoded_jit_config.expose_secret(), &[])).unwrap();
            self.made += 1;
        }
        Ok(())
    }
}

async fn whole(flow: Flow) {
    let (server, simulator) = start(Settings { flow, ..quick() }).await;
    let (app, installation) = simulator.app("acme").await.unwrap();
    let credentials = Credentials::github_app(app.client_id, installation, &app.private_key).unwrap();
    let client = Client::builder(format!("{}/acme", server.url), credentials).allow_http(true).build().unwrap();
    let group = client.get_runner_group_by_name("Default").await.unwrap().unwrap();
    assert_eq!(group.id, RunnerGroupId::DEFAULT);
    assert!(client.get_runner_scale_set_by_name(group.id, "linux").await.unwrap().is_none());
    let spec = RunnerScaleSetSpec::new("linux").labels(["linux", "big"]).disable_update(true);
    let set = client.create_runner_scale_set(&spec).await.unwrap();
    assert_eq!(set.labels.len(), 2);
    assert!(client.create_runner_scale_set(&spec).await.is_err());

    // Somebody else has the session at first: the listener stands by.
    let other = client.create_message_session(set.id, "other").await.unwrap();
    assert!(client.create_message_session(set.id, "more").await.unwrap_err().is_conflict());
    simulator
        .enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["big".into()], count: 3, ..Enqueue::default() })
        .await
        .unwrap();
    // A poll without a body, and a token that ends.
    simulator.fault(&Fault { path: "/_services/messages/**".into(), empty_body: true, times: Some(1), ..Fault::default() }).await.unwrap();
    let (runners, mut started) = unbounded_channel();
    let (completed, mut results) = unbounded_channel();
    let mut pool = Pool { client: client.clone(), set: set.id, made: 0, done: 0, runners, completed };
    let listener = Listener::new(client.clone(), set.id, 2).backoff(Duration::from_millis(100), Duration::from_millis(500));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let listening = tokio::spawn(async move {
        listener.run(&mut pool, async { drop(stopped.await) }).await.unwrap();
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    other.close().await.unwrap();
    for number in 0..3 {
        let result = tokio::time::timeout(PATIENCE, results.recv()).await.unwrap().unwrap();
        assert_eq!(result, "succeeded");
        if number == 0 {
            simulator.expire("queue").await.unwrap();
        }
    }
    stop.send(()).unwrap();
    tokio::time::timeout(PATIENCE, listening).await.unwrap().unwrap();
    while let Some(ran) = started.recv().await {
        let ran = ran.await.unwrap();
        assert_eq!(ran.code, 0, "{}", ran.output);
    }
    client.delete_runner_scale_set(set.id).await.unwrap();
    assert!(client.get_runner_scale_set_by_id(set.id).await.is_err());
    assert!(simulator.runners().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_story_in_which_jobs_are_assigned() {
    whole(Flow::Assign).await;
}

#[tokio::test]
async fn a_story_in_which_jobs_are_acquired() {
    whole(Flow::Acquire).await;
}
