//! RSA keys, JSON web tokens and random identifiers.
//!
//! RSA keys travel in three forms here: PEM for a GitHub App, JWK for the OIDC issuer, and the eight numbers of
//! `.credentials_rsaparams` for a runner. All three are made from the numbers themselves, which a small DER reader takes out of what
//! the library hands over (RFC 8017, appendix A.1.2).

use anyhow::{Context, Result, bail};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{self, RsaPublicKeyComponents};
use aws_lc_rs::{digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// The numbers of an RSA key, big endian, without leading zeros, in the order of RFC 8017: modulus, public exponent, private
/// exponent, two primes, two exponents, coefficient.
#[derive(Clone)]
pub struct RsaNumbers([Vec<u8>; 8]);

/// Names that `.credentials_rsaparams` gives the numbers, in the same order.
const PARAMETER_NAMES: [&str; 8] = ["modulus", "exponent", "d", "p", "q", "dp", "dq", "inverseQ"];

/// An RSA key with an identifier.
pub struct RsaKey {
    pair: KeyPair,
    numbers: RsaNumbers,
    /// Its identifier: a hash of the public part.
    pub id: String,
}

impl RsaKey {
    /// A new key of 2048 bits.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn generate() -> Result<Self> {
        let pair = KeyPair::generate(KeySize::Rsa2048).ok().context("an RSA key could not be made")?;
        let der = pair.as_der().ok().context("an RSA key could not be written")?;
        let numbers = RsaNumbers::from_pkcs8(der.as_ref())?;
        Ok(Self::with(pair, numbers))
    }

    /// The key of these numbers.
    ///
    /// # Errors
    /// When they are no RSA key.
    pub fn from_numbers(numbers: RsaNumbers) -> Result<Self> {
        let pair = KeyPair::from_der(&numbers.to_pkcs1()).map_err(|error| anyhow::anyhow!("not an RSA key: {error}"))?;
        Ok(Self::with(pair, numbers))
    }

    fn with(pair: KeyPair, numbers: RsaNumbers) -> Self {
        let id = hex(&digest::digest(&digest::SHA256, numbers.modulus()).as_ref()[..20]).to_uppercase();
        Self { pair, numbers, id }
    }

    /// Its numbers.
    pub fn numbers(&self) -> &RsaNumbers {
        &self.numbers
    }

    /// What `x5t` is: the bytes of which the id is the hexadecimal form, as at GitHub's issuer.
    fn thumbprint(&self) -> String {
        let digits = self.id.as_bytes().chunks(2).filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        URL_SAFE_NO_PAD.encode(digits.collect::<Vec<u8>>())
    }

    /// The public part as a JSON web key (RFC 7517).
    pub fn jwk(&self) -> Value {
        let [modulus, exponent, ..] = &self.numbers.0;
        json!({
            "kty": "RSA", "alg": "RS256", "use": "sig", "kid": self.id, "x5t": self.thumbprint(),
            "n": URL_SAFE_NO_PAD.encode(modulus), "e": URL_SAFE_NO_PAD.encode(exponent),
        })
    }

    /// A token with these claims (RFC 7519), signed with RS256.
    ///
    /// # Errors
    /// When the library refuses to sign.
    pub fn sign(&self, claims: &Value) -> Result<String> {
        let header = json!({"alg": "RS256", "typ": "JWT", "kid": self.id, "x5t": self.thumbprint()});
        let input = signing_input(&header, claims);
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(&signature::RSA_PKCS1_SHA256, &SystemRandom::new(), input.as_bytes(), &mut signature)
            .ok()
            .context("the token could not be signed")?;
        Ok(format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

impl RsaNumbers {
    fn from_pkcs8(der: &[u8]) -> Result<Self> {
        let mut outer = Der(der).enter(0x30)?;
        outer.take(0x02)?;
        outer.take(0x30)?;
        Self::from_pkcs1(outer.take(0x04)?)
    }

    fn from_pkcs1(der: &[u8]) -> Result<Self> {
        let mut inner = Der(der).enter(0x30)?;
        inner.take(0x02)?;
        let mut numbers: [Vec<u8>; 8] = Default::default();
        for number in &mut numbers {
            let bytes = inner.take(0x02)?;
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            *number = bytes[zeros..].to_vec();
        }
        Ok(Self(numbers))
    }

    fn to_pkcs1(&self) -> Vec<u8> {
        let mut body = vec![0x02, 1, 0];
        for number in &self.0 {
            let padded = number.first().is_none_or(|first| first & 0x80 != 0);
            body.push(0x02);
            push_length(&mut body, number.len() + usize::from(padded));
            if padded {
                body.push(0);
            }
            body.extend_from_slice(number);
        }
        let mut der = vec![0x30];
        push_length(&mut der, body.len());
        der.extend_from_slice(&body);
        der
    }

    /// The modulus.
    pub fn modulus(&self) -> &[u8] {
        &self.0[0]
    }

    /// As GitHub hands out a private key of an App: PEM around PKCS#1.
    pub fn to_pem(&self) -> String {
        let text = STANDARD.encode(self.to_pkcs1());
        let mut pem = String::from("-----BEGIN RSA PRIVATE KEY-----\n");
        for start in (0..text.len()).step_by(64) {
            pem.push_str(&text[start..text.len().min(start + 64)]);
            pem.push('\n');
        }
        pem.push_str("-----END RSA PRIVATE KEY-----\n");
        pem
    }

    /// As in `.credentials_rsaparams` of a runner.
    pub fn to_parameters(&self) -> Value {
        PARAMETER_NAMES.iter().zip(&self.0).map(|(name, number)| ((*name).to_owned(), Value::from(STANDARD.encode(number)))).collect()
    }

    /// From `.credentials_rsaparams` of a runner.
    ///
    /// # Errors
    /// When a number is missing or is not base64.
    pub fn from_parameters(parameters: &Value) -> Result<Self> {
        let mut numbers: [Vec<u8>; 8] = Default::default();
        for (name, number) in PARAMETER_NAMES.iter().zip(&mut numbers) {
            let text = parameters[name].as_str().with_context(|| format!("{name} is missing"))?;
            *number = STANDARD.decode(text).with_context(|| format!("{name} is not base64"))?;
        }
        Ok(Self(numbers))
    }
}

/// What is left of a DER structure to read.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn enter(mut self, tag: u8) -> Result<Self> {
        Ok(Self(self.take(tag)?))
    }

    fn take(&mut self, tag: u8) -> Result<&'a [u8]> {
        let [found, first, rest @ ..] = self.0 else { bail!("the DER structure ends early") };
        if *found != tag {
            bail!("expected tag {tag:#x} in a DER structure, found {found:#x}");
        }
        let (length, rest) = if *first < 0x80 {
            (usize::from(*first), rest)
        } else {
            let count = usize::from(first & 0x7f);
            let bytes = rest.get(..count).context("the DER structure ends early")?;
            (bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), &rest[count..])
        };
        let value = rest.get(..length).context("the DER structure ends early")?;
        self.0 = &rest[length..];
        Ok(value)
    }
}

