//! `xpm usage`.

use xpm_protocol::ByteSize;
use xpm_protocol::api::allocator::Usage;

use crate::connect::Daemons;
use crate::output::Output;
use crate::table::Table;

pub(crate) async fn run(daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let usage: Vec<Usage> = daemons.allocator()?.get("/v1/usage").await?;
    output.print(&usage, |usage| table(usage))
}

fn table(usage: &[Usage]) -> String {
    if usage.is_empty() {
        return "Nobody has anything, and there are no limits.\n".to_owned();
    }
    let mut table = Table::new(&["KIND", "NAME", ">HAS", ">ALLOCATIONS", ">SOFT LIMIT", ">HARD LIMIT"]);
    let shown = |size: Option<ByteSize>| size.map(|size| size.to_string()).unwrap_or_default();
    for one in usage {
        table.row([
            one.of.kind.to_string(),
            one.of.name.to_string(),
            one.used.to_string(),
            one.allocations.to_string(),
            shown(one.soft_limit),
            shown(one.hard_limit),
        ]);
    }
    table.render()
}
