//! The NetworkPolicies of a pool: closed in both directions, then one object per opening.
//!
//! They exist before the first pod and do not change per job: a policy made together with a pod comes too late on many network
//! plugins.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mayfly_crds::Egress;
use mayfly_crds::names::{LABEL_MANAGED_BY, LABEL_POOL, MANAGED_BY};

use super::endpoints::Endpoints;
use super::facts::ClusterFacts;

/// Where the forge answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ForgeAddress {
    /// Its addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// Its port.
    pub(crate) port: u16,
}

/// All policies of a pool, by name.
///
/// # Errors
/// When a range of the pool cannot be read or covers a metadata endpoint; the text says which.
pub(crate) fn network_policies(
    pool: &str,
    namespace: &str,
    owner: &OwnerReference,
    egress: &Egress,
    forge: &ForgeAddress,
    cluster: &ClusterFacts,
) -> Result<Vec<NetworkPolicy>, String> {
    let mut openings: Vec<(&str, Vec<NetworkPolicyEgressRule>)> = vec![
        ("dns", vec![rule(dns(cluster), &[("UDP", 53), ("TCP", 53)])]),
        ("gate", vec![rule(vec![pods(&cluster.operator_namespace, &cluster.operator_labels)], &[("TCP", cluster.gate_port)])]),
    ];
    if let Some((labels, port)) = &cluster.broker {
        openings.push(("broker", vec![rule(vec![pods(&cluster.operator_namespace, labels)], &[("TCP", *port)])]));
    }
    if let Some(why) = forge.addresses.iter().find_map(no_forge_at) {
        return Err(why);
    }
    if !forge.addresses.is_empty() {
        let peers = forge.addresses.iter().map(|address| block(IpNet::from(*address), Vec::new())).collect();
        openings.push(("forge", vec![rule(peers, &[("TCP", forge.port)])]));
    }
    if egress.internet {
        openings.push(("internet", vec![rule(internet(cluster)?, &[("TCP", 443), ("TCP", 80)])]));
    }
    if !egress.allow.is_empty() {
        let rules = egress.allow.iter().map(|allow| {
            let range = allowed_range(&allow.cidr)?;
            let ports: Vec<_> = allow.ports.iter().map(|port| ("TCP", *port)).collect();
            Ok(rule(vec![block(range, Vec::new())], &ports))
        });
        openings.push(("allow", rules.collect::<Result<_, String>>()?));
    }
    let deny = policy(pool, namespace, owner, "deny", None);
    let allows = openings.into_iter().map(|(purpose, rules)| policy(pool, namespace, owner, purpose, Some(rules)));
    Ok(std::iter::once(deny).chain(allows).collect())
}

/// Why there can be no forge at this address: neither the operator nor a job may speak to it.
pub(crate) fn no_forge_at(address: &IpAddr) -> Option<String> {
    if let Some(endpoint) = super::covers_metadata(&IpNet::from(*address)) {
        return Some(format!("the forge's host name leads to {address}, which is {}: no job may reach it", endpoint.platform));
    }
    let never = is_never_a_forge(address);
    never.then(|| format!("the forge's host name leads to {address}, which is no address for a server: no job may reach it"))
}

/// Who is asked for names: the cluster's DNS pods, and the addresses that pods are told. A cache on the node and the resolvers of some
/// clouds are link-local, or have the address of a metadata endpoint: of them port 53 is open and nothing else.
fn dns(cluster: &ClusterFacts) -> Vec<NetworkPolicyPeer> {
    let addresses = cluster.dns_addresses.iter().map(|address| block(IpNet::from(*address), Vec::new()));
    std::iter::once(pods(&cluster.dns_namespace, &cluster.dns_labels)).chain(addresses).collect()
}

/// Loopback, link-local, multicast and unspecified addresses: a host name that leads there opens the node, not a forge.
fn is_never_a_forge(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local
}

/// A range a user may open: readable, and without a metadata endpoint in it.
fn allowed_range(cidr: &str) -> Result<IpNet, String> {
    let range: IpNet = cidr.parse().map_err(|_| format!("isolation.egress.allow: {cidr:?} is not an address range"))?;
    match super::covers_metadata(&range) {
        Some(endpoint) => Err(format!(
            "isolation.egress.allow: {cidr} covers {} ({}), which no job may reach: name smaller ranges",
            endpoint.address, endpoint.platform
        )),
        None => Ok(range),
    }
}

