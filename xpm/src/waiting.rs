//! Making an allocation, and waiting for one's turn.

use std::time::{Duration, Instant};

use anyhow::bail;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Allocation, AllocationState, Create};
use xpm_protocol::{RequestId, Span};

use crate::connect::Daemon;
use crate::output::{Output, one_line};

/// Pause between two looks at the queue.
const PAUSE: Duration = Duration::from_secs(1);

/// Makes an allocation. Where the request waits for its turn, waits with it; an allocator that was
/// started again has forgotten the request, which is then made again for the rest of the time.
pub(crate) async fn create(allocator: &Daemon, create: Create, output: Output) -> anyhow::Result<Allocation> {
    let until = create.wait.map(|wait| Instant::now() + wait.0);
    let path = format!("/v1/allocations/{}", create.name);
    // With an id of its own it is the same request when it is made again, also for an allocator that was asked to
    // forget it.
    let request = RequestId::from_u128(u128::from_ne_bytes(xpm_control::random::bytes()?));
    let order = format!("/v1/allocations?request={request}");
    let mut asked: Allocation = allocator.post(&order, &create).await?;
    if asked.state == AllocationState::Waiting {
        output.hint(&format!("`xpm alloc delete {}` takes the request back.", create.name));
    }
    let mut place = None;
    loop {
        let waiting = asked.waiting.as_ref();
        if waiting.and_then(|one| one.request).is_some_and(|other| other != request) {
            bail!("the request was taken back, and another one of that name waits");
        }
        match asked.state {
            AllocationState::Waiting | AllocationState::Creating => {}
            AllocationState::Refused => {
                bail!("{}", one_line(waiting.map_or("it was refused", |one| &one.why)))
            }
            _ => return Ok(asked),
        }
        if let Some(waiting) = waiting.filter(|one| one.before.is_some() && one.before != place) {
            place = waiting.before;
            output.hint(&format!(
                "{} requests before this one; {}",
                place.unwrap_or(0),
                one_line(&waiting.why)
            ));
        }
        tokio::time::sleep(PAUSE).await;
        asked = match allocator.get(&path).await {
            Ok(asked) => asked,
            Err(error) if error.is(ErrorKind::NotFound) => {
                match until.map(|until| until.saturating_duration_since(Instant::now())) {
                    Some(left) if !left.is_zero() => {
                        let again = Create { wait: Some(Span(whole_seconds(left))), ..create.clone() };
                        allocator.post(&order, &again).await?
                    }
                    _ => bail!("the request is gone: somebody took it back, or its time is over"),
                }
            }
            // It may be starting again.
            Err(error) if error.has_no_leader() && until.is_some_and(|until| Instant::now() < until) => asked,
            Err(error) => return Err(error.into()),
        };
    }
}

fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs() + 1)
}
