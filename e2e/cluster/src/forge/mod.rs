//! The forge: Gitea, in the outside world, and a client of its REST interface for tests and demos.

mod client;
mod server;

pub use client::{CallError, Forge, Job, Run, Runner, Scope};
pub use server::{ACCESS_LOG, ADMIN, PART, PASSWORD_FILE, Place, TOKEN_FILE, admin_password, admin_token, ensure, healthy};
