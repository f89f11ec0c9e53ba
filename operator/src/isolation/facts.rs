//! What the policies have to know about the cluster: what was set, and what the watches show.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// What the builders have to know about the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClusterFacts {
    /// Namespace the operator runs in.
    pub(crate) operator_namespace: String,
    /// Labels of the operator's pods, which serve the gates.
    pub(crate) operator_labels: BTreeMap<String, String>,
    /// Port of the gate API on the operator's pods.
    pub(crate) gate_port: u16,
    /// Labels of the broker's pods, and their port; `None` where there is no broker.
    pub(crate) broker: Option<(BTreeMap<String, String>, u16)>,
    /// Namespace of the cluster's DNS.
    pub(crate) dns_namespace: String,
    /// Labels of the cluster's DNS pods.
    pub(crate) dns_labels: BTreeMap<String, String>,
    /// Addresses that pods are told to ask for names: the DNS Service, a cache on the node, a cloud's resolver.
    pub(crate) dns_addresses: Vec<IpAddr>,
    /// Addresses of nodes, pods, Services and the API server: never reachable, even where they are public.
    pub(crate) cluster_ranges: Vec<IpNet>,
    /// Addresses of nodes and of the API server's endpoints.
    pub(crate) nodes: Vec<IpAddr>,
}

impl ClusterFacts {
    /// With the addresses of nodes, of their pods, and of the API server. Of Services only what is set is known.
    pub(crate) fn joined<'a>(
        mut self,
        nodes: impl Iterator<Item = &'a Node> + Clone,
        api_server: impl Iterator<Item = &'a EndpointSlice>,
    ) -> Self {
        let named = nodes.clone().filter_map(|node| node.status.as_ref()?.addresses.as_ref()).flatten().map(|address| &address.address);
        let endpoints = api_server.flat_map(|slice| &slice.endpoints).flat_map(|endpoint| &endpoint.addresses);
        // A node's name is among its addresses.
        self.nodes.extend(named.chain(endpoints).filter_map(|address| address.parse::<IpAddr>().ok()));
        self.nodes.sort();
        self.nodes.dedup();
        let spec = nodes.filter_map(|node| node.spec.as_ref());
        let pods =
            spec.flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr)).filter_map(|range| range.parse::<IpNet>().ok());
        self.cluster_ranges.extend(pods);
        self.cluster_ranges.extend(self.nodes.iter().map(|address| IpNet::from(*address)));
        self.cluster_ranges.sort();
        self.cluster_ranges.dedup();
        self
    }
}

/// The addresses that a resolv.conf (resolv.conf(5)) says to ask, but for those that lead back into whoever asks.
pub(crate) fn nameservers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse::<IpAddr>().ok()).flatten()
    });
    let mut servers: Vec<IpAddr> = servers.map(|address| address.to_canonical()).filter(is_a_resolver).collect();
    servers.sort();
    servers.dedup();
    servers
}

/// Whether pods can ask for names there.
fn is_a_resolver(address: &IpAddr) -> bool {
    !address.is_loopback() && !address.is_unspecified() && !address.is_multicast()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::isolation::policies::tests::cluster;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn what_a_resolv_conf_names_is_found() {
        let text = "# made by the kubelet\nsearch ci.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\n\
                    nameserver\t169.254.20.10 \noptions ndots:5\nnameserver fd00::a\n";
        assert_eq!(nameservers(text), [ip("10.96.0.10"), ip("169.254.20.10"), ip("fd00::a")]);
        let nothing =
            "nameserver 127.0.0.53\nnameserver ::1\nnameserver\n#nameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameservers 10.0.0.2";
        assert_eq!(nameservers(nothing), Vec::<IpAddr>::new());
    }

    #[test]
    fn nodes_their_pods_and_the_api_server_are_the_cluster() {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "node1"}, "spec": {"podCIDR": "198.51.100.0/25", "podCIDRs": ["198.51.100.0/25", "2001:db8:5::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "ExternalIP", "address": "203.0.113.77"},
                {"type": "Hostname", "address": "node1"}]}}))
        .expect("a node");
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "kubernetes"}, "addressType": "IPv4", "ports": [], "endpoints": [{"addresses": ["192.0.2.6"]}]}))
        .expect("an endpoint slice");
        let before = cluster();
        let joined = before.clone().joined([&node].into_iter(), [&slice].into_iter());
        assert!([ip("10.0.0.1"), ip("192.0.2.6"), ip("203.0.113.77")].iter().all(|address| joined.nodes.contains(address)));
        for range in ["203.0.113.77/32", "192.0.2.6/32", "198.51.100.0/25", "2001:db8:5::/64"] {
            assert!(joined.cluster_ranges.contains(&range.parse().expect("a range")), "{range}");
        }
        assert!(before.cluster_ranges.iter().all(|range| joined.cluster_ranges.contains(range)), "what was set stays");
        let again = joined.clone().joined([&node].into_iter(), [&slice].into_iter());
        assert_eq!(again, joined, "the same whatever the order and however often");
    }
}
