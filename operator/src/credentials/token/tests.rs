//! Tokens: one that is good, and every trick that was played on somebody's verification (the numbers are of RFC 8725 and of public
//! advisories).

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use jsonwebtoken::EncodingKey;
use jsonwebtoken::crypto::sign;
use mayfly_github_simulator::keys::RsaKey;
use proptest::prelude::*;
use serde_json::json;

use super::super::keys::read_keys;
use super::*;

const NOW: i64 = 1_800_000_000;

fn profile() -> Profile {
    Profile { algorithms: vec![Algorithm::Rs256], max_age: 600 }
}

fn header(kid: &str) -> Value {
    json!({"alg": "RS256", "typ": "JWT", "kid": kid})
}

fn payload() -> Value {
    json!({
        "iss": "https://issuer.example", "aud": "broker", "sub": "repo:acme/web:ref:refs/heads/main", "iat": NOW, "nbf": NOW - 600,
        "exp": NOW + 300, "jti": "j-1", "repository_id": "42", "run_attempt": 1, "big": 9_007_199_254_740_993_u64, "ref_protected": true,
    })
}

fn encode(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// A key, and what it signs.
struct Signer {
    key: RsaKey,
    secret: EncodingKey,
}

impl Signer {
    fn new() -> Self {
        let key = RsaKey::generate().expect("a key");
        let secret = EncodingKey::from_rsa_pem(key.numbers().to_pem().as_bytes()).expect("PEM");
        Self { key, secret }
    }

    fn sign_raw(&self, header: &str, payload: &str) -> String {
        let input = format!("{header}.{payload}");
        let signature = sign(input.as_bytes(), &self.secret, jsonwebtoken::Algorithm::RS256).expect("signed");
        format!("{input}.{signature}")
    }

    fn sign(&self, header: &Value, payload: &Value) -> String {
        self.sign_raw(&encode(header), &encode(payload))
    }

    fn public(&self) -> Key {
        let jwk = self.key.jwk().as_object().expect("an object").clone();
        read_keys(&[jwk]).expect("keys").remove(&self.key.id).expect("the key")
    }

    fn verify(&self, token: &str) -> Result<Claims, TokenError> {
        Unverified::parse(token)?.verify(&self.public(), &profile(), NOW)
    }
}

#[test]
fn a_good_token_says_what_it_says() {
    let signer = Signer::new();
    let claims = signer.verify(&signer.sign(&header("k"), &payload())).expect("good");
    assert_eq!((claims.issuer.as_str(), claims.audience.as_str()), ("https://issuer.example", "broker"));
    assert_eq!(
        (claims.get("repository_id"), claims.get("run_attempt"), claims.get("ref_protected")),
        (Some("42"), Some("1"), Some("true"))
    );
    assert_eq!(claims.get("big"), Some("9007199254740993"), "beyond 2^53, to the last digit");
    assert_eq!(claims.digest_text().len(), 64);
    let mut list = payload();
    list["aud"] = json!(["broker"]);
    assert_eq!(signer.verify(&signer.sign(&header("k"), &list)).map(|claims| claims.audience), Ok("broker".to_owned()));
}

#[test]
fn a_number_that_does_not_fit_has_no_text_rather_than_a_wrong_one() {
    let signer = Signer::new();
    for number in ["123456789012345678901234567890", "42.0", "4.2e1"] {
        let text = payload().to_string().replace(r#""repository_id":"42""#, &format!(r#""repository_id":{number}"#));
        let claims = signer.verify(&signer.sign_raw(&encode(&header("k")), &URL_SAFE_NO_PAD.encode(text))).expect("good");
        assert_eq!(claims.get("repository_id"), None, "{number}");
    }
}

/// What is tried, and how a header is changed for it.
type Trick = (&'static str, fn(&mut Value));

#[test]
fn headers_play_no_tricks() {
    let signer = Signer::new();
    let changes: [Trick; 24] = [
        ("none", |h| h["alg"] = json!("none")),
        ("None", |h| h["alg"] = json!("None")),
        ("nOnE", |h| h["alg"] = json!("nOnE")),
        ("no alg", |h| drop(h.as_object_mut().map(|h| h.remove("alg")))),
        ("alg is a list", |h| h["alg"] = json!(["RS256"])),
        ("rs256", |h| h["alg"] = json!("rs256")),
        ("HS256", |h| h["alg"] = json!("HS256")),
        ("PS256", |h| h["alg"] = json!("PS256")),
        ("RS512", |h| h["alg"] = json!("RS512")),
        ("ES256 where RS256 is pinned", |h| h["alg"] = json!("ES256")),
        ("EdDSA", |h| h["alg"] = json!("EdDSA")),
        ("no kid", |h| drop(h.as_object_mut().map(|h| h.remove("kid")))),
        ("an empty kid", |h| h["kid"] = json!("")),
        ("kid is a number", |h| h["kid"] = json!(1)),
        ("a long kid", |h| h["kid"] = json!("k".repeat(300))),
        ("NUL in kid", |h| h["kid"] = json!("k\u{0}")),
        ("a space in kid", |h| h["kid"] = json!("k' OR 1=1")),
        ("an embedded key", |h| h["jwk"] = json!({"kty": "oct", "k": "AAAA"})),
        ("jku", |h| h["jku"] = json!("https://evil.example/keys")),
        ("x5u", |h| h["x5u"] = json!("https://evil.example/cert")),
        ("x5c", |h| h["x5c"] = json!(["AAAA"])),
        ("crit", |h| h["crit"] = json!(["exp"])),
        ("b64", |h| h["b64"] = json!(false)),
        ("another type", |h| h["typ"] = json!("at+jwt")),
    ];
    for (what, change) in changes {
        let mut changed = header("k");
        change(&mut changed);
        assert!(signer.verify(&signer.sign(&changed, &payload())).is_err(), "{what}");
    }
    let mut plain = header("k");
    plain.as_object_mut().expect("an object").remove("typ");
    assert!(signer.verify(&signer.sign(&plain, &payload())).is_ok(), "typ may be left out");
}

#[test]
fn a_public_key_is_no_secret_to_sign_with() {
    let signer = Signer::new();
    let jwk = signer.key.jwk();
    let modulus = URL_SAFE_NO_PAD.decode(jwk["n"].as_str().expect("n")).expect("base64");
    for secret in [jwk.to_string().into_bytes(), modulus, Vec::new()] {
        for alg in ["HS256", "RS256"] {
            let input = format!("{}.{}", encode(&json!({"alg": alg, "typ": "JWT", "kid": "k"})), encode(&payload()));
            let signature = sign(input.as_bytes(), &EncodingKey::from_secret(&secret), jsonwebtoken::Algorithm::HS256).expect("signed");
            assert!(signer.verify(&format!("{input}.{signature}")).is_err(), "{alg}");
        }
    }
}

#[test]
fn signatures_are_the_whole_signature_of_the_whole_token_by_the_right_key() {
    let (signer, other) = (Signer::new(), Signer::new());
    let good = signer.sign(&header("k"), &payload());
    let (input, signature) = good.rsplit_once('.').expect("three parts");
    let mut richer = payload();
    richer["repository_id"] = json!("43");
    let spliced = format!("{}.{}.{signature}", encode(&header("k")), encode(&richer));
    let bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64");
    let with = |bytes: &[u8]| format!("{input}.{}", URL_SAFE_NO_PAD.encode(bytes));
    let bad = [
        other.sign(&header("k"), &payload()),
        spliced,
        format!("{input}."),
        with(&bytes[1..]),
        with(&[&[0], &bytes[..]].concat()),
        with(&[&bytes[..], &[0]].concat()),
        with(&vec![0; bytes.len()]),
        with(&[1]),
    ];
    for (n, token) in bad.iter().enumerate() {
        assert!(signer.verify(token).is_err(), "{n}");
    }
}

#[test]
fn an_empty_ecdsa_signature_is_none() {
    // "Psychic signatures", CVE-2022-21449.
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
    let jwk = json!({"kty": "EC", "kid": "k", "crv": "P-256", "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)});
    let key = read_keys(&[jwk.as_object().expect("an object").clone()]).expect("keys").remove("k").expect("a key");
    let profile = Profile { algorithms: vec![Algorithm::Es256], max_age: 600 };
    let input = format!("{}.{}", encode(&json!({"alg": "ES256", "kid": "k"})), encode(&payload()));
    let verify = |signature: &[u8], profile: &Profile| {
        let token = format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature));
        Unverified::parse(&token).and_then(|token| token.verify(&key, profile, NOW)).map(|claims| claims.digest)
    };
    let good = pair.sign(&SystemRandom::new(), input.as_bytes()).expect("signed");
    assert!(verify(good.as_ref(), &profile).is_ok());
    assert!(verify(&[0; 64], &profile).is_err());
    assert!(verify(&[], &profile).is_err());
    assert!(verify(good.as_ref(), &self::profile()).is_err(), "the issuer is pinned to RS256");
    // s and n - s both verify: what a token is remembered by is not its signature.
    let order = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84,
        0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51_u8,
    ];
    let (mut other, mut borrow) = (good.as_ref().to_vec(), 0_i16);
    for at in (0..32).rev() {
        let difference = i16::from(order[at]) - i16::from(other[32 + at]) - borrow;
        borrow = i16::from(difference < 0);
        other[32 + at] = u8::try_from(difference + 256 * borrow).expect("a byte");
    }
    assert_eq!(verify(&other, &profile).expect("the other signature"), verify(good.as_ref(), &profile).expect("good"));
}

#[test]
fn forms_that_are_not_the_compact_one_are_refused() {
    let signer = Signer::new();
    let good = signer.sign(&header("k"), &payload());
    let parts: Vec<&str> = good.split('.').collect();
    let [head, body, signature] = parts[..] else { panic!("three parts") };
    let json_form = json!({"protected": head, "payload": body, "signature": signature}).to_string();
    let bad = [
        String::new(),
        ".".to_owned(),
        "..".to_owned(),
        ".".repeat(10_000),
        format!("{good}."),
        format!(".{good}"),
        format!("{head}.{body}"),
        format!("{head}.{body}.{signature}.{signature}.{signature}"),
        format!("{head}=.{body}.{signature}"),
        format!("{head}.{body}.{signature}="),
        format!(" {good}"),
        format!("{good}\n"),
        json_form,
        signer.sign_raw(head, "_"),
        signer.sign_raw(head, ""),
        signer.sign_raw(head, &URL_SAFE_NO_PAD.encode("[]")),
        signer.sign_raw(head, &URL_SAFE_NO_PAD.encode(format!("\u{feff}{}", payload()))),
        signer.sign_raw(head, &URL_SAFE_NO_PAD.encode(format!("{} {{}}", payload()))),
        signer.sign_raw(head, &URL_SAFE_NO_PAD.encode(payload().to_string().replacen('{', r#"{"sub":"a","#, 1))),
        signer.sign_raw(&URL_SAFE_NO_PAD.encode(r#"{"alg":"RS256","kid":"k","kid":"k"}"#), body),
        signer.sign_raw(head, &URL_SAFE_NO_PAD.encode(b"{\"iss\":\"\xff\"}")),
    ];
    for (n, token) in bad.iter().enumerate() {
        assert!(signer.verify(token).is_err(), "{n}");
    }
    let mut long = payload();
    long["pad"] = json!("x".repeat(MAX_TOKEN));
    assert_eq!(signer.verify(&signer.sign(&header("k"), &long)).map(drop), Err(TokenError("the token is too long")));
}

#[test]
fn what_is_needed_is_there_and_of_the_right_kind() {
    let signer = Signer::new();
    for name in ["iss", "aud", "sub", "iat", "exp"] {
        let mut lacking = payload();
        lacking.as_object_mut().expect("an object").remove(name);
        assert!(signer.verify(&signer.sign(&header("k"), &lacking)).is_err(), "without {name}");
    }
    let odd =
        [json!(null), json!([]), json!({}), json!(true), json!(1.5), json!(-1), json!(0), json!(u64::MAX), json!("1800000000"), json!("")];
    for name in ["iss", "aud", "sub", "iat", "exp", "nbf", "jti"] {
        for value in &odd {
            // A text is right for what is a text.
            if value == "1800000000" && ["iss", "aud", "sub", "jti"].contains(&name) || value == "" && ["iss", "aud"].contains(&name) {
                continue;
            }
            let mut changed = payload();
            changed[name] = value.clone();
            assert!(signer.verify(&signer.sign(&header("k"), &changed)).is_err(), "{name} = {value}");
        }
    }
    for audience in [json!(["broker", "other"]), json!(["broker", "broker"]), json!([["broker"]]), json!([1]), json!({"broker": true})] {
        let mut changed = payload();
        changed["aud"] = audience.clone();
        assert!(signer.verify(&signer.sign(&header("k"), &changed)).is_err(), "aud = {audience}");
    }
    let huge = payload().to_string().replace(&format!(r#""exp":{}"#, NOW + 300), r#""exp":1e400"#);
    assert!(signer.verify(&signer.sign_raw(&encode(&header("k")), &URL_SAFE_NO_PAD.encode(huge))).is_err());
}

#[test]
fn times_are_held_to_the_second() {
    let signer = Signer::new();
    let at = |iat: i64, nbf: i64, exp: i64| {
        let mut changed = payload();
        (changed["iat"], changed["nbf"], changed["exp"]) = (json!(iat), json!(nbf), json!(exp));
        signer.verify(&signer.sign(&header("k"), &changed)).is_ok()
    };
    assert!(at(NOW - 300, NOW - 300, NOW - LEEWAY + 1) && !at(NOW - 300, NOW - 300, NOW - LEEWAY), "exp");
    assert!(at(NOW + LEEWAY, NOW, NOW + 300) && !at(NOW + LEEWAY + 1, NOW, NOW + 300), "iat");
    assert!(at(NOW, NOW + LEEWAY, NOW + 300) && !at(NOW, NOW + LEEWAY + 1, NOW + 300), "nbf");
    assert!(at(NOW, NOW, NOW + 600) && !at(NOW, NOW, NOW + 601), "the longest life");
    assert!(!at(NOW, NOW, NOW) && !at(NOW, NOW, NOW - 1), "no life at all");
}

proptest! {
    /// Whatever comes is refused in good order.
    #[test]
    fn noise_is_refused(text in "[A-Za-z0-9_.{}\"-]{0,200}") {
        prop_assert!(Unverified::parse(&text).is_err());
    }
}

#[test]
fn no_change_of_a_single_letter_passes() {
    let signer = Signer::new();
    let good = signer.sign(&header("k"), &payload());
    let key = signer.public();
    for at in 0..good.len() {
        let mut changed = good.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).expect("ASCII");
        let verified = Unverified::parse(&changed).and_then(|token| token.verify(&key, &profile(), NOW));
        assert!(verified.is_err(), "letter {at}");
    }
}
