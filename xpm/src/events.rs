//! `xpm events`.

use xpm_protocol::api::allocator::Event;

use crate::age;
use crate::connect::Daemons;
use crate::output::{Output, one_line};

/// Prints events; with `follow`, until the reader goes away.
pub(crate) async fn run(follow: bool, after: u64, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let mut last = after;
    loop {
        let events: Vec<Event> =
            allocator.get_later(&format!("/v1/events?after={last}&wait={follow}")).await?;
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
