//! Where an NBD URI leads.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use xpm_transport::nbd::client::Target;

/// The port that IANA gave to NBD.
const PORT: u16 = 10809;

/// A server and the name of one of its exports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) target: Target,
    pub(crate) export: String,
}

/// Reads `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, as the NBD project's
/// `uri.md` has them, with `%` and two digits for bytes that a URI cannot have. Blocks while a host's
/// name is looked up.
pub(crate) fn parse(uri: &str) -> Result<Place> {
    let (scheme, rest) = uri.split_once("://").context("no `nbd://` or `nbd+unix://` at its beginning")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
    let target = match scheme {
        "nbd" => tcp(host, query)?,
        "nbd+unix" => unix(host, query)?,
        _ => bail!("it begins with `{scheme}://`, not with `nbd://` or `nbd+unix://`"),
    };
    Ok(Place { target, export: decode(export)? })
}

fn tcp(host: &str, query: &str) -> Result<Target> {
    ensure!(query.is_empty(), "`nbd://` takes nothing behind a `?`");
    ensure!(!host.contains('@'), "it names a user, which is for TLS only");
    Ok(Target::Tcp(resolve(host).with_context(|| format!("`{host}` is no address HOST[:PORT]"))?))
}

fn resolve(host: &str) -> Result<SocketAddr> {
    // A colon within brackets belongs to an IPv6 address.
    let port_at = host.rfind(':').filter(|at| !host[*at..].contains(']'));
    let (name, port) = match port_at {
        None => (host, PORT),
        Some(at) => (&host[..at], host[at + 1..].parse().context("the port is no number up to 65535")?),
    };
    ensure!(!name.is_empty(), "the host is missing");
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    (name, port).to_socket_addrs()?.next().context("it has no address")
}

fn unix(host: &str, query: &str) -> Result<Target> {
    ensure!(host.is_empty(), "`nbd+unix://` takes no host, so a third `/` follows");
    let socket = query.split('&').find_map(|word| word.strip_prefix("socket="));
    let socket = decode(socket.context("`?socket=PATH` is missing")?)?;
    ensure!(!socket.is_empty(), "the path of the socket is empty");
    Ok(Target::Unix(PathBuf::from(socket)))
}

/// Puts the bytes back that are written as `%` and two hexadecimal digits.
fn decode(text: &str) -> Result<String> {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or("").as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let digits = digits.context("a `%` is not followed by two hexadecimal digits")?;
        bytes.push(u8::from_str_radix(digits, 16)?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).context("what the `%` stand for is no UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_place(address: &str, export: &str) -> Place {
        Place { target: Target::Tcp(address.parse().unwrap()), export: export.to_owned() }
    }

    #[test]
    fn places() {
        assert_eq!(parse("nbd://127.0.0.1:4000/a/b").unwrap(), tcp_place("127.0.0.1:4000", "a/b"));
        assert_eq!(parse("nbd://127.0.0.1").unwrap(), tcp_place("127.0.0.1:10809", ""));
        assert_eq!(parse("nbd://[::1]/").unwrap(), tcp_place("[::1]:10809", ""));
        assert_eq!(parse("nbd://[::1]:7/x%20y").unwrap(), tcp_place("[::1]:7", "x y"));
        let socket = Target::Unix(PathBuf::from("/run/a b"));
        let place = parse("nbd+unix:///%C3%A9?socket=/run/a%20b").unwrap();
        assert_eq!(place, Place { target: socket, export: "é".to_owned() });
    }

    #[test]
    fn what_is_no_place_is_refused_in_one_line() {
        let wrong = [
            "",
            "nbd",
            "nbd:/127.0.0.1/",
            "nbds://127.0.0.1/",
            "nbd:///export",
            "nbd://:10/",
            "nbd://127.0.0.1:65536/",
            "nbd://127.0.0.1:x/",
            "nbd://[::1/",
            "nbd://me@127.0.0.1/",
            "nbd://127.0.0.1/?socket=/x",
            "nbd://127.0.0.1/%",
            "nbd://127.0.0.1/%+1",
            "nbd://127.0.0.1/%é",
            "nbd://127.0.0.1/%ff",
            "nbd+unix:///",
            "nbd+unix:///?socket=",
            "nbd+unix:///?path=/x",
            "nbd+unix://host/?socket=/x",
        ];
        for uri in wrong {
            let text = format!("{:#}", parse(uri).expect_err(uri));
            assert!(!text.is_empty() && !text.contains('\n'), "{uri}: {text}");
        }
    }
}
