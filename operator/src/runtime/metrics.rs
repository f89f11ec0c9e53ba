//! What the process counts. Labels are words from closed sets, never names of objects.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Write {
    verb: &'static str,
    resource: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The counters.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    kube_writes: Family<Write, Counter>,
    passes: Family<Outcome, Counter>,
    pods_created: Counter,
    told_to_pod_seconds: Histogram,
    pods_deleted: Family<Outcome, Counter>,
    hand_overs: Family<Outcome, Counter>,
    id_tokens: Family<Outcome, Counter>,
    proofs: Family<Outcome, Counter>,
    proof_seconds: Histogram,
    starts: Family<Outcome, Counter>,
    deregistrations: Family<Outcome, Counter>,
    webhooks: Family<Outcome, Counter>,
    forge_errors: Family<Outcome, Counter>,
    exchanges: Family<Outcome, Counter>,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("mayfly");
        let metrics = Self {
            registry: Arc::default(),
            kube_writes: Family::default(),
            passes: Family::default(),
            pods_created: Counter::default(),
            told_to_pod_seconds: Histogram::new([0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0]),
            pods_deleted: Family::default(),
            hand_overs: Family::default(),
            id_tokens: Family::default(),
            proofs: Family::default(),
            proof_seconds: Histogram::new([0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0]),
            starts: Family::default(),
            deregistrations: Family::default(),
            webhooks: Family::default(),
            forge_errors: Family::default(),
            exchanges: Family::default(),
        };
        registry.register("kube_writes", "Writes to the API server", metrics.kube_writes.clone());
        registry.register("passes", "Passes over a pool", metrics.passes.clone());
        registry.register("pods_created", "Runner pods created", metrics.pods_created.clone());
        registry.register(
            "told_to_pod_seconds",
            "From the moment the forge told of a job, by message or webhook, until the API server had its pod",
            metrics.told_to_pod_seconds.clone(),
        );
        registry.register("pods_deleted", "Runner pods deleted", metrics.pods_deleted.clone());
        registry.register("hand_overs", "Answers to gates", metrics.hand_overs.clone());
        registry.register("id_tokens", "Answers to gates that ask for OIDC tokens of their jobs", metrics.id_tokens.clone());
        registry.register("proofs", "Reports of gates on their pod's isolation", metrics.proofs.clone());
        registry.register("proof_seconds", "How long the rounds of a proof took", metrics.proof_seconds.clone());
        registry.register(
            "starts",
            "Starts of runner pods, by whether a sentinel answered before policies were enforced",
            metrics.starts.clone(),
        );
        registry.register("deregistrations", "Registrations removed other than by a job's end", metrics.deregistrations.clone());
        registry.register("webhooks", "Webhook deliveries", metrics.webhooks.clone());
        registry.register("forge_errors", "Passes that could not see the forge", metrics.forge_errors.clone());
        registry.register("exchanges", "Requests for a credential, by what became of them", metrics.exchanges.clone());
        Self { registry: Arc::new(registry), ..metrics }
    }

    /// OpenMetrics text.
    pub(crate) fn encode(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# {error}\n"),
        }
    }

    pub(crate) fn kube_write(&self, verb: &'static str, resource: &str, ok: bool) {
        let result = if ok { "ok" } else { "error" };
        self.kube_writes.get_or_create(&Write { verb, resource: resource.to_owned(), result }).inc();
    }

    pub(crate) fn pass(&self, outcome: &'static str) {
        self.passes.get_or_create(&Outcome { outcome }).inc();
    }

    /// `after` is how long ago the forge told of the job, where it did.
    pub(crate) fn pod_created(&self, after: Option<Duration>) {
        self.pods_created.inc();
        if let Some(after) = after {
            self.told_to_pod_seconds.observe(after.as_secs_f64());
        }
    }

    pub(crate) fn pod_deleted(&self, outcome: &'static str) {
        self.pods_deleted.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn hand_over(&self, outcome: &'static str) {
        self.hand_overs.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn id_token(&self, outcome: &'static str) {
        self.id_tokens.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn proof(&self, outcome: &'static str, took_ms: u32) {
        self.proofs.get_or_create(&Outcome { outcome }).inc();
        self.proof_seconds.observe(f64::from(took_ms) / 1_000.0);
    }

    pub(crate) fn start(&self, leaked: bool) {
        self.starts.get_or_create(&Outcome { outcome: if leaked { "leaked" } else { "closed" } }).inc();
    }

    pub(crate) fn deregistered(&self, outcome: &'static str) {
        self.deregistrations.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn webhook(&self, outcome: &'static str) {
        self.webhooks.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn exchange(&self, outcome: &'static str) {
        self.exchanges.get_or_create(&Outcome { outcome }).inc();
    }

    pub(crate) fn forge_error(&self, outcome: &'static str) {
        self.forge_errors.get_or_create(&Outcome { outcome }).inc();
    }
}
