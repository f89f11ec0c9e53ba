//! Dialects of network policies beside NetworkPolicy, where the cluster has them: what is wanted, what stands, what is applied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kube::ResourceExt;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::watch;

use super::controller::Context;
use super::validate::Pool;
use crate::isolation::{CiliumNetworkPolicy, ClusterFacts, ForgeAddress, cilium_policies};

/// What a CiliumNetworkPolicy's version is noted under, before its name.
const CILIUM: &str = "CiliumNetworkPolicy/";

/// Whether the cluster's network engine opens host names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Names {
    /// It has no policies that know any.
    #[default]
    NoEngine,
    /// It has, and what they need is off.
    NoProxy,
    /// It does.
    Known,
}

/// Which dialects the API server speaks, and Mayfly's objects in them.
pub(crate) struct Dialects {
    /// Whether it serves CiliumNetworkPolicy; nothing before it was asked.
    served: watch::Sender<Option<bool>>,
    /// Whether its agents have the proxy that reads what the DNS answers.
    proxy: AtomicBool,
    policies: Store<PartialObjectMeta<CiliumNetworkPolicy>>,
}

impl Dialects {
    /// Before the API server was asked.
    pub(crate) fn new(policies: Store<PartialObjectMeta<CiliumNetworkPolicy>>) -> Self {
        Self { served: watch::Sender::new(None), proxy: AtomicBool::new(true), policies }
    }

    /// Notes the answer; true where it is news.
    pub(crate) fn note_cilium(&self, served: bool) -> bool {
        self.served.send_replace(Some(served)) != Some(served)
    }

    /// Notes whether Cilium's proxy is on; true where it is news.
    pub(crate) fn note_proxy(&self, on: bool) -> bool {
        self.proxy.swap(on, Ordering::Relaxed) != on
    }

    /// Whether pools can open host names.
    pub(super) fn names(&self) -> Names {
        match (self.cilium(), self.proxy.load(Ordering::Relaxed)) {
            (false, _) => Names::NoEngine,
            (true, false) => Names::NoProxy,
            (true, true) => Names::Known,
        }
    }

    /// Waits for the first answer.
    pub(crate) async fn asked(&self) {
        // The sender lives as long as `self`.
        let _ = self.served.subscribe().wait_for(Option::is_some).await;
    }

    /// Whether the cluster has Cilium's policies.
    pub(crate) fn cilium(&self) -> bool {
        *self.served.borrow() == Some(true)
    }
}

/// What the builders have to know, with what the watches show.
pub(super) fn facts(ctx: &Context) -> ClusterFacts {
    let (nodes, api_server) = (ctx.nodes.state(), ctx.api_endpoints.state());
    ctx.settings.cluster.clone().joined(nodes.iter().map(|node| &**node), api_server.iter().map(|slice| &**slice))
}

/// The pool's policies in Cilium's dialect; none where the cluster does not have it.
pub(super) fn wanted(ctx: &Context, pool: &Pool, forge: &ForgeAddress, cluster: &ClusterFacts) -> Result<Vec<CiliumNetworkPolicy>, String> {
    let mut egress = pool.spec.isolation.egress.clone();
    match ctx.dialects.names() {
        Names::NoEngine => return Ok(Vec::new()),
        // Its agents would refuse the policy.
        Names::NoProxy => egress.hosts.clear(),
        Names::Known => {}
    }
    cilium_policies(&pool.key.name, &pool.key.namespace, &pool.owner, &egress, forge, cluster)
}

/// The version of a policy that stands, if it is noted in one of these dialects.
pub(super) fn seen(ctx: &Context, pool: &Pool, noted: &str) -> Option<String> {
    let reference = ObjectRef::new(noted.strip_prefix(CILIUM)?).within(&pool.key.namespace);
    ctx.dialects.policies.get(&reference).map(|policy| version(&*policy))
}

/// Applies the policies and notes their versions; removes those that are wanted no more.
pub(super) async fn apply(
    ctx: &Context,
    pool: &Pool,
    wanted: &[CiliumNetworkPolicy],
    versions: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    for policy in wanted {
        let stored = ctx.io.apply(&pool.key.namespace, policy).await.map_err(|error| format!("{CILIUM}{}", error.message()))?;
        versions.insert(format!("{CILIUM}{}", stored.name_any()), version(&stored));
    }
    if !ctx.dialects.cilium() {
        return Ok(());
    }
    let stale = |policy: &Arc<PartialObjectMeta<CiliumNetworkPolicy>>| {
        policy.namespace().as_deref() == Some(&pool.key.namespace)
            && policy.owner_references().iter().any(|owner| owner.uid == pool.uid)
            && !versions.contains_key(&format!("{CILIUM}{}", policy.name_any()))
    };
    for policy in ctx.dialects.policies.state().iter().filter(|policy| stale(policy)) {
        let deleted = ctx.io.delete::<CiliumNetworkPolicy>(&pool.key.namespace, &policy.name_any()).await;
        deleted.map_err(|error| format!("{CILIUM}{}", error.message()))?;
    }
    Ok(())
}

/// Which object it is, and how often its spec was changed. Not its resource version: some versions of Cilium write into the status.
fn version(policy: &impl ResourceExt) -> String {
    format!("{} {}", policy.uid().unwrap_or_default(), policy.meta().generation.unwrap_or_default())
}
