//! What steps tell the runner: workflow commands in their output, and files.

use serde_json::{Map, Value};

/// A workflow command: `::name key=value,..::text`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Command {
    /// Its name.
    pub(crate) name: String,
    /// Its properties.
    pub(crate) properties: Vec<(String, String)>,
    /// Its text.
    pub(crate) text: String,
}

impl Command {
    /// The command in a line, if there is one at its beginning.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (head, text) = line.trim_start().strip_prefix("::")?.split_once("::")?;
        let (name, properties) = head.split_once(' ').unwrap_or((head, ""));
        if name.is_empty() {
            return None;
        }
        let property = |pair: &str| pair.trim().split_once('=').map(|(key, value)| (key.to_owned(), unescape(value, true)));
        Some(Self {
            name: name.to_lowercase(),
            properties: properties.split(',').filter_map(property).collect(),
            text: unescape(text, false),
        })
    }
}

fn unescape(text: &str, property: bool) -> String {
    let text = text.replace("%0D", "\r").replace("%0A", "\n");
    let text = if property { text.replace("%3A", ":").replace("%2C", ",") } else { text };
    text.replace("%25", "%")
}

/// Reads a file of `NAME=value` lines and `NAME<<DELIMITER` blocks.
///
/// # Errors
/// What is wrong with it, in the real runner's terms.
pub(crate) fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let (equals, heredoc) = (line.find('='), line.find("<<"));
        if let Some(at) = heredoc.filter(|at| equals.is_none_or(|equals| *at < equals)) {
            let (name, delimiter) = (&line[..at], &line[at + 2..]);
            if name.is_empty() || delimiter.is_empty() {
                return Err(format!("Invalid format '{line}'. Name must not be empty and delimiter must not be empty"));
            }
            let mut value = Vec::new();
            loop {
                match lines.next() {
                    None => return Err(format!("Invalid value. Matching delimiter not found '{delimiter}'")),
                    Some(end) if end == delimiter => break,
                    Some(line) => value.push(line),
                }
            }
            pairs.push((name.to_owned(), value.join("\n")));
        } else if let Some(at) = equals.filter(|at| *at > 0) {
            pairs.push((line[..at].to_owned(), line[at + 1..].to_owned()));
        } else {
            return Err(format!("Invalid format '{line}'"));
        }
    }
    Ok(pairs)
}

/// Pairs as a JSON object.
pub(crate) fn object(pairs: Vec<(String, String)>) -> Map<String, Value> {
    pairs.into_iter().map(|(name, value)| (name, Value::String(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_and_unescaped() {
        let command = Command::parse("  ::error file=a%2Cb.rs,line=3::first%0Asecond %25").unwrap();
        assert_eq!((command.name.as_str(), command.text.as_str()), ("error", "first\nsecond %"));
        assert_eq!(command.properties, [("file".into(), "a,b.rs".into()), ("line".into(), "3".into())]);
        assert_eq!(Command::parse("::add-mask::x").unwrap().text, "x");
        assert_eq!(Command::parse("echo ::error::x"), None);
        assert_eq!(Command::parse("::::"), None);
    }

    #[test]
    fn files_are_read_as_documented() {
        let read = pairs("A=1\nB<<END\none\ntwo=2\nEND\n\nC==x<<y\n").unwrap();
        assert_eq!(read, [("A".into(), "1".into()), ("B".into(), "one\ntwo=2".into()), ("C".into(), "=x<<y".into())]);
        for wrong in ["nothing", "=x", "A<<E\nopen", "A<<\nx\n"] {
            assert!(pairs(wrong).is_err(), "{wrong}");
        }
    }
}
