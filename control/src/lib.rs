//! Shared parts of xpm's daemons and commands on the control plane: an HTTP/JSON client and server scaffold, the
//! token, configuration files, settings of command and libraries, state directories, logs, random ids, the kernel's
//! figures on swap and memory, and the identity of this host.
//!
//! Nothing here is on the data path. All network operations are asynchronous and have a time limit. Functions that
//! read files block and belong to the start of a program, except [`state`] and [`proc`], which can be used at any
//! time. Only [`handed`] contains unsafe code.

#![deny(unsafe_code)]

pub mod client;
pub mod config;
pub mod daemon;
pub mod discover;
pub mod facts;
pub mod handed;
pub mod host;
pub mod known;
pub mod life;
pub mod link;
pub mod listen;
pub mod log;
mod man;
pub mod manager;
pub mod proc;
pub mod random;
pub mod server;
pub mod settings;
pub mod shutdown;
pub mod spare;
pub mod state;
pub mod token;
pub mod urls;

/// An error and its causes as one line: `cannot reach http://a:1: connection refused`.
pub fn error_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let text = source.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        next = source.source();
    }
    line.replace(['\n', '\r'], " ")
}
