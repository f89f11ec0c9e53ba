//! An OIDC token: read with suspicion, then verified with one of the issuer's keys.
//!
//! The profile is narrower than the standards (RFC 7515, 7519, 8725; OpenID Connect Core 3.1.3.7): compact form, one signature, one of two
//! algorithms that the operator's configuration names for the issuer, a key that the token names and the issuer published, one audience.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use data_encoding::HEXLOWER;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::json;
use super::keys::Key;
use crate::digest::sha256;

/// Longest token looked at, in bytes.
pub(crate) const MAX_TOKEN: usize = 16 << 10;
/// How far clocks may be apart, in seconds.
pub(crate) const LEEWAY: i64 = 30;
/// Longest identifier of a key or a token, in bytes.
const MAX_ID: usize = 256;
/// Longest subject, in bytes.
const MAX_SUBJECT: usize = 1024;
/// 9999-12-31: a time after that is no time.
const LAST_SECOND: i64 = 253_402_300_799;
/// Members of a header that bring or fetch a key, or change how the token is read (RFC 7515, 7516, 7797). None is ever right here.
const NEVER: [&str; 9] = ["crit", "b64", "jwk", "jku", "x5u", "x5c", "zip", "enc", "cty"];

/// A signature algorithm (RFC 7518, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    #[serde(rename = "RS256")]
    Rs256,
    /// ECDSA on P-256 with SHA-256.
    #[serde(rename = "ES256")]
    Es256,
}

/// Why a token is not taken. The text is for the binding's owner and holds nothing of the token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TokenError(pub(crate) &'static str);

/// A token that was read and not verified: it says whose it claims to be, and nothing that may be believed.
pub(crate) struct Unverified<'a> {
    algorithm: &'static str,
    kid: String,
    issuer: String,
    claims: Map<String, Value>,
    signed: &'a str,
    signature: Vec<u8>,
}

/// What an issuer's tokens have to be, by the operator's configuration.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) algorithms: Vec<Algorithm>,
    /// Longest time between `iat` and `exp`, and between `iat` and now, in seconds.
    pub(crate) max_age: i64,
}

/// A verified token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claims {
    pub(crate) issuer: String,
    pub(crate) audience: String,
    pub(crate) subject: String,
    pub(crate) issued: i64,
    pub(crate) expires: i64,
    /// The forge's identifier of the token.
    pub(crate) jti: Option<String>,
    /// SHA-256 of what is signed: the same for every spelling of the signature.
    pub(crate) digest: [u8; 32],
    /// Every claim that is a text, a whole number or a truth value, as text; the others without a value.
    pub(crate) all: Map<String, Value>,
}

impl Claims {
    /// A claim as text.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all.get(name).and_then(Value::as_str)
    }

    /// By what the token is known once it is spent: issuer and `jti`, or the digest where the forge gives no `jti`.
    pub(crate) fn spent_as(&self) -> [u8; 32] {
        match &self.jti {
            Some(jti) => sha256([self.issuer.as_bytes(), &[0], jti.as_bytes()]),
            None => self.digest,
        }
    }

    /// The digest as hexadecimal text, by which records name the token.
    pub(crate) fn digest_text(&self) -> String {
        HEXLOWER.encode(&self.digest)
    }
}

