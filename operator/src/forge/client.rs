//! The HTTP client of all forges, issuers and clouds, and what is read with it.

use std::error::Error;
use std::time::Duration;

use super::ForgeError;
use super::address::{Refuse, Resolver};

/// Deadline of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// For a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client fit for servers that others run: no redirects (a redirect would carry the token elsewhere), bounded waiting, and no proxy but the one named.
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

/// The whole body of an answer; `None` where it has more than `most` bytes.
pub(crate) async fn body(answer: &mut reqwest::Response, most: usize) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > most {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// The whole chain of an error's causes, without the address, which may hold what somebody else wrote.
pub(crate) fn causes(error: reqwest::Error) -> String {
    let error = error.without_url();
    let first: &dyn Error = &error;
    let causes = std::iter::successors(Some(first), |cause: &&dyn Error| (*cause).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl From<reqwest::Error> for ForgeError {
    fn from(error: reqwest::Error) -> Self {
        Self::Unreachable(causes(error))
    }
}
