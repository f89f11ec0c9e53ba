//! Denials of cluster scope for every runner pod there is, in the dialects that have such an object. They are the same for all pools, so
//! that they belong to the installation: the chart applies them, and the operator needs no right to write them.
//!
//! Metadata endpoints only, and not their port 53: some clouds have their resolver there, which a pool's NetworkPolicy opens where pods are
//! told to ask it and closes elsewhere. What a pool may open never holds an endpoint, so nothing that was opened is closed again.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use mayfly_crds::names::{LABEL_MANAGED_BY, LABEL_POOL, MANAGED_BY};
use serde_json::{Value, json};

use super::endpoints::Endpoints;

/// Name of the object in either dialect.
const NAME: &str = "mayfly-metadata";
/// Where DNS answers.
const DNS: u16 = 53;

/// A dialect with an object of cluster scope that can deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Dialect {
    /// `policy.networking.k8s.io/v1alpha2`, of the Kubernetes network policy working group.
    ClusterNetworkPolicy,
    /// `projectcalico.org/v3`, of Calico.
    GlobalNetworkPolicy,
}

/// The denial, as an object of that dialect.
///
/// # Errors
/// When the list of metadata endpoints cannot be read.
pub(crate) fn cluster_wide_denial(dialect: Dialect) -> Result<Value, String> {
    let addresses: BTreeSet<IpAddr> = Endpoints::built_in()?.endpoints.iter().map(|row| row.address.to_canonical()).collect();
    let labels = json!({ LABEL_MANAGED_BY: MANAGED_BY });
    Ok(match dialect {
        Dialect::ClusterNetworkPolicy => json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
            "metadata": {"name": NAME, "labels": labels},
            "spec": cluster_network_policy(&addresses),
        }),
        Dialect::GlobalNetworkPolicy => json!({
            "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
            "metadata": {"name": NAME, "labels": labels},
            "spec": global_network_policy(&addresses),
        }),
    })
}

/// Fields: kubernetes-sigs/network-policy-api v0.2.0, apis/v1alpha2, standard channel. At most 25 networks in a peer.
fn cluster_network_policy(addresses: &BTreeSet<IpAddr>) -> Value {
    let range = |protocol: &str, start: u16, end: u16| json!({ protocol: {"destinationPort": {"range": {"start": start, "end": end}}} });
    json!({
        // Before every other policy: who accepts one of these addresses for runner pods has to do so at the same priority.
        "tier": "Admin", "priority": 0,
        "subject": {"pods": {
            "namespaceSelector": {},
            "podSelector": {"matchExpressions": [{"key": LABEL_POOL, "operator": "Exists"}]},
        }},
        "egress": [{
            "name": "metadata", "action": "Deny",
            "to": [{"networks": networks(addresses.iter())}],
            "protocols": [
                range("tcp", 1, DNS - 1), range("tcp", DNS + 1, u16::MAX),
                range("udp", 1, DNS - 1), range("udp", DNS + 1, u16::MAX),
                range("sctp", 1, u16::MAX),
            ],
        }],
    })
}

/// Fields: docs.tigera.io, reference "Global network policy". In Calico's default tier, in which NetworkPolicies are at order 1000: what no
/// rule here says goes on to them.
fn global_network_policy(addresses: &BTreeSet<IpAddr>) -> Value {
    let (v4, v6): (Vec<&IpAddr>, Vec<&IpAddr>) = addresses.iter().partition(|address| address.is_ipv4());
    let rule = |version: u8, of: &[&IpAddr], protocol: &str| {
        let mut destination = json!({ "nets": networks(of.iter().copied()) });
        if protocol != "SCTP" {
            destination["notPorts"] = json!([DNS]);
        }
        json!({"action": "Deny", "ipVersion": version, "protocol": protocol, "destination": destination})
    };
    let protocols = ["TCP", "UDP", "SCTP"];
    let egress: Vec<Value> = [(4, &v4), (6, &v6)].iter().flat_map(|(version, of)| protocols.map(|name| rule(*version, of, name))).collect();
    json!({"order": 0, "selector": format!("has({LABEL_POOL})"), "types": ["Egress"], "egress": egress})
}

fn networks<'a>(addresses: impl Iterator<Item = &'a IpAddr>) -> Vec<String> {
    addresses.map(|address| IpNet::from(*address).to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether some rule of a ClusterNetworkPolicy denies this.
    fn denies(policy: &Value, address: IpAddr, protocol: &str, port: u16) -> bool {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        list(&policy["spec"]["egress"]).iter().any(|rule| {
            let network =
                |text: &Value| text.as_str().and_then(|text| text.parse::<IpNet>().ok()).is_some_and(|net| net.contains(&address));
            let ports = |entry: &Value| {
                let range = &entry[protocol]["destinationPort"]["range"];
                range["start"].as_u64() <= Some(port.into()) && Some(u64::from(port)) <= range["end"].as_u64()
            };
            rule["action"] == "Deny"
                && list(&rule["to"]).iter().any(|peer| list(&peer["networks"]).iter().any(network))
                && list(&rule["protocols"]).iter().any(ports)
        })
    }

    #[test]
    fn every_endpoint_is_denied_on_every_port_but_that_of_dns() {
        let policy = cluster_wide_denial(Dialect::ClusterNetworkPolicy).expect("the list");
        for row in &Endpoints::built_in().expect("the list").endpoints {
            let address = row.address.to_canonical();
            for port in [if row.port == 0 { 80 } else { row.port }, 1, 52, 54, 65_535] {
                assert!(denies(&policy, address, "tcp", port) && denies(&policy, address, "udp", port), "{row:?} on {port}");
            }
            assert!(!denies(&policy, address, "tcp", DNS) && !denies(&policy, address, "udp", DNS), "{row:?}");
        }
        assert!(!denies(&policy, "140.82.121.4".parse().expect("an address"), "tcp", 443));
        let networks = policy["spec"]["egress"][0]["to"][0]["networks"].as_array().map_or(0, Vec::len);
        assert!((1..=25).contains(&networks), "the API takes no more: {networks}");
    }

    #[test]
    fn the_object_for_calico_is_as_reviewed() {
        insta::assert_yaml_snapshot!(cluster_wide_denial(Dialect::GlobalNetworkPolicy).expect("the list"));
    }
}
