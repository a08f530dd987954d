//! Who may call what: tokens with scopes, and names of certificates.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::ValueEnum;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use serde::Deserialize;
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};
use tonic::{Code, Status, body::Body};
use tower_http::auth::AsyncAuthorizeRequest;
use tracing::warn;

use crate::{
    Fault,
    args::AccessArgs,
    blobs,
    metrics::REFUSED,
    reloaded::{self, Reloaded},
    tls::Peer,
};

/// What a token is good for; each scope has what those before it have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Look at jobs, results and models
    Read,
    /// Start and end jobs, upload, run models
    Run,
    /// All else
    Admin,
}

/// Its name, as the tokens file and flags have it.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        })
    }
}

/// The scope that each method needs. One that is not here needs admin.
const METHODS: &[(&str, Scope)] = &[
    ("dnd.v1.ActivationService/Activate", Scope::Run),
    ("dnd.v1.ActivationService/Crop", Scope::Run),
    ("dnd.v1.ActivationService/DescribeTarget", Scope::Run),
    ("dnd.v1.ActivationService/GetModel", Scope::Read),
    ("dnd.v1.ActivationService/ListShards", Scope::Run),
    ("dnd.v1.ActivationService/Probe", Scope::Run),
    ("dnd.v1.ActivationService/ReadPictures", Scope::Run),
    ("dnd.v1.CaptionService/Caption", Scope::Run),
    ("dnd.v1.CaptionService/GetModel", Scope::Read),
    ("dnd.v1.DiffusionService/Generate", Scope::Run),
    ("dnd.v1.DiffusionService/GetModel", Scope::Read),
    ("dnd.v1.DissectService/CancelJob", Scope::Run),
    ("dnd.v1.DissectService/CreateJob", Scope::Run),
    ("dnd.v1.DissectService/DeleteJob", Scope::Admin),
    ("dnd.v1.DissectService/DescribeTarget", Scope::Run),
    ("dnd.v1.DissectService/Dissect", Scope::Run),
    ("dnd.v1.DissectService/GetJob", Scope::Read),
    ("dnd.v1.DissectService/GetUnit", Scope::Read),
    ("dnd.v1.DissectService/ListJobs", Scope::Read),
    ("dnd.v1.DissectService/ListUnits", Scope::Read),
    ("dnd.v1.DissectService/NearestUnits", Scope::Run),
    ("dnd.v1.DissectService/ResumeJob", Scope::Run),
    ("dnd.v1.DissectService/SelectConcept", Scope::Run),
    ("dnd.v1.DissectService/WatchJob", Scope::Read),
    ("dnd.v1.EmbeddingService/EmbedImages", Scope::Run),
    ("dnd.v1.EmbeddingService/EmbedTexts", Scope::Run),
    ("dnd.v1.EmbeddingService/GetModel", Scope::Read),
    ("dnd.v1.PictureService/GetPictures", Scope::Read),
    ("dnd.v1.StudyService/CreateStudy", Scope::Run),
    ("dnd.v1.StudyService/DeleteStudy", Scope::Admin),
    ("dnd.v1.StudyService/GetStudy", Scope::Read),
    ("dnd.v1.StudyService/ListRatings", Scope::Read),
    ("dnd.v1.StudyService/ListStudies", Scope::Read),
    ("dnd.v1.StudyService/NextTask", Scope::Run),
    ("dnd.v1.StudyService/Rate", Scope::Run),
    ("dnd.v1.SummaryService/GetModel", Scope::Read),
    ("dnd.v1.SummaryService/Simplify", Scope::Run),
    ("dnd.v1.SummaryService/Summarize", Scope::Run),
    ("dnd.v1.UploadService/CheckUploads", Scope::Run),
    ("dnd.v1.UploadService/Upload", Scope::Run),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Scope::Read),
    ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Scope::Read),
];

/// Health is anyone's to ask who has got as far as to a call: balancers do, and they have no token.
const HEALTH: &str = "grpc.health.v1.Health/";

