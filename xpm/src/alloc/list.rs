//! `xpm alloc list`: what each allocation is, and the state it is in with its reason.

use xpm_protocol::api::allocator::{Allocation, AllocationState, ChangeKind, Owner};

use super::{layout, places};
use crate::age;
use crate::listing::{Cell, Column, Listing};

/// The list of all allocations.
pub(crate) const LISTING: Listing<Allocation> = Listing {
    columns: &[
        Column::text("NAME", |one| Cell::text(&one.name)),
        Column::number("SIZE", |one| Cell::ranked(one.size, one.size.0)),
        Column::wide_number("TAKES", |one| Cell::ranked(one.taken, one.taken.0)),
        Column::text("ACCOUNT", |one| optional(&one.account)),
        Column::wide_text("STRATEGY", |one| optional(&one.strategy)),
        Column::wide_text("LAYOUT", |one| Cell::text(layout(&one.layout))),
        Column::wide_number("REGIONS", |one| count(one.regions.len())),
        Column::wide_text("APPLIANCES", |one| {
            Cell::text(places(one).into_keys().collect::<Vec<_>>().join(","))
        }),
        Column::wide_text("OWNER", |one| {
            one.owner.as_ref().map_or_else(Cell::none, |by| Cell::text(short_owner(by)))
        }),
        Column::wide_number("EPOCH", |one| Cell::text(one.epoch)),
        Column::wide_text("CREATED", |one| Cell::ranked(age::since(one.created), u64::MAX - one.created)),
        Column::text("ENDS", ends),
        Column::text("STATE", |one| Cell::text(explained_state(one))),
    ],
    empty: "No allocations: make one with `xpm alloc create NAME --size SIZE`.\n",
};

fn optional(name: &Option<xpm_protocol::Name>) -> Cell {
    name.as_ref().map_or_else(Cell::none, Cell::text)
}

fn count(number: usize) -> Cell {
    Cell::ranked(number, number as u64)
}

/// When it ends by itself; what never does is sorted last.
fn ends(allocation: &Allocation) -> Cell {
    let freed = allocation.ending.as_ref().map(|ending| ending.frees);
    match allocation.lease.map(|lease| lease.ends).or(freed) {
        Some(ends) => Cell::ranked(age::until(ends), ends),
        None => Cell::ranked("", u64::MAX),
    }
}

/// Whether it can be used, by whom it is, and why it is so.
pub(crate) fn explained_state(allocation: &Allocation) -> String {
    let waiting = allocation.waiting.as_ref();
    let why = waiting.map(|one| format!(": {}", one.why)).unwrap_or_default();
    match allocation.state {
        AllocationState::Waiting => {
            let before = waiting.and_then(|one| one.before).unwrap_or(0);
            format!("waiting, {before} before it{why}")
        }
        AllocationState::Refused => format!("refused{why}"),
        AllocationState::Creating => "creating".to_owned(),
        AllocationState::Deleting => "deleting: an appliance has not confirmed yet".to_owned(),
        AllocationState::Ready => ready_state(allocation),
    }
}

fn ready_state(allocation: &Allocation) -> String {
    let mut state = match allocation.lost.len() {
        0 => "ready".to_owned(),
        _ => format!("lost on {}", allocation.lost.join(", ")),
    };
    if let Some(owner) = &allocation.owner {
        state.push_str(&format!(", used by {}", short_owner(owner)));
    }
    if let Some(ending) = &allocation.ending {
        state.push_str(&format!("; ends: {}", ending.text));
    }
    if let Some(change) = &allocation.change {
        let what = match change.kind {
            ChangeKind::Grow => "grows",
            ChangeKind::Shrink => "shrinks",
            ChangeKind::Move => "moves",
        };
        state.push_str(&format!("; {what}: {}", change.text));
    }
    if let Some(refused) = &allocation.refused {
        state.push_str(&format!("; last change refused: {refused}"));
    }
    state
}

/// An owner without the place of a socket, which would make a table wide.
fn short_owner(owner: &Owner) -> String {
    let purpose = owner.purpose.split('=').next().unwrap_or_default();
    format!("{} ({purpose})", owner.host_name)
}