/// Public addresses: positive ranges minus everything that is not public or belongs to the cluster.
fn internet(cluster: &ClusterFacts) -> Result<Vec<NetworkPolicyPeer>, String> {
    let list = Endpoints::built_in()?;
    let family = |range: &str, ipv6: bool| -> Result<NetworkPolicyPeer, String> {
        let whole: IpNet = range.parse().map_err(|_| format!("{range} is not a range"))?;
        let own = cluster.cluster_ranges.iter().copied();
        let mut except: Vec<IpNet> = list.never_of(ipv6).chain(own.filter(|net| whole.contains(net))).collect();
        except.sort();
        Ok(block(whole, IpNet::aggregate(&except)))
    };
    Ok(vec![family("0.0.0.0/0", false)?, family("2000::/3", true)?])
}

fn policy(
    pool: &str,
    namespace: &str,
    owner: &OwnerReference,
    purpose: &str,
    egress: Option<Vec<NetworkPolicyEgressRule>>,
) -> NetworkPolicy {
    let types: &[&str] = if egress.is_some() { &["Egress"] } else { &["Ingress", "Egress"] };
    NetworkPolicy {
        metadata: object_meta(pool, namespace, owner, purpose),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(pool_pods(pool)),
            policy_types: Some(types.iter().map(|t| (*t).to_owned()).collect()),
            egress,
            ingress: None,
        }),
    }
}

/// What every policy of a pool is called and marked with, in whichever dialect.
pub(super) fn object_meta(pool: &str, namespace: &str, owner: &OwnerReference, purpose: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(format!("mayfly-{pool}-{purpose}")),
        namespace: Some(namespace.to_owned()),
        labels: Some(BTreeMap::from([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned()), (LABEL_POOL.to_owned(), pool.to_owned())])),
        owner_references: Some(vec![owner.clone()]),
        ..ObjectMeta::default()
    }
}

/// The pods of a pool.
pub(super) fn pool_pods(pool: &str) -> LabelSelector {
    LabelSelector { match_labels: Some(BTreeMap::from([(LABEL_POOL.to_owned(), pool.to_owned())])), ..LabelSelector::default() }
}

fn rule(to: Vec<NetworkPolicyPeer>, ports: &[(&str, u16)]) -> NetworkPolicyEgressRule {
    let ports = ports.iter().map(|(protocol, port)| NetworkPolicyPort {
        protocol: Some((*protocol).to_owned()),
        port: Some(IntOrString::Int(i32::from(*port))),
        end_port: None, // not every plugin reads it
    });
    NetworkPolicyEgressRule { to: Some(to), ports: Some(ports.collect()) }
}

fn pods(namespace: &str, labels: &BTreeMap<String, String>) -> NetworkPolicyPeer {
    let selector = |labels: BTreeMap<String, String>| LabelSelector { match_labels: Some(labels), ..LabelSelector::default() };
    NetworkPolicyPeer {
        namespace_selector: Some(selector(BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), namespace.to_owned())]))),
        pod_selector: Some(selector(labels.clone())),
        ip_block: None,
    }
}

