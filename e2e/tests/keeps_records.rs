//! What happens is on record, in a chain that shows what was done to it.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use kube::api::DeleteParams;
use mayfly_cluster::command::output;
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, turn, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::built;
use mayfly_e2e::{audit, pool};
use serde_json::{Value, json};

/// The operator's process, as its chart names it.
const CONTROLLER: &str = "controller";

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_pool_and_of_a_runner_is_on_record() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("records").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 4"))], 1).await?;
    let runner = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    stage.succeeds("app", jobs[0].id).await?;
    let of_runner = |record: &Value| record["target"]["name"] == json!(runner.name_any());
    let records = eventually("the runner's end is on record", PATIENCE, || async {
        let records = audit::records(&stage.world, CONTROLLER, &stage.namespace).await?;
        Ok(records.iter().any(|record| of_runner(record) && record["action"] == "runner.completed").then_some(records))
    })
    .await?;
    let told: Vec<&str> = records.iter().filter(|record| of_runner(record)).filter_map(|record| record["action"].as_str()).collect();
    ensure!(told == ["runner.started", "runner.registered", "job.matched", "runner.completed"], "{told:?}");
    let first = records.first().context("a record")?;
    ensure!(first["action"] == "pool.created" && first["payload"]["spec"]["scale"]["max"].is_u64(), "{first}");
    let job = records.iter().find(|record| record["action"] == "job.matched").context("the job")?;
    ensure!(job["payload"]["job"] == json!(format!("{}/app#{}", stage.organization.name, jobs[0].id)), "{job}");
    for record in &records {
        ensure!(record["scope"] == json!({"namespace": stage.namespace, "pool": POOL}), "{record}");
        ensure!(record["actor"]["kind"] == "Controller" && record["success"] == json!(true), "{record}");
    }

    pool::pools(&stage.world, &stage.namespace).delete(POOL, &DeleteParams::default()).await?;
    eventually("the pool's end is on record", PATIENCE, || async {
        let records = audit::records(&stage.world, CONTROLLER, &stage.namespace).await?;
        Ok(records.iter().any(|record| record["action"] == "pool.deleted").then_some(()))
    })
    .await?;
    verify(&stage).await?;
    stage.strike().await
}

/// The records hold together as their own program sees it, and do not any more when one is left out.
async fn verify(stage: &Stage) -> Result<()> {
    let log = audit::logs(&stage.world, CONTROLLER).await?.pop().context("a controller")?;
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(r#""hash":""#)).collect();
    let file = std::env::temp_dir().join(format!("{}.jsonl", stage.namespace));
    let check = |lines: &[&str]| -> Result<String> {
        fs::write(&file, lines.join("\n") + "\n")?;
        // A log that was rotated has lost its beginning.
        output(Command::new(built()?.join("mayfly")).args(["audit", "verify", "--continued"]).arg(&file))
    };
    let whole = check(&lines)?;
    let without = [&lines[..1], &lines[2..]].concat();
    let broken = check(&without);
    fs::remove_file(&file)?;
    ensure!(whole.contains(&format!("{} records", lines.len())), "{whole}");
    ensure!(broken.is_err_and(|error| error.to_string().contains("line 2")), "a record that is left out goes unseen");
    Ok(())
}