/// The scope that a method needs, by its path without the slash before it.
fn scope_of(method: &str) -> Scope {
    METHODS.binary_search_by(|(name, _)| (*name).cmp(method)).map_or(Scope::Admin, |at| METHODS[at].1)
}

/// Counts a refusal.
pub(crate) fn refused(reason: &str) {
    REFUSED.of([reason]).inc();
}

/// The tokens of a file, of which only the digests are known.
struct Tokens(Vec<Token>);

struct Token {
    name: String,
    scope: Scope,
    digest: [u8; 64],
}

/// A token as the file has it, `name = { scope = "run", sha256 = "..." }`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenLine {
    scope: Scope,
    sha256: String,
}

impl Tokens {
    fn parse(file: &Path, contents: &[u8]) -> Result<Self, String> {
        let lines: BTreeMap<String, TokenLine> = toml_of(file, contents)?;
        let token = |(name, line): (String, TokenLine)| match line.sha256.as_bytes().try_into() {
            Ok(digest) if blobs::is_digest(&line.sha256) => Ok(Token { name, scope: line.scope, digest }),
            _ => Err(format!("{}: {name}: sha256 is not a lower-case hex SHA-256; `dnd tokens new` prints the line", file.display())),
        };
        lines.into_iter().map(token).collect::<Result<_, _>>().map(Self)
    }

    /// The token that was shown. All are compared, each whole: how long it takes tells nothing.
    fn find(&self, shown: &str) -> Option<&Token> {
        let digest = blobs::digest(shown.as_bytes());
        let mut found = u64::MAX;
        for (place, token) in (0_u64..).zip(&self.0) {
            let same: Choice = digest.as_bytes().ct_eq(&token.digest);
            found.conditional_assign(&place, same);
        }
        self.0.get(usize::try_from(found).ok()?)
    }
}

/// A new token of that name, and its line for the tokens file. The token itself is kept nowhere.
pub fn new_token(name: &str, scope: Scope, secret: [u8; 32]) -> (String, String) {
    // The prefix lets those who look for leaked secrets know it.
    let token = format!("dnd_{}", blobs::hex(&secret));
    let line = format!("{} = {{ scope = \"{scope}\", sha256 = \"{}\" }}", toml::Value::from(name), blobs::digest(token.as_bytes()));
    (token, line)
}

/// Which names of certificates may call, by service (`dnd.v1.CaptionService`), method (`dnd.v1.CaptionService/Caption`), or for all (`*`). The nearest entry
/// counts; what has none takes no calls.
struct Allowed(BTreeMap<String, Vec<String>>);

impl Allowed {
    fn parse(file: &Path, contents: &[u8]) -> Result<Self, String> {
        let lines: BTreeMap<String, Vec<String>> = toml_of(file, contents)?;
        let known = |key: &str| key == "*" || METHODS.iter().any(|(method, _)| *method == key || service_of(method) == key);
        match lines.keys().find(|key| !known(key)) {
            Some(key) => {
                Err(format!("{}: {key:?} is no service or method; one looks like dnd.v1.CaptionService or dnd.v1.CaptionService/Caption", file.display()))
            }
            None => Ok(Self(lines)),
        }
    }

    fn permits(&self, method: &str, peer: &[String]) -> bool {
        let entry = self.0.get(method).or_else(|| self.0.get(service_of(method))).or_else(|| self.0.get("*"));
        entry.is_some_and(|names| names.iter().any(|name| peer.contains(name)))
    }
}

fn service_of(method: &str) -> &str {
    method.split_once('/').map_or(method, |(service, _)| service)
}

fn toml_of<T: for<'de> Deserialize<'de>>(file: &Path, contents: &[u8]) -> Result<T, String> {
    let text = reloaded::text(contents).map_err(|e| format!("{}: {e}", file.display()))?;
    // The parser's message would show the line, and somebody may have put a token there.
    toml::from_str(text).map_err(|e: toml::de::Error| {
        let line = e.span().map_or(0, |span| text.get(..span.start).unwrap_or_default().lines().count().max(1));
        format!("{}: line {line}: {}", file.display(), e.message())
    })
}

