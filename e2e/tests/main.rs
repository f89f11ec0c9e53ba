//! End-to-end tests, named by promise. They need a cluster that is up with the operator installed: `make test` sees to both. Those of
//! `without_engine` need one of another kind, and fail on this one.

mod admission_refuses;
mod cleans_up;
mod finds_nothing_durable;
mod hides_secrets;
mod holds_no_rights;
mod keeps_records;
mod leaves_nothing_to_find;
mod proves_isolation;
mod refuses_input;
mod refuses_jobs;
mod runs_jobs;
mod serves_github;
mod settles;
mod stays_in_its_pod;
mod uses_clouds;
mod uses_credentials;
mod vouches_for_jobs;
mod without_engine;
