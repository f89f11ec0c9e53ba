//! Addresses behind the names of the operator's own Services: the sentinels', and the gate API's.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::task::TaskTracker;

/// How long an answer of the DNS is used before it is asked again.
const FRESH: Duration = Duration::from_secs(10);
/// How long it is used while the next is on its way, so that no pod waits for the DNS.
const USED: Duration = Duration::from_secs(60);

/// What the DNS said a moment ago.
#[derive(Clone)]
pub(crate) struct Names {
    known: Arc<Mutex<HashMap<String, Known>>>,
    tasks: TaskTracker,
}

struct Known {
    asked: Instant,
    answered: Instant,
    addresses: Vec<IpAddr>,
}

impl Names {
    /// Knows none yet; questions that nobody waits for are among these tasks.
    pub(crate) fn new(tasks: TaskTracker) -> Self {
        Self { known: Arc::default(), tasks }
    }

    /// The addresses of a host; nothing where the name leads nowhere.
    pub(crate) async fn find(&self, host: &str) -> Vec<IpAddr> {
        match self.known(host, Instant::now()) {
            None => self.look_up(host).await,
            Some((addresses, false)) => addresses,
            Some((addresses, true)) => {
                let (names, host) = (self.clone(), host.to_owned());
                self.tasks.spawn(async move { names.look_up(&host).await });
                addresses
            }
        }
    }

    /// What is known, and whether the caller is to ask again.
    fn known(&self, host: &str, now: Instant) -> Option<(Vec<IpAddr>, bool)> {
        let mut all = self.all();
        let known = all.get_mut(host).filter(|known| now.duration_since(known.answered) < USED)?;
        let due = now.duration_since(known.asked) >= FRESH;
        if due {
            known.asked = now;
        }
        Some((known.addresses.clone(), due))
    }

    async fn look_up(&self, host: &str) -> Vec<IpAddr> {
        let asked = Instant::now();
        let found = tokio::net::lookup_host((host, 0)).await;
        let mut addresses: Vec<IpAddr> = found.into_iter().flatten().map(|socket| socket.ip()).collect();
        addresses.sort();
        addresses.dedup();
        self.all().insert(host.to_owned(), Known { asked, answered: Instant::now(), addresses: addresses.clone() });
        addresses
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[tokio::test]
    async fn one_caller_asks_again_and_nobody_waits() {
        let (names, host) = (Names::new(TaskTracker::new()), "127.0.0.1");
        let here = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
        assert_eq!(names.known(host, Instant::now()), None);
        assert_eq!(names.find(host).await, here);
        let later = |seconds: u64| Instant::now() + Duration::from_secs(seconds);
        assert_eq!(names.known(host, later(9)), Some((here.clone(), false)));
        assert_eq!(names.known(host, later(11)), Some((here.clone(), true)));
        assert_eq!(names.known(host, later(12)), Some((here, false)), "somebody asks already");
        assert_eq!(names.known(host, later(61)), None, "too old while nobody answers");
    }
}
