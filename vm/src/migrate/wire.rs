//! Messages between the two commands of a migration: JSON, one message per line, over TCP.
//!
//! The destination listens. Each connection begins with an [`Opening`], which contains the pool's token if there is
//! one, and which tells the three kinds of connection apart:
//!
//! ```text
//! move:   source  Opening::Move ─────────────▶  destination
//!                 ◀── Ready or Refused                        capabilities are set, QEMU listens
//!                 ◀── Loaded or Never                         all of the machine's state has arrived
//!                 Order::Run ────────────────▶                from here on the source never runs it by itself
//!                 ◀── Running or Never
//!                 Order::Hot, repeated ──────▶                pages to fetch while the machine runs
//! state:  source  Opening::State ────────────▶  from then on bytes between the two QEMUs
//! ask:    source  Opening::Ask ──────────────▶
//!                 ◀── Running or Never                        final: what the destination has said it keeps to
//! ```
//!
//! The destination runs the machine only by an order on the connection that began the move. If that connection ends
//! before the order, the destination never runs the machine. So a source whose order was not sent yet may run the
//! machine again, whatever happens at the destination.

use std::net::SocketAddr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use xpm_control::token::Token;
use xpm_protocol::{ByteSize, ClientId, Name};

use crate::Error;
use crate::hot::Runs;
use crate::qmp::Version;

/// The version of these messages.
pub(crate) const VERSION: u32 = 1;
/// The longest message, in bytes.
const LINE_MAX: usize = 16 << 10;
/// Time limit of connecting and of stating the purpose.
pub(crate) const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Time limit of a step of the other side.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(60);

/// The first message of a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Opening {
    /// Version of the messages.
    pub(crate) version: u32,
    /// The pool's token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// Purpose of the connection.
    pub(crate) purpose: Purpose,
}

/// Purpose of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(crate) enum Purpose {
    /// To move a machine.
    Move(Offer),
    /// To send its state.
    State {
        /// The attempt.
        session: String,
    },
    /// To ask for the outcome of an attempt whose connection broke.
    Ask {
        /// The attempt.
        session: String,
    },
}

/// A machine that is offered to the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offer {
    /// Id of the attempt: a random number as text.
    pub(crate) session: String,
    /// The machine's name.
    pub(crate) name: Name,
    /// RAM at the start.
    pub(crate) size: ByteSize,
    /// Largest total RAM.
    #[serde(default)]
    pub(crate) maximum: Option<ByteSize>,
    /// Its disks that move with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) disks: Vec<Name>,
    /// The version of QEMU at the source.
    pub(crate) qemu: Version,
}

/// A message of the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(crate) enum Answer {
    /// It is ready for the state.
    Ready {
        /// The client that stands by for the RAM; none if the RAM is an ordinary file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        heir: Option<ClientId>,
        /// The client that stands by for the disks; none where there is none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk_heir: Option<ClientId>,
    },
    /// It refuses this machine, and goes on waiting for another.
    Refused {
        /// Why.
        why: String,
    },
    /// The whole state has arrived.
    Loaded,
    /// The machine runs at the destination, or is paused there as before.
    Running,
    /// The machine does not run at the destination, and will not: its QEMU has ended.
    Never {
        /// Why.
        why: String,
    },
}

/// An order of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub(crate) enum Order {
    /// Take the machine over.
    Run {
        /// Whether it was paused before, and stays paused.
        paused: bool,
    },
    /// Give the attempt up.
    GiveUp,
    /// Pages that the source had cached. Follows when the machine runs at the destination; a destination that reads
    /// no further loses speed only.
    Hot(Runs),
}

/// A connection that carries messages as lines.
#[derive(Debug)]
pub(crate) struct Conn {
    peer: String,
    stream: TcpStream,
    /// Received bytes that are not used yet. Kept here so that a cancelled read loses nothing.
    received: Vec<u8>,
}

impl Conn {
    /// Connects and sends the opening.
    pub(crate) async fn open(to: SocketAddr, token: Option<&Token>, purpose: Purpose) -> Result<Conn, Error> {
        let until = Instant::now() + OPEN_LIMIT;
        let unreachable = |why: &dyn std::fmt::Display| {
            Error::Peer(format!("cannot reach {to}: {why}; does `xpm vm receive` listen there?"))
        };
        let stream = match timeout_at(until, TcpStream::connect(to)).await {
            Ok(connected) => connected.map_err(|error| unreachable(&error))?,
            Err(_) => return Err(unreachable(&format!("no answer within {OPEN_LIMIT:?}"))),
        };
        let mut conn = Conn::new(stream, to);
        let token = token.map(|token| token.reveal().to_string());
        conn.send(&Opening { version: VERSION, token, purpose }).await?;
        Ok(conn)
    }

