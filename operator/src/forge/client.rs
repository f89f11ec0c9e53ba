//! The HTTP client of all forges.

use std::time::Duration;

use super::address::{Refuse, Resolver};

/// Deadline of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// For a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client fit for forges: no redirects (a redirect would carry the token elsewhere), bounded waiting, and no proxy but the one named.
/// `authorities` are further certificate authorities, PEM.
///
/// Where a proxy is named, it resolves the forges' names, and `refuse` is asked about the proxy alone: what it lets through is its business.
///
/// # Errors
/// When the authorities or the proxy cannot be read.
pub(crate) fn http_client(authorities: Option<&[u8]>, proxy: Option<&str>, refuse: Refuse) -> Result<reqwest::Client, reqwest::Error> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .dns_resolver(Resolver::shared(refuse))
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT);
    if let Some(proxy) = proxy {
        builder = builder.proxy(reqwest::Proxy::all(proxy)?);
    }
    for authority in reqwest::Certificate::from_pem_bundle(authorities.unwrap_or_default())? {
        builder = builder.add_root_certificate(authority);
    }
    builder.build()
}
