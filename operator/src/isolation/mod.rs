//! Network isolation of runner pods: what is closed, what is open, the list of what must never be, and how a pod shows that it is so.

mod controls;
mod endpoints;
mod names;
mod policies;
mod targets;

pub(crate) use controls::Controls;
pub(crate) use endpoints::covers_metadata;
pub(crate) use names::Names;
pub(crate) use policies::{ClusterFacts, ForgeAddress, network_policies, no_forge_at};
pub(crate) use targets::{Surroundings, WHOLE, challenge, forbidden};
