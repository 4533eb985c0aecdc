//! `xpm events`.

use std::time::Duration;

use xpm_protocol::api::allocator::Event;

use crate::age;
use crate::connect::Daemons;
use crate::output::{Output, one_line};

/// Pause before an allocator that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Prints events; with `follow`, until the reader goes away.
pub(crate) async fn run(follow: bool, after: u64, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let (mut last, mut heard) = (after, false);
    loop {
        let asked: Result<Vec<Event>, _> =
            allocator.get_later(&format!("/v1/events?after={last}&wait={follow}")).await;
        let events = match asked {
            Err(error) if follow && heard && error.may_pass() => {
                // It is being started again, or another one takes over; either counts anew.
                last = 0;
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            asked => asked?,
        };
        heard = true;
        if let Some(event) = events.last() {
            // A smaller number than before: the allocator was started again.
            last = event.number;
        }
        if !follow || !events.is_empty() {
            output.print(&events, |events| events.iter().map(line).collect())?;
        }
        if !follow {
            return Ok(());
        }
    }
}

fn line(event: &Event) -> String {
    format!(
        "{:>6}  {:<9}  {:<17}  {}\n",
        event.number,
        age::since(event.at),
        event.kind,
        one_line(&event.text)
    )
}
