//! Requests to the control interfaces of daemons, as a program sends them that shares no code with them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use serde_json::Value;

use crate::LIMIT;

/// Whether a daemon of this machine answers with 200.
pub(crate) fn http_get(port: u16, path: &str) -> bool {
    http_answer(port, path).is_ok_and(|answer| answer.split(' ').nth(1) == Some("200"))
}

/// The answer to a request for this path, head and body.
pub(crate) fn http_answer(port: u16, path: &str) -> std::io::Result<String> {
    http(port, "GET", path, "")
}

/// The status of the daemon at a port of loopback; null where it does not answer.
pub fn status_at(port: u16) -> Value {
    let answer = http_answer(port, "/v1/status").unwrap_or_default();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    serde_json::from_str(body).unwrap_or_default()
}

/// The answer of an HTTP server of loopback, head and body.
///
/// # Errors
/// When it cannot be reached, or breaks off.
pub fn http(port: u16, method: &str, path: &str, body: &str) -> std::io::Result<String> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    exchange(stream, method, path, body)
}

/// The body of the answer of the daemon at a unix socket to a request for this path.
///
/// # Errors
/// When it cannot be reached, or breaks off.
pub fn unix_get(socket: &Path, path: &str) -> std::io::Result<String> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let answer = exchange(stream, "GET", path, "")?;
    Ok(answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_owned()))
}

fn exchange(mut stream: impl Read + Write, method: &str, path: &str, body: &str) -> std::io::Result<String> {
    let (kind, len) = ("Content-Type: application/json", body.len());
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
