//! What was given out, kept until shortly before its end.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use data_encoding::HEXLOWER;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::SetOnce;

use super::broker::{Broker, Kind, Offer, Provider, Trouble, Wish};
use super::identity::Identity;

/// What a request on loopback has to show, in the file of this name.
const TOKEN: &str = "credentials-token";
/// Where Google's SDKs are told where to ask.
const GOOGLE: &str = "google-credentials.json";
/// The job's token of Vault.
const VAULT: &str = "vault-token";
/// The job's own token, for those who show it to Entra themselves.
const AZURE: &str = "azure-federated-token";

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
/// Between two tries to get a token that is kept in a file.
const PAUSE_FILE: Duration = Duration::from_secs(5);
/// How long a job's hook may be kept waiting for the broker, all in all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Everything that is given to the job.
pub(crate) struct Desk {
    identity: Identity,
    /// Without one there are tokens and nothing else.
    broker: Option<Broker>,
    address: SocketAddr,
    /// Where files are for the job.
    folder: PathBuf,
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
    kept: Mutex<HashMap<Wish, Kept>>,
    /// The hook was told that there is nothing.
    denied: AtomicBool,
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

    /// How long it need not be renewed.
    fn fresh_for(&self, now: Instant) -> Duration {
        self.left(now).saturating_sub(RENEW.min(self.until.saturating_duration_since(self.from) / 2))
    }

