//! What a proof of isolation is: which addresses are tried, what each answers, and what that shows.
//!
//! Two sides share it. An address is tried where no policy stands in the way, which is the **control**: by the operator, and by a sentinel
//! on the runner pod's own node. The gate tries the same address inside the runner pod. Silence in the pod means something only where the
//! control was answered a moment ago ([`judge`]).

mod probe;
mod verdict;

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use probe::{Probe, probe};
pub use verdict::{Finding, Verdict, judge, overall};

/// Port on which a sentinel answers, TCP and UDP.
pub const SENTINEL_PORT: u16 = 7_654;
/// What a probe says to a UDP target, and a sentinel says back.
pub const GREETING: &[u8] = b"mayfly";

/// A kind of address that no job may reach. What enforces a policy often treats the kinds differently, so each is proved by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// Metadata and credential endpoints of clouds.
    Metadata,
    /// Other addresses outside of the cluster.
    Outside,
    /// The pod's own node.
    Node,
    /// Other nodes.
    OtherNode,
    /// The API server, by its Service and by its endpoints. The Service is one that leads to a forbidden target.
    ApiServer,
    /// Pods of other namespaces.
    Pods,
    /// Services of other namespaces.
    Services,
}

impl Class {
    /// As it is spelled in statuses and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Metadata => "Metadata",
            Self::Outside => "Outside",
            Self::Node => "Node",
            Self::OtherNode => "OtherNode",
            Self::ApiServer => "ApiServer",
            Self::Pods => "Pods",
            Self::Services => "Services",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a target is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// A connection is tried.
    Tcp,
    /// A datagram is sent and an answer awaited.
    Udp,
}

/// An address and how to speak to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// How.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
}

impl Endpoint {
    /// A TCP endpoint.
    pub fn tcp(address: SocketAddr) -> Self {
        Self { protocol: Protocol::Tcp, address }
    }

    /// A UDP endpoint.
    pub fn udp(address: SocketAddr) -> Self {
        Self { protocol: Protocol::Udp, address }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol} {}", self.address)
    }
}

/// What became of one try, from closed to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Nothing came back in time, or there is no way there.
    Silent,
    /// A refusal came back: from the target itself, or from a policy engine that rejects instead of dropping.
    Refused,
    /// The target took the connection, or answered the datagram.
    Accepted,
}

/// One thing that is tried in the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Its kind.
    pub class: Class,
    /// Where it is.
    pub endpoint: Endpoint,
    /// What it answered a moment ago where no policy stood in the way.
    pub control: Answer,
}

/// What the operator asks the control on a node to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Look {
    /// Belongs into the answer.
    pub number: u64,
    /// What to try.
    pub endpoints: Vec<Endpoint>,
    /// How long a try waits for an answer, in milliseconds.
    pub patience_ms: u16,
}

/// What the control on a node found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Looked {
    /// The question's.
    pub number: u64,
    /// What each endpoint answered, in the question's order.
    pub probes: Vec<Probe>,
}

/// What the operator asks a gate to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Challenge {
    /// Belongs into the report: an answer to another challenge is worth nothing.
    pub nonce: String,
    /// What must not be reachable.
    pub forbidden: Vec<Target>,
    /// Of these TCP endpoints at least one must accept. Empty: nothing is required.
    pub required: Vec<SocketAddr>,
    /// Clean rounds in a row that are asked for.
    pub rounds: u8,
    /// How long a try waits for an answer, in milliseconds.
    pub patience_ms: u16,
    /// How long it may take until the rounds are clean, in milliseconds.
    pub within_ms: u32,
}

/// What a gate found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The challenge's.
    pub nonce: String,
    /// What each forbidden target answered in the last rounds, in the challenge's order; the most open answer of each.
    pub forbidden: Vec<Answer>,
    /// Whether a required endpoint accepted in each of the last rounds.
    pub required: bool,
    /// Clean rounds in a row at the end.
    pub clean: u8,
    /// Rounds before, in which something was open or something required was closed.
    pub unclean: u32,
    /// How long all rounds took, in milliseconds.
    pub took_ms: u32,
    /// What a sentinel answered from the gate's first instruction on. In the first report of a pod only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
}

/// The race at a pod's start: whether something answered before the pod's policies were enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Start {
    /// Tries.
    pub tries: u32,
    /// Tries that were answered.
    pub answered: u32,
    /// When the last answered try began, in milliseconds after the gate's first instruction.
    pub last_ms: u32,
}
