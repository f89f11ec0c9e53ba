//! Addresses behind the names of the operator's own Services: the sentinels', and the gate API's.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

/// How long an answer of the DNS is used.
const FRESH: Duration = Duration::from_secs(10);

/// What the DNS said a moment ago.
#[derive(Default)]
pub(crate) struct Names(Mutex<HashMap<String, (Instant, Vec<IpAddr>)>>);

impl Names {
    /// The addresses of a host; nothing where the name leads nowhere.
    pub(crate) async fn find(&self, host: &str) -> Vec<IpAddr> {
        let mut known = self.0.lock().await;
        if let Some((_, found)) = known.get(host).filter(|(at, _)| at.elapsed() < FRESH) {
            return found.clone();
        }
        let found = tokio::net::lookup_host((host, 0)).await;
        let mut addresses: Vec<IpAddr> = found.into_iter().flatten().map(|socket| socket.ip()).collect();
        addresses.sort();
        addresses.dedup();
        known.insert(host.to_owned(), (Instant::now(), addresses.clone()));
        addresses
    }
}
