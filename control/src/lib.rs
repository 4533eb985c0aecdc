//! What xpm's daemons and commands share on the control plane: an HTTP/JSON client and server
//! scaffold, the token, configuration files, settings of command and libraries, state directories, logs, random ids, what the kernel says of swap and memory,
//! and who this host is.
//!
//! Nothing here is on the data path. Everything that touches the network is asynchronous and ends
//! within a time limit; everything that reads a file blocks and belongs to the start of a program, but for [`state`] and
//! [`proc`], which are of use at any time. Unsafe code is in [`handed`] alone.

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
