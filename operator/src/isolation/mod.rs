//! Network isolation of runner pods: what is closed, what is open, the list of what must never be, and how a pod shows that it is so.

mod cilium;
mod cluster_wide;
mod controls;
mod endpoints;
mod facts;
mod names;
mod policies;
mod targets;

pub(crate) use cilium::{CiliumNetworkPolicy, cilium_policies, is_host_name};
pub(crate) use cluster_wide::{Dialect, cluster_wide_denial};
pub(crate) use controls::{Beside, Controls};
pub(crate) use endpoints::covers_metadata;
pub(crate) use facts::{ClusterFacts, nameservers};
pub(crate) use names::Names;
pub(crate) use policies::{ForgeAddress, network_policies, no_forge_at};
pub(crate) use targets::{Surroundings, WHOLE, challenge, forbidden};