/// The layer that lets a call through or refuses it.
#[derive(Clone, Default)]
pub struct Guard(Arc<Checks>);

#[derive(Default)]
struct Checks {
    tokens: Option<Reloaded<Tokens>>,
    allowed: Option<Reloaded<Allowed>>,
}

impl Guard {
    /// Reads the tokens and the allow-list, as far as there are any; they are read again when they change.
    ///
    /// # Errors
    ///
    /// If a file can't be read, or holds something else.
    pub fn open(args: &AccessArgs) -> Result<Self, String> {
        let tokens = args.tokens.clone().map(|file| reload(file, Tokens::parse)).transpose()?;
        let allowed = args.allow.clone().map(|file| reload(file, Allowed::parse)).transpose()?;
        Ok(Self(Arc::new(Checks { tokens, allowed })))
    }

    /// Looks at the files for each call.
    #[cfg(test)]
    pub(crate) fn always(self) -> Self {
        let Checks { tokens, allowed } = Arc::into_inner(self.0).unwrap();
        Self(Arc::new(Checks { tokens: tokens.map(Reloaded::always), allowed: allowed.map(Reloaded::always) }))
    }

    /// Whether a call may go on.
    async fn check(&self, method: &str, headers: &HeaderMap, peer: Option<&Peer>) -> Result<(), Fault> {
        if method.starts_with(HEALTH) {
            return Ok(());
        }
        if let Some(allowed) = &self.0.allowed {
            let names = peer.map(|peer| &*peer.names).unwrap_or_default();
            if !allowed.current().await.permits(method, names) {
                let who = if names.is_empty() { "a client without a certificate".to_owned() } else { names.join(", ") };
                return Err(Fault::new(Code::PermissionDenied, "CLIENT_NOT_ALLOWED", format!("{who} may not call {method}")));
            }
        }
        let Some(tokens) = &self.0.tokens else { return Ok(()) };
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| value.split_once(' '));
        let Some((_, shown)) = bearer.filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer")) else {
            let message = "no token: send `authorization: Bearer TOKEN` (--token-file FILE)";
            return Err(Fault::new(Code::Unauthenticated, "NO_TOKEN", message));
        };
        let tokens = tokens.current().await;
        let token = tokens.find(shown.trim()).ok_or_else(|| Fault::new(Code::Unauthenticated, "UNKNOWN_TOKEN", "the token is not one of this service's"))?;
        let scope = scope_of(method);
        if token.scope < scope {
            let message = format!("the token {:?} has the scope {}; {method} needs {scope}", token.name, token.scope);
            return Err(Fault::new(Code::PermissionDenied, "MISSING_SCOPE", message));
        }
        Ok(())
    }
}

fn reload<T>(file: PathBuf, parse: impl Fn(&Path, &[u8]) -> Result<T, String> + Send + Sync + 'static) -> Result<Reloaded<T>, String> {
    Reloaded::open(vec![file.clone()], move |contents| parse(&file, &contents[0]))
}

impl AsyncAuthorizeRequest<Body> for Guard {
    type RequestBody = Body;
    type ResponseBody = Body;
    type Future = BoxFuture<'static, Result<Request<Body>, Response<Body>>>;

    fn authorize(&mut self, mut request: Request<Body>) -> Self::Future {
        let guard = self.clone();
        Box::pin(async move {
            let method = request.uri().path().trim_start_matches('/').to_owned();
            let checked = guard.check(&method, request.headers(), request.extensions().get()).await;
            // Nothing behind this sees the token.
            request.headers_mut().remove(AUTHORIZATION);
            match checked {
                Ok(()) => Ok(request),
                Err(fault) => {
                    let peer = request.extensions().get::<Peer>();
                    warn!(peer = ?peer.and_then(|peer| peer.address), names = ?peer.map(|peer| &peer.names), reason = fault.reason(), "refused a call: {fault}");
                    refused(fault.reason());
                    Err(Status::from(fault).into_http())
                }
            }
        })
    }
}