impl<'a> Unverified<'a> {
    /// Reads a token.
    pub(crate) fn parse(text: &'a str) -> Result<Self, TokenError> {
        if text.len() > MAX_TOKEN {
            return Err(TokenError("the token is too long"));
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(TokenError("the token is not three parts with dots between them"));
        };
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError("the token is not base64url without padding"));
        let object = |part: &str| json::object(&decode(part)?).map_err(TokenError);
        let (header_object, claims) = (object(header)?, object(payload)?);
        let (algorithm, kid) = read_header(&header_object)?;
        let issuer = match claims.get("iss") {
            Some(Value::String(issuer)) => issuer.clone(),
            _ => return Err(TokenError("the token has no iss, or it is no text")),
        };
        let signature = decode(signature)?;
        Ok(Self { algorithm, kid, issuer, claims, signed: &text[..header.len() + 1 + payload.len()], signature })
    }

    /// Whose the token claims to be. Only good for looking up a configured issuer, to the letter.
    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The key it claims to be signed with.
    pub(crate) fn kid(&self) -> &str {
        &self.kid
    }

    /// Whether the issuer may use the token's algorithm: asked before a key is looked for.
    pub(crate) fn check_algorithm(&self, profile: &Profile) -> Result<Algorithm, TokenError> {
        let named = match self.algorithm {
            "RS256" => Algorithm::Rs256,
            _ => Algorithm::Es256,
        };
        match profile.algorithms.contains(&named) {
            true => Ok(named),
            false => Err(TokenError("the issuer's tokens are signed with another algorithm")),
        }
    }

    /// Verifies signature and times. `now` is in seconds since 1970.
    pub(crate) fn verify(self, key: &Key, profile: &Profile, now: i64) -> Result<Claims, TokenError> {
        let algorithm = self.check_algorithm(profile)?;
        if !key.verifies(algorithm, self.signed.as_bytes(), &self.signature) {
            return Err(TokenError("the signature does not fit"));
        }
        let (issued, expires) = times(&self.claims, profile.max_age, now)?;
        let audience = match self.claims.get("aud") {
            Some(Value::String(audience)) => audience.clone(),
            Some(Value::Array(list)) => match list.as_slice() {
                [Value::String(audience)] => audience.clone(),
                _ => return Err(TokenError("the token has not exactly one audience")),
            },
            _ => return Err(TokenError("the token has no audience")),
        };
        let subject = match self.claims.get("sub") {
            Some(Value::String(subject)) if !subject.is_empty() && subject.len() <= MAX_SUBJECT => subject.clone(),
            _ => return Err(TokenError("the token has no sub, or it is no text of a sound length")),
        };
        let jti = match self.claims.get("jti") {
            None => None,
            Some(Value::String(jti)) if !jti.is_empty() && jti.len() <= MAX_ID => Some(jti.clone()),
            Some(_) => return Err(TokenError("jti is no text of a sound length")),
        };
        let digest = sha256([self.signed.as_bytes()]);
        let mut all = self.claims;
        all.values_mut().for_each(|value| *value = plain(value.take()));
        Ok(Claims { issuer: self.issuer, audience, subject, issued, expires, jti, digest, all })
    }
}

fn read_header(header: &Map<String, Value>) -> Result<(&'static str, String), TokenError> {
    if NEVER.iter().any(|name| header.contains_key(*name)) {
        return Err(TokenError("the token's header brings a key, or asks for what is not done here"));
    }
    if header.get("typ").is_some_and(|kind| !kind.as_str().is_some_and(|kind| kind.eq_ignore_ascii_case("JWT"))) {
        return Err(TokenError("the token is of another type than JWT"));
    }
    let algorithm = match header.get("alg").and_then(Value::as_str) {
        Some("RS256") => "RS256",
        Some("ES256") => "ES256",
        _ => return Err(TokenError("the token's algorithm is none that is taken")),
    };
    let sound = |kid: &&str| !kid.is_empty() && kid.len() <= MAX_ID && kid.bytes().all(|byte| byte.is_ascii_graphic());
    match header.get("kid").and_then(Value::as_str).filter(sound) {
        Some(kid) => Ok((algorithm, kid.to_owned())),
        None => Err(TokenError("the token names no key, or not as a plain text")),
    }
}

/// `iat` and `exp`, both needed and whole numbers, and `nbf` where there is one.
fn times(claims: &Map<String, Value>, max_age: i64, now: i64) -> Result<(i64, i64), TokenError> {
    let time = |name: &str| match claims.get(name) {
        None => Ok(None),
        Some(value) => match value.as_i64().filter(|time| (1..=LAST_SECOND).contains(time)) {
            Some(time) => Ok(Some(time)),
            None => Err(TokenError("a time of the token is no whole number of seconds")),
        },
    };
    let (Some(issued), Some(expires)) = (time("iat")?, time("exp")?) else {
        return Err(TokenError("the token lacks iat or exp"));
    };
    if expires <= issued || expires - issued > max_age {
        return Err(TokenError("the token lives longer than its issuer's may, or not at all"));
    }
    if now >= expires + LEEWAY || now - issued > max_age + LEEWAY {
        return Err(TokenError("the token has expired"));
    }
    if issued > now + LEEWAY || time("nbf")?.is_some_and(|start| start > now + LEEWAY) {
        return Err(TokenError("the token is not valid yet"));
    }
    Ok((issued, expires))
}

/// A value as text. What is neither text nor a whole number nor a truth value has none; a number that does not fit 64 bits was read as a
/// fraction, so that it has none either, rather than a wrong one.
fn plain(value: Value) -> Value {
    match value {
        Value::String(_) => value,
        Value::Bool(truth) => Value::String(truth.to_string()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Value::String(number.to_string()),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests;
