//! A RunnerPool and how many pods it needs: gather, validate and decide, plan (pure), apply, status.

mod accept;
mod apply;
mod controller;
mod dialects;
mod gather;
pub(crate) mod hints;
mod nodes;
mod plan;
pub(crate) mod proof;
mod registry;
mod room;
mod status;
mod validate;

pub(crate) use apply::{reference_to, runner_target};
pub(crate) use controller::{Context, Guarded, run};
pub(crate) use dialects::Dialects;
pub(crate) use gather::{own_pods, runners_of_pool};
pub(crate) use nodes::looked_at;
pub(crate) use registry::{Deaf, NoJob, OwedJob, PoolHandle, PoolKey, Pools};
pub(crate) use room::parts;
pub(crate) use validate::{Pool, Validated};
#[cfg(test)]
pub(crate) use {controller::tests::context, registry::Spawned};
