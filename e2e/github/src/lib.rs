//! A GitHub that can be tested against: a simulator of what a runner operator meets of GitHub.
//!
//! It follows the documented protocol (REST API, Actions service, broker and run service, OIDC issuer, webhooks) as far as `README.md`
//! says, on one address, with a control API of its own under `/_simulator/`. [`server::Server`] runs it in this process,
//! [`client::Simulator`] arranges things in one, [`runner`] is a stand-in for GitHub's runner program.

mod actions;
mod broker;
pub mod client;
pub mod control;
pub mod expressions;
pub mod http;
mod jobs;
pub mod keys;
pub mod model;
mod oidc;
pub mod queue;
mod rest;
pub mod runner;
pub mod server;
mod webhook;
pub mod workflow;
mod world;
