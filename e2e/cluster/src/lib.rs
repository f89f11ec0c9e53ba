//! A real Kubernetes cluster, a real forge and a network policy engine that enforces, on one Linux machine without a container
//! daemon: for Mayfly's tests, benchmarks and demo.
//!
//! ```no_run
//! use mayfly_cluster::{Cluster, Options, Progress};
//!
//! # fn main() -> anyhow::Result<()> {
//! let cluster = Cluster::up(Options::default(), &Progress::stderr())?;
//! let forge = cluster.forge()?.client();
//! forge.create_org("acme")?;
//! # Ok(())
//! # }
//! ```

pub mod artefacts;
pub mod builder;
pub mod cgroup;
pub mod cluster;
pub mod command;
pub mod control_plane;
pub mod dns;
pub mod engine;
pub mod forge;
mod given;
pub mod images;
mod kind;
pub mod layout;
pub mod local;
pub mod net;
pub mod node;
pub mod packages;
pub mod pki;
pub mod process;
pub mod progress;
pub mod provider;
pub mod status;
pub mod template;

pub use crate::cluster::{Cluster, ForgeAccess};
pub use crate::engine::Engine;
pub use crate::forge::Forge;
pub use crate::layout::World;
pub use crate::local::Options;
pub use crate::progress::Progress;
pub use crate::provider::Provider;
