use std::{env, fmt, fs, num::NonZeroUsize, path::PathBuf, str::FromStr};

use clap::Args;
use dnd_mesh::Fault;
use reqwest::Url;
use secrecy::SecretString;
use tonic::Code;

/// The variable that holds the key: there is no flag for it, since flags are seen by everyone on the machine.
const KEY: &str = "DND_LLM_KEY";
const TIMEOUT: u64 = 60;
const CONCURRENCY: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// Which language model is asked over HTTP, and what that may cost.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "A language model over HTTP")]
pub struct LlmArgs {
    /// Base URL of an OpenAI-compatible endpoint, such as https://api.openai.com/v1, whose model is asked in place of one from a folder; a key, if it wants one,
    /// is read from the environment variable DND_LLM_KEY, or from --llm-key-file
    #[arg(long, env = "DND_LLM_URL", value_name = "URL", requires = "llm_model", hide_env_values = true)]
    pub llm_url: Option<BaseUrl>,
    /// The model's name at that endpoint
    #[arg(long, env = "DND_LLM_MODEL", value_name = "NAME", requires = "llm_url")]
    pub llm_model: Option<String>,
    /// File with the endpoint's key; it wins over DND_LLM_KEY
    #[arg(long, env = "DND_LLM_KEY_FILE", value_name = "FILE")]
    pub llm_key_file: Option<PathBuf>,
    /// Seconds that the endpoint has for an answer
    #[arg(long, env = "DND_LLM_TIMEOUT", value_name = "SECONDS", default_value_t = TIMEOUT, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub llm_timeout: u64,
    /// Calls of the endpoint in flight at most
    #[arg(long, env = "DND_LLM_CONCURRENCY", value_name = "COUNT", default_value_t = CONCURRENCY)]
    pub llm_concurrency: NonZeroUsize,
    /// Price of a million tokens of prompts; with --llm-price-out, results say what they cost
    #[arg(long, env = "DND_LLM_PRICE_IN", value_name = "AMOUNT", requires = "llm_price_out", value_parser = amount)]
    pub llm_price_in: Option<f64>,
    /// Price of a million tokens of answers
    #[arg(long, env = "DND_LLM_PRICE_OUT", value_name = "AMOUNT", requires = "llm_price_in", value_parser = amount)]
    pub llm_price_out: Option<f64>,
    /// Tokens, of prompts and answers together, after which this process asks no more; calls that are in flight then are still counted
    #[arg(long, env = "DND_LLM_BUDGET", value_name = "TOKENS")]
    pub llm_budget: Option<u64>,
    /// Cost, by the two prices, after which this process asks no more
    #[arg(long, env = "DND_LLM_BUDGET_COST", value_name = "AMOUNT", requires = "llm_price_in", value_parser = amount)]
    pub llm_budget_cost: Option<f64>,
}

impl Default for LlmArgs {
    fn default() -> Self {
        Self {
            llm_url: None,
            llm_model: None,
            llm_key_file: None,
            llm_timeout: TIMEOUT,
            llm_concurrency: CONCURRENCY,
            llm_price_in: None,
            llm_price_out: None,
            llm_budget: None,
            llm_budget_cost: None,
        }
    }
}

impl LlmArgs {
    /// The key, if there is one.
    pub(super) fn key(&self) -> Result<Option<SecretString>, Fault> {
        let wrong = |problem: String| Fault::new(Code::FailedPrecondition, "LLM_KEY", problem);
        let key = match &self.llm_key_file {
            Some(file) => fs::read_to_string(file).map_err(|e| wrong(format!("{}: {e}", file.display())))?,
            None => match env::var(KEY) {
                Ok(key) => key,
                Err(env::VarError::NotPresent) => String::new(),
                Err(env::VarError::NotUnicode(_)) => return Err(wrong(format!("{KEY} is no text"))),
            },
        };
        let key = key.trim();
        if !key.chars().all(|c| c.is_ascii_graphic()) {
            return Err(wrong("the key has characters that no key has: white space in it, or others than ASCII's".to_owned()));
        }
        Ok((!key.is_empty()).then(|| SecretString::from(key)))
    }
}

fn amount(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|amount: &f64| amount.is_finite() && *amount >= 0.0).ok_or_else(|| "an amount is a number from 0, such as 0.5".to_owned())
}

/// The base URL of an endpoint. It is shown without the credentials and the query that it may hold.
#[derive(Clone, PartialEq, Eq)]
pub struct BaseUrl(Url);

impl BaseUrl {
    /// What lies under it, with its credentials and its query.
    pub(super) fn at(&self, path: &[&str]) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        url
    }

    /// Whether what is sent there can be read on the way.
    pub(super) fn is_open(&self) -> bool {
        let here = matches!(self.0.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        self.is_plain() && !here
    }

    /// Whether it is HTTP without TLS.
    pub(super) fn is_plain(&self) -> bool {
        self.0.scheme() == "http"
    }
}

impl FromStr for BaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{why}; an endpoint looks like https://api.openai.com/v1");
        let url = Url::parse(text).map_err(|e| wrong(&e.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return Err(wrong("not the URL of an HTTP server"));
        }
        Ok(Self(url))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.0.port().map(|port| format!(":{port}")).unwrap_or_default();
        write!(f, "{}://{}{port}{}", self.0.scheme(), self.0.host_str().unwrap_or_default(), self.0.path().trim_end_matches('/'))
    }
}

impl fmt::Debug for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
