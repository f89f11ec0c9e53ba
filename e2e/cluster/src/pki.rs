//! Keys, certificates and kubeconfigs. Every component has an identity of its own; nothing skips verification.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::command::{write_file, write_private};
use crate::layout::{CLUSTER_DOMAIN, Layout, NODE_NAME};

/// Clients of the API server: file name, user, group.
const CLIENTS: [(&str, &str, Option<&str>); 5] = [
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("kubelet", "system:node:node1", Some("system:nodes")),
    ("proxy", "system:kube-proxy", None),
    ("cilium", "cilium", Some("mayfly-e2e:engine")),
];

/// The person at the keyboard: user, group.
const ADMIN: (&str, &str) = ("kubernetes-admin", "system:masters");

/// Lifetime of everything: longer than any test cluster.
const LIFETIME: Duration = Duration::days(3650);

/// Path of a file this module makes, such as `ca.crt` or `scheduler.kubeconfig`.
pub fn path(layout: &Layout, file: &str) -> PathBuf {
    layout.at("pki").join(file)
}

/// Makes the authority and all identities, once per cluster.
pub fn create(layout: &Layout) -> Result<()> {
    if layout.kubeconfig().exists() {
        return Ok(());
    }
    let authority = Authority::new()?;
    authority.store(layout)?;

    let (addresses, server) = (layout.addresses(), layout.addresses().api_url());
    let service = format!("kubernetes.default.svc.{CLUSTER_DOMAIN}");
    let api_names = [
        &addresses.node,
        &addresses.api_service,
        "127.0.0.1",
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        &service,
    ];
    authority.issue("kube-apiserver", None, &api_names)?.store(layout, "apiserver")?;
    authority.issue("system:node:node1", Some("system:nodes"), &[&addresses.node, NODE_NAME])?.store(layout, "kubelet-server")?;
    authority.issue("kube-apiserver-kubelet-client", Some("system:masters"), &[])?.store(layout, "apiserver-kubelet-client")?;

    let accounts = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    write_private(&path(layout, "service-accounts.key"), &accounts.serialize_pem())?;
    write_file(&path(layout, "service-accounts.pub"), &accounts.public_key_pem())?;

    for (file, user, group) in CLIENTS {
        let pair = authority.issue(user, group, &[])?;
        let text = kubeconfig(layout.name(), &server, &authority.pem, user, &pair);
        write_private(&path(layout, &format!("{file}.kubeconfig")), &text)?;
    }
    // Last, because its presence says that all of them are there.
    let (user, group) = ADMIN;
    let pair = authority.issue(user, Some(group), &[])?;
    write_private(&layout.kubeconfig(), &kubeconfig(layout.name(), &server, &authority.pem, user, &pair))
}

/// Makes the authority of the outside world's certificates for a cluster that others made, once.
pub fn create_authority(layout: &Layout) -> Result<()> {
    match path(layout, "ca.key").exists() {
        true => Ok(()),
        false => Authority::new()?.store(layout),
    }
}

/// A certificate of the cluster's authority for a server of the outside world, and its key, as PEM files: made once under each `name`,
/// for these host names and addresses.
pub fn server(layout: &Layout, name: &str, hosts: &[&str]) -> Result<(PathBuf, PathBuf)> {
    let paths = (path(layout, &format!("{name}.crt")), path(layout, &format!("{name}.key")));
    if !paths.0.exists() || !paths.1.exists() {
        Authority::of(layout)?.issue_server(name, hosts)?.store(layout, name)?;
    }
    Ok(paths)
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    key: String,
}

