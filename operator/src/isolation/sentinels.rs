//! Where the sentinels are: pods of the operator's namespace that answer whoever asks, found by the names of their Services.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

/// How long an answer of the DNS is used.
const FRESH: Duration = Duration::from_secs(10);

/// The addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Of the Service.
    pub(crate) service: Vec<IpAddr>,
    /// Of the pods behind it.
    pub(crate) pods: Vec<IpAddr>,
}

/// Finds them.
#[derive(Default)]
pub(crate) struct Sentinels(Mutex<Option<(Instant, Found)>>);

impl Sentinels {
    /// By the host names of the Service and of the headless Service; nothing where a name leads nowhere.
    pub(crate) async fn find(&self, service: &str, pods: &str) -> Found {
        let mut known = self.0.lock().await;
        if let Some((_, found)) = known.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return found.clone();
        }
        let (service, pods) = futures::join!(addresses(service), addresses(pods));
        let found = Found { service, pods };
        *known = Some((Instant::now(), found.clone()));
        found
    }
}

async fn addresses(host: &str) -> Vec<IpAddr> {
    let found = tokio::net::lookup_host((host, 0)).await;
    let mut addresses: Vec<IpAddr> = found.into_iter().flatten().map(|socket| socket.ip()).collect();
    addresses.sort();
    addresses.dedup();
    addresses
}
