//! `/livez`, `/readyz` (with the names of what it waits for) and `/metrics`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;

use super::metrics::Metrics;

/// What the process still waits for.
#[derive(Clone)]
pub(crate) struct Health {
    metrics: Metrics,
    waits: Arc<Mutex<BTreeSet<&'static str>>>,
}

impl Health {
    /// Not ready until each of `waits` is done.
    pub(crate) fn new(metrics: Metrics, waits: &[&'static str]) -> Self {
        Self { metrics, waits: Arc::new(Mutex::new(waits.iter().copied().collect())) }
    }

    /// One thing less to wait for.
    pub(crate) fn done(&self, what: &'static str) {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).remove(what);
    }

    /// The routes.
    pub(crate) fn router(&self) -> Router {
        Router::new()
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }
}

async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    let waits = health.waits.lock().unwrap_or_else(PoisonError::into_inner);
    match waits.is_empty() {
        true => (StatusCode::OK, "ok".to_owned()),
        false => {
            let waits: Vec<_> = waits.iter().copied().collect();
            (StatusCode::SERVICE_UNAVAILABLE, format!("waits for: {}", waits.join(", ")))
        }
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], health.metrics.encode())
}
