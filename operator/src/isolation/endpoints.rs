//! The list of metadata endpoints, as data.

use std::net::IpAddr;
use std::sync::LazyLock;

use ipnet::IpNet;
use serde::Deserialize;

/// `metadata-endpoints.yaml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Endpoints {
    /// Addresses that no job may reach.
    pub(crate) endpoints: Vec<Endpoint>,
    /// Ranges that are taken out of every range Mayfly allows by itself.
    pub(crate) never: Vec<Never>,
}

/// One endpoint.
#[cfg_attr(not(test), expect(dead_code, reason = "documentation in the data; tests hold the policies against it"))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Endpoint {
    /// Whose it is.
    pub(crate) platform: String,
    /// Where it listens.
    pub(crate) address: IpAddr,
    /// The port; 0 for every port.
    pub(crate) port: u16,
    /// Where that is documented.
    pub(crate) source: String,
}

/// One range and the reason it is closed.
#[cfg_attr(not(test), expect(dead_code, reason = "documentation in the data; tests hold the policies against it"))]
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Never {
    /// The range.
    pub(crate) range: IpNet,
    /// Why.
    pub(crate) why: String,
}

static ENDPOINTS: LazyLock<Result<Endpoints, String>> =
    LazyLock::new(|| serde_saphyr::from_str(include_str!("metadata-endpoints.yaml")).map_err(|error| error.to_string()));

impl Endpoints {
    /// The list that was built in.
    ///
    /// # Errors
    /// When the file in the source tree is not what it should be; a test reads it.
    pub(crate) fn built_in() -> Result<&'static Self, String> {
        ENDPOINTS.as_ref().map_err(Clone::clone)
    }

    /// The ranges of one address family.
    pub(crate) fn never_of(&self, ipv6: bool) -> impl Iterator<Item = IpNet> + '_ {
        self.never.iter().map(|never| never.range).filter(move |range| matches!(range, IpNet::V6(_)) == ipv6)
    }
}

/// The first metadata endpoint inside `range`, if there is one.
pub(crate) fn covers_metadata(range: &IpNet) -> Option<&'static Endpoint> {
    let endpoints = Endpoints::built_in().ok()?;
    endpoints.endpoints.iter().find(|endpoint| range.contains(&endpoint.address))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_list_is_read_and_every_row_has_its_source() {
        let list = Endpoints::built_in().expect("the file parses");
        assert!(list.endpoints.len() >= 25);
        for row in &list.endpoints {
            assert!(!row.platform.is_empty() && !row.source.is_empty(), "{row:?}");
        }
        assert!(list.never.iter().all(|never| !never.why.is_empty()));
    }

    #[test]
    fn the_api_server_is_told_of_every_address_that_it_can_read() {
        let told: BTreeSet<IpAddr> = mayfly_crds::METADATA_ADDRESSES.iter().map(|address| address.parse().expect("an address")).collect();
        let mapped = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        let list = Endpoints::built_in().expect("the file parses");
        let known: BTreeSet<IpAddr> = list.endpoints.iter().map(|row| row.address).filter(|address| !mapped(address)).collect();
        assert_eq!(told, known);
    }

    #[test]
    fn a_range_with_an_endpoint_is_found_out() {
        let covers = |range: &str| covers_metadata(&range.parse().expect("a range")).is_some();
        assert!(covers("169.254.169.254/32") && covers("0.0.0.0/0") && covers("100.64.0.0/10") && covers("::/0"));
        assert!(!covers("203.0.113.0/24") && !covers("10.1.2.0/24"));
    }
}
