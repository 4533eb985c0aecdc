//! `xpm events`.

use std::time::Duration;

use xpm_protocol::api::allocator::Event;

use crate::age;
use crate::cli::EventsArgs;
use crate::connect::Daemons;
use crate::output::{Output, one_line};

/// Pause before an allocator that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Prints events; with `follow`, until the reader goes away.
pub(crate) async fn run(args: EventsArgs, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let (mut last, mut heard) = (args.after, false);
    let mut all = Vec::new();
    loop {
        let asked: Result<Vec<Event>, _> = allocator.get_later(&args.path(last)).await;
        let events = match asked {
            Err(error) if args.follow && heard && error.may_pass() => {
                // It is being started again, or another one takes over; it goes on counting.
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            asked => asked?,
        };
        heard = true;
        if let Some(event) = events.last() {
            // A smaller number than before: the allocator lost its metadata.
            last = event.number;
        }
        if args.follow && !events.is_empty() {
            print(&events, output)?;
        }
        if !args.follow {
            // An allocator of before answers with all at once, and so with nothing new the second time.
            match events.is_empty() {
                true => return print(&all, output),
                false => all.extend(events),
            }
        }
    }
}

impl EventsArgs {
    fn path(&self, after: u64) -> String {
        let mut path = format!("/v1/events?after={after}&wait={}", self.follow);
        if let Some(object) = &self.object {
            path.push_str(&format!("&object={object}"));
        }
        if !self.kinds.is_empty() {
            path.push_str(&format!("&kind={}", self.kinds.join(",")));
        }
        path
    }
}

fn print(events: &[Event], output: Output) -> anyhow::Result<()> {
    output.print(&events, |events| events.iter().map(line).collect())
}

fn line(event: &Event) -> String {
    let (time, text) = (age::rfc3339(event.at), one_line(&event.text));
    format!("{:>6}  {time}  {:<17}  {text}\n", event.number, event.kind)
}
