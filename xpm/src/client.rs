//! `xpm client`: machines that use external memory.

use anyhow::Context as _;
use xpm_control::facts;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::Client;

use crate::age;
use crate::cli::ClientCommand;
use crate::connect::Daemons;
use crate::listing::{Cell, Column, Listing};
use crate::output::Output;

pub(crate) async fn run(command: ClientCommand, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    match command {
        ClientCommand::List(args) => {
            LISTING.print(daemons.allocator()?.get("/v1/clients").await?, &args, output)
        }
        ClientCommand::Report { name } => report(name, daemons, output).await,
    }
}

async fn report(name: Option<Name>, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let name = match name {
        Some(name) => name,
        None => {
            facts::client_name().context("this host's name is no name for a client: give one with --name")?
        }
    };
    let appliances = allocator.appliances().await?;
    let facts = facts::find(allocator.url(), &appliances).await?;
    let reported: Client = allocator.put(&format!("/v1/clients/{name}"), &facts).await?;
    output.print(&reported, |Client { name, facts, .. }| {
        let speed =
            facts.link_speed.map_or_else(|| "of unknown speed".to_owned(), |speed| format!("of {speed}"));
        format!("{name}: link {speed}, round trips to {} appliances\n", facts.round_trips.len())
    })
}

const LISTING: Listing<Client> = Listing {
    columns: &[
        Column::text("NAME", |one| Cell::text(&one.name)),
        Column::text("ID", |one| one.facts.client.map_or_else(Cell::none, Cell::text)),
        Column::number("LINK", |one| {
            one.facts.link_speed.map_or_else(Cell::none, |speed| Cell::ranked(speed, speed.0))
        }),
        Column::wide_number("APPLIANCES", |one| {
            Cell::ranked(one.facts.round_trips.len(), one.facts.round_trips.len() as u64)
        }),
        Column::wide_number("SHORTEST", |one| micros(one.facts.round_trips.values().min())),
        Column::wide_number("LONGEST", |one| micros(one.facts.round_trips.values().max())),
        Column::text("HEARD", |one| Cell::ranked(age::since(one.heard), u64::MAX - one.heard)),
    ],
    empty: "No client has told of itself: run `xpm client report` on one.\n",
};

/// A round trip.
fn micros(nanos: Option<&u64>) -> Cell {
    nanos.map_or_else(Cell::none, |nanos| Cell::ranked(format!("{}us", nanos.div_ceil(1000)), *nanos))
}
