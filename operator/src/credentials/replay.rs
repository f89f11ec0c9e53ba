//! Tokens that were spent. Each is bound to the pod that showed it first: the same pod may ask again and gets the same, anybody else is a
//! thief. Kept in memory, as long as the token could still be shown.

use std::collections::{BTreeMap, HashMap};

use super::token::LEEWAY;
use crate::digest::sha256;

/// What a token is known by (see [`super::token::Claims::spent_as`]).
pub(crate) type SpentKey = [u8; 32];

/// What showing a token meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spent {
    /// Nobody showed it before.
    First,
    /// The same pod showed it for the same binding before.
    Again,
    /// The same pod showed it for another binding before.
    ElsewhereBound,
    /// Another pod showed it before.
    ByAnother,
    /// So many tokens are remembered that this one could not be.
    Full,
}

/// Whose a spent token is. Digests of the names, as there may be a million of them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Holder {
    pod: [u8; 16],
    binding: [u8; 16],
}

/// The tokens.
pub(crate) struct Replay {
    holders: HashMap<SpentKey, Holder>,
    ends: BTreeMap<i64, Vec<SpentKey>>,
    most: usize,
}

impl Replay {
    /// Remembers so many tokens at the same time.
    pub(crate) fn new(most: usize) -> Self {
        Self { holders: HashMap::new(), ends: BTreeMap::new(), most }
    }

    /// A pod, by its UID, shows a token for a binding, by its UID. `expires` is the token's own end.
    pub(crate) fn spend(&mut self, key: SpentKey, pod: &str, binding: &str, expires: i64, now: i64) -> Spent {
        self.forget(now);
        let holder = Holder { pod: short(pod), binding: short(binding) };
        match self.holders.get(&key) {
            Some(known) if *known == holder => Spent::Again,
            Some(known) if known.pod == holder.pod => Spent::ElsewhereBound,
            Some(_) => Spent::ByAnother,
            // Forgetting an old one to make room would let it be spent twice.
            None if self.holders.len() >= self.most => Spent::Full,
            None => {
                self.holders.insert(key, holder);
                // As long as the verification takes it, and no token is taken at this second.
                self.ends.entry(expires + LEEWAY).or_default().push(key);
                Spent::First
            }
        }
    }

    /// How many are remembered.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.holders.len()
    }

    fn forget(&mut self, now: i64) {
        while let Some(entry) = self.ends.first_entry().filter(|entry| *entry.key() <= now) {
            for key in entry.remove() {
                self.holders.remove(&key);
            }
        }
    }
}

fn short(name: &str) -> [u8; 16] {
    let digest = sha256([name.as_bytes()]);
    let mut short = [0; 16];
    short.copy_from_slice(&digest[..16]);
    short
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_belongs_to_the_pod_and_binding_that_showed_it_first() {
        let mut replay = Replay::new(10);
        assert_eq!(replay.spend([1; 32], "pod", "binding", 100, 0), Spent::First);
        assert_eq!(replay.spend([1; 32], "pod", "binding", 100, 50), Spent::Again);
        assert_eq!(replay.spend([1; 32], "pod", "other", 100, 50), Spent::ElsewhereBound);
        assert_eq!(replay.spend([1; 32], "thief", "binding", 100, 50), Spent::ByAnother);
        assert_eq!(replay.spend([1; 32], "thief", "binding", 100, 129), Spent::ByAnother, "it could still be shown");
    }

    #[test]
    fn what_has_expired_makes_room_and_what_has_not_does_not() {
        let mut replay = Replay::new(2);
        assert_eq!(replay.spend([1; 32], "a", "b", 100, 0), Spent::First);
        assert_eq!(replay.spend([2; 32], "a", "b", 200, 0), Spent::First);
        assert_eq!(replay.spend([3; 32], "a", "b", 300, 129), Spent::Full);
        assert_eq!(replay.spend([3; 32], "a", "b", 300, 130), Spent::First);
        assert_eq!(replay.len(), 2);
        assert_eq!(replay.spend([2; 32], "thief", "b", 200, 130), Spent::ByAnother);
    }

    proptest! {
        /// Whatever is shown in whatever order, a token has one holder until it ends.
        #[test]
        fn no_token_ever_has_two_holders(shows in proptest::collection::vec((0_u8..4, 0_u8..3, 0_i64..40), 1..200)) {
            let mut replay = Replay::new(3);
            let mut held: HashMap<u8, (u8, i64)> = HashMap::new();
            let mut now = 0;
            for (token, pod, later) in shows {
                now += later;
                let expires = 20 * (1 + i64::from(token));
                if now >= expires + LEEWAY {
                    continue; // Verification refuses it.
                }
                let got = replay.spend([token; 32], &pod.to_string(), "b", expires, now);
                match held.get(&token) {
                    Some((holder, _)) => prop_assert_eq!(got, if *holder == pod { Spent::Again } else { Spent::ByAnother }),
                    None if got == Spent::First => {
                        held.insert(token, (pod, expires));
                    }
                    None => prop_assert_eq!(got, Spent::Full),
                }
            }
        }
    }
}
