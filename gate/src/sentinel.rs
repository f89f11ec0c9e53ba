//! Something that answers: the other end of a positive control.

use std::convert::Infallible;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use clap::Args;
use mayfly_proof::{GREETING, SENTINEL_PORT};

/// Pause after an error of the network, which may be one of many.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Args)]
pub(crate) struct Settings {
    /// Where to answer, TCP and UDP [default: everywhere, IPv6 and IPv4, on port 7654].
    #[arg(long, env = "MAYFLY_SENTINEL_ADDRESS")]
    address: Option<SocketAddr>,
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
