//! A stand-in for STS, and for what other clouds have in its place. It is ours, so that what it does not know of the real service is not tested with it; real counterparts are the
//! end-to-end tests' business.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::RwLock;
use tokio::task::JoinHandle;

/// Status and body of each answer.
type Answers = Arc<Mutex<Vec<(u16, String)>>>;
/// Each call.
type Calls = Arc<Mutex<Vec<Asked>>>;

/// What was asked.
#[derive(Clone)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Asked {
    /// A parameter of a form.
    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.body.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }
}

/// An STS that answers what it was told to, one answer a call, the last one for ever, and keeps what it was asked.
#[derive(Clone)]
pub(crate) struct Sts {
    answers: Answers,
    asked: Calls,
    /// While somebody holds it for writing, nothing is answered.
    pub(crate) hold: Arc<RwLock<()>>,
    pub(crate) url: String,
    _task: Arc<Abort>,
}

struct Abort(JoinHandle<()>);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Sts {
    pub(crate) async fn start(answers: Vec<(u16, String)>) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (answers, asked, hold) = (Arc::new(Mutex::new(answers)), Arc::default(), Arc::default());
        let state = (answers.clone(), Arc::clone(&asked), Arc::clone(&hold));
        let router = Router::new().fallback(Self::answer).with_state(state);
        #[expect(clippy::disallowed_methods, reason = "a test's own server ends with the test")]
        let task = tokio::spawn(async move { drop(axum::serve(listener, router).await) });
        Self { answers, asked, hold, url, _task: Arc::new(Abort(task)) }
    }

    async fn answer(
        State((answers, asked, hold)): State<(Answers, Calls, Arc<RwLock<()>>)>,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
        body: String,
    ) -> Response {
        asked.lock().expect("asked").push(Asked { method, path: uri.path().to_owned(), headers, body });
        drop(hold.read().await);
        let mut answers = answers.lock().expect("answers");
        let (status, text) = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
        let status = StatusCode::from_u16(status).expect("a status");
        // It has a meaning for redirects only.
        (status, [(header::LOCATION, "http://127.0.0.1:1/")], text).into_response()
    }

    pub(crate) fn calls(&self) -> usize {
        self.asked.lock().expect("asked").len()
    }

    pub(crate) fn then(&self, answers: Vec<(u16, String)>) {
        *self.answers.lock().expect("answers") = answers;
    }

    /// The call of this number, from zero.
    pub(crate) fn call(&self, number: usize) -> Asked {
        self.asked.lock().expect("asked").get(number).expect("a call").clone()
    }
}

/// The answer of the API reference of `AssumeRoleWithWebIdentity`, with names of our own.
pub(crate) fn granted(expires: i64) -> (u16, String) {
    let when = jiff::Timestamp::from_second(expires).expect("a time");
    let text = format!(
        r#"<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
        <SubjectFromWebIdentityToken>repo</SubjectFromWebIdentityToken><Audience>a</Audience>
        <AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/ci/mayfly-1-1-1</Arn><AssumedRoleId>AROA:mayfly</AssumedRoleId></AssumedRoleUser>
        <Credentials><SessionToken>session-of-the-job</SessionToken><SecretAccessKey>key-of-the-job</SecretAccessKey>
        <Expiration>{when}</Expiration><AccessKeyId>ASIAEXAMPLE</AccessKeyId></Credentials>
        <Provider>p</Provider></AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata>
        </AssumeRoleWithWebIdentityResponse>"#
    );
    (200, text)
}
