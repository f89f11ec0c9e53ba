//! A pool's policies in Cilium's dialect. Its denials win over every opening, also over one that somebody else made, which a
//! NetworkPolicy cannot do.
//!
//! Fields are those of `cilium.io/v2` as of Cilium 1.15 (pkg/policy/api): no port ranges, at most 40 ports in a list.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, OwnerReference};
use kube::CustomResource;
use mayfly_crds::{Egress, EgressHost};
use serde::{Deserialize, Serialize};

use super::endpoints::Endpoints;
use super::facts::ClusterFacts;
use super::policies::{ForgeAddress, object_meta, pool_pods};

/// Link-local ranges: metadata endpoints of most clouds, those that are not in the list included.
const LINK_LOCAL: [&str; 2] = ["169.254.0.0/16", "fe80::/10"];
/// Where DNS answers.
const DNS: [(&str, u16); 2] = [("UDP", 53), ("TCP", 53)];
/// What Cilium calls the pod's own node, the others, and the API server wherever it is.
const NODES: [&str; 3] = ["host", "remote-node", "kube-apiserver"];
/// What listens on nodes, for a cluster where something that jobs need does so as well: SSH, HTTP, etcd, API server, Cilium, kubelet,
/// kube-proxy, controller manager, scheduler.
const NODE_PORTS: [u16; 16] = [22, 80, 443, 2379, 2380, 4240, 4244, 6443, 8080, 9100, 10_248, 10_249, 10_250, 10_255, 10_257, 10_259];

/// The part of a CiliumNetworkPolicy that Mayfly writes.
#[derive(CustomResource, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(group = "cilium.io", version = "v2", kind = "CiliumNetworkPolicy", plural = "ciliumnetworkpolicies", namespaced)]
#[kube(schema = "disabled")]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct CiliumNetworkPolicySpec {
    /// The pods it is for.
    endpoint_selector: LabelSelector,
    /// What is opened.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    egress: Vec<Rule>,
    /// What is closed, whatever else opens it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    egress_deny: Vec<Rule>,
}

