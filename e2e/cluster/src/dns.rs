//! Asking the cluster's DNS server, without the machine's resolver in between.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::layout::{CLUSTER_DOMAIN, Layout, OUTSIDE_DOMAIN};

/// Fails unless DNS answers for a Service and for the outside world.
pub fn answers(layout: &Layout) -> Result<()> {
    let api = format!("kubernetes.default.svc.{CLUSTER_DOMAIN}");
    let found = lookup(layout, &api)?;
    ensure!(found.is_some(), "DNS does not know {api}");
    let forge = format!("forge.{OUTSIDE_DOMAIN}");
    let found = lookup(layout, &forge)?.map(|address| address.to_string());
    ensure!(found.as_ref() == Some(&layout.addresses().outside), "DNS says {found:?} for {forge}");
    Ok(())
}

/// The first IPv4 address of a name, asked from this machine through the Service's address.
pub fn lookup(layout: &Layout, name: &str) -> Result<Option<Ipv4Addr>> {
    lookup_at(&layout.addresses().dns, name)
}

/// The first IPv4 address that a DNS server (RFC 1035) gives for a name, within a second.
pub fn lookup_at(server: &str, name: &str) -> Result<Option<Ipv4Addr>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let id = u16::try_from(std::process::id() & 0xffff)?;
    socket.send_to(&query(id, name)?, (server, 53)).with_context(|| format!("cannot send to the DNS server {server}"))?;
    let mut buffer = [0u8; 512];
    let length = socket.recv(&mut buffer).with_context(|| format!("the DNS server {server} does not answer"))?;
    answer(id, &buffer[..length])
}

fn query(id: u16, name: &str) -> Result<Vec<u8>> {
    let mut message = Vec::from(id.to_be_bytes());
    // Recursion desired; one question.
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.trim_end_matches('.').split('.') {
        ensure!((1..64).contains(&label.len()), "{name:?} is not a DNS name");
        message.push(u8::try_from(label.len())?);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    Ok(message)
}

fn answer(id: u16, message: &[u8]) -> Result<Option<Ipv4Addr>> {
    let word = |at: usize| -> Result<u16> {
        let bytes = message.get(at..at + 2).context("the DNS answer is cut short")?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    ensure!(word(0)? == id, "the DNS answer is for another question");
    match word(2)? & 0xf {
        0 => {}
        3 => return Ok(None),
        code => bail!("the DNS server answered with error {code}"),
    }
    let mut at = 12;
    for _ in 0..word(4)? {
        at = skip_name(message, at)? + 4;
    }
    for _ in 0..word(6)? {
        at = skip_name(message, at)?;
        let (kind, length) = (word(at)?, usize::from(word(at + 8)?));
        let data = message.get(at + 10..at + 10 + length).context("the DNS answer is cut short")?;
        if let (1, [a, b, c, d]) = (kind, data) {
            return Ok(Some(Ipv4Addr::new(*a, *b, *c, *d)));
        }
        at += 10 + length;
    }
    Ok(None)
}

fn skip_name(message: &[u8], mut at: usize) -> Result<usize> {
    loop {
        match *message.get(at).context("the DNS answer is cut short")? {
            0 => return Ok(at + 1),
            length if length & 0xc0 == 0xc0 => return Ok(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(flags: u16, answers: &[&[u8]]) -> Vec<u8> {
        let mut message = query(7, "a.b").unwrap();
        message[2..4].copy_from_slice(&flags.to_be_bytes());
        message[6..8].copy_from_slice(&u16::try_from(answers.len()).unwrap().to_be_bytes());
        for answer in answers {
            message.extend(*answer);
        }
        message
    }

    #[test]
    fn finds_the_address_behind_an_alias() {
        let alias = [0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, 2, 0xc0, 12];
        let address = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 172, 30, 0, 254];
        let found = answer(7, &reply(0x8180, &[&alias, &address])).unwrap();
        assert_eq!(found, Some(Ipv4Addr::new(172, 30, 0, 254)));
    }

    #[test]
    fn tells_no_such_name_from_failure_and_from_garbage() {
        assert_eq!(answer(7, &reply(0x8183, &[])).unwrap(), None);
        assert!(answer(7, &reply(0x8182, &[])).is_err());
        assert!(answer(8, &reply(0x8180, &[])).is_err());
        assert!(answer(7, &[0, 7, 0x81]).is_err());
        assert!(answer(7, &reply(0x8180, &[&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 172]])).is_err());
    }

    #[test]
    fn refuses_what_is_no_name() {
        assert!(query(1, "a..b").is_err());
        assert!(query(1, &"x".repeat(64)).is_err());
    }
}
