//! JSON of strangers: names that come twice are refused, as two readers could take different ones (RFC 8725, section 2.4).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Reads one object, to the last byte.
pub(crate) fn object(bytes: &[u8]) -> Result<Map<String, Value>, &'static str> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut reader).map_err(|_| "not JSON, or a name comes twice")?;
    reader.end().map_err(|_| "something follows the JSON")?;
    match value {
        Value::Object(object) => Ok(object),
        _ => Err("not a JSON object"),
    }
}

/// Texts by name. What needs no unescaping is not copied.
pub(crate) type Texts<'a> = BTreeMap<Cow<'a, str>, Cow<'a, str>>;

/// Reads one object of texts, to the last byte.
pub(crate) fn texts(bytes: &[u8]) -> Result<Texts<'_>, &'static str> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let texts = reader.deserialize_map(StrictTexts).map_err(|_| "no JSON object of texts, or a name comes twice")?;
    reader.end().map_err(|_| "something follows the JSON")?;
    Ok(texts)
}

struct StrictTexts;

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for StrictTexts {
    type Value = Texts<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts<'de>, A::Error> {
        let mut texts = Texts::new();
        while let Some((Text(name), Text(value))) = map.next_entry()? {
            if texts.insert(name, value).is_some() {
                return Err(A::Error::custom("a name comes twice"));
            }
        }
        Ok(texts)
    }
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Strict)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict)?;
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("a name comes twice"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        for text in
            [r#"{"a":1,"a":2}"#, r#"{"x":{"a":1,"a":1}}"#, r#"{"x":[{"a":1,"\u0061":1}]}"#, r#"{"a":1} x"#, "[]", "1", "", "\u{feff}{}"]
        {
            assert!(object(text.as_bytes()).is_err() && texts(text.as_bytes()).is_err(), "{text}");
        }
        assert!(object(b"{\"a\":\"\xff\"}").is_err(), "bad UTF-8");
        assert!(object("[".repeat(100_000).as_bytes()).is_err(), "deep");
        assert!(object(format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000)).as_bytes()).is_err(), "deep");
    }

    #[test]
    fn texts_are_texts() {
        for text in [r#"{"a":1}"#, r#"{"a":null}"#, r#"{"a":["b"]}"#, r#"{"a":"b","a":"b"}"#, r#"{"a":"b","\u0061":"b"}"#, r#"{"a":"b"} x"#]
        {
            assert!(texts(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn texts_are_what_serde_reads(known: BTreeMap<String, String>) {
            let written = serde_json::to_vec(&known).expect("JSON");
            let read = texts(&written).expect("texts").into_iter().map(|(name, value)| (name.into_owned(), value.into_owned()));
            prop_assert_eq!(read.collect::<BTreeMap<_, _>>(), known);
        }

        #[test]
        fn what_it_reads_is_what_serde_reads(names in proptest::collection::btree_set("[a-z]{1,4}", 0..6), numbers: [u64; 6], text: String) {
            let mut value = Map::new();
            for (name, number) in names.into_iter().zip(numbers) {
                value.insert(name, serde_json::json!([number, text, null, true]));
            }
            let written = serde_json::to_vec(&value).expect("JSON");
            prop_assert_eq!(object(&written), Ok(value));
        }
    }
}
