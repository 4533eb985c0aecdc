//! `xpm usage`.

use xpm_protocol::ByteSize;
use xpm_protocol::api::allocator::Usage;

use crate::cli::ListArgs;
use crate::connect::Daemons;
use crate::listing::{Cell, Column, Listing};
use crate::output::Output;

pub(crate) async fn run(args: &ListArgs, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    LISTING.print(daemons.allocator()?.get("/v1/usage").await?, args, output)
}

const LISTING: Listing<Usage> = Listing {
    columns: &[
        Column::text("KIND", |one| Cell::text(one.of.kind)),
        Column::text("NAME", |one| Cell::text(&one.of.name)),
        Column::number("HAS", |one| limit(Some(one.used))),
        Column::number("ALLOCATIONS", |one| Cell::ranked(one.allocations, one.allocations)),
        Column::number("SOFT LIMIT", |one| limit(one.soft_limit)),
        Column::number("HARD LIMIT", |one| limit(one.hard_limit)),
    ],
    empty: "Nobody has anything, and there are no limits.\n",
};

/// A size; none is more than any.
fn limit(size: Option<ByteSize>) -> Cell {
    size.map_or_else(|| Cell::ranked("", u64::MAX), |size| Cell::ranked(size, size.0))
}
