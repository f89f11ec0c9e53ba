//! The certificate of the gate API: made by the operator, kept in a Secret of its own namespace, so that pods started before a
//! restart trust the process that comes after it. The authority's key is thrown away: it signs one certificate.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, ResourceExt};
use mayfly_crds::names::{LABEL_MANAGED_BY, MANAGED_BY};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use crate::kube_io::KubeIo;

const ANNOTATION_NOT_AFTER: &str = "mayfly.dev/not-after";
const ANNOTATION_NAMES: &str = "mayfly.dev/dns-names";
/// Life of the certificate, and how much of it must be left at a start.
const LIFE: SignedDuration = SignedDuration::from_hours(24 * 730);
const LEFT: SignedDuration = SignedDuration::from_hours(24 * 365);

/// Certificate authority, certificate and key, PEM.
#[derive(Clone)]
pub(crate) struct GateTls {
    pub(crate) authority: String,
    pub(crate) certificate: String,
    pub(crate) key: crate::forge::Secret,
}

/// The certificate from the Secret; a new one where there is none, or it is about to end, or the names changed.
pub(crate) async fn load_or_create(io: &KubeIo, namespace: &str, secret: &str, names: &[String]) -> Result<GateTls> {
    let api: Api<Secret> = Api::namespaced(io.client(), namespace);
    for _ in 0..3 {
        let stored = api.get_opt(secret).await.with_context(|| format!("reading Secret {namespace}/{secret}"))?;
        if let Some(stored) = stored {
            if let Some(tls) = still_good(&stored, names) {
                return Ok(tls);
            }
            let uid = stored.uid().unwrap_or_default();
            io.delete_this::<Secret>(namespace, secret, &uid, None).await.context("replacing the gate's certificate")?;
        }
        let (tls, not_after) = generate(names)?;
        let object = kept(namespace, secret, names, &tls, not_after);
        match io.create(namespace, &object).await {
            Ok(_) => return Ok(tls),
            // Another process was faster.
            Err(error) if error.already_exists() => {}
            Err(error) => return Err(error).context("storing the gate's certificate"),
        }
    }
    Err(anyhow!("the gate's certificate in Secret {namespace}/{secret} keeps changing"))
}

fn still_good(secret: &Secret, names: &[String]) -> Option<GateTls> {
    let annotations = secret.annotations();
    let not_after: Timestamp = annotations.get(ANNOTATION_NOT_AFTER)?.parse().ok()?;
    if not_after.duration_since(Timestamp::now()) < LEFT || annotations.get(ANNOTATION_NAMES)? != &names.join(",") {
        return None;
    }
    let text = |key: &str| String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok();
    Some(GateTls { authority: text("ca.crt")?, certificate: text("tls.crt")?, key: crate::forge::Secret::new(text("tls.key")?) })
}

/// A certificate for these names, by an authority of its own whose key is thrown away; and when both end.
pub(crate) fn generate(names: &[String]) -> Result<(GateTls, Timestamp)> {
    let now = Timestamp::now();
    let not_after = now + LIFE;
    let day = |time: Timestamp| {
        let date = time.to_zoned(TimeZone::UTC).date();
        let part = |number: i8| u8::try_from(number).unwrap_or(1);
        rcgen::date_time_ymd(i32::from(date.year()), part(date.month()), part(date.day()))
    };
    let dates = |params: &mut CertificateParams| {
        params.not_before = day(now - SignedDuration::from_hours(24));
        params.not_after = day(not_after);
    };

    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "Mayfly gate authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    dates(&mut authority);
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::new(authority, authority_key);

    let mut leaf = CertificateParams::new(names.to_vec())?;
    leaf.distinguished_name.push(DnType::CommonName, "mayfly-gate");
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    dates(&mut leaf);
    let key = KeyPair::generate()?;
    let certificate = leaf.signed_by(&key, &issuer)?.pem();
    let key = crate::forge::Secret::new(key.serialize_pem());
    Ok((GateTls { authority: authority_pem, certificate, key }, not_after))
}

/// What is public of it, for those who may not see the Secret, in a ConfigMap that is there.
pub(crate) async fn publish(io: &KubeIo, namespace: &str, config_map: &str, authority: &str) -> Result<()> {
    let object = ConfigMap {
        metadata: ObjectMeta { name: Some(config_map.to_owned()), ..ObjectMeta::default() },
        data: Some(BTreeMap::from([("ca.crt".to_owned(), authority.to_owned())])),
        ..ConfigMap::default()
    };
    io.apply(namespace, &object).await.map(drop).with_context(|| format!("writing ConfigMap {namespace}/{config_map}"))
}

/// The Secret that keeps it.
fn kept(namespace: &str, secret: &str, names: &[String], tls: &GateTls, not_after: Timestamp) -> Secret {
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    Secret {
        metadata: ObjectMeta {
            name: Some(secret.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned())])),
            annotations: Some(BTreeMap::from([
                (ANNOTATION_NOT_AFTER.to_owned(), not_after.to_string()),
                (ANNOTATION_NAMES.to_owned(), names.join(",")),
            ])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(BTreeMap::from([
            ("ca.crt".to_owned(), bytes(&tls.authority)),
            ("tls.crt".to_owned(), bytes(&tls.certificate)),
            ("tls.key".to_owned(), bytes(tls.key.reveal())),
        ])),
        ..Secret::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_certificate_is_good_and_one_for_other_names_is_not() {
        let names = ["mayfly-gate.mayfly-system.svc".to_owned()];
        let (tls, not_after) = generate(&names).expect("a certificate");
        let object = kept("mayfly-system", "mayfly-gate-tls", &names, &tls, not_after);
        assert!(still_good(&object, &names).is_some());
        assert!(still_good(&object, &["other".to_owned()]).is_none());
        let mut old = object;
        old.annotations_mut().insert(ANNOTATION_NOT_AFTER.to_owned(), Timestamp::now().to_string());
        assert!(still_good(&old, &names).is_none());
    }
}
