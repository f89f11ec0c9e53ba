//! What the broker refused, told to the controller, which tells it to whoever looks at the binding. The broker writes nothing in the cluster.
//!
//! `POST /v1/refusals` of the gate API, `Authorization: Bearer <the broker's projected token, audience gate.mayfly.dev>`, a JSON list of
//! [`Refusal`]. It is a courtesy: the record in the audit trail is what counts, and what cannot be told in time is left out.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::decide::{Check, Denial};
use crate::audit::Request;
use crate::runner::identity::PodIdentity;

/// Refusals that wait to be told.
const WAITING: usize = 256;
/// Most that are told at once.
const AT_ONCE: usize = 32;
/// How often it is tried, and the pause in between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// One refusal, as its binding's owner may know it. Holds no token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Refusal {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    /// The name that was asked for. There may be no such binding.
    pub(crate) binding: String,
    /// Which check failed.
    pub(crate) check: Check,
    pub(crate) reason: String,
    /// It looks like theft rather than a mistake.
    pub(crate) alarm: bool,
    /// By which the record is found, and which the job was told.
    pub(crate) correlation_id: String,
}

/// Where refusals are left to be told.
#[derive(Clone, Debug)]
pub(crate) struct Reports(mpsc::Sender<Refusal>);

impl Reports {
    /// The other end is for [`deliver`].
    pub(crate) fn new() -> (Self, mpsc::Receiver<Refusal>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    /// Leaves a refusal, unless too many wait.
    pub(crate) fn leave(&self, presenter: &PodIdentity, binding: &str, denial: &Denial, request: &Request) {
        let refusal = Refusal {
            namespace: presenter.namespace.clone(),
            pod: presenter.name.clone(),
            binding: binding.to_owned(),
            check: denial.check,
            reason: denial.reason.clone(),
            alarm: denial.alarm,
            correlation_id: request.id.clone(),
        };
        if self.0.try_send(refusal).is_err() {
            tracing::debug!(request = request.id, "the controller is not told: too much waits");
        }
    }
}

/// How the controller is reached.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    /// Base URL of its gate API.
    pub(crate) url: String,
    /// Certificate authority of that, PEM.
    pub(crate) authority: Vec<u8>,
    /// File with this process's token for it; read anew for every call, as it is rotated.
    pub(crate) token_file: PathBuf,
}

/// Tells the controller until `stop`.
///
/// # Errors
/// When its authority cannot be read.
pub(crate) async fn deliver(
    controller: Controller,
    mut left: mpsc::Receiver<Refusal>,
    stop: CancellationToken,
) -> Result<(), reqwest::Error> {
    // In the cluster, by the one authority that it makes itself: there is nothing to refuse.
    let http = crate::forge::http_client(Some(&controller.authority), None, |_| None)?;
    let url = format!("{}/v1/refusals", controller.url);
    let mut batch = Vec::new();
    let tell = async {
        while left.recv_many(&mut batch, AT_ONCE).await > 0 {
            for attempt in 1..=TRIES {
                let told = match tokio::fs::read_to_string(&controller.token_file).await {
                    Ok(token) => match http.post(&url).bearer_auth(token.trim()).json(&batch).send().await {
                        Ok(answer) if answer.status().is_success() => break,
                        Ok(answer) => format!("HTTP {}", answer.status().as_u16()),
                        Err(error) => crate::forge::causes(error),
                    },
                    Err(error) => format!("{}: {error}", controller.token_file.display()),
                };
                tracing::warn!(refusals = batch.len(), attempt, error = told, "the controller is not told of refusals");
                tokio::time::sleep(PAUSE).await;
            }
            batch.clear();
        }
    };
    tokio::select! { () = tell => {}, () = stop.cancelled() => {} }
    Ok(())
}
