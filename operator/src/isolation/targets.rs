//! What a runner pod has to try, by class: a pure function of where the pod is.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mayfly_proof::{Answer, Challenge, Class, Endpoint, Probe, SENTINEL_PORT, Target};

use super::endpoints::Endpoints;

/// Port of the kubelet on every node.
const KUBELET: u16 = 10_250;
/// Other nodes tried: those on which policies are enforced in another way are proved by their own pods.
const OTHER_NODES: usize = 2;
/// Clean rounds in a row.
const ROUNDS: u8 = 3;
/// Time until the rounds have to be clean: some network plugins enforce a policy only a while after a pod's start.
const WITHIN: Duration = Duration::from_secs(10);
/// A try waits this many times as long as the slowest control took, within these bounds.
const PATIENCE: u32 = 4;
const PATIENCE_LEAST: Duration = Duration::from_millis(60);
const PATIENCE_MOST: Duration = Duration::from_millis(500);

/// Where a pod is, and what is around it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Addresses of the pod's node.
    pub(crate) node: Vec<IpAddr>,
    /// Addresses of other nodes.
    pub(crate) other_nodes: Vec<IpAddr>,
    /// The API server's Service and endpoints.
    pub(crate) api_server: Vec<SocketAddr>,
    /// Addresses of pods that answer on [`SENTINEL_PORT`], in another namespace.
    pub(crate) sentinel_pods: Vec<IpAddr>,
    /// Addresses of the Service in front of them.
    pub(crate) sentinel_service: Vec<IpAddr>,
    /// Addresses outside of the cluster that no pool opens.
    pub(crate) outside: Vec<SocketAddr>,
}

/// Everything that must not answer a runner pod there.
///
/// # Errors
/// When the list of metadata endpoints cannot be read.
pub(crate) fn forbidden(around: &Surroundings) -> Result<Vec<(Class, Endpoint)>, String> {
    let metadata = Endpoints::built_in()?.endpoints.iter().map(|row| {
        let port = if row.port == 0 { 80 } else { row.port };
        (Class::Metadata, Endpoint::tcp((row.address, port).into()))
    });
    let tcp = |class: Class, address: &IpAddr, port: u16| (class, Endpoint::tcp((*address, port).into()));
    let mut all: Vec<(Class, Endpoint)> = metadata.collect();
    all.extend(around.outside.iter().map(|address| (Class::Outside, Endpoint::tcp(*address))));
    all.extend(around.node.iter().map(|address| tcp(Class::Node, address, KUBELET)));
    all.extend(around.other_nodes.iter().take(OTHER_NODES).map(|address| tcp(Class::OtherNode, address, KUBELET)));
    all.extend(around.api_server.iter().map(|address| (Class::ApiServer, Endpoint::tcp(*address))));
    for (class, addresses) in [(Class::Pods, &around.sentinel_pods), (Class::Services, &around.sentinel_service)] {
        all.extend(addresses.iter().map(|address| tcp(class, address, SENTINEL_PORT)));
        all.extend(addresses.iter().map(|address| (class, Endpoint::udp((*address, SENTINEL_PORT).into()))));
    }
    all.sort();
    all.dedup();
    Ok(all)
}

/// The challenge for a pod: what it has to try, with what each answered the operator.
pub(crate) fn challenge(nonce: String, forbidden: &[(Class, Endpoint)], controls: &[Probe], required: Vec<SocketAddr>) -> Challenge {
    let targets = forbidden.iter().zip(controls).map(|((class, endpoint), control)| Target {
        class: *class,
        endpoint: *endpoint,
        control: control.answer,
    });
    let answered = controls.iter().filter(|control| control.answer != Answer::Silent).map(|control| control.took);
    let patience = (answered.max().unwrap_or_default() * PATIENCE).clamp(PATIENCE_LEAST, PATIENCE_MOST);
    Challenge {
        nonce,
        forbidden: targets.collect(),
        required,
        rounds: ROUNDS,
        patience_ms: u16::try_from(patience.as_millis()).unwrap_or(u16::MAX),
        within_ms: u32::try_from(WITHIN.as_millis()).unwrap_or(u32::MAX),
    }
}

/// Which classes have to be among the findings for a proof to be whole. Other nodes may not exist.
pub(crate) const WHOLE: [Class; 6] = [Class::Metadata, Class::Outside, Class::Node, Class::ApiServer, Class::Pods, Class::Services];

#[cfg(test)]
mod tests {
    use super::*;

    fn around() -> Surroundings {
        let ip = |text: &str| text.parse().expect("an address");
        Surroundings {
            node: vec![ip("10.0.0.1")],
            other_nodes: (2..9).map(|n| IpAddr::from([10, 0, 0, n])).collect(),
            api_server: vec!["10.96.0.1:443".parse().expect("an address")],
            sentinel_pods: vec![ip("10.244.0.9")],
            sentinel_service: vec![ip("10.96.0.7")],
            outside: vec!["198.51.100.7:1".parse().expect("an address")],
        }
    }

    #[test]
    fn every_row_of_the_list_and_every_class_is_tried() {
        let all = forbidden(&around()).expect("the list");
        for row in &Endpoints::built_in().expect("the list").endpoints {
            assert!(all.iter().any(|(class, endpoint)| *class == Class::Metadata && endpoint.address.ip() == row.address), "{row:?}");
        }
        for class in WHOLE {
            assert!(all.iter().any(|(tried, _)| *tried == class), "{class}");
        }
        assert_eq!(all.iter().filter(|(class, _)| *class == Class::OtherNode).count(), OTHER_NODES);
        assert_eq!(all.iter().filter(|(class, _)| *class == Class::Pods).count(), 2, "TCP and UDP");
    }

    #[test]
    fn patience_follows_the_slowest_control_within_bounds() {
        let all = forbidden(&around()).expect("the list");
        let patience = |answer: Answer, took: u64| {
            let controls = vec![Probe { answer, took: Duration::from_millis(took) }; all.len()];
            challenge("n".to_owned(), &all, &controls, Vec::new()).patience_ms
        };
        assert_eq!(patience(Answer::Accepted, 1), 60);
        assert_eq!(patience(Answer::Accepted, 20), 80);
        assert_eq!(patience(Answer::Accepted, 400), 500);
        assert_eq!(patience(Answer::Silent, 400), 60);
    }
}
