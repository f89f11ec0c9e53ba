//! What was given out, kept until shortly before its end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::SetOnce;

use super::broker::{Broker, Offer, Provider, Trouble};
use super::identity::Identity;

/// A credential is renewed when it has less left than this, or than half its life: SDKs want more than a quarter of an hour.
const RENEW: Duration = Duration::from_secs(20 * 60);
/// What has less left than this is renewed before anything is given out.
const LEAST: Duration = Duration::from_secs(60);
/// Between two questions of which job this is.
const PAUSE: Duration = Duration::from_millis(200);
/// Between two tokens that a job asks for itself.
const PACE: Duration = Duration::from_millis(50);
/// Between two tries of the first exchange.
const PAUSE_EXCHANGE: Duration = Duration::from_secs(1);
/// How long a job's hook may be kept waiting for the broker, all in all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything that is given to the job.
pub(crate) struct Desk {
    identity: Identity,
    /// Without one there are tokens and nothing else.
    broker: Option<Broker>,
    address: SocketAddr,
    token: String,
    /// Until when the hook may be kept waiting.
    until: Instant,
    /// What the job may use, once it is known which job it is.
    drawers: SetOnce<Result<Drawers, Trouble>>,
    /// One token at a time that the job asks for itself.
    asking: tokio::sync::Mutex<()>,
}

/// By the name of the binding.
type Drawers = HashMap<String, Drawer>;

/// One binding, and what came of it last.
struct Drawer {
    offer: Offer,
    kept: Mutex<Option<Kept>>,
    /// One exchange at a time.
    renewing: Arc<tokio::sync::Mutex<()>>,
}

/// A credential with its times.
#[derive(Clone)]
struct Kept {
    value: String,
    from: Instant,
    until: Instant,
}

impl Kept {
    fn left(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }

    fn is_fresh(&self, now: Instant) -> bool {
        self.left(now) > RENEW.min(self.until.saturating_duration_since(self.from) / 2)
    }
}

/// What AWS's `credential_process` prints, which is what the broker gives out.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AwsSession {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

impl AwsSession {
    fn read(text: &str) -> Result<Self, Trouble> {
        // serde's message may quote it.
        serde_json::from_str(text).map_err(|_| Trouble::Passing("the broker gave no AWS session".to_owned()))
    }
}

impl Desk {
    /// Asks the broker which bindings this job may use, until it knows which job it is. Blocks.
    pub(crate) fn open(identity: Identity, broker: Broker, address: SocketAddr) -> Result<Self, String> {
        let desk = Self::waiting(identity, Some(broker), address)?;
        desk.learn()?;
        Ok(desk)
    }

