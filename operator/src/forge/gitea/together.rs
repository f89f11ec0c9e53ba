//! One question for all who have it at the same time: many pools of one organization would ask the server the same.

use std::fmt;
use std::sync::{Mutex, PoisonError, Weak};
use std::time::Instant;

use futures::Future;

use super::{Arc, Gitea, Scope, Secret};
use crate::forge::ForgeError;

/// Those who ask while the server is being asked wait for the next answer. It is asked for after they came: nobody gets an answer that is
/// older than the question, so that whoever asks for two things in a certain order gets them in that order.
pub(super) struct Together<T>(tokio::sync::Mutex<Option<(Instant, Result<T, ForgeError>)>>);

impl<T> Default for Together<T> {
    fn default() -> Self {
        Self(tokio::sync::Mutex::default())
    }
}

impl<T> fmt::Debug for Together<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Together")
    }
}

impl<T: Clone> Together<T> {
    /// An error is everybody's as well. `ask` is dropped where somebody else has asked, or who asks is cancelled: then the next asks.
    pub(super) async fn get(&self, ask: impl Future<Output = Result<T, ForgeError>>) -> Result<T, ForgeError> {
        let came = Instant::now();
        let mut last = self.0.lock().await;
        if let Some((asked, answer)) = &*last
            && *asked >= came
        {
            return answer.clone();
        }
        let asked = Instant::now();
        let answer = ask.await;
        *last = Some((asked, answer.clone()));
        answer
    }
}

/// The servers that pools ask: pools with the same server, scope and token have the same.
#[derive(Debug, Default)]
pub(crate) struct Giteas(Mutex<Vec<Weak<Gitea>>>);

impl Giteas {
    /// As [`Gitea::new`].
    pub(crate) fn get(&self, http: &reqwest::Client, base: &str, scope: &Scope, token: &Secret) -> Arc<Gitea> {
        let made = Gitea::new(http.clone(), base, scope.clone(), token.clone());
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|gitea| gitea.strong_count() > 0);
        let same = |gitea: &Arc<Gitea>| (&gitea.base, &gitea.scope, &gitea.token) == (&made.base, &made.scope, &made.token);
        if let Some(same) = known.iter().filter_map(Weak::upgrade).find(same) {
            return same;
        }
        let made = Arc::new(made);
        known.push(Arc::downgrade(&made));
        made
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use futures::FutureExt;
    use futures::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_gets_an_answer_that_was_asked_for_before() {
        let (together, asked) = (Together::default(), AtomicU32::new(0));
        let ask = || {
            together.get(async {
                let n = asked.fetch_add(1, Ordering::SeqCst) + 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
                if n == 3 { Err(ForgeError::Unreachable("away".to_owned())) } else { Ok(n) }
            })
        };
        assert_eq!(join_all((0..50).map(|_| ask())).await, [vec![Ok(1)], vec![Ok(2); 49]].concat());
        assert_eq!(ask().await.map_err(|error| error.category()), Err("unreachable"));
        // Who asks is cancelled, and the next goes on.
        assert!(ask().now_or_never().is_none());
        assert_eq!(ask().await, Ok(5));
    }

    #[test]
    fn the_same_server_scope_and_token_are_asked_together() {
        let (giteas, http) = (Giteas::default(), reqwest::Client::new());
        let get =
            |base: &str, scope: &str, token: &str| giteas.get(&http, base, &Scope::Organization(scope.to_owned()), &Secret::new(token));
        let first = get("http://a", "o", "t");
        assert!(Arc::ptr_eq(&first, &get("http://a/", "o", "t")));
        for other in [get("http://b", "o", "t"), get("http://a", "p", "t"), get("http://a", "o", "u")] {
            assert!(!Arc::ptr_eq(&first, &other));
        }
        drop(first);
        get("http://a", "q", "t");
        assert_eq!(giteas.0.lock().expect("whole").len(), 1, "what no pool has any more is forgotten");
    }
}
