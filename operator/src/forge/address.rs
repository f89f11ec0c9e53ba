//! Host names of forges, issuers and clouds become addresses here, and nowhere else: one that leads where none may be is not spoken to.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Says why an address cannot be that of what is spoken to; `None` where it can.
pub(crate) type Refuse = fn(&IpAddr) -> Option<String>;

/// Resolves names as the system does, and refuses addresses. What is checked is what the connection is made to.
pub(crate) struct Resolver(pub(super) Refuse);

impl Resolver {
    /// For a client of HTTP.
    pub(crate) fn shared(refuse: Refuse) -> Arc<Self> {
        Arc::new(Self(refuse))
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let refuse = self.0;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            match found.iter().find_map(|address| refuse(&address.ip())) {
                Some(why) => Err(why.into()),
                None => Ok(Box::new(found.into_iter()) as Addrs),
            }
        })
    }
}

/// Why nobody speaks to this host, where it is an address: one that stands in a URL is not resolved, so that the resolver does not see it.
pub(crate) fn refused(host: &str, refuse: Refuse) -> Option<String> {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    refuse(&address)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    async fn resolve(refuse: Refuse) -> Result<usize, String> {
        let name = Name::from_str("localhost").expect("a name");
        Resolver(refuse).resolve(name).await.map(Iterator::count).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_name_that_leads_to_one_refused_address_leads_nowhere() {
        assert!(resolve(|_| None).await.is_ok_and(|count| count > 0));
        let refused = resolve(|address| address.is_loopback().then(|| format!("not {address}"))).await;
        assert!(refused.is_err_and(|why| why.starts_with("not ")));
    }
}