    /// A desk of a job that is not known yet: until [`Desk::learn`] whoever asks has to wait.
    pub(crate) fn waiting(identity: Identity, broker: Option<Broker>, address: SocketAddr) -> Result<Self, String> {
        let mut random = [0; 32];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| "no random numbers".to_owned())?;
        let token = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let (drawers, asking) = (SetOnce::new(), tokio::sync::Mutex::new(()));
        Ok(Self { identity, broker, address, token, until: Instant::now() + PATIENCE, drawers, asking })
    }

    /// Asks the broker which bindings the job may use, until it knows which job it is. Blocks.
    pub(crate) fn learn(&self) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        let offers = loop {
            match self.broker.as_ref().map_or_else(|| Ok(Vec::new()), Broker::offers) {
                Err(Trouble::Passing(_)) if Instant::now() < until => std::thread::sleep(PAUSE),
                found => break found,
            }
        };
        let told = offers.clone().map(drop).map_err(Trouble::into_text);
        // It is told once.
        let _ = self.drawers.set(offers.map(drawers));
        told
    }

    /// What the job may use; waited for as long as a job is not known.
    async fn drawers(&self) -> Result<&Drawers, Trouble> {
        let known = tokio::time::timeout(PATIENCE, self.drawers.wait()).await;
        let known = known.map_err(|_| Trouble::Passing("it is not known yet which job this pod has".to_owned()))?;
        known.as_ref().map_err(Clone::clone)
    }

    async fn drawer(&self, binding: &str, fits: impl Fn(&Drawer) -> bool) -> Result<&Drawer, Trouble> {
        let unknown = || Trouble::Denied(format!("no CredentialBinding {binding:?} of this kind is for this job"));
        self.drawers().await?.get(binding).filter(|drawer| fits(drawer)).ok_or_else(unknown)
    }

    /// Names and regions of the bindings for AWS.
    async fn all_aws(&self) -> Result<Vec<(&str, &str)>, Trouble> {
        let mut aws: Vec<(&str, &str)> = self.drawers().await?.values().filter_map(Drawer::aws).collect();
        aws.sort_unstable();
        Ok(aws)
    }

    /// Variables for the steps of a job that is not known yet: its right to ask for tokens, as GitHub's jobs have it, and where SDKs look for
    /// credentials that some job of the pool may have. Blocks.
    pub(crate) fn environment(&self, token_file: &str) -> String {
        let (base, token) = (format!("http://{}", self.address), &self.token);
        let mut lines = vec![
            format!("MAYFLY_CREDENTIALS_URL={base}"),
            format!("MAYFLY_CREDENTIALS_TOKEN_FILE={token_file}"),
            format!("ACTIONS_ID_TOKEN_REQUEST_URL={base}/v1/id-token?api-version=2.0"),
            format!("ACTIONS_ID_TOKEN_REQUEST_TOKEN={token}"),
        ];
        let offers = self.broker.as_ref().map_or_else(|| Ok(Vec::new()), Broker::offers_to_any_job);
        let mut regions: Vec<String> = Vec::new();
        for offer in offers.iter().flatten() {
            if let Provider::Aws { region } = &offer.provider {
                regions.push(region.clone());
            }
        }
        regions.sort_unstable();
        regions.dedup();
        // A broker that is away may be there when the job asks.
        if offers.is_err() || !regions.is_empty() {
            lines.push(format!("AWS_CONTAINER_CREDENTIALS_FULL_URI={base}/v1/aws"));
            lines.push(format!("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE={token_file}"));
            lines.push(format!("AWS_CONTAINER_AUTHORIZATION_TOKEN={token}"));
        }
        if let [region] = regions.as_slice() {
            lines.push(format!("AWS_REGION={region}"));
        }
        lines.join("\n") + "\n"
    }

    /// What every request has to show.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// Whether this is what every request has to show, as `Authorization`: the token itself, or as a bearer's.
    pub(crate) fn admits(&self, authorization: &[u8]) -> bool {
        let shown = authorization.strip_prefix(b"Bearer ").unwrap_or(authorization);
        verify_slices_are_equal(shown, self.token.as_bytes()).is_ok()
    }

    /// Whether a `Host` header names this desk. A page that a browser of the job loads under another name is not served.
    pub(crate) fn is_at(&self, host: &str) -> bool {
        let name = host.strip_suffix(&format!(":{}", self.address.port()));
        name.is_some_and(|name| name == "localhost" || name == self.address.ip().to_string())
    }

    /// What the hook is told: where credentials are, and what of the first one the log must not show. `token_file` holds the token.
    pub(crate) async fn introduce(self: &Arc<Self>, token_file: &str) -> String {
        let base = format!("http://{}", self.address);
        let mut lines = vec![
            format!("mask {}", self.token),
            format!("set MAYFLY_CREDENTIALS_URL={base}"),
            format!("set MAYFLY_CREDENTIALS_TOKEN_FILE={token_file}"),
        ];
        let aws = self.all_aws().await.unwrap_or_default();
        match aws[..] {
            [] => {}
            [(name, region)] => match self.first_aws_session(name).await {
                Err(Trouble::Denied(why)) => lines.push(format!("say Mayfly: CredentialBinding {name} gives nothing: {why}")),
                tried => {
                    lines.extend(
                        tried
                            .iter()
                            .flat_map(|session| [&session.secret_access_key, &session.session_token])
                            .map(|secret| format!("mask {secret}")),
                    );
                    lines.push(format!("set AWS_CONTAINER_CREDENTIALS_FULL_URI={base}/v1/aws/{name}"));
                    // The same twice: SDKs from before the end of 2023 know the variable alone, and complain of what they do not get.
                    lines.push(format!("set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE={token_file}"));
                    lines.push(format!("set AWS_CONTAINER_AUTHORIZATION_TOKEN={}", self.token));
                    lines.push(format!("set AWS_REGION={region}"));
                    lines.push(match tried {
                        Ok(_) => format!("say Mayfly: AWS SDKs find the credentials of CredentialBinding {name}"),
                        // SDKs ask again, each time that they need one.
                        Err(trouble) => format!("say Mayfly: CredentialBinding {name} gives nothing yet: {}", trouble.into_text()),
                    });
                }
            },
            _ => {
                lines.push(format!("say Mayfly: {}", several(&aws)));
            }
        }
        if self.drawers().await.is_ok_and(HashMap::is_empty) {
            lines.push("say Mayfly: no CredentialBinding is for this job".to_owned());
        }
        lines.join("\n") + "\n"
    }

    /// The answer of AWS's container credentials endpoint.
    pub(crate) async fn aws(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let session = self.aws_session(binding).await?;
        Ok(json!({
            "AccessKeyId": session.access_key_id, "SecretAccessKey": session.secret_access_key, "Token": session.session_token,
            "Expiration": session.expiration,
        }))
    }

    /// The same for the one binding for AWS that the job may use.
    pub(crate) async fn only_aws(self: &Arc<Self>) -> Result<Value, Trouble> {
        match self.all_aws().await?.as_slice() {
            [] => Err(Trouble::Denied("no CredentialBinding that gives AWS credentials is for this job".to_owned())),
            [(name, _)] => self.aws(name).await,
            many => Err(Trouble::Denied(several(many))),
        }
    }

    /// Has the job's AWS credential there before it is asked for: SDKs wait a second or two.
    pub(crate) async fn fetch_ahead(self: &Arc<Self>) {
        // Whoever asks for it gets the error.
        let _ = self.only_aws().await;
    }

    /// What `ACTIONS_ID_TOKEN_REQUEST_URL` answers: a token of the job for this audience. Of a forge the job asks itself.
    pub(crate) async fn id_token(self: &Arc<Self>, audience: String) -> Result<Value, Trouble> {
        if !matches!(self.identity, Identity::Operator(_)) {
            return Err(Trouble::Denied("the forge gives this job its tokens".to_owned()));
        }
        let _turn = self.asking.lock().await;
        let until = Instant::now() + PATIENCE;
        loop {
            let (desk, wanted) = (self.clone(), audience.clone());
            let asked = tokio::task::spawn_blocking(move || desk.identity.token_for(&wanted)).await;
            // A job that asks without end must not be a load on the operator.
            tokio::time::sleep(PACE).await;
            match asked.map_err(|error| Trouble::Passing(error.to_string()))? {
                Err(Trouble::Passing(_)) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
                tried => return tried.map(|token| json!({"count": 1, "value": token})),
            }
        }
    }

    /// What AWS's `credential_process` prints.
    pub(crate) async fn credential_process(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let session = self.aws_session(binding).await?;
        Ok(json!({
            "Version": 1, "AccessKeyId": session.access_key_id, "SecretAccessKey": session.secret_access_key,
            "SessionToken": session.session_token, "Expiration": session.expiration,
        }))
    }

    /// What is the matter for a moment only, such as a broker that has not seen its issuer's keys yet, is waited for as long as a hook may
    /// be kept.
    async fn first_aws_session(self: &Arc<Self>, binding: &str) -> Result<AwsSession, Trouble> {
        loop {
            match self.aws_session(binding).await {
                Err(Trouble::Passing(_)) if Instant::now() < self.until => tokio::time::sleep(PAUSE_EXCHANGE).await,
                tried => return tried,
            }
        }
    }

    async fn aws_session(self: &Arc<Self>, binding: &str) -> Result<AwsSession, Trouble> {
        AwsSession::read(&self.get(binding, |drawer| drawer.aws().is_some()).await?)
    }

    /// A token of the job with the binding's audience, in the shape in which the forge gives it.
    pub(crate) async fn audience_token(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let value = self.get(binding, |drawer| drawer.aws().is_none()).await?;
        Ok(json!({"value": value}))
    }

    /// What the binding gives, from the drawer where that is good for a while: SDKs wait a second for an answer, and clouds take longer.
    async fn get(self: &Arc<Self>, binding: &str, fits: impl Fn(&Drawer) -> bool) -> Result<String, Trouble> {
        let drawer = self.drawer(binding, fits).await?;
        let now = Instant::now();
        if let Some(kept) = drawer.kept().filter(|kept| kept.left(now) > LEAST) {
            if !kept.is_fresh(now)
                && let Ok(turn) = drawer.renewing.clone().try_lock_owned()
            {
                let (desk, name) = (self.clone(), binding.to_owned());
                // What is kept is good as long as it lasts: the next request tries again.
                drop(tokio::task::spawn_blocking(move || (desk.renew(&name).map(drop), turn)));
            }
            return Ok(kept.value);
        }
        let turn = drawer.renewing.clone().lock_owned().await;
        if let Some(kept) = drawer.kept().filter(|kept| kept.is_fresh(Instant::now())) {
            return Ok(kept.value);
        }
        let (desk, name) = (self.clone(), binding.to_owned());
        let renewed = tokio::task::spawn_blocking(move || (desk.renew(&name), turn)).await;
        renewed.map_err(|error| Trouble::Passing(error.to_string()))?.0
    }

    /// One token of the job for one credential. Blocks.
    fn renew(&self, binding: &str) -> Result<String, Trouble> {
        let none = || Trouble::Denied("no such binding".to_owned());
        let drawer = self.drawers.get().and_then(|known| known.as_ref().ok()?.get(binding)).ok_or_else(none)?;
        let broker = self.broker.as_ref().ok_or_else(none)?;
        let token = self.identity.token_for(&drawer.offer.audience)?;
        let from = Instant::now();
        let granted = broker.exchange(binding, &token)?;
        let kept = Kept { value: granted.access_token, from, until: from + Duration::from_secs(granted.expires_in) };
        *drawer.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept.clone());
        Ok(kept.value)
    }
}

