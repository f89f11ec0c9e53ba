//! Network isolation of runner pods, as pure builders: what is closed, what is open, and the list of what must never be.

mod endpoints;
mod policies;

pub(crate) use endpoints::covers_metadata;
pub(crate) use policies::{ClusterFacts, ForgeAddress, network_policies};