fn block(range: IpNet, except: Vec<IpNet>) -> NetworkPolicyPeer {
    let except: Vec<String> = except.iter().map(ToString::to_string).collect();
    NetworkPolicyPeer {
        ip_block: Some(IPBlock { cidr: range.to_string(), except: (!except.is_empty()).then_some(except) }),
        ..NetworkPolicyPeer::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use mayfly_crds::EgressAllow;
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn cluster() -> ClusterFacts {
        let labels = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
        ClusterFacts {
            operator_namespace: "mayfly-system".to_owned(),
            operator_labels: labels("app.kubernetes.io/name", "mayfly"),
            gate_port: 8443,
            broker: Some((labels("app.kubernetes.io/name", "mayfly-broker"), 8443)),
            dns_namespace: "kube-system".to_owned(),
            dns_labels: labels("k8s-app", "kube-dns"),
            dns_addresses: vec!["10.96.0.10".parse().expect("an address")],
            cluster_ranges: vec!["203.0.113.0/28".parse().expect("a range"), "2001:db8:77::/64".parse().expect("a range")],
            nodes: vec!["203.0.113.5".parse().expect("an address")],
        }
    }

    fn build(egress: &Egress) -> Result<Vec<NetworkPolicy>, String> {
        build_in(&cluster(), egress)
    }

    fn build_in(cluster: &ClusterFacts, egress: &Egress) -> Result<Vec<NetworkPolicy>, String> {
        let owner = OwnerReference { name: "ci".to_owned(), uid: "u".to_owned(), ..OwnerReference::default() };
        let forge = ForgeAddress { addresses: vec!["198.51.100.7".parse().expect("an address")], port: 3000 };
        network_policies("ci", "team", &owner, egress, &forge, cluster)
    }

    #[test]
    fn a_resolver_at_a_metadata_address_is_open_on_its_port_alone() {
        for resolver in ["169.254.20.10", "169.254.169.254", "168.63.129.16", "fd20:ce::254"] {
            let address: IpAddr = resolver.parse().expect("an address");
            let cluster = ClusterFacts { dns_addresses: vec![address], ..cluster() };
            let policies = build_in(&cluster, &Egress { internet: true, ..Egress::default() }).expect("valid");
            assert!(allows(&policies, address, 53), "{resolver}");
            let rows = &Endpoints::built_in().expect("the list").endpoints;
            assert!(rows.iter().all(|row| row.port != 53), "no proof tries the port that is open");
            for port in rows.iter().map(|row| row.port).filter(|port| *port != 0).chain([22, 443, 10_250]) {
                assert!(!allows(&policies, address, port), "{resolver} on {port}");
            }
        }
    }

    /// Whether some rule allows this TCP connection by address.
    fn allows(policies: &[NetworkPolicy], address: IpAddr, port: u16) -> bool {
        let rules = policies.iter().filter_map(|p| p.spec.as_ref()?.egress.as_ref()).flatten();
        rules.into_iter().any(|rule| {
            let port_fits = rule.ports.as_ref().is_none_or(|ports| {
                ports
                    .iter()
                    .any(|p| p.protocol.as_deref() == Some("TCP") && (port == 0 || p.port == Some(IntOrString::Int(i32::from(port)))))
            });
            let peer_fits = rule.to.iter().flatten().filter_map(|peer| peer.ip_block.as_ref()).any(|block| {
                let within = |range: &str| range.parse::<IpNet>().expect("a range").contains(&address);
                within(&block.cidr) && !block.except.iter().flatten().any(|range| within(range))
            });
            port_fits && peer_fits
        })
    }

    #[test]
    fn the_whole_set_is_as_reviewed() {
        let allow = vec![EgressAllow { cidr: "203.0.113.64/26".to_owned(), ports: vec![8081] }];
        let egress = Egress { internet: true, allow, ..Egress::default() };
        insta::assert_yaml_snapshot!(build(&egress).expect("valid"));
    }

    #[test]
    fn no_endpoint_of_the_list_is_ever_allowed() {
        let policies = build(&Egress { internet: true, ..Egress::default() }).expect("valid");
        for endpoint in &Endpoints::built_in().expect("the list").endpoints {
            for port in [endpoint.port, 80, 443] {
                assert!(!allows(&policies, endpoint.address, port), "{endpoint:?} on {port}");
            }
        }
        assert!(allows(&policies, "140.82.121.4".parse().expect("an address"), 443), "the internet is reachable");
        assert!(!allows(&policies, "203.0.113.5".parse().expect("an address"), 443), "a public node address is not");
    }

    #[test]
    fn without_openings_only_the_forge_is_reachable_by_address() {
        let policies = build(&Egress::default()).expect("valid");
        assert!(allows(&policies, "198.51.100.7".parse().expect("an address"), 3000));
        assert!(!allows(&policies, "140.82.121.4".parse().expect("an address"), 443));
    }

    #[test]
    fn a_forge_name_that_leads_to_metadata_or_the_node_opens_nothing() {
        let owner = OwnerReference::default();
        for address in [
            "169.254.169.254",
            "169.254.1.1",
            "168.63.129.16",
            "100.100.100.200",
            "fd00:ec2::254",
            "127.0.0.1",
            "::1",
            "fe80::1",
            "0.0.0.0",
        ] {
            let good = "198.51.100.7".parse().expect("an address");
            let forge = ForgeAddress { addresses: vec![good, address.parse().expect("an address")], port: 80 };
            let built = network_policies("ci", "team", &owner, &Egress::default(), &forge, &cluster());
            assert!(built.is_err_and(|why| why.contains("no job may reach it")), "{address}");
        }
    }

    proptest! {
        #[test]
        fn an_allow_list_cannot_open_a_metadata_endpoint(bytes: [u8; 4], prefix in 0u8..=32) {
            let cidr = format!("{}.{}.{}.{}/{prefix}", bytes[0], bytes[1], bytes[2], bytes[3]);
            let egress = Egress { allow: vec![EgressAllow { cidr, ports: vec![80, 443, 8080] }], ..Egress::default() };
            if let Ok(policies) = build(&egress) {
                for endpoint in &Endpoints::built_in().expect("the list").endpoints {
                    prop_assert!(!allows(&policies, endpoint.address, endpoint.port), "{:?}", endpoint);
                }
            }
        }
    }
}
