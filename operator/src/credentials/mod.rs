//! The broker: a job's own OIDC token becomes a short-lived credential, from its own pod only.
//!
//! `token` and `keys` verify, `decide` (with `matchers` and `replay`) decides, both without a client or a clock; `issuers` brings keys,
//! `providers` exchange, `broker` is the API around them.

mod broker;
mod decide;
mod explain;
mod http;
mod issuers;
mod json;
mod keys;
mod matchers;
mod providers;
mod replay;
mod report;
mod revoke;
mod status;
mod token;
mod wire;

pub(crate) use broker::{Broker, Guarded, Known, Parts, pod_facts, router};
pub(crate) use explain::explain;
pub(crate) use http::{Http, no_server_at};
pub(crate) use issuers::{Issuer, IssuerConfig, Issuers, Rhythm};
pub(crate) use providers::{AppConfig, Providers};
pub(crate) use report::{Controller, Refusal, Reports, deliver};
pub(crate) use status::{Configured, status};
