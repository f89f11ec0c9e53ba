//! Trying many endpoints at once, on one thread, until a deadline.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with, sockopt};
use serde::{Deserialize, Serialize};

use crate::{Answer, Endpoint, GREETING, Protocol};

/// What one try showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The answer.
    pub answer: Answer,
    /// How long it took to come; `patience` where none came.
    pub took: Duration,
}

/// Tries every endpoint at the same time and waits for answers until `patience` is over. Results are in the endpoints' order.
///
/// An endpoint to which no socket can be made counts as silent: a caller that needs an answer finds none.
pub fn probe(endpoints: &[Endpoint], patience: Duration) -> Vec<Probe> {
    let began = Instant::now();
    let mut results = vec![Probe { answer: Answer::Silent, took: patience }; endpoints.len()];
    let mut open: Vec<(usize, OwnedFd)> = Vec::new();
    for (index, endpoint) in endpoints.iter().enumerate() {
        match start(*endpoint) {
            Started::Waits(socket) => open.push((index, socket)),
            Started::Over(answer) => results[index] = Probe { answer, took: began.elapsed() },
        }
    }
    while !open.is_empty() {
        // When the time is over it is looked once more: this program may not have run for a while, and answers came meanwhile.
        let left = patience.saturating_sub(began.elapsed());
        let ready = match wait(&open, endpoints, left) {
            Ok(ready) => ready,
            Err(Errno::INTR) => continue,
            Err(_) => break,
        };
        for place in ready.into_iter().rev() {
            let (index, socket) = open.remove(place);
            results[index] = Probe { answer: finish(endpoints[index].protocol, &socket), took: began.elapsed() };
        }
        if left.is_zero() {
            break;
        }
    }
    results
}

enum Started {
    Waits(OwnedFd),
    Over(Answer),
}

fn start(endpoint: Endpoint) -> Started {
    let family = match endpoint.address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match endpoint.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let Ok(socket) = socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None) else {
        return Started::Over(Answer::Silent);
    };
    let connected = connect(&socket, &endpoint.address);
    match (endpoint.protocol, connected) {
        (_, Err(Errno::INPROGRESS)) => Started::Waits(socket),
        (Protocol::Tcp, Ok(())) => Started::Over(Answer::Accepted),
        (Protocol::Udp, Ok(())) => match send(&socket, GREETING, SendFlags::empty()) {
            Ok(_) => Started::Waits(socket),
            Err(error) => Started::Over(refusal(error)),
        },
        (_, Err(error)) => Started::Over(refusal(error)),
    }
}

/// Places in `open` at which something happened.
fn wait(open: &[(usize, OwnedFd)], endpoints: &[Endpoint], left: Duration) -> Result<Vec<usize>, Errno> {
    let flags = |index: usize| match endpoints[index].protocol {
        Protocol::Tcp => PollFlags::OUT,
        Protocol::Udp => PollFlags::IN,
    };
    let mut polled: Vec<PollFd<'_>> = open.iter().map(|(index, socket)| PollFd::new(socket, flags(*index))).collect();
    let timeout = Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
    poll(&mut polled, Some(&timeout))?;
    Ok(polled.iter().enumerate().filter(|(_, fd)| !fd.revents().is_empty()).map(|(place, _)| place).collect())
}

fn finish(protocol: Protocol, socket: &OwnedFd) -> Answer {
    match protocol {
        Protocol::Tcp => match sockopt::socket_error(socket) {
            Ok(Ok(())) => Answer::Accepted,
            Ok(Err(error)) | Err(error) => refusal(error),
        },
        Protocol::Udp => match recv(socket, &mut [0_u8; 16][..], RecvFlags::empty()) {
            Ok(_) => Answer::Accepted,
            Err(error) => refusal(error),
        },
    }
}

/// A reset or a refusal came from somewhere; everything else is no way there.
fn refusal(error: Errno) -> Answer {
    match error {
        Errno::CONNREFUSED | Errno::CONNRESET => Answer::Refused,
        _ => Answer::Silent,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::thread;

    use super::*;

    fn answers(endpoints: &[Endpoint], patience: Duration) -> Vec<Answer> {
        probe(endpoints, patience).into_iter().map(|probe| probe.answer).collect()
    }

    #[test]
    fn an_answer_that_is_there_when_the_time_is_over_is_seen() {
        let open = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let endpoint = Endpoint::tcp(open.local_addr().expect("an address"));
        assert_eq!(answers(&[endpoint], Duration::ZERO), [Answer::Accepted]);
    }

    #[test]
    fn an_open_a_closed_and_a_silent_target_are_told_apart() {
        let open = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let closed = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("an address");
        let echo = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let mute = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let endpoints = [
            Endpoint::tcp(open.local_addr().expect("an address")),
            Endpoint::tcp(closed),
            Endpoint::udp(echo.local_addr().expect("an address")),
            Endpoint::udp(mute.local_addr().expect("an address")),
            Endpoint::udp(closed),
            Endpoint::tcp("[fe80::a9fe:a9fe]:80".parse().expect("an address")),
        ];
        let answering = thread::spawn(move || {
            let mut said = [0; 16];
            let (length, from) = echo.recv_from(&mut said).expect("a greeting");
            echo.send_to(&said[..length], from).expect("an answer");
        });
        let found = answers(&endpoints, Duration::from_millis(300));
        answering.join().expect("no panic");
        use Answer::{Accepted, Refused, Silent};
        assert_eq!(found, [Accepted, Refused, Accepted, Silent, Refused, Silent]);
    }

    #[test]
    fn silence_is_not_waited_for_longer_than_said() {
        let mute = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let endpoints = [Endpoint::udp(mute.local_addr().expect("an address")); 200];
        let began = Instant::now();
        assert!(answers(&endpoints, Duration::from_millis(50)).iter().all(|answer| *answer == Answer::Silent));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}
