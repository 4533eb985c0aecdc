//! `xpm client`: machines that use external memory.

use anyhow::Context as _;
use xpm_control::facts;
use xpm_protocol::Name;
use xpm_protocol::api::allocator::Client;

use crate::age;
use crate::cli::ClientCommand;
use crate::connect::Daemons;
use crate::output::Output;
use crate::table::Table;

pub(crate) async fn run(command: ClientCommand, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    match command {
        ClientCommand::List => {
            let clients: Vec<Client> = daemons.allocator()?.get("/v1/clients").await?;
            output.print(&clients, |clients| table(clients))
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

fn table(clients: &[Client]) -> String {
    if clients.is_empty() {
        return "No client has told of itself: run `xpm client report` on one.\n".to_owned();
    }
    let mut table = Table::new(&["NAME", "ID", ">LINK", ">APPLIANCES", ">SHORTEST", ">LONGEST", "HEARD"]);
    let micros =
        |nanos: Option<&u64>| nanos.map(|nanos| format!("{}us", nanos.div_ceil(1000))).unwrap_or_default();
    for client in clients {
        let times = &client.facts.round_trips;
        table.row([
            client.name.to_string(),
            client.facts.client.map(|id| id.to_string()).unwrap_or_default(),
            client.facts.link_speed.map(|speed| speed.to_string()).unwrap_or_default(),
            times.len().to_string(),
            micros(times.values().min()),
            micros(times.values().max()),
            age::since(client.heard),
        ]);
    }
    table.render()
}
