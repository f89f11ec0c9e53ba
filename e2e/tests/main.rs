//! End-to-end tests, named by promise. They need a cluster that is up with the operator installed: `make test` sees to both. Those of
//! `without_engine` need one of another kind, and fail on this one.

mod admission_refuses;
mod cleans_up;
mod hides_secrets;
mod leaves_nothing_to_find;
mod proves_isolation;
mod refuses_input;
mod refuses_jobs;
mod runs_jobs;
mod settles;
mod without_engine;