    fn is_fresh(&self, now: Instant) -> bool {
        !self.fresh_for(now).is_zero()
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

/// Variables by which AWS's SDKs find the region: Python's knows the second alone.
fn in_region(region: &str) -> [(&'static str, String); 2] {
    [("AWS_REGION", region.to_owned()), ("AWS_DEFAULT_REGION", region.to_owned())]
}

impl Desk {
    /// Asks the broker which bindings this job may use, until it knows which job it is. Blocks.
    pub(crate) fn open(identity: Identity, broker: Broker, address: SocketAddr, folder: &Path) -> Result<Self, String> {
        let desk = Self::waiting(identity, Some(broker), address, folder)?;
        desk.learn()?;
        Ok(desk)
    }

    /// A desk of a job that is not known yet: until [`Desk::learn`] whoever asks has to wait. Files for the job are in `folder`.
    pub(crate) fn waiting(identity: Identity, broker: Option<Broker>, address: SocketAddr, folder: &Path) -> Result<Self, String> {
        let mut random = [0; 32];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| "no random numbers".to_owned())?;
        let token = HEXLOWER.encode(&random);
        crate::tell(&folder.join(TOKEN), token.as_bytes())?;
        let (drawers, asking, folder) = (SetOnce::new(), tokio::sync::Mutex::new(()), folder.to_owned());
        Ok(Self { identity, broker, address, folder, token, until: Instant::now() + PATIENCE, drawers, asking })
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

    async fn drawer(&self, binding: &str, fits: impl Fn(Kind) -> bool) -> Result<&Drawer, Trouble> {
        let unknown = || Trouble::Denied(format!("no CredentialBinding {binding:?} of this kind is for this job"));
        self.drawers().await?.get(binding).filter(|drawer| fits(drawer.offer.provider.kind())).ok_or_else(unknown)
    }

    /// The job's bindings of this kind, by their names.
    async fn of_kind(&self, kind: Kind) -> Result<Vec<&Drawer>, Trouble> {
        let mut found: Vec<&Drawer> = self.drawers().await?.values().filter(|drawer| drawer.offer.provider.kind() == kind).collect();
        found.sort_unstable_by_key(|drawer| &drawer.offer.name);
        Ok(found)
    }

    /// The one binding of this kind that the job may use.
    async fn only(&self, kind: Kind) -> Result<&Drawer, Trouble> {
        match self.of_kind(kind).await?[..] {
            [] => Err(Trouble::Denied(format!("no CredentialBinding that gives {} is for this job", what(kind)))),
            [drawer] => Ok(drawer),
            ref many => Err(Trouble::Denied(several(kind, many))),
        }
    }

    fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Variables for the steps of a job that is not known yet: its right to ask for tokens, as GitHub's jobs have it, and where SDKs look for
    /// credentials that some job of the pool may have. Blocks.
    pub(crate) fn environment(&self) -> String {
        let (base, token) = (self.base(), &self.token);
        let mut set = vec![
            ("ACTIONS_ID_TOKEN_REQUEST_URL", format!("{base}/v1/id-token?api-version=2.0")),
            ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", token.clone()),
        ];
        set.extend(self.own());
        let offers = self.broker.as_ref().map_or_else(|| Ok(Vec::new()), Broker::offers_to_any_job);
        let mut regions: Vec<&str> = Vec::new();
        for offer in offers.iter().flatten() {
            if let Provider::Aws { region } = &offer.provider {
                regions.push(region);
            }
        }
        regions.sort_unstable();
        regions.dedup();
        // A broker that is away may be there when the job asks.
        if offers.is_err() || !regions.is_empty() {
            set.extend(self.for_aws(format!("{base}/v1/aws")));
        }
        if let [region] = regions[..] {
            set.extend(in_region(region));
        }
        for kind in [Kind::Google, Kind::Azure, Kind::Vault] {
            let mut all = offers.iter().flatten().filter(|offer| offer.provider.kind() == kind);
            if let (Some(offer), None) = (all.next(), all.next()) {
                match self.settings(offer) {
                    Ok(settings) => set.extend(settings),
                    Err(why) => crate::say(&why),
                }
            }
        }
        set.into_iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }

    /// Variables that every job has.
    fn own(&self) -> [(&'static str, String); 2] {
        [("MAYFLY_CREDENTIALS_URL", self.base()), ("MAYFLY_CREDENTIALS_TOKEN_FILE", self.file(TOKEN))]
    }

    /// Variables by which AWS's SDKs find credentials at this address.
    fn for_aws(&self, url: String) -> [(&'static str, String); 3] {
        [
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url),
            // The same twice: SDKs from before the end of 2023 know the variable alone, and complain of what they do not get.
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", self.file(TOKEN)),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN", self.token.clone()),
        ]
    }

    /// Variables by which a provider's own SDKs find what the binding gives; the file that they need is written.
    fn settings(&self, offer: &Offer) -> Result<Vec<(&'static str, String)>, String> {
        let (base, name) = (self.base(), &offer.name);
        Ok(match &offer.provider {
            Provider::Aws { region } => {
                let found = self.for_aws(format!("{base}/v1/aws/{name}"));
                found.into_iter().chain(in_region(region)).collect()
            }
            Provider::Google { .. } => {
                let file = self.folder.join(GOOGLE);
                crate::tell(&file, self.external_account(offer).to_string().as_bytes())?;
                let file = file.display().to_string();
                // The second is gcloud's.
                vec![("GOOGLE_APPLICATION_CREDENTIALS", file.clone()), ("CLOUDSDK_AUTH_CREDENTIAL_FILE_OVERRIDE", file)]
            }
            Provider::Azure { .. } => {
                vec![
                    ("IDENTITY_ENDPOINT", format!("{base}/v1/azure/{name}")),
                    ("IDENTITY_HEADER", self.token.clone()),
                    // Without tenant and client, which the workflow names where it wants this, libraries pass it by.
                    ("AZURE_FEDERATED_TOKEN_FILE", self.file(AZURE)),
                ]
            }
            Provider::Vault { address, namespace } => {
                let namespace = namespace.iter().map(|namespace| ("VAULT_NAMESPACE", namespace.clone()));
                [("VAULT_ADDR", address.clone())].into_iter().chain(namespace).collect()
            }
            Provider::GithubApp {} | Provider::AudienceToken {} => Vec::new(),
        })
    }

    /// What Google's SDKs read of a file (google.aip.dev/auth/4117): they fetch the job's token here, and show it to Google themselves.
    fn external_account(&self, offer: &Offer) -> Value {
        let Provider::Google { audience, service_account, lifetime, sts_endpoint, iam_credentials_endpoint } = &offer.provider else {
            return Value::Null;
        };
        let mut account = json!({
            "type": "external_account", "audience": audience, "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": format!("{sts_endpoint}/v1/token"),
            "credential_source": {
                "url": format!("{}/v1/subject-token/{}", self.base(), offer.name), "headers": {"Authorization": self.token},
                "format": {"type": "json", "subject_token_field_name": "value"},
            },
        });
        if let Some(name) = service_account {
            let url = format!("{iam_credentials_endpoint}/v1/projects/-/serviceAccounts/{name}:generateAccessToken");
            account["service_account_impersonation_url"] = json!(url);
            account["service_account_impersonation"] = json!({"token_lifetime_seconds": lifetime});
        }
        account
    }

    /// What every request has to show.
    #[cfg(test)]
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

    /// What the hook is told: where credentials are, and what of the first ones the log must not show.
    pub(crate) async fn introduce(self: &Arc<Self>) -> String {
        let mut lines = vec![format!("mask {}", self.token)];
        lines.extend(self.own().map(|(name, value)| format!("set {name}={value}")));
        for kind in [Kind::Aws, Kind::Google, Kind::Azure, Kind::Vault] {
            match self.of_kind(kind).await.unwrap_or_default()[..] {
                [] => {}
                [drawer] => lines.extend(self.introduce_one(drawer).await),
                ref many => lines.push(format!("say Mayfly: {}", several(kind, many))),
            }
        }
        if self.drawers().await.is_ok_and(HashMap::is_empty) {
            lines.push("say Mayfly: no CredentialBinding is for this job".to_owned());
        }
        lines.join("\n") + "\n"
    }

    /// What the hook is told of the one binding of its kind.
    async fn introduce_one(self: &Arc<Self>, drawer: &Drawer) -> Vec<String> {
        let (binding, kind) = (&drawer.offer.name, drawer.offer.provider.kind());
        let tried = self.first(drawer).await;
        if let Err(Trouble::Denied(why)) = &tried {
            drawer.denied.store(true, Ordering::Relaxed);
            return vec![format!("say Mayfly: CredentialBinding {binding} gives nothing: {why}")];
        }
        // Before anything is set that could show it.
        let mut lines: Vec<String> = tried.iter().flatten().map(|secret| format!("mask {secret}")).collect();
        match self.settings(&drawer.offer) {
            Ok(settings) => lines.extend(settings.into_iter().map(|(name, value)| format!("set {name}={value}"))),
            Err(why) => lines.push(format!("say Mayfly: {why}")),
        }
        lines.push(match tried {
            Ok(_) => format!("say Mayfly: {} the credentials of CredentialBinding {binding}", finder(kind)),
            // SDKs ask again, each time that they need one.
            Err(trouble) => format!("say Mayfly: CredentialBinding {binding} gives nothing yet: {}", trouble.into_text()),
        });
        lines
    }

    /// Tries whether the binding gives anything, and tells what of that is secret. What is the matter for a moment only, such as a broker
    /// that has not seen its issuer's keys yet, is waited for as long as a hook may be kept.
    async fn first(self: &Arc<Self>, drawer: &Drawer) -> Result<Vec<String>, Trouble> {
        let (binding, kind) = (&drawer.offer.name, drawer.offer.provider.kind());
        // Google's SDKs exchange the token themselves.
        let wish = match kind {
            Kind::Google => Wish { itself: true, scope: None },
            _ => drawer.offer.provider.usual(),
        };
        loop {
            match self.get(binding, |found| found == kind, wish.clone()).await {
                Err(Trouble::Passing(_)) if Instant::now() < self.until => tokio::time::sleep(PAUSE_EXCHANGE).await,
                Err(trouble) => return Err(trouble),
                Ok(kept) if kind == Kind::Aws => {
                    let session = AwsSession::read(&kept.value)?;
                    return Ok(vec![session.secret_access_key, session.session_token]);
                }
                Ok(kept) => {
                    let filed = self.write_file(binding, kind).await?.filter(|filed| filed.value != kept.value);
                    return Ok(std::iter::once(kept.value).chain(filed.map(|filed| filed.value)).collect());
                }
            }
        }
    }

    /// The answer of AWS's container credentials endpoint.
    pub(crate) async fn aws(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let session = self.aws_session(binding).await?;
        Ok(json!({
            "AccessKeyId": session.access_key_id, "SecretAccessKey": session.secret_access_key, "Token": session.session_token,
            "Expiration": session.expiration,
        }))
    }

    /// The answer of AWS's endpoint for the one binding for AWS that the job may use.
    pub(crate) async fn only_aws(self: &Arc<Self>) -> Result<Value, Trouble> {
        self.aws(&self.only(Kind::Aws).await?.offer.name).await
    }

    /// Has the job's AWS credential there before it is asked for, as SDKs wait a second or two, unless a hook saw to that; and keeps in
    /// files what nobody asks for.
    pub(crate) async fn keep_ready(self: &Arc<Self>) {
        if matches!(self.identity, Identity::Operator(_)) {
            // Whoever asks for it gets the error.
            let _ = self.only_aws().await;
        }
        tokio::join!(self.keep_file(Kind::Vault), self.keep_file(Kind::Azure));
    }

    /// Keeps the file of a kind as long as what is in it can be renewed.
    async fn keep_file(self: &Arc<Self>, kind: Kind) {
        let Ok(drawer) = self.only(kind).await else { return };
        if drawer.denied.load(Ordering::Relaxed) {
            return;
        }
        let binding = &drawer.offer.name;
        loop {
            let pause = match self.write_file(binding, kind).await {
                Ok(Some(kept)) => kept.fresh_for(Instant::now()).max(PAUSE_FILE),
                Ok(None) => return,
                Err(Trouble::Denied(why)) => return crate::say(&format!("CredentialBinding {binding} gives nothing: {why}")),
                Err(Trouble::Passing(_)) => PAUSE_FILE,
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Writes the file of a kind that has one; returns what is in it.
    async fn write_file(self: &Arc<Self>, binding: &str, kind: Kind) -> Result<Option<Kept>, Trouble> {
        let (file, itself) = match kind {
            Kind::Vault => (VAULT, false),
            Kind::Azure => (AZURE, true),
            Kind::Aws | Kind::Google | Kind::GithubApp | Kind::AudienceToken => return Ok(None),
        };
        let kept = self.get(binding, |found| found == kind, Wish { itself, scope: None }).await?;
        crate::tell(&self.folder.join(file), kept.value.as_bytes()).map_err(Trouble::Passing)?;
        Ok(Some(kept))
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

    async fn aws_session(self: &Arc<Self>, binding: &str) -> Result<AwsSession, Trouble> {
        AwsSession::read(&self.get(binding, |kind| kind == Kind::Aws, Wish::default()).await?.value)
    }

    /// What the binding gives where that is one token, in the shape in which the forge gives its own.
    pub(crate) async fn finished_token(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let wish = self.drawer(binding, |kind| kind != Kind::Aws).await?.offer.provider.usual();
        Ok(json!({"value": self.get(binding, |_| true, wish).await?.value}))
    }

    /// A token of the job with the binding's audience, for SDKs that show it to their provider themselves.
    pub(crate) async fn subject_token(self: &Arc<Self>, binding: &str) -> Result<Value, Trouble> {
        let kept = self.get(binding, |_| true, Wish { itself: true, scope: None }).await?;
        Ok(json!({"value": kept.value}))
    }

    /// The answer of App Service's endpoint for managed identities, for this resource.
    pub(crate) async fn azure(self: &Arc<Self>, binding: &str, resource: &str, wanted: Option<&str>) -> Result<Value, Trouble> {
        let drawer = self.drawer(binding, |kind| kind == Kind::Azure).await?;
        let Provider::Azure { client_id, scopes } = &drawer.offer.provider else {
            return Err(Trouble::Denied("no such binding".to_owned()));
        };
        if wanted.is_some_and(|wanted| wanted != client_id) {
            return Err(Trouble::Denied(format!("CredentialBinding {binding} is for the client {client_id}")));
        }
        let has = |resource: &str| scopes.iter().find(|scope| scope.strip_suffix("/.default") == Some(resource));
        let scope = has(resource).or_else(|| has(resource.trim_end_matches('/')));
        let scope =
            scope.ok_or_else(|| Trouble::Denied(format!("CredentialBinding {binding} has only the scopes {}", scopes.join(", "))))?;
        let wish = Wish { itself: false, scope: Some(scope.clone()) };
        let kept = self.get(binding, |kind| kind == Kind::Azure, wish).await?;
        let until = SystemTime::now() + kept.left(Instant::now());
        let until = until.duration_since(SystemTime::UNIX_EPOCH).map_err(|error| Trouble::Passing(error.to_string()))?;
        Ok(json!({
            "access_token": kept.value, "expires_on": until.as_secs().to_string(), "resource": resource, "token_type": "Bearer",
            "client_id": client_id,
        }))
    }

    /// What the binding gives, from the drawer where that is good for a while: SDKs wait a second for an answer, and clouds take longer.
    async fn get(self: &Arc<Self>, binding: &str, fits: impl Fn(Kind) -> bool, wish: Wish) -> Result<Kept, Trouble> {
        let drawer = self.drawer(binding, fits).await?;
        let now = Instant::now();
        if let Some(kept) = drawer.kept(&wish).filter(|kept| kept.left(now) > LEAST) {
            if !kept.is_fresh(now)
                && let Ok(turn) = drawer.renewing.clone().try_lock_owned()
            {
                let (desk, name) = (self.clone(), binding.to_owned());
                // What is kept is good as long as it lasts: the next request tries again.
                drop(tokio::task::spawn_blocking(move || (desk.renew(&name, wish).map(drop), turn)));
            }
            return Ok(kept);
        }
        let turn = drawer.renewing.clone().lock_owned().await;
        if let Some(kept) = drawer.kept(&wish).filter(|kept| kept.is_fresh(Instant::now())) {
            return Ok(kept);
        }
        let (desk, name) = (self.clone(), binding.to_owned());
        let renewed = tokio::task::spawn_blocking(move || (desk.renew(&name, wish), turn)).await;
        renewed.map_err(|error| Trouble::Passing(error.to_string()))?.0
    }

    /// One token of the job for one credential. Blocks.
    fn renew(&self, binding: &str, wish: Wish) -> Result<Kept, Trouble> {
        let none = || Trouble::Denied("no such binding".to_owned());
        let drawer = self.drawers.get().and_then(|known| known.as_ref().ok()?.get(binding)).ok_or_else(none)?;
        let broker = self.broker.as_ref().ok_or_else(none)?;
        let token = self.identity.token_for(&drawer.offer.audience)?;
        let from = Instant::now();
        let granted = broker.exchange(binding, &token, &wish)?;
        let kept = Kept { value: granted.access_token, from, until: from + Duration::from_secs(granted.expires_in) };
        drawer.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(wish, kept.clone());
        Ok(kept)
    }
}

fn drawers(offers: Vec<Offer>) -> Drawers {
    let empty = |offer| Drawer { offer, kept: Mutex::default(), denied: AtomicBool::new(false), renewing: Arc::default() };
    offers.into_iter().map(|offer| (offer.name.clone(), empty(offer))).collect()
}

/// What a kind of binding gives, in words.
fn what(kind: Kind) -> &'static str {
    match kind {
        Kind::Aws => "AWS credentials",
        Kind::Google => "tokens of Google",
        Kind::Azure => "tokens of Azure",
        Kind::Vault => "tokens of Vault",
        Kind::GithubApp => "tokens of a GitHub App",
        Kind::AudienceToken => "tokens",
    }
}

/// Who finds what it gives.
fn finder(kind: Kind) -> &'static str {
    match kind {
        Kind::Aws => "AWS SDKs find",
        Kind::Google => "Google's SDKs find",
        Kind::Azure => "Azure's SDKs find",
        Kind::Vault => "clients of Vault find",
        Kind::GithubApp | Kind::AudienceToken => "steps find",
    }
}

/// What to do where more than one binding of a kind is for the job.
fn several(kind: Kind, drawers: &[&Drawer]) -> String {
    let names: Vec<&str> = drawers.iter().map(|drawer| drawer.offer.name.as_str()).collect();
    let choose = match kind {
        Kind::Aws => {
            "set AWS_CONTAINER_CREDENTIALS_FULL_URI to $MAYFLY_CREDENTIALS_URL/v1/aws/NAME, and AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE to \
             $MAYFLY_CREDENTIALS_TOKEN_FILE, or a profile's credential_process to `mayfly-credentials NAME`"
        }
        Kind::Azure => {
            "set IDENTITY_ENDPOINT to $MAYFLY_CREDENTIALS_URL/v1/azure/NAME, and IDENTITY_HEADER to what is in $MAYFLY_CREDENTIALS_TOKEN_FILE"
        }
        Kind::Google | Kind::Vault | Kind::GithubApp | Kind::AudienceToken => "ask $MAYFLY_CREDENTIALS_URL/v1/token/NAME",
    };
    format!("several CredentialBindings give {} ({}): {choose}", what(kind), names.join(", "))
}

impl Drawer {
    fn kept(&self, wish: &Wish) -> Option<Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(wish).cloned()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::AtomicU64;

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
        static DESKS: AtomicU64 = AtomicU64::new(0);
        let number = DESKS.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("mayfly-gate-desk-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut desk = Desk::waiting(identity, Some(broker), "127.0.0.1:4711".parse().expect("an address"), &folder).expect("a desk");
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
        // As SDKs ask for it, those of Google as well.
        for wish in [drawers[name].offer.provider.usual(), Wish { itself: true, scope: None }] {
            drawers[name].kept.lock().expect("a drawer").insert(wish, kept.clone());
        }
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
        let lines = desk.introduce().await;
        assert!(lines.contains("set AWS_CONTAINER_CREDENTIALS_FULL_URI=http://127.0.0.1:4711/v1/aws/deploy\n"), "{lines}");
        assert!(lines.contains(&format!("set AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE={}\n", desk.file(TOKEN))), "{lines}");
        assert!(lines.contains("set AWS_REGION=eu-central-1\nset AWS_DEFAULT_REGION=eu-central-1\n"), "{lines}");
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
    async fn one_binding_of_each_kind_is_what_the_sdks_of_that_kind_find() {
        let (audience, service_account) = ("//iam.googleapis.com/p".to_owned(), Some("deploy@acme.iam.gserviceaccount.com".to_owned()));
        let (sts_endpoint, iam_credentials_endpoint) = ("https://sts.example".to_owned(), "https://iam.example".to_owned());
        let google = Provider::Google { audience, service_account, lifetime: 900, sts_endpoint, iam_credentials_endpoint };
        let azure = Provider::Azure { client_id: "c-1".to_owned(), scopes: vec!["https://management.azure.com/.default".to_owned()] };
        let vault = Provider::Vault { address: "https://vault.example".to_owned(), namespace: Some("team".to_owned()) };
        let desk = desk(&[("g", google, "hunter4"), ("a", azure, "hunter5"), ("v", vault, "hunter6")]);
        let lines = desk.introduce().await;
        let set =
            |name: &str| lines.lines().find_map(|line| line.strip_prefix("set ")?.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
        assert_eq!(set("IDENTITY_ENDPOINT").as_deref(), Some("http://127.0.0.1:4711/v1/azure/a"));
        assert_eq!(set("IDENTITY_HEADER").as_deref(), Some(desk.token()));
        assert_eq!((set("VAULT_ADDR").as_deref(), set("VAULT_NAMESPACE").as_deref()), (Some("https://vault.example"), Some("team")));
        assert_eq!(set("CLOUDSDK_AUTH_CREDENTIAL_FILE_OVERRIDE"), set("GOOGLE_APPLICATION_CREDENTIALS"));
        for secret in ["hunter4", "hunter5", "hunter6"] {
            let shown: Vec<&str> = lines.lines().filter(|line| line.contains(secret)).collect();
            assert_eq!(shown, [format!("mask {secret}")]);
        }
        assert_eq!(std::fs::read_to_string(desk.file(VAULT)).expect("a file"), "hunter6");
        assert_eq!(set("AZURE_FEDERATED_TOKEN_FILE"), Some(desk.file(AZURE)));
        assert_eq!(std::fs::read_to_string(desk.file(AZURE)).expect("a file"), "hunter5");
        let file = std::fs::read_to_string(set("GOOGLE_APPLICATION_CREDENTIALS").expect("a path")).expect("a file");
        assert!(!file.contains("hunter"), "{file}");
        let account: Value = serde_json::from_str(&file).expect("JSON");
        assert_eq!(account["credential_source"]["url"], "http://127.0.0.1:4711/v1/subject-token/g");
        assert_eq!(account["credential_source"]["headers"]["Authorization"], desk.token());
        assert_eq!((&account["type"], &account["token_url"]), (&json!("external_account"), &json!("https://sts.example/v1/token")));
        let url = "https://iam.example/v1/projects/-/serviceAccounts/deploy@acme.iam.gserviceaccount.com:generateAccessToken";
        assert_eq!(account["service_account_impersonation_url"], url);
        assert_eq!(account["service_account_impersonation"]["token_lifetime_seconds"], 900);
        assert!(lines.ends_with("say Mayfly: clients of Vault find the credentials of CredentialBinding v\n"), "{lines}");
    }

    #[tokio::test]
    async fn several_are_named_and_none_is_chosen() {
        let own = ["MAYFLY_CREDENTIALS_URL", "MAYFLY_CREDENTIALS_TOKEN_FILE"];
        let lines = desk(&[("deploy", aws(), SESSION), ("backup", aws(), SESSION)]).introduce().await;
        assert_eq!(settings(&lines), own);
        assert!(lines.contains("(backup, deploy)"), "{lines}");
        let lines = desk(&[]).introduce().await;
        assert!(lines.contains("no CredentialBinding is for this job"), "{lines}");
    }

    #[tokio::test]
    async fn where_the_broker_is_away_sdks_ask_again() {
        let lines = desk(&[("deploy", aws(), "")]).introduce().await;
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
