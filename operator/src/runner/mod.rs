//! One runner is one pod: how it is built, what its state says, and how it gets its registration.

pub(crate) mod handoff;
pub(crate) mod identity;
mod pod;
pub(crate) mod sessions;
mod state;
pub(crate) mod tls;

pub(crate) use pod::{BrokerAccess, Placement, PodRequest, PodSettings, runner_pod};
pub(crate) use state::{Phase, Reason, phase};
