//! Mayfly against a real cluster and a real forge: what the demo, the end-to-end tests and the benchmarks share.

pub mod audit;
pub mod binding;
pub mod clouds;
pub mod forge;
pub mod gates;
pub mod github;
pub mod ingress;
pub mod install;
pub mod leak;
pub mod moto;
pub mod pool;
pub mod stage;
pub mod store;
pub mod wait;
pub mod world;

pub use world::World;
