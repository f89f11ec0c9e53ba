//! The sweep: what the forge has and the cluster does not is removed, however it came about.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::SignedDuration;
use kube::ResourceExt;
use serde_json::json;

use crate::audit::Action;
use crate::forge::{Forge, RegisteredRunner};
use crate::pool::{Context, Pool, PoolHandle, own_pods, runners_of_pool};

/// Between two sweeps of a pool.
const EVERY: SignedDuration = SignedDuration::from_mins(10);

/// Starts a sweep in the background when its time has come.
pub(crate) fn sweep_if_due(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>, forge: &Arc<dyn Forge>) {
    let now = ctx.now();
    {
        let mut state = handle.state();
        if state.next_sweep.is_some_and(|at| at > now) {
            return;
        }
        state.next_sweep = Some(now + EVERY);
    }
    let (task_ctx, pool, handle, forge) = (ctx.clone(), pool.clone(), handle.clone(), forge.clone());
    ctx.tasks.spawn(async move { sweep(&task_ctx, &pool, &handle, &forge).await });
}

async fn sweep(ctx: &Context, pool: &Pool, handle: &PoolHandle, forge: &Arc<dyn Forge>) {
    let listed = match runners_of_pool(forge, &pool.uid).await {
        Ok(listed) => listed,
        Err(error) => return tracing::warn!(pool = %pool.key, %error, "the forge could not be searched for leftovers"),
    };
    // Who lives is read after the list: a runner registered meanwhile is not in the list, or has a living pod.
    let mut living: BTreeSet<String> = own_pods(ctx, pool).iter().map(|pod| pod.name_any()).collect();
    living.extend(handle.state().spawned.keys().cloned());
    for runner in orphans(&listed, &living) {
        let removed = forge.deregister(&runner.key).await;
        let target = json!({"kind": "Registration", "id": runner.key.id, "name": runner.name});
        ctx.record(ctx.event(Action::RunnerSwept, &pool.key, target).about(json!({}), removed.is_ok()));
        match removed {
            Ok(_) => tracing::info!(pool = %pool.key, runner = runner.name, "removed a registration without a pod"),
            Err(error) => tracing::warn!(pool = %pool.key, runner = runner.name, %error, "a leftover could not be removed"),
        }
    }
}

/// Runners that no pod stands behind.
fn orphans<'a>(listed: &'a [RegisteredRunner], living: &BTreeSet<String>) -> Vec<&'a RegisteredRunner> {
    listed.iter().filter(|runner| !living.contains(&runner.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forge::{Repository, RunnerKey};

    #[test]
    fn only_runners_without_a_pod_are_leftovers() {
        let runner =
            |name: &str| RegisteredRunner { key: RunnerKey { repository: Repository::parse("acme/web"), id: 1 }, name: name.to_owned() };
        let listed = [runner("ci-a"), runner("ci-b")];
        let living = BTreeSet::from(["ci-b".to_owned(), "ci-c".to_owned()]);
        assert_eq!(orphans(&listed, &living), [&listed[0]]);
    }
}