/// A certificate and its key, both PEM.
struct Pair {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let (key, params) = (KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, Self::params());
        let certificate = params.self_signed(&key).context("cannot sign the authority's certificate")?;
        Ok(Self { pem: certificate.pem(), key: key.serialize_pem(), issuer: Issuer::new(params, key) })
    }

    /// The one that a cluster has.
    fn of(layout: &Layout) -> Result<Self> {
        let key = fs::read_to_string(path(layout, "ca.key")).context("cannot read the authority's key")?;
        let pair = KeyPair::from_pem(&key).context("cannot use the authority's key")?;
        Ok(Self { pem: authority(layout)?, key, issuer: Issuer::new(Self::params(), pair) })
    }

    fn store(&self, layout: &Layout) -> Result<()> {
        write_file(&path(layout, "ca.crt"), &self.pem)?;
        write_private(&path(layout, "ca.key"), &self.key)
    }

    fn params() -> CertificateParams {
        let mut params = params("mayfly-e2e", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params
    }

    /// A certificate for a client, or, with `names`, for a server as well.
    fn issue(&self, user: &str, group: Option<&str>, names: &[&str]) -> Result<Pair> {
        let mut usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !names.is_empty() {
            usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        self.sign(params(user, group), user, names, usages)
    }

    /// A certificate for a server that is nobody to the API server.
    fn issue_server(&self, name: &str, hosts: &[&str]) -> Result<Pair> {
        self.sign(params(name, None), name, hosts, vec![ExtendedKeyUsagePurpose::ServerAuth])
    }

    fn sign(&self, mut params: CertificateParams, user: &str, names: &[&str], usages: Vec<ExtendedKeyUsagePurpose>) -> Result<Pair> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName((*name).try_into()?),
            });
        }
        let certificate = params.signed_by(&key, &self.issuer).with_context(|| format!("cannot sign the certificate of {user}"))?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

impl Pair {
    fn store(&self, layout: &Layout, name: &str) -> Result<()> {
        write_file(&path(layout, &format!("{name}.crt")), &self.certificate)?;
        write_private(&path(layout, &format!("{name}.key")), &self.key)
    }
}

fn params(user: &str, group: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, user);
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    params.distinguished_name = name;
    // The clock of a virtual machine may step back a little.
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = params.not_before + LIFETIME;
    params
}

fn kubeconfig(cluster: &str, server: &str, authority: &str, user: &str, pair: &Pair) -> String {
    let data = |pem: &str| STANDARD.encode(pem);
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: {cluster}
  cluster:
    server: {server}
    certificate-authority-data: {}
users:
- name: {user}
  user:
    client-certificate-data: {}
    client-key-data: {}
contexts:
- name: {cluster}
  context: {{cluster: {cluster}, user: \"{user}\"}}
current-context: {cluster}
",
        data(authority),
        data(&pair.certificate),
        data(&pair.key),
    )
}

/// The certificate authority of API server and outside world, PEM.
pub fn authority(layout: &Layout) -> Result<String> {
    let path = path(layout, "ca.crt");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}; is the cluster up?", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubeconfig_is_whole_and_verifies_the_server() {
        let authority = Authority::new().unwrap();
        let pair = authority.issue("kubernetes-admin", Some("system:masters"), &[]).unwrap();
        let text = kubeconfig("mayfly", "https://172.30.0.1:6443", &authority.pem, "kubernetes-admin", &pair);
        assert!(!text.contains("insecure"));
        for (field, pem) in [
            ("certificate-authority-data: ", &authority.pem),
            ("client-certificate-data: ", &pair.certificate),
            ("client-key-data: ", &pair.key),
        ] {
            let encoded = text.lines().find_map(|line| line.trim().strip_prefix(field)).unwrap();
            assert_eq!(STANDARD.decode(encoded).unwrap(), pem.as_bytes());
        }
    }

    #[test]
    fn only_servers_may_serve() {
        let authority = Authority::new().unwrap();
        let client = authority.issue("scheduler", None, &[]).unwrap();
        let server = authority.issue("kube-apiserver", None, &["172.30.0.1", "kubernetes"]).unwrap();
        let outside = authority.issue_server("github", &["github.mayfly.test"]).unwrap();
        // OIDs 1.3.6.1.5.5.7.3.1 and .2, authentication of servers and of clients, in DER.
        let server_auth = [0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
        let client_auth = [0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];
        let der = |pem: &str| {
            let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
            STANDARD.decode(body).unwrap()
        };
        let may = |pair: &Pair, usage: [u8; 10]| der(&pair.certificate).windows(usage.len()).any(|window| window == usage);
        assert!(may(&server, server_auth) && may(&outside, server_auth) && !may(&client, server_auth));
        assert!(may(&server, client_auth) && may(&client, client_auth) && !may(&outside, client_auth));
    }
}