/// Where to, and on which ports; all ports where there are none.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
struct Rule {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    to_entities: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    to_endpoints: Vec<LabelSelector>,
    #[serde(rename = "toFQDNs", skip_serializing_if = "Vec::is_empty")]
    to_names: Vec<Name>,
    #[serde(rename = "toCIDRSet", skip_serializing_if = "Vec::is_empty")]
    to_cidr_set: Vec<Cidr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    to_ports: Vec<Ports>,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
struct Cidr {
    cidr: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    except: Vec<String>,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
struct Ports {
    ports: Vec<Port>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rules: Option<Lookups>,
}

/// Which names may be looked up there. It is what has Cilium read the answers.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
struct Lookups {
    dns: Vec<Name>,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
struct Name {
    #[serde(skip_serializing_if = "Option::is_none")]
    match_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    match_pattern: Option<String>,
}

#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
struct Port {
    port: String,
    protocol: String,
}

/// All CiliumNetworkPolicies of a pool, to stand beside its NetworkPolicies: denials first.
///
/// # Errors
/// When the list of metadata endpoints cannot be read.
pub(crate) fn cilium_policies(
    pool: &str,
    namespace: &str,
    owner: &OwnerReference,
    egress: &Egress,
    forge: &ForgeAddress,
    cluster: &ClusterFacts,
) -> Result<Vec<CiliumNetworkPolicy>, String> {
    let mut deny = metadata(egress, cluster)?;
    deny.push(nodes(egress, forge, cluster));
    let deny = CiliumNetworkPolicySpec { egress_deny: deny, ..CiliumNetworkPolicySpec::default() };
    let mut policies = vec![policy(pool, namespace, owner, "deny", deny)];
    let asked = on_nodes(cluster);
    if !asked.is_empty() {
        let spec = CiliumNetworkPolicySpec { egress: asked, ..CiliumNetworkPolicySpec::default() };
        policies.push(policy(pool, namespace, owner, "dns", spec));
    }
    if !egress.hosts.is_empty() {
        let opened = CiliumNetworkPolicySpec { egress: hosts(&egress.hosts, cluster), ..CiliumNetworkPolicySpec::default() };
        policies.push(policy(pool, namespace, owner, "hosts", opened));
    }
    Ok(policies)
}

/// Whether this is a host name that a pool may open: of small letters, digits, `-` and `_`, in two labels or more of which the last is no
/// number, as that would be an address; before them perhaps `*.`. The API's rule is the same.
pub(crate) fn is_host_name(host: &str) -> bool {
    let labels: Vec<&str> = host.strip_prefix("*.").unwrap_or(host).split('.').collect();
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    let edge = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let good = |label: &&str| {
        let bytes = label.as_bytes();
        bytes.len() <= 63 && edge(bytes.first()) && edge(bytes.last()) && bytes.iter().all(|byte| inner(*byte))
    };
    let last = labels.last().copied().unwrap_or_default();
    let lettered = last.starts_with(|c: char| c.is_ascii_lowercase()) && !last.contains('_');
    host.len() <= 253 && labels.len() >= 2 && labels.iter().all(good) && lettered
}

/// One rule for each name. Cilium opens the addresses that it sees in answers of the cluster's DNS, which it reads where a rule about
/// lookups stands. That rule lets all names be looked up, as the NetworkPolicy for DNS does: jobs need more than those that are opened.
fn hosts(hosts: &[EgressHost], cluster: &ClusterFacts) -> Vec<Rule> {
    let any = Name { match_pattern: Some("*".to_owned()), ..Name::default() };
    let lookups = Ports { rules: Some(Lookups { dns: vec![any] }), ..ports(&DNS) };
    let mut asked = vec![pods(&cluster.dns_namespace, &cluster.dns_labels)];
    if !on_nodes(cluster).is_empty() {
        asked.push(pods(&cluster.dns_namespace, &cache_labels()));
    }
    let mut dns = vec![Rule { to_endpoints: asked, to_ports: vec![lookups.clone()], ..Rule::default() }];
    if !cluster.dns_addresses.is_empty() {
        let to_cidr_set = cluster.dns_addresses.iter().map(|address| cidr(*address)).collect();
        dns.push(Rule { to_cidr_set, to_ports: vec![lookups], ..Rule::default() });
    }
    let opened = hosts.iter().map(|opened| {
        let name = Some(opened.host.clone());
        let name = match opened.host.contains('*') {
            true => Name { match_pattern: name, ..Name::default() },
            false => Name { match_name: name, ..Name::default() },
        };
        let numbers: Vec<(&str, u16)> = opened.ports.iter().map(|port| ("TCP", *port)).collect();
        Rule { to_names: vec![name], to_ports: vec![ports(&numbers)], ..Rule::default() }
    });
    dns.into_iter().chain(opened).collect()
}

/// Pods by their labels, in another namespace.
fn pods(namespace: &str, labels: &BTreeMap<String, String>) -> LabelSelector {
    let mut all: BTreeMap<String, String> = labels.iter().map(|(key, value)| (format!("k8s:{key}"), value.clone())).collect();
    all.insert("k8s:io.kubernetes.pod.namespace".to_owned(), namespace.to_owned());
    LabelSelector { match_labels: Some(all), ..LabelSelector::default() }
}

/// Every metadata endpoint of the list, and link-local addresses but for those that the pool opens by name (which holds no endpoint).
///
/// A resolver among them keeps port 53. What else listens there is closed by its ports.
fn metadata(egress: &Egress, cluster: &ClusterFacts) -> Result<Vec<Rule>, String> {
    let ranges = LINK_LOCAL.map(|range| range.parse::<IpNet>().map_err(|_| format!("{range} is not a range")));
    let ranges = ranges.into_iter().collect::<Result<Vec<_>, _>>()?;
    let rows = &Endpoints::built_in()?.endpoints;
    // An IPv4-mapped address leaves the pod as IPv4.
    let listed: BTreeSet<IpAddr> = rows.iter().map(|row| row.address.to_canonical()).collect();
    let link_local = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
    let resolvers: BTreeSet<IpAddr> =
        cluster.dns_addresses.iter().copied().filter(|address| listed.contains(address) || link_local(address)).collect();

    let named = egress.allow.iter().filter_map(|allow| allow.cidr.parse::<IpNet>().ok()).map(|range| range.trunc());
    let opened: BTreeSet<IpNet> = named.chain(resolvers.iter().map(|address| IpNet::from(*address))).collect();
    let within = |range: &IpNet| opened.iter().filter(|net| range.contains(*net)).map(ToString::to_string).collect();
    let mut closed: Vec<Cidr> = ranges.iter().map(|range| Cidr { cidr: range.to_string(), except: within(range) }).collect();
    closed.extend(listed.iter().filter(|address| !link_local(address) && !resolvers.contains(address)).map(|address| cidr(*address)));
    let mut rules = vec![Rule { to_cidr_set: closed, ..Rule::default() }];

    if !resolvers.is_empty() {
        let known = rows.iter().filter(|row| resolvers.contains(&row.address.to_canonical()) && row.port != 0).map(|row| row.port);
        let numbers: BTreeSet<u16> = known.chain(NODE_PORTS).collect();
        let numbers: Vec<(&str, u16)> = numbers.into_iter().map(|port| ("TCP", port)).collect();
        let to_cidr_set = resolvers.into_iter().map(cidr).collect();
        rules.push(Rule { to_cidr_set, to_ports: vec![ports(&numbers)], ..Rule::default() });
    }
    Ok(rules)
}

fn cidr(address: IpAddr) -> Cidr {
    Cidr { cidr: IpNet::from(address).to_string(), except: Vec::new() }
}

/// Resolvers on nodes. Cilium knows a node's addresses, link-local ones included, as the node and not as a range, so that the NetworkPolicy
/// for DNS does not open them; nor are the pods of a cache that it redirects to those of the cluster's DNS.
fn on_nodes(cluster: &ClusterFacts) -> Vec<Rule> {
    let mut entities = Vec::new();
    if cluster.dns_addresses.iter().any(is_link_local) {
        entities.push("host");
    }
    if cluster.dns_addresses.iter().any(|address| cluster.nodes.contains(address)) {
        entities = vec!["host", "remote-node"];
    }
    if entities.is_empty() {
        return Vec::new();
    }
    let nodes = Rule { to_entities: entities.into_iter().map(str::to_owned).collect(), to_ports: vec![ports(&DNS)], ..Rule::default() };
    let caches = Rule { to_endpoints: vec![pods(&cluster.dns_namespace, &cache_labels())], to_ports: vec![ports(&DNS)], ..Rule::default() };
    vec![nodes, caches]
}

/// Labels of NodeLocal DNSCache (kubernetes/kubernetes, cluster/addons/dns/nodelocaldns).
fn cache_labels() -> BTreeMap<String, String> {
    BTreeMap::from([("k8s-app".to_owned(), "node-local-dns".to_owned())])
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Nodes and API server. Where the pool needs something of them, only what is known to listen on nodes is closed, but for that: names are
/// asked for there, the forge is on one, or `allow` names one, and Cilium is set to let ranges match nodes.
fn nodes(egress: &Egress, forge: &ForgeAddress, cluster: &ClusterFacts) -> Rule {
    let to_entities = NODES.map(str::to_owned).to_vec();
    let mut needed = Vec::new();
    if forge.addresses.iter().any(|address| cluster.nodes.contains(address)) {
        needed.push(forge.port);
    }
    for allow in &egress.allow {
        if allow.cidr.parse::<IpNet>().is_ok_and(|range| cluster.nodes.iter().any(|node| range.contains(node))) {
            needed.extend(&allow.ports);
        }
    }
    if !on_nodes(cluster).is_empty() {
        needed.push(53);
    }
    if needed.is_empty() {
        return Rule { to_entities, ..Rule::default() };
    }
    let closed: Vec<(&str, u16)> = NODE_PORTS.iter().filter(|port| !needed.contains(port)).map(|port| ("TCP", *port)).collect();
    Rule { to_entities, to_ports: vec![ports(&closed)], ..Rule::default() }
}

fn ports(ports: &[(&str, u16)]) -> Ports {
    Ports {
        ports: ports.iter().map(|(protocol, port)| Port { port: port.to_string(), protocol: (*protocol).to_owned() }).collect(),
        rules: None,
    }
}

fn policy(pool: &str, namespace: &str, owner: &OwnerReference, purpose: &str, spec: CiliumNetworkPolicySpec) -> CiliumNetworkPolicy {
    CiliumNetworkPolicy {
        metadata: object_meta(pool, namespace, owner, purpose),
        spec: CiliumNetworkPolicySpec { endpoint_selector: pool_pods(pool), ..spec },
    }
}

#[cfg(test)]
mod tests {
    use mayfly_crds::{EgressAllow, EgressHost};
    use proptest::prelude::*;

    use super::*;
    use crate::isolation::policies::tests::cluster;

    fn forge(address: &str) -> ForgeAddress {
        ForgeAddress { addresses: vec![address.parse().expect("an address")], port: 3000 }
    }

    fn build(egress: &Egress, forge: &ForgeAddress) -> Vec<CiliumNetworkPolicy> {
        build_in(&cluster(), egress, forge)
    }

    fn build_in(cluster: &ClusterFacts, egress: &Egress, forge: &ForgeAddress) -> Vec<CiliumNetworkPolicy> {
        let owner = OwnerReference { name: "ci".to_owned(), uid: "u".to_owned(), ..OwnerReference::default() };
        cilium_policies("ci", "team", &owner, egress, forge, cluster).expect("valid")
    }

    fn asking(resolver: &str) -> ClusterFacts {
        ClusterFacts { dns_addresses: vec![resolver.parse().expect("an address")], ..cluster() }
    }

    #[test]
    fn a_cache_on_the_node_is_as_reviewed() {
        insta::assert_yaml_snapshot!(build_in(&asking("169.254.20.10"), &Egress::default(), &forge("198.51.100.7")));
    }

    #[test]
    fn a_resolver_at_a_metadata_address_keeps_its_port_alone() {
        let rows = &Endpoints::built_in().expect("the list").endpoints;
        for resolver in ["169.254.169.254", "168.63.129.16", "fd20:ce::254"] {
            let policies = build_in(&asking(resolver), &Egress::default(), &forge("198.51.100.7"));
            assert!(!denies(&policies, resolver.parse().expect("an address"), 53), "{resolver}");
            for row in rows {
                assert!(denies(&policies, row.address.to_canonical(), if row.port == 0 { 80 } else { row.port }), "{resolver}: {row:?}");
            }
            let most =
                policies.iter().flat_map(|policy| &policy.spec.egress_deny).flat_map(|rule| &rule.to_ports).map(|ports| ports.ports.len());
            assert!(most.max().is_some_and(|most| most <= 40), "Cilium takes no more");
        }
    }

    #[test]
    fn names_are_asked_for_on_nodes_only_where_pods_are_told_so() {
        let asked = |resolver: &str| on_nodes(&asking(resolver)).first().map(|rule| rule.to_entities.clone()).unwrap_or_default();
        assert!(asked("10.96.0.10").is_empty());
        assert_eq!(asked("169.254.20.10"), ["host"]);
        assert_eq!(asked("203.0.113.5"), ["host", "remote-node"]);
        let closed = nodes(&Egress::default(), &forge("198.51.100.7"), &asking("169.254.20.10"));
        assert!(
            closed.to_ports[0].ports.iter().all(|port| port.port != "53")
                && closed.to_ports[0].ports.iter().any(|port| port.port == "10250")
        );
    }

    /// Whether some denial closes this address on this TCP port.
    fn denies(policies: &[CiliumNetworkPolicy], address: IpAddr, port: u16) -> bool {
        policies.iter().flat_map(|policy| &policy.spec.egress_deny).any(|rule| {
            let listed = |ports: &Ports| ports.ports.iter().any(|p| p.protocol == "TCP" && p.port == port.to_string());
            let within = |range: &str| range.parse::<IpNet>().expect("a range").contains(&address);
            let closed = |cidr: &Cidr| within(&cidr.cidr) && !cidr.except.iter().any(|range| within(range));
            (rule.to_ports.is_empty() || rule.to_ports.iter().any(listed)) && rule.to_cidr_set.iter().any(closed)
        })
    }

    #[test]
    fn the_whole_set_is_as_reviewed() {
        let host = |host: &str, port: u16| EgressHost { host: host.to_owned(), ports: vec![port] };
        let hosts = vec![host("registry.example.org", 443), host("*.mirror.example.org", 8443)];
        insta::assert_yaml_snapshot!(build(&Egress { hosts, ..Egress::default() }, &forge("198.51.100.7")));
    }

    #[test]
    fn without_host_names_nothing_is_opened() {
        assert!(
            build(&Egress { internet: true, ..Egress::default() }, &forge("198.51.100.7"))
                .iter()
                .all(|policy| policy.spec.egress.is_empty())
        );
    }

    #[test]
    fn host_names_are_told_from_what_is_none() {
        for good in ["example.org", "a.b-c.d_e.example.org", "*.example.org", "1.example.org", "xn--bcher-kva.example"] {
            assert!(is_host_name(good), "{good}");
        }
        let long = format!("{}.example.org", "a".repeat(64));
        for bad in [
            "",
            "*",
            "*.",
            "*.org",
            "org",
            "*example.org",
            "a.*.org",
            "*.*.example.org",
            "example.org.",
            ".example.org",
            "a..org",
            "Example.org",
            "192.0.2.1",
            "1.2",
            "2001:db8::1",
            "-a.example.org",
            "a-.example.org",
            "a b.example.org",
            "ex\u{e4}mple.org",
            &long,
        ] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }

    #[test]
    fn every_endpoint_of_the_list_is_denied() {
        let policies = build(&Egress { internet: true, ..Egress::default() }, &forge("198.51.100.7"));
        for row in &Endpoints::built_in().expect("the list").endpoints {
            for port in [row.port, 80, 443, 1] {
                assert!(denies(&policies, row.address.to_canonical(), port), "{row:?} on {port}");
            }
        }
        for open in ["140.82.121.4", "198.51.100.7", "10.0.0.1", "2606:50c0::1"] {
            assert!(!denies(&policies, open.parse().expect("an address"), 443), "{open}");
        }
    }

    #[test]
    fn what_a_pool_needs_of_a_node_stays_open_and_the_rest_of_it_closed() {
        let rule = |egress: &Egress, address: &str| build(egress, &forge(address))[0].spec.egress_deny[1].clone();
        assert!(rule(&Egress::default(), "198.51.100.7").to_ports.is_empty(), "nothing is needed: all of it is closed");
        let allow = EgressAllow { cidr: "203.0.113.0/24".to_owned(), ports: vec![443] };
        let allowed = Egress { allow: vec![allow], ..Egress::default() };
        for (rule, open) in [(rule(&Egress::default(), "203.0.113.5"), "3000"), (rule(&allowed, "198.51.100.7"), "443")] {
            let closed = &rule.to_ports[0].ports;
            assert!(closed.iter().any(|port| port.port == "10250") && closed.iter().all(|port| port.port != open), "{closed:?}");
            assert!(closed.len() <= 40, "Cilium takes no more");
        }
    }

    proptest! {
        #[test]
        fn what_a_pool_opens_is_not_denied_and_never_an_endpoint(third: u8, prefix in 24u8..=32) {
            let cidr = format!("169.254.{third}.0/{prefix}");
            let range: IpNet = cidr.parse().expect("a range");
            prop_assume!(super::super::covers_metadata(&range).is_none());
            let egress = Egress { allow: vec![EgressAllow { cidr, ports: vec![443] }], ..Egress::default() };
            let policies = build(&egress, &forge("198.51.100.7"));
            prop_assert!(!denies(&policies, range.addr(), 443));
            for row in &Endpoints::built_in().expect("the list").endpoints {
                prop_assert!(denies(&policies, row.address.to_canonical(), row.port), "{:?}", row);
            }
        }
    }
}
