//! Calls to issuers and clouds: to where the configuration says, and to nowhere else.

use std::net::IpAddr;
use std::time::Duration;

use crate::forge::{Refuse, body, causes, http_client, refused};
use crate::isolation::no_forge_at;

/// How long a call may take in all.
const CALL: Duration = Duration::from_secs(10);

/// A call that came to nothing. The text holds no token and no body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// It was not made, or what came back is not taken: asking again changes nothing.
    #[error("{0}")]
    Refused(String),
    /// The other side was not reached, or stopped in the middle.
    #[error("{0}")]
    Failed(String),
}

impl CallError {
    /// One that asking again does not change.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }
}

/// A client of HTTP, and which addresses it does not speak to.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: reqwest::Client,
    refuse: Refuse,
}

impl Http {
    /// Follows no redirect, asks no proxy, and speaks to no address that `refuse` refuses. `authorities` are further certificate
    /// authorities, PEM.
    pub(crate) fn new(authorities: Option<&[u8]>, refuse: Refuse) -> Result<Self, reqwest::Error> {
        Ok(Self { client: http_client(authorities, None, refuse)?, refuse })
    }

    /// Sends a request; the answer's body has at most `most` bytes.
    pub(crate) async fn send(&self, request: http::Request<Vec<u8>>, most: usize) -> Result<http::Response<Vec<u8>>, CallError> {
        let mut request = reqwest::Request::try_from(request).map_err(|_| CallError::new("the address cannot be used"))?;
        *request.timeout_mut() = Some(CALL);
        if let Some(why) = refused(request.url().host_str().unwrap_or_default(), self.refuse) {
            return Err(CallError::Refused(why));
        }
        let failed = |error| CallError::Failed(causes(error));
        let mut answer = self.client.execute(request).await.map_err(failed)?;
        let too_long = || CallError::new(format!("the answer has more than {most} bytes"));
        let body = body(&mut answer, most).await.map_err(failed)?.ok_or_else(too_long)?;
        let mut response = http::Response::new(body);
        *response.status_mut() = answer.status();
        *response.headers_mut() = answer.headers().clone();
        Ok(response)
    }
}

/// Why there can be no issuer and no cloud at this address.
pub(crate) fn no_server_at(address: &IpAddr) -> Option<String> {
    no_forge_at(address).map(|_| format!("the host leads to {address}, where neither an issuer nor a cloud may be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_where_nobody_may_be_are_not_spoken_to_by_name_or_number() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = Http::new(None, no_server_at).expect("a client");
        for url in [
            "http://169.254.169.254/",
            "http://127.0.0.1:1/",
            "http://[::1]:1/",
            "http://[fd00:ec2::254]/",
            "http://[::ffff:169.254.169.254]/",
            "http://localhost:1/",
        ] {
            let request = http::Request::get(url).body(Vec::new()).expect("a request");
            let error = http.send(request, 10).await.expect_err(url);
            assert!(error.to_string().contains("neither an issuer nor a cloud"), "{url}: {error}");
        }
    }
}
