//! The expressions of workflow files: a small honest subset.
//!
//! Contexts with dots (`github.ref`, `steps.build.outputs.version`), literals, `==`, `!=`, `!`, `&&`, `||`, brackets, and the functions
//! `always`, `success`, `failure`, `cancelled`, `contains`, `startsWith`, `endsWith`. Anything else is an error that names it, never a
//! guess. Strings compare without regard to case, as documented.

use serde_json::Value;

/// How a job stands while its steps run: what the status functions answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Nothing failed so far.
    #[default]
    Success,
    /// A step failed.
    Failure,
    /// Somebody cancelled the run.
    Cancelled,
}

/// What an expression is evaluated against.
pub struct Scope<'a> {
    /// The contexts, one member each: `github`, `env`, `matrix`, `secrets`, `steps`, `needs`, `inputs`.
    pub contexts: &'a Value,
    /// How the job stands.
    pub status: Status,
}

/// Puts the values of all `${{ }}` into a text.
///
/// # Errors
/// For an expression outside the subset.
pub fn interpolate(text: &str, scope: &Scope<'_>) -> Result<String, String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${{") {
        result.push_str(&rest[..start]);
        let end = end_of_expression(&rest[start + 3..]).ok_or_else(|| format!("`${{{{` is not closed in {text:?}"))?;
        result.push_str(&to_text(&evaluate(&rest[start + 3..start + 3 + end], scope)?));
        rest = &rest[start + 3 + end + 2..];
    }
    result.push_str(rest);
    Ok(result)
}

/// Where the `}}` is that closes an expression: not one inside a string.
fn end_of_expression(text: &str) -> Option<usize> {
    let mut quoted = false;
    for (at, character) in text.char_indices() {
        match character {
            '\'' => quoted = !quoted,
            '}' if !quoted && text[at..].starts_with("}}") => return Some(at),
            _ => {}
        }
    }
    None
}

/// Whether something with this `if:` runs. Without a status function it runs only where nothing failed.
///
/// # Errors
/// For an expression outside the subset.
pub fn condition(text: Option<&str>, scope: &Scope<'_>) -> Result<bool, String> {
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(scope.status == Status::Success) };
    let inside = text.strip_prefix("${{").and_then(|text| text.strip_suffix("}}")).unwrap_or(text);
    let asks = ["always", "success", "failure", "cancelled"].iter().any(|name| {
        inside.match_indices(name).any(|(at, name)| {
            inside[at + name.len()..].trim_start().starts_with('(') && !inside[..at].ends_with(|c: char| c.is_alphanumeric() || c == '.')
        })
    });
    Ok((asks || scope.status == Status::Success) && truthy(&evaluate(inside, scope)?))
}

/// The value of an expression without its `${{ }}`.
///
/// # Errors
/// For an expression outside the subset.
pub fn evaluate(text: &str, scope: &Scope<'_>) -> Result<Value, String> {
    let mut parser = Parser { rest: text, text, scope };
    let value = parser.or()?;
    if parser.rest.trim().is_empty() { Ok(value) } else { Err(parser.error()) }
}

struct Parser<'a> {
    rest: &'a str,
    text: &'a str,
    scope: &'a Scope<'a>,
}

impl Parser<'_> {
    fn error(&self) -> String {
        format!("the stand-in does not understand {:?} in the expression {:?}", self.rest.trim(), self.text.trim())
    }

    fn eat(&mut self, token: &str) -> bool {
        let rest = self.rest.trim_start();
        let eaten = rest.strip_prefix(token);
        self.rest = eaten.unwrap_or(rest);
        eaten.is_some()
    }

    fn or(&mut self) -> Result<Value, String> {
        let mut left = self.and()?;
        while self.eat("||") {
            let right = self.and()?;
            left = if truthy(&left) { left } else { right };
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Value, String> {
        let mut left = self.comparison()?;
        while self.eat("&&") {
            let right = self.comparison()?;
            left = if truthy(&left) { right } else { left };
        }
        Ok(left)
    }

    fn comparison(&mut self) -> Result<Value, String> {
        let left = self.primary()?;
        if self.eat("==") {
            return Ok(Value::Bool(equal(&left, &self.primary()?)));
        }
        if self.eat("!=") {
            return Ok(Value::Bool(!equal(&left, &self.primary()?)));
        }
        Ok(left)
    }

    fn primary(&mut self) -> Result<Value, String> {
        if self.eat("(") {
            let value = self.or()?;
            return if self.eat(")") { Ok(value) } else { Err(self.error()) };
        }
        if !self.rest.trim_start().starts_with("!=") && self.eat("!") {
            return Ok(Value::Bool(!truthy(&self.primary()?)));
        }
        if self.eat("'") {
            return self.string();
        }
        let rest = self.rest;
        let length = rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))).unwrap_or(rest.len());
        let word = &rest[..length];
        if word.is_empty() {
            return Err(self.error());
        }
        self.rest = &rest[length..];
        match word {
            "true" => return Ok(Value::Bool(true)),
            "false" => return Ok(Value::Bool(false)),
            "null" => return Ok(Value::Null),
            _ => {}
        }
        if word.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            return serde_json::from_str(word).map_err(|_| self.error());
        }
        if self.eat("(") { self.function(word) } else { self.context(word) }
    }

    fn string(&mut self) -> Result<Value, String> {
        let mut value = String::new();
        let mut characters = self.rest.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            if character != '\'' {
                value.push(character);
            } else if characters.next_if(|(_, next)| *next == '\'').is_some() {
                value.push('\'');
            } else {
                self.rest = &self.rest[at + 1..];
                return Ok(Value::String(value));
            }
        }
        Err(self.error())
    }

    fn function(&mut self, name: &str) -> Result<Value, String> {
        let mut arguments = Vec::new();
        while !self.eat(")") {
            if !arguments.is_empty() && !self.eat(",") {
                return Err(self.error());
            }
            arguments.push(self.or()?);
        }
        let status = self.scope.status;
        let answer = match (name.to_ascii_lowercase().as_str(), arguments.as_slice()) {
            ("always", []) => true,
            ("success", []) => status == Status::Success,
            ("failure", []) => status == Status::Failure,
            ("cancelled", []) => status == Status::Cancelled,
            ("contains", [Value::Array(list), item]) => list.iter().any(|entry| equal(entry, item)),
            ("contains", [text, part]) => lower(text).contains(&lower(part)),
            ("startswith", [text, part]) => lower(text).starts_with(&lower(part)),
            ("endswith", [text, part]) => lower(text).ends_with(&lower(part)),
            _ => return Err(format!("the stand-in does not understand the function {name} in the expression {:?}", self.text.trim())),
        };
        Ok(Value::Bool(answer))
    }

    fn context(&self, path: &str) -> Result<Value, String> {
        let mut parts = path.split('.');
        let first = parts.next().unwrap_or_default();
        let Some(mut value) = self.scope.contexts.get(first) else {
            return Err(format!("the stand-in does not understand the context {first} in the expression {:?}", self.text.trim()));
        };
        for part in parts {
            let member = value.as_object().and_then(|object| {
                object.get(part).or_else(|| object.iter().find(|(name, _)| name.eq_ignore_ascii_case(part)).map(|(_, value)| value))
            });
            value = member.unwrap_or(&Value::Null);
        }
        Ok(value.clone())
    }
}

