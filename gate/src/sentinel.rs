//! The other end of a positive control: something that answers, and tells the operator what answers here.

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use mayfly_proof::{GREETING, Looked, SENTINEL_PORT, probe};

use crate::operator::Client;

/// Pause after an error of the network, which may be one of many.
const PAUSE: Duration = Duration::from_millis(20);
/// Pause after a call to the operator that failed.
const PAUSE_OPERATOR: Duration = Duration::from_secs(2);
/// Most endpoints tried at once, and how long at most.
const MOST: usize = 1_000;
const LONGEST: Duration = Duration::from_secs(1);

#[derive(Args)]
pub(crate) struct Settings {
    /// Where to answer, TCP and UDP [default: everywhere, IPv6 and IPv4, on port 7654].
    #[arg(long, env = "MAYFLY_SENTINEL_ADDRESS")]
    address: Option<SocketAddr>,
    /// Base URL of the operator's gate API, which is asked what to try on this node [default: nobody is asked].
    // No environment: the variables of these names are a runner pod's.
    #[arg(long, requires_all = ["operator_ca_file", "token_file"])]
    operator_url: Option<String>,
    /// File with the certificate authority of the gate API, PEM; read anew after every error.
    #[arg(long)]
    operator_ca_file: Option<PathBuf>,
    /// File with this pod's token for the gate API; read anew for every call.
    #[arg(long)]
    token_file: Option<PathBuf>,
}

/// Tries for ever what the operator asks for, and tells it what answered: what is bound to this node answers only here.
fn look(url: &str, authority: &Path, token: &Path) -> Infallible {
    loop {
        let served = fs::read_to_string(authority)
            .map_err(|error| format!("{}: {error}", authority.display()))
            .and_then(|authority| Client::new(url, &authority, token))
            .and_then(|client| {
                let mut found = None;
                loop {
                    found = client.control(found.as_ref())?.map(|look| {
                        let patience = Duration::from_millis(look.patience_ms.into()).min(LONGEST);
                        Looked { number: look.number, probes: probe(&look.endpoints[..look.endpoints.len().min(MOST)], patience) }
                    });
                }
            });
        let Err::<Infallible, _>(why) = served;
        crate::say(&why);
        thread::sleep(PAUSE_OPERATOR);
    }
}

/// Answers for ever. Nothing that is said is looked at, and an answer is never longer than the question.
///
/// # Errors
/// When the address cannot be had.
pub(crate) fn run(settings: &Settings) -> Result<Infallible, String> {
    // The first takes IPv4 as well; a node may have no IPv6.
    let everywhere = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, SENTINEL_PORT)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, SENTINEL_PORT))];
    let addresses = settings.address.as_ref().map_or(&everywhere[..], std::slice::from_ref);
    let wrong = |error: std::io::Error| format!("{addresses:?}: {error}");
    let listener = TcpListener::bind(addresses).map_err(wrong)?;
    let socket = UdpSocket::bind(addresses).map_err(wrong)?;
    if let (Some(url), Some(authority), Some(token)) = (&settings.operator_url, &settings.operator_ca_file, &settings.token_file) {
        let (url, authority, token) = (url.clone(), authority.clone(), token.clone());
        thread::spawn(move || look(&url, &authority, &token));
    }
    thread::spawn(move || {
        let mut said = [0; GREETING.len()];
        loop {
            match socket.recv_from(&mut said) {
                // Whoever left early misses nothing.
                Ok((length, from)) => drop(socket.send_to(&said[..length], from)),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    });
    loop {
        match listener.accept() {
            Ok((mut connection, _)) => drop(connection.write_all(GREETING)),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}
