//! Arguments that every service takes.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;

/// Where and how a service serves.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on; port 0 takes a free one, which the log names
    #[arg(long, env = "DND_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    /// Address of the admin port, which serves plain HTTP: /livez, /readyz, /metrics and gRPC health, and nothing else; none unless it is given
    #[arg(long, env = "DND_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<SocketAddr>,
    /// Seconds that running calls get to end after SIGTERM or Ctrl-C
    #[arg(long, env = "DND_GRACE", default_value_t = 20)]
    pub grace: u64,
    /// What to log: error, warn, info, debug, trace, or a filter such as `dnd_activation=debug,warn`
    #[arg(long, env = "DND_LOG", default_value = "info")]
    pub log: String,
    /// Write the address that is listened on to this file, once the port is open; beside it, to FILE.admin, that of the admin port
    #[arg(long, hide = true)]
    pub port_file: Option<PathBuf>,
}

impl ServeArgs {
    /// The grace period.
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace)
    }
}
