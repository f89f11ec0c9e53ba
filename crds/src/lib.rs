//! Mayfly's Kubernetes API: the custom resources, and the names that everything Mayfly makes is found by.
//!
//! This crate holds types and pure functions only (no client, clock or environment), so that others can compile against it.

pub mod conditions;
pub mod credential_binding;
pub mod names;
pub mod runner_pool;

pub use credential_binding::*;
pub use runner_pool::*;