/// Whether a value counts as true: all but `false`, `0`, `''` and `null`.
pub fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(_) | Value::Object(_) => true,
    }
}

/// A value as text in a `${{ }}`.
pub fn to_text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(_) => "Array".to_owned(),
        Value::Object(_) => "Object".to_owned(),
    }
}

fn lower(value: &Value) -> String {
    to_text(value).to_lowercase()
}

fn equal(left: &Value, right: &Value) -> bool {
    let number = |value: &Value| match value {
        Value::Null => Some(0.0),
        Value::Bool(value) => Some(f64::from(u8::from(*value))),
        Value::Number(number) => number.as_f64(),
        Value::String(text) if text.is_empty() => Some(0.0),
        Value::String(text) => text.trim().parse().ok(),
        Value::Array(_) | Value::Object(_) => None,
    };
    match (left, right) {
        (Value::String(left), Value::String(right)) => left.to_lowercase() == right.to_lowercase(),
        (Value::Null, Value::Null) => true,
        _ => number(left).zip(number(right)).is_some_and(|(left, right)| (left - right).abs() < f64::EPSILON),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn value(text: &str, status: Status) -> Result<Value, String> {
        let contexts = json!({
            "github": {"ref": "refs/heads/main", "run_id": 7, "event": {"number": 3}},
            "matrix": {"os": "linux", "list": ["a", "b"]},
            "steps": {"one": {"outputs": {"x": "it's"}}},
            "env": {}, "secrets": {},
        });
        evaluate(text, &Scope { contexts: &contexts, status })
    }

    #[test]
    fn values_are_found_and_compared() {
        for (text, expected) in [
            ("github.ref", json!("refs/heads/main")),
            ("github.REF", json!("refs/heads/main")),
            ("github.event.number == 3", json!(true)),
            ("github.event.nothing", json!(null)),
            ("steps.one.outputs.x == 'IT''S'", json!(true)),
            ("matrix.os != 'windows' && !failure()", json!(true)),
            ("env.NOTHING || 'default'", json!("default")),
            ("(true || false) && 5", json!(5)),
            ("contains(matrix.list, 'b')", json!(true)),
            ("startsWith(github.ref, 'refs/tags/')", json!(false)),
        ] {
            assert_eq!(value(text, Status::Success).as_ref(), Ok(&expected), "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for text in ["hashFiles('**')", "toJSON(github)", "github.ref[0]", "vars.x", "1 < 2", "", "'open"] {
            assert!(value(text, Status::Success).is_err(), "{text}");
        }
    }

    #[test]
    fn conditions_follow_the_status() {
        let contexts = json!({"github": {"ref": "x"}});
        let runs = |text: Option<&str>, status| condition(text, &Scope { contexts: &contexts, status }).unwrap();
        assert!(runs(None, Status::Success) && !runs(None, Status::Failure) && !runs(None, Status::Cancelled));
        assert!(runs(Some("always()"), Status::Cancelled));
        assert!(runs(Some("${{ failure() }}"), Status::Failure) && !runs(Some("failure()"), Status::Success));
        assert!(runs(Some("github.ref == 'x'"), Status::Success) && !runs(Some("github.ref == 'x'"), Status::Failure));
        assert!(runs(Some("!cancelled()"), Status::Failure));
    }

    #[test]
    fn texts_are_filled_in() {
        let contexts = json!({"env": {"A": "1"}});
        let scope = Scope { contexts: &contexts, status: Status::Success };
        assert_eq!(interpolate("a ${{ env.A }} b ${{ '}}' }} $x", &scope).unwrap(), "a 1 b }} $x");
        assert!(interpolate("${{ env.A", &scope).is_err());
    }
}
