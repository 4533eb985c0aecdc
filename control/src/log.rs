//! The log: lines on standard error, which the service manager keeps.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

/// Environment variable with the level (`error`, `warn`, `info`, `debug`, `trace`) or a filter in
/// the form of tracing-subscriber's `EnvFilter`.
pub const LEVEL_VARIABLE: &str = "XPM_LOG";

/// Starts the log at level `info`, or at what `XPM_LOG` says. A second call changes nothing.
/// Without a terminal, lines carry no colours and no time, for the journal adds its own.
pub fn init() {
    let wanted = std::env::var(LEVEL_VARIABLE).unwrap_or_default();
    let filter = match wanted.is_empty() {
        true => Ok(EnvFilter::new("info")),
        false => EnvFilter::try_new(&wanted),
    };
    let (filter, complaint) = match filter {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(terminal);
    // Only a logger that is set already makes this fail, and that one is then used.
    let _ = match terminal {
        true => lines.try_init(),
        false => lines.without_time().try_init(),
    };
    if let Some(error) = complaint {
        tracing::warn!("{LEVEL_VARIABLE}={wanted} is not a level ({error}); using info");
    }
}
