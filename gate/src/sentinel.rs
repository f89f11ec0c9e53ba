//! Something that answers: the other end of a positive control.

use std::convert::Infallible;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use clap::Args;
use mayfly_proof::{GREETING, SENTINEL_PORT};

/// Pause after an error of the network, which may be one of many.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Args)]
pub(crate) struct Settings {
    /// Where to answer, TCP and UDP.
    #[arg(long, env = "MAYFLY_SENTINEL_ADDRESS", default_value_t = SocketAddr::from(([0, 0, 0, 0], SENTINEL_PORT)))]
    address: SocketAddr,
}

/// Answers for ever. Nothing that is said is looked at, and an answer is never longer than the question.
///
/// # Errors
/// When the address cannot be had.
pub(crate) fn run(settings: &Settings) -> Result<Infallible, String> {
    let wrong = |error: std::io::Error| format!("{}: {error}", settings.address);
    let listener = TcpListener::bind(settings.address).map_err(wrong)?;
    let socket = UdpSocket::bind(settings.address).map_err(wrong)?;
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
