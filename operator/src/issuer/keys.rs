//! The keys that tokens are signed with: each is published a day before it signs, signs for a month, and stays published until the last
//! token it signed has ended.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::jwk::{Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, EncodingKey};
use rcgen::{KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use serde::{Deserialize, Serialize};

/// How long a key signs.
const LIFE: SignedDuration = SignedDuration::from_hours(24 * 30);
/// How long a key is published before it signs: longer than anybody keeps a key set.
const AHEAD: SignedDuration = SignedDuration::from_hours(24);
/// How long a key stays published after it signed for the last time: longer than a token lives, with clocks apart.
const AFTER: SignedDuration = SignedDuration::from_hours(1);

/// A key as it is kept. Its text is secret: it has no `Debug`.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Kept {
    /// By which tokens and key set name it.
    kid: String,
    made: Timestamp,
    /// PKCS#8, PEM.
    pem: String,
}

impl Kept {
    /// A new one, of 2048 bits: every cloud takes RS256.
    pub(super) fn generate(now: Timestamp) -> Result<Self> {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).context("a signing key")?;
        Ok(Self { kid: crate::audit::uuid(), made: now, pem: pair.serialize_pem() })
    }
}

/// All keys of a moment, oldest first.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Ring(Vec<Kept>);

impl Ring {
    /// As it was kept.
    pub(super) fn read(text: &[u8]) -> Option<Self> {
        let mut ring: Self = serde_json::from_slice(text).ok()?;
        ring.0.sort_by_key(|key| key.made);
        Some(ring)
    }

    /// As it is kept.
    pub(super) fn write(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).context("the signing keys")
    }

    /// Which of them signs: the youngest that was published long enough, or the first there is.
    fn signing(&self, now: Timestamp) -> usize {
        self.0.iter().rposition(|key| now.duration_since(key.made) >= AHEAD).unwrap_or_default()
    }

    /// What the ring has to be now, if that is something else: with a key for the time after the one that signs, and without those whose
    /// tokens have all ended.
    pub(super) fn renewed(&self, now: Timestamp, make: impl FnOnce() -> Result<Kept>) -> Result<Option<Self>> {
        let mut keys = self.0.clone();
        let signing = self.signing(now);
        let ended = |over: &Kept| now.duration_since(over.made) >= AHEAD + AFTER;
        if signing > 0 && self.0.get(signing).is_some_and(ended) {
            keys.drain(..signing);
        }
        if keys.last().is_none_or(|last| now.duration_since(last.made) >= LIFE) {
            keys.push(make()?);
        }
        let same = keys.len() == self.0.len() && keys.iter().zip(&self.0).all(|(new, old)| new.kid == old.kid);
        Ok((!same).then_some(Self(keys)))
    }

    /// The ring, ready for use.
    pub(super) fn open(&self, now: Timestamp) -> Result<Open> {
        let signing = self.0.get(self.signing(now)).context("there is no signing key")?;
        let mut published = Vec::new();
        for key in &self.0 {
            let mut jwk = Jwk::from_encoding_key(&encoding(key)?, Algorithm::RS256).context("a signing key cannot be read")?;
            jwk.common.key_id = Some(key.kid.clone());
            jwk.common.public_key_use = Some(PublicKeyUse::Signature);
            jwk.common.key_algorithm = Some(KeyAlgorithm::RS256);
            published.push(jwk);
        }
        Ok(Open { kid: signing.kid.clone(), key: Arc::new(encoding(signing)?), published })
    }
}

/// What tokens are signed with now, and what the world is told of all keys.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) kid: String,
    pub(super) key: Arc<EncodingKey>,
    pub(super) published: Vec<Jwk>,
}

fn encoding(key: &Kept) -> Result<EncodingKey> {
    EncodingKey::from_rsa_pem(key.pem.as_bytes()).context("a signing key cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(kid: &str, at: Timestamp) -> Kept {
        Kept { kid: kid.to_owned(), made: at, pem: String::new() }
    }

    /// A year, looked at every hour: whatever key signs was known a day before, and is known an hour after.
    #[test]
    fn a_key_is_known_before_it_signs_and_after() {
        let start = Timestamp::UNIX_EPOCH;
        let (mut ring, mut count) = (Ring::default(), 0);
        let mut seen: Vec<(String, Vec<String>)> = Vec::new();
        for hour in 0..24 * 365 {
            let now = start + SignedDuration::from_hours(hour);
            let next = || {
                count += 1;
                Ok(made(&count.to_string(), now))
            };
            if let Some(renewed) = ring.renewed(now, next).expect("renewed") {
                ring = renewed;
            }
            seen.push((ring.0[ring.signing(now)].kid.clone(), ring.0.iter().map(|key| key.kid.clone()).collect()));
        }
        assert_eq!(count, 13, "one a month");
        assert!(seen.iter().all(|(_, published)| published.len() <= 2));
        for (hour, (signing, _)) in seen.iter().enumerate() {
            let known = |at: usize| seen.get(at).is_none_or(|(_, published)| published.contains(signing));
            assert!(known(hour + 1), "{signing} is gone in hour {hour}");
            assert!(hour < 24 || known(hour - 23), "{signing} signs in hour {hour} and was not known a day before");
        }
    }

    #[test]
    fn after_a_long_sleep_the_old_key_signs_until_the_new_one_is_known() {
        let now = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 400);
        let old = Ring(vec![made("old", Timestamp::UNIX_EPOCH)]);
        let ring = old.renewed(now, || Ok(made("new", now))).expect("renewed").expect("another");
        let signing = |ring: &Ring, later: i64| ring.0[ring.signing(now + SignedDuration::from_hours(later))].kid.clone();
        assert_eq!((signing(&ring, 0), signing(&ring, 23), signing(&ring, 24)), ("old".to_owned(), "old".to_owned(), "new".to_owned()));
        let later = now + SignedDuration::from_hours(26);
        let kept = ring.renewed(later, || panic!("none is due")).expect("renewed").expect("another");
        assert_eq!(kept.0.len(), 1);
        assert!(kept.renewed(later, || panic!("none is due")).expect("renewed").is_none());
    }

    #[test]
    fn what_is_kept_is_read_again() {
        let ring = Ring(vec![Kept::generate(Timestamp::now()).expect("a key")]);
        let again = Ring::read(&ring.write().expect("text")).expect("read");
        let open = again.open(Timestamp::now()).expect("open");
        assert_eq!(open.published.len(), 1);
        assert_eq!(open.published[0].common.key_id.as_deref(), Some(open.kid.as_str()));
        let told = serde_json::to_value(&open.published[0]).expect("JSON");
        let names: Vec<&String> = told.as_object().expect("an object").keys().collect();
        assert_eq!(names, ["alg", "e", "kid", "kty", "n", "use"], "nothing private of the key");
        assert!(Ring::read(b"{}").is_none() && Ring::default().open(Timestamp::now()).is_err());
    }
}