fn drawers(offers: Vec<Offer>) -> Drawers {
    let empty = |offer| Drawer { offer, kept: Mutex::default(), renewing: Arc::default() };
    offers.into_iter().map(|offer| (offer.name.clone(), empty(offer))).collect()
}

/// What to do where more than one binding gives AWS credentials.
fn several(aws: &[(&str, &str)]) -> String {
    let names = aws.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    format!(
        "several CredentialBindings give AWS credentials ({names}): set AWS_CONTAINER_CREDENTIALS_FULL_URI to \
         $MAYFLY_CREDENTIALS_URL/v1/aws/NAME, and AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to $MAYFLY_CREDENTIALS_TOKEN_FILE, or a profile's \
         credential_process to `mayfly-credentials NAME`"
    )
}

impl Drawer {
    fn kept(&self) -> Option<Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Name and region of a binding for AWS.
    fn aws(&self) -> Option<(&str, &str)> {
        match &self.offer.provider {
            Provider::Aws { region } => Some((&self.offer.name, region)),
            Provider::AudienceToken {} => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::super::identity::HandedOver;
    use super::*;

    pub(crate) const SESSION: &str =
        r#"{"Version":1,"AccessKeyId":"AKIA","SecretAccessKey":"hunter2","SessionToken":"hunter3","Expiration":"2026-11-22T10:00:00Z"}"#;

    /// A desk that asks nobody: what it has is in its drawers.
    pub(crate) fn desk(bindings: &[(&str, Provider, &str)]) -> Arc<Desk> {
        let identity = Identity::Forge(HandedOver::read(b"https://forge.invalid/\ntoken\n", "").expect("an identity"));
        let authority = rcgen::generate_simple_self_signed(vec!["broker".to_owned()]).expect("a certificate").cert.pem();
        let broker = Broker::new("https://127.0.0.1:1", &authority, Path::new("/nowhere")).expect("a broker");
        let offer = |name: &str, provider: &Provider| Offer { name: name.to_owned(), audience: "a".to_owned(), provider: provider.clone() };
        let offers = bindings.iter().map(|(name, provider, _)| offer(name, provider)).collect();
        let mut desk = Desk::waiting(identity, Some(broker), "127.0.0.1:4711".parse().expect("an address")).expect("a desk");
        desk.until = Instant::now();
        assert!(desk.drawers.set(Ok(drawers(offers))).is_ok());
        let from = Instant::now();
        for (name, _, value) in bindings.iter().filter(|(.., value)| !value.is_empty()) {
            let kept = Kept { value: (*value).to_owned(), from, until: from + Duration::from_secs(3600) };
            fill(&desk, name, kept);
        }
        Arc::new(desk)
    }

    fn fill(desk: &Desk, name: &str, kept: Kept) {
        let drawers = desk.drawers.get().and_then(|known| known.as_ref().ok()).expect("drawers");
        *drawers[name].kept.lock().expect("a drawer") = Some(kept);
    }

    pub(crate) fn aws() -> Provider {
        Provider::Aws { region: "eu-central-1".to_owned() }
    }

    fn settings(lines: &str) -> Vec<&str> {
        lines.lines().filter_map(|line| line.strip_prefix("set ")?.split('=').next()).collect()
    }

    #[tokio::test]
    async fn one_binding_for_aws_is_what_sdks_find() {
        let desk = desk(&[("deploy", aws(), SESSION), ("other", Provider::AudienceToken {}, "a.b.c")]);
        let lines = desk.introduce("/run/mayfly/credentials-token").await;
        assert!(lines.contains("set AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:4711/v1/aws/deploy\n"), "{lines}");
        assert!(lines.contains("set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=/run/mayfly/credentials-token\n"), "{lines}");
        assert!(lines.contains("set AWS_REGION=eu-central-1\n"), "{lines}");
        let shown = |secret: &str| lines.lines().filter(|line| line.contains(secret)).map(str::to_owned).collect::<Vec<_>>();
        for secret in ["hunter2", "hunter3"] {
            assert_eq!(shown(secret), [format!("mask {secret}")]);
        }
        // Before it is set, nothing can show it.
        assert_eq!(
            shown(desk.token()),
            [format!("mask {0}", desk.token()), format!("set AWS_CONTAINER_AUTHORIZATION_TOKEN={0}", desk.token())]
        );
    }

    #[tokio::test]
    async fn several_are_named_and_none_is_chosen() {
        let own = ["MAYFLY_CREDENTIALS_URL", "MAYFLY_CREDENTIALS_TOKEN_FILE"];
        let lines = desk(&[("deploy", aws(), SESSION), ("backup", aws(), SESSION)]).introduce("/file").await;
        assert_eq!(settings(&lines), own);
        assert!(lines.contains("(backup, deploy)"), "{lines}");
        let lines = desk(&[]).introduce("/file").await;
        assert!(lines.contains("no CredentialBinding is for this job"), "{lines}");
    }

    #[tokio::test]
    async fn where_the_broker_is_away_sdks_ask_again() {
        let lines = desk(&[("deploy", aws(), "")]).introduce("/file").await;
        assert!(lines.contains("set AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:4711/v1/aws/deploy\n"), "{lines}");
        assert!(lines.contains("say Mayfly: CredentialBinding deploy gives nothing yet: "), "{lines}");
    }

    #[tokio::test]
    async fn what_cannot_be_renewed_is_given_as_long_as_it_is_good() {
        // Nobody answers this desk's questions.
        let desk = desk(&[("deploy", aws(), SESSION)]);
        let keep = |left: u64| {
            let until = Instant::now() + Duration::from_secs(left);
            let kept = Kept { value: SESSION.to_owned(), from: until - Duration::from_secs(3600), until };
            fill(&desk, "deploy", kept);
        };
        for (left, given) in [(3000, true), (600, true), (70, true), (50, false)] {
            keep(left);
            assert_eq!(desk.aws("deploy").await.is_ok(), given, "{left} s");
        }
    }

    #[test]
    fn a_credential_is_renewed_in_time() {
        let from = Instant::now();
        let at = |seconds: u64| from + Duration::from_secs(seconds);
        let kept = |life: u64| Kept { value: String::new(), from, until: at(life) };
        for (life, last_fresh) in [(3600, 2399), (43_200, 41_999), (900, 449), (300, 149)] {
            assert!(kept(life).is_fresh(at(last_fresh)), "{life}");
            assert!(!kept(life).is_fresh(at(last_fresh + 1)), "{life}");
        }
        assert!(!kept(900).is_fresh(at(10_000)));
    }
}