/// The token that a client's calls show, if it has one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bearer(Option<HeaderValue>);

impl Bearer {
    /// Reads the token of a file, if one is named. Blocking.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else { return Ok(Self(None)) };
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        let token = text.trim();
        // What it holds is not repeated: it is a secret, if a wrong one.
        let value = (!token.is_empty()).then(|| HeaderValue::try_from(format!("Bearer {token}")).ok()).flatten();
        let mut value = value.ok_or_else(|| format!("{}: no token in it, or more than one line", file.display()))?;
        // So that nothing shows it that shows headers.
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }

    /// Puts the token on a call.
    pub(crate) fn show(&self, headers: &mut HeaderMap) {
        if let Some(token) = &self.0 {
            headers.insert(AUTHORIZATION, token.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_method_of_the_api_has_its_scope() {
        assert!(METHODS.is_sorted(), "they are searched by halves");
        let files = FileDescriptorSet::decode(dnd_proto::FILE_DESCRIPTOR_SET).unwrap().file;
        for file in files {
            for service in &file.service {
                for method in &service.method {
                    let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(METHODS.iter().any(|(known, _)| *known == name), "{name} has no scope");
                }
            }
        }
        assert_eq!(scope_of("dnd.v1.DissectService/Dissect"), Scope::Run);
        assert_eq!(scope_of("dnd.v1.DissectService/Unknown"), Scope::Admin);
    }

    #[test]
    fn a_token_is_found_by_its_digest_among_others_and_the_file_has_no_token() {
        let file = Path::new("tokens.toml");
        let made: Vec<(String, String)> = (0..3).map(|n| new_token(&format!("caller {n}"), Scope::Run, [n; 32])).collect();
        let lines: Vec<&str> = made.iter().map(|(_, line)| line.as_str()).collect();
        let tokens = Tokens::parse(file, lines.join("\n").as_bytes()).unwrap();
        for (n, (token, line)) in made.iter().enumerate() {
            assert_eq!(tokens.find(token).unwrap().name, format!("caller {n}"));
            assert!(!line.contains(token.as_str()));
            assert!(tokens.find(&token[..token.len() - 1]).is_none());
        }
        for wrong in
            ["a = 1", "a = { scope = \"run\" }", "a = { scope = \"all\", sha256 = \"00\" }", "a = { scope = \"run\", sha256 = \"dnd_secret\" }", "dnd_secret"]
        {
            let problem = Tokens::parse(file, wrong.as_bytes()).err().unwrap();
            assert!(problem.contains("tokens.toml") && !problem.contains("dnd_secret"), "{problem}");
        }
    }

    #[test]
    fn the_nearest_entry_says_who_may_call() {
        let file = Path::new("allow.toml");
        let lines = "\"dnd.v1.CaptionService\" = [\"orchestrator\"]\n\"dnd.v1.CaptionService/GetModel\" = [\"monitor\"]\n\"*\" = [\"operator\"]";
        let allowed = Allowed::parse(file, lines.as_bytes()).unwrap();
        let may = |method: &str, name: &str| allowed.permits(method, &["x".to_owned(), name.to_owned()]);
        assert!(may("dnd.v1.CaptionService/Caption", "orchestrator") && !may("dnd.v1.CaptionService/Caption", "operator"));
        assert!(may("dnd.v1.CaptionService/GetModel", "monitor") && !may("dnd.v1.CaptionService/GetModel", "orchestrator"));
        assert!(may("dnd.v1.DiffusionService/Generate", "operator") && !may("dnd.v1.DiffusionService/Generate", "monitor"));
        assert!(!Allowed::parse(file, b"").unwrap().permits("dnd.v1.CaptionService/Caption", &["orchestrator".to_owned()]));
        assert!(Allowed::parse(file, b"\"dnd.v1.Captionservice\" = []").err().unwrap().contains("Captionservice"));
    }
}
