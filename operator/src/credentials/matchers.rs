//! Whether a token's claims are what a binding asks for.

use mayfly_crds::{Claim, CredentialBindingSpec, DEFAULT_EVENTS, Matcher, NEVER_EVENTS};

use super::json::Texts;
use super::token::Claims;

/// The first claim that is not what the binding asks for. Events are looked at in any case: a binding that names none takes those that
/// people with write access cause.
pub(crate) fn mismatch(spec: &CredentialBindingSpec, claims: &Claims) -> Option<String> {
    if !takes_event(spec, claims.get(Claim::EventName.as_str()).unwrap_or_default()) {
        return Some(Claim::EventName.as_str().to_owned());
    }
    let wrong = |(name, matcher): &(&String, &Matcher)| !claims.get(name).is_some_and(|value| fits(matcher, value));
    spec.subject.claims.iter().find(wrong).map(|(name, _)| name.clone())
}

/// Whether the binding may be for a job of which only these claims are known. What is not known may fit.
pub(crate) fn may_fit(spec: &CredentialBindingSpec, known: &Texts<'_>) -> bool {
    known.get(Claim::EventName.as_str()).is_none_or(|event| takes_event(spec, event))
        && spec.subject.claims.iter().all(|(name, matcher)| known.get(name.as_str()).is_none_or(|value| fits(matcher, value)))
}

/// Whether the binding takes jobs that this event started, as far as its matcher for events is not concerned.
fn takes_event(spec: &CredentialBindingSpec, event: &str) -> bool {
    let named = spec.subject.claims.contains_key(Claim::EventName.as_str());
    !NEVER_EVENTS.contains(&event) && (named || DEFAULT_EVENTS.contains(&event))
}

/// Whether `value` is what the matcher says. One that says nothing fits nothing.
pub(crate) fn fits(matcher: &Matcher, value: &str) -> bool {
    match matcher {
        Matcher { exact: Some(exact), one_of: None, prefix_segments: None } => value == exact,
        Matcher { exact: None, one_of: Some(list), prefix_segments: None } => list.iter().any(|one| one == value),
        Matcher { exact: None, one_of: None, prefix_segments: Some(prefix) } => begins_with(prefix, value),
        _ => false,
    }
}

/// Whether the path `value` begins with the segments of `prefix` and goes on. Segments that could be resolved away fit nothing.
fn begins_with(prefix: &str, value: &str) -> bool {
    let plain = |path: &str| path.split('/').all(|segment| !matches!(segment, "" | "." | ".."));
    plain(prefix) && plain(value) && value.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix(prefix: &str) -> Matcher {
        Matcher { prefix_segments: Some(prefix.to_owned()), ..Matcher::default() }
    }

    #[test]
    fn a_prefix_ends_where_a_segment_ends() {
        let release = prefix("refs/heads/release");
        for value in ["refs/heads/release/1", "refs/heads/release/1/2"] {
            assert!(fits(&release, value), "{value}");
        }
        for value in [
            "",
            "refs/heads/release",
            "refs/heads/release/",
            "refs/heads/release-1",
            "refs/heads/releases/1",
            "Refs/heads/release/1",
            "/refs/heads/release/1",
            "refs/heads/release/../main",
            "refs/heads/release/./1",
            "refs/heads/release//1",
            "refs/tags/release/1",
            "x/refs/heads/release/1",
        ] {
            assert!(!fits(&release, value), "{value}");
        }
    }

    #[test]
    fn a_matcher_that_says_nothing_or_two_things_fits_nothing() {
        assert!(!fits(&Matcher::default(), ""));
        let both = Matcher { exact: Some("a".to_owned()), one_of: Some(vec!["a".to_owned()]), prefix_segments: None };
        assert!(!fits(&both, "a"));
        assert!(!fits(&Matcher { one_of: Some(Vec::new()), ..Matcher::default() }, ""));
        for pattern in [".*", "*", "a|b", "^a", "a$"] {
            assert!(!fits(&Matcher { exact: Some(pattern.to_owned()), ..Matcher::default() }, "a"), "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn what_is_named_fits_and_nothing_else(value in "[a-z/.]{0,12}", other in "[a-z/.]{0,12}") {
            let exact = Matcher { exact: Some(value.clone()), ..Matcher::default() };
            let list = Matcher { one_of: Some(vec!["zz zz".to_owned(), value.clone()]), ..Matcher::default() };
            prop_assert!(fits(&exact, &value) && fits(&list, &value));
            prop_assert_eq!(fits(&exact, &other), value == other);
            prop_assert_eq!(fits(&list, &other), value == other);
        }

        #[test]
        fn whatever_fits_a_prefix_has_all_its_segments_and_more(wanted in "[a-b]{1,2}(/[a-b]{1,2}){0,2}", value in "[a-b/.]{0,9}") {
            if fits(&prefix(&wanted), &value) {
                let (wanted, found): (Vec<_>, Vec<_>) = (wanted.split('/').collect(), value.split('/').collect());
                prop_assert!(found.len() > wanted.len() && found.starts_with(&wanted));
            }
        }
    }
}
