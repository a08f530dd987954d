//! Arguments that every service takes.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, builder::FalseyValueParser};

/// Where and how a service serves.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on; port 0 takes a free one, which the log names
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    /// Seconds that running calls get to end after SIGTERM or Ctrl-C
    #[arg(long, env = "DND_GRACE", default_value_t = 20)]
    pub grace: u64,
    /// What to log: error, warn, info, debug, trace, or a filter such as `dnd_activation=debug,warn`
    #[arg(long, env = "DND_LOG", default_value = "info")]
    pub log: String,
    /// OpenTelemetry collector that traces are sent to (OTLP over gRPC), such as http://localhost:4317; OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG say which
    /// share of them
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp: Option<String>,
    /// Write the address that is listened on to this file, once the port is open
    #[arg(long, hide = true)]
    pub port_file: Option<PathBuf>,
    /// Its certificate
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Who may call
    #[command(flatten)]
    pub access: AccessArgs,
}

/// Certificates: a service shows its own to those who call it and to those whom it calls.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Certificates and tokens")]
pub struct TlsArgs {
    /// This program's certificate and those that it was issued through, in PEM; read again when it changes
    #[arg(long, env = "DND_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of that certificate, in PEM
    #[arg(long, env = "DND_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// CA that certificates at the other end must be of, in PEM
    #[arg(long, env = "DND_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Speak in the clear with other machines, too
    #[arg(long, env = "DND_INSECURE", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new())]
    pub insecure: bool,
}

/// Who may call.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Certificates and tokens")]
pub struct AccessArgs {
    /// Tokens that callers show, a line each as `dnd tokens new` prints it; with it a caller may come without a certificate. Read again when it changes
    #[arg(long, env = "DND_TOKENS", value_name = "FILE.toml")]
    pub tokens: Option<PathBuf>,
    /// Names of certificates that may call, such as `"dnd.v1.CaptionService" = ["orchestrator"]`, by service, by method (`dnd.v1.CaptionService/Caption`), or for all (`"*"`);
    /// what has no line takes no calls. Read again when it changes
    #[arg(long, env = "DND_ALLOW", value_name = "FILE.toml", requires = "tls_ca", requires = "tls_cert")]
    pub allow: Option<PathBuf>,
}

impl ServeArgs {
    /// The grace period.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace)
    }
}
