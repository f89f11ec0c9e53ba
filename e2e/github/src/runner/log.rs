//! The log of a job, with masks.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;

/// What stands for a masked value.
const MASK: &str = "***";

/// Values that no log shows.
#[derive(Default)]
pub(crate) struct Masks(Vec<String>);

impl Masks {
    /// Hides this value from now on: all of it, each of its lines, and their base64.
    pub(crate) fn add(&mut self, value: &str) {
        let lines = value.lines().map(str::trim).filter(|line| *line != value.trim());
        for part in std::iter::once(value.trim()).chain(lines) {
            if part.is_empty() {
                continue;
            }
            self.insert(part.to_owned());
            self.insert(STANDARD.encode(part));
        }
    }

    fn insert(&mut self, value: String) {
        if !self.0.contains(&value) {
            self.0.push(value);
            // Longer ones first: a value may contain another.
            self.0.sort_by_key(|value| std::cmp::Reverse(value.len()));
        }
    }

    /// The text without the values.
    pub(crate) fn apply(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, value| text.replace(value.as_str(), MASK))
    }
}

#[derive(Default)]
struct Inner {
    masks: Masks,
    unsent: String,
    in_job: bool,
}

/// The log: to standard output at once, to the forge in pieces.
#[derive(Default)]
pub(crate) struct Log(Mutex<Inner>);

impl Log {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on lines are the job's.
    pub(crate) fn begin_job(&self) {
        self.inner().in_job = true;
    }

    /// Hides a value.
    pub(crate) fn mask(&self, value: &str) {
        self.inner().masks.add(value);
    }

    /// Writes a line.
    pub(crate) fn line(&self, line: &str) {
        let mut inner = self.inner();
        let line = inner.masks.apply(line);
        // Whoever reads the output may have gone; the job goes on.
        let _ = writeln!(std::io::stdout().lock(), "{line}");
        if inner.in_job {
            let stamped = format!("{} {line}\n", Timestamp::now());
            inner.unsent.push_str(&stamped);
        }
    }

    /// What was written and not yet sent.
    pub(crate) fn unsent(&self) -> String {
        std::mem::take(&mut self.inner().unsent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_hidden_in_every_form() {
        let mut masks = Masks::default();
        masks.add("hunter2\nsecond line");
        masks.add("hunter2-and-more");
        masks.add("  ");
        assert_eq!(masks.apply("a hunter2-and-more b hunter2 c"), "a *** b *** c");
        assert_eq!(masks.apply("second line"), "***");
        assert_eq!(masks.apply(&STANDARD.encode("hunter2")), "***");
        assert_eq!(masks.apply("nothing to hide"), "nothing to hide");
    }
}
