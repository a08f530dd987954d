//! Logs: to standard error, as text on a terminal and as JSON lines elsewhere.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, fmt};

/// Starts logging. `level` is a filter such as `info` or `dnd_activation=debug,warn`; `RUST_LOG` wins over it.
pub fn init(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let logs = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call in one process (tests) changes nothing.
    let _ = if std::io::stderr().is_terminal() { logs.with_target(false).try_init() } else { logs.json().flatten_event(true).try_init() };
}