fn push_length(der: &mut Vec<u8>, length: usize) {
    let bytes = length.to_be_bytes();
    if length < 0x80 {
        der.push(bytes[bytes.len() - 1]);
        return;
    }
    let zeros = length.leading_zeros() as usize / 8;
    der.push(0x80 | (bytes.len() - zeros).to_be_bytes()[7]);
    der.extend_from_slice(&bytes[zeros..]);
}

/// A token that has been taken apart and not been verified.
pub struct Token<'a> {
    /// What is signed.
    input: &'a str,
    signature: Vec<u8>,
    /// Its header.
    pub header: Value,
    /// Its claims.
    pub claims: Value,
}

impl<'a> Token<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// When it is not three parts of base64 with JSON inside.
    pub fn parse(token: &'a str) -> Result<Self> {
        let (input, signature) = token.rsplit_once('.').context("not a token")?;
        let (header, claims) = input.split_once('.').context("not a token")?;
        Ok(Self {
            input,
            signature: URL_SAFE_NO_PAD.decode(signature)?,
            header: serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header)?)?,
            claims: serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?,
        })
    }

    /// Whether the owner of this key signed it with RS256.
    pub fn signed_by(&self, key: &RsaNumbers) -> bool {
        let [n, e, ..] = &key.0;
        self.header["alg"] == "RS256"
            && RsaPublicKeyComponents { n, e }
                .verify(&signature::RSA_PKCS1_2048_8192_SHA256, self.input.as_bytes(), &self.signature)
                .is_ok()
    }

    /// Whether it was made with this secret and HS256.
    pub fn made_with(&self, secret: &[u8]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        self.header["alg"] == "HS256" && hmac::verify(&key, self.input.as_bytes(), &self.signature).is_ok()
    }

    /// A claim that is a number: seconds since 1970, say.
    pub fn number(&self, claim: &str) -> Option<i64> {
        self.claims[claim].as_f64().map(|number| {
            #[expect(clippy::cast_possible_truncation, reason = "a time in seconds")]
            let whole = number as i64;
            whole
        })
    }
}

/// A token with these claims, made with HS256: for tokens that only their maker reads.
pub fn token_with_secret(secret: &[u8], claims: &Value) -> String {
    let input = signing_input(&json!({"alg": "HS256", "typ": "JWT"}), claims);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), input.as_bytes());
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(tag.as_ref()))
}

fn signing_input(header: &Value, claims: &Value) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()))
}

/// HMAC of a webhook's body, hexadecimal: SHA-256, and SHA-1 for the header of old.
pub fn webhook_signatures(secret: &str, body: &[u8]) -> (String, String) {
    let sign = |algorithm| hex(hmac::sign(&hmac::Key::new(algorithm, secret.as_bytes()), body).as_ref());
    (sign(hmac::HMAC_SHA256), sign(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY))
}

/// Hexadecimal, lower case.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Random bytes.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The library's random source fails only where a process may not go on at all; zeros would then be the least of it.
    let _ = SystemRandom::new().fill(&mut bytes);
    bytes
}

/// A random UUID (RFC 9562, version 4).
pub fn uuid() -> String {
    let mut bytes: [u8; 16] = random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_every_form() {
        let key = RsaKey::generate().unwrap();
        let token = key.sign(&json!({"iss": "me"})).unwrap();
        let again = RsaKey::from_numbers(RsaNumbers::from_parameters(&key.numbers().to_parameters()).unwrap()).unwrap();
        assert_eq!(again.id, key.id);
        assert_eq!(again.numbers().to_pem(), key.numbers().to_pem());
        assert!(Token::parse(&token).unwrap().signed_by(again.numbers()));
        let other = RsaKey::generate().unwrap();
        assert!(!Token::parse(&token).unwrap().signed_by(other.numbers()));
    }

    #[test]
    fn a_secret_makes_and_knows_its_tokens() {
        let token = token_with_secret(b"secret", &json!({"exp": 5}));
        let parsed = Token::parse(&token).unwrap();
        assert!(parsed.made_with(b"secret") && !parsed.made_with(b"another"));
        assert_eq!(parsed.number("exp"), Some(5));
    }

    #[test]
    fn webhooks_are_signed_as_documented() {
        // The example of GitHub's documentation, "Validating webhook deliveries".
        let (sha256, _) = webhook_signatures("It's a Secret to Everybody", b"Hello, World!");
        assert_eq!(sha256, "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17");
    }
}
