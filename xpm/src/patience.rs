//! An allocator that refuses connections may be starting: it is asked again for a time, and the person who waits is
//! told.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xpm_control::client::ClientError;
use xpm_protocol::Span;

use crate::connect::Who;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// How long requests to the allocator are made again while it refuses connections.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    limit: Duration,
    /// Whether it was said that this command waits: once is enough.
    said: Arc<AtomicBool>,
}

impl Patience {
    pub(crate) fn new(limit: Duration) -> Patience {
        Patience { limit, said: Arc::default() }
    }

    /// Nothing is asked twice.
    pub(crate) fn none() -> Patience {
        Patience::new(Duration::ZERO)
    }

    /// Makes the request until it reaches the daemon, or the time is over. A request that may have been carried out
    /// is never repeated.
    pub(crate) async fn ask<T, F: Future<Output = Result<T, ClientError>>>(
        &self,
        who: &Who,
        request: impl Fn() -> F,
    ) -> Result<T, ClientError> {
        let begun = Instant::now();
        loop {
            let answer = request().await;
            match &answer {
                Err(ClientError::Unreachable { source, .. })
                    if is_refused(source) && begun.elapsed() + PAUSE <= self.limit =>
                {
                    self.say(who, source);
                }
                _ => return answer,
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn say(&self, who: &Who, source: &io::Error) {
        if !self.said.swap(true, Ordering::Relaxed) {
            eprintln!("xpm: cannot reach {who}: {source}; trying again for {}", Span(self.limit));
        }
    }
}

/// Whether nothing listens there; a socket of a daemon that is not started yet is a file that is not there.
fn is_refused(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}