    /// A connection that was accepted.
    pub(crate) fn new(stream: TcpStream, peer: SocketAddr) -> Conn {
        // Messages are small, and each side waits for answers.
        let _ = stream.set_nodelay(true);
        Conn { peer: peer.to_string(), stream, received: Vec::new() }
    }

    /// Sends a message.
    pub(crate) async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), Error> {
        let mut line = serde_json::to_vec(message).map_err(|error| Error::Peer(error.to_string()))?;
        line.push(b'\n');
        match timeout_at(Instant::now() + OPEN_LIMIT, self.stream.write_all(&line)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.failed(&error)),
            Err(_) => Err(self.failed(&"it takes nothing any more")),
        }
    }

    /// Receives a message. Cancelling loses nothing.
    pub(crate) async fn receive<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T, Error> {
        let until = Instant::now() + limit;
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|error| self.failed(&format!("it does not speak as `xpm vm` does: {error}")));
            }
            if self.received.len() > LINE_MAX {
                return Err(self.failed(&"it does not speak as `xpm vm` does: a message is too long"));
            }
            match timeout_at(until, self.stream.read_buf(&mut self.received)).await {
                Ok(Ok(0)) => return Err(self.failed(&"it closed the connection")),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(self.failed(&error)),
                Err(_) => return Err(self.failed(&format!("no answer within {limit:?}"))),
            }
        }
    }

    /// The bare connection, with the bytes that were received after the opening.
    pub(crate) fn into_stream(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.received)
    }

    fn failed(&self, why: &dyn std::fmt::Display) -> Error {
        Error::Peer(format!("the other host ({}): {why}", self.peer))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn messages_have_one_form() {
        let opening = Opening { version: 1, token: None, purpose: Purpose::Ask { session: "ab".into() } };
        let text = serde_json::to_string(&opening).unwrap();
        assert_eq!(text, r#"{"version":1,"purpose":{"kind":"ask","session":"ab"}}"#);
        let text = serde_json::to_string(&Order::Run { paused: false }).unwrap();
        assert_eq!(text, r#"{"kind":"run","paused":false}"#);
        let hot = Order::Hot(Runs { file: 0, start: 7, runs: vec![(0, 2)] });
        assert_eq!(
            serde_json::to_string(&hot).unwrap(),
            r#"{"kind":"hot","file":0,"start":7,"runs":[[0,2]]}"#
        );
        assert_eq!(serde_json::to_string(&Answer::Loaded).unwrap(), r#"{"kind":"loaded"}"#);
    }

    #[tokio::test]
    async fn lines_and_the_bytes_after_them_are_received() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let sending = tokio::spawn(async move {
            let mut conn = Conn::open(to, None, Purpose::State { session: "s".into() }).await.unwrap();
            conn.stream.write_all(b"bytes").await.unwrap();
            let error = conn.receive::<Answer>(Duration::from_secs(5)).await.unwrap_err().to_string();
            assert!(error.contains("does not speak as `xpm vm` does"), "{error}");
            let error = conn.receive::<Answer>(Duration::from_millis(20)).await.unwrap_err().to_string();
            assert!(error.contains("no answer within"), "{error}");
            conn
        });
        let (stream, peer) = listener.accept().await.unwrap();
        let mut conn = Conn::new(stream, peer);
        let opening: Opening = conn.receive(Duration::from_secs(5)).await.unwrap();
        assert_eq!(opening.purpose, Purpose::State { session: "s".into() });
        conn.stream.write_all(b"GET / HTTP/1.1\n").await.unwrap();
        drop(sending.await.unwrap());
        let (mut stream, mut received) = conn.into_stream();
        stream.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"bytes");
    }

    #[tokio::test]
    async fn a_message_without_an_end_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        sender.write_all(&vec![b'x'; LINE_MAX + 1]).await.unwrap();
        let error = Conn::new(stream, peer).receive::<Opening>(Duration::from_secs(5)).await.unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    proptest! {
        #[test]
        fn any_line_is_decoded_or_refused(line in ".{0,80}") {
            let _ = serde_json::from_str::<Opening>(&line);
            let _ = serde_json::from_str::<Order>(&line);
        }
    }
}
