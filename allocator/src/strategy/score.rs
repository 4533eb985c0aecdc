//! The score of an appliance.
//!
//! A score is the sum of weighted parts, each a share in thousandths. A newcomer gets a fraction of its score, which
//! grows from a tenth to all of it. Otherwise an empty new appliance would attract every allocation before it has shown
//! that it works.

use std::borrow::Cow;

use xpm_protocol::api::decision::ScorePart;
use xpm_protocol::policy::Level;

use super::filter::Rooms;
use super::pool::{Chosen, Hot, Position};
use super::{Demand, Seen, Snapshot};

/// Fraction of its score that a newcomer gets at first, in thousandths.
const RAMP_START: u64 = 100;

/// The weights of one decision, prepared for a walk over the pool.
#[derive(Debug)]
pub(super) struct Scorer<'a> {
    snapshot: &'a Snapshot<'a>,
    demand: &'a Demand,
    /// Thousandths per byte of free memory.
    per_free: f64,
    prefer: Vec<Chosen<'a>>,
    /// Shortest round trip that the client measured.
    shortest: Option<u64>,
    /// No document says where the client is.
    nowhere: bool,
}

impl<'a> Scorer<'a> {
    /// `most_free`: free memory in bytes of the usable appliance that has most.
    pub(super) fn new(snapshot: &'a Snapshot<'a>, demand: &'a Demand, most_free: u64) -> Scorer<'a> {
        let prefer = demand.needs.prefer.iter().map(|(_, one)| snapshot.pool.choose(&one.select)).collect();
        let shortest = snapshot.round_trips.values().copied().min();
        let nowhere = demand.needs.position == Position::default();
        let per_free = 1000.0 / most_free.max(1) as f64;
        Scorer { snapshot, demand, per_free, prefer, shortest, nowhere }
    }

    /// The score after `taken` bytes of the appliance were given away by this decision.
    pub(super) fn score(&self, at: usize, taken: u64) -> u32 {
        let hot = &self.snapshot.pool.hot[at];
        let weights = &self.demand.needs.weights;
        let mut sum = u64::from(self.free(hot, taken)) * u64::from(weights.free)
            + u64::from(hot.idle) * u64::from(weights.load)
            + u64::from(hot.health) * u64::from(weights.health)
            + u64::from(self.near(at)) * u64::from(weights.near);
        for (chosen, (_, preference)) in self.prefer.iter().zip(&self.demand.needs.prefer) {
            if self.snapshot.pool.fits(at, chosen) {
                sum += 1000 * u64::from(preference.weight);
            }
        }
        if self.snapshot.unix < u64::from(hot.ramp_to) {
            sum = sum * self.ramp(at) / 1000;
        }
        sum.try_into().unwrap_or(u32::MAX)
    }

    fn free(&self, hot: &Hot, taken: u64) -> u16 {
        ((hot.free.saturating_sub(taken) as f64 * self.per_free) as u16).min(1000)
    }

    /// Nearness by round-trip time if the client measured it, else by labels.
    fn near(&self, at: usize) -> u16 {
        if let Some(shortest) = self.shortest {
            let time = round_trip(self.snapshot, at);
            return time.map_or(0, |time| (shortest.max(1) * 1000 / time.max(1)).min(1000) as u16);
        }
        if self.nowhere {
            return 0;
        }
        match self.snapshot.pool.common(at, self.demand.needs.position) {
            None => 0,
            Some(Level::Site) => 250,
            Some(Level::Row) => 500,
            Some(Level::Rack) => 750,
            Some(Level::Host) => 1000,
        }
    }

    fn ramp(&self, at: usize) -> u64 {
        let one = &self.snapshot.pool.cold[at].candidate;
        let age = self.snapshot.unix.saturating_sub(one.since);
        match age < one.ramp_up {
            true => RAMP_START + (1000 - RAMP_START) * age / one.ramp_up.max(1),
            false => 1000,
        }
    }

    /// The parts of the score, for an explanation.
    pub(super) fn parts(&self, at: usize) -> Vec<ScorePart> {
        let hot = &self.snapshot.pool.hot[at];
        let weights = &self.demand.needs.weights;
        let part = |of: Cow<'static, str>, share: u16, weight: u16| ScorePart { of, share, weight };
        let mut parts = vec![
            part("free".into(), self.free(hot, 0), weights.free),
            part("load".into(), hot.idle, weights.load),
            part("health".into(), hot.health, weights.health),
            part("near".into(), self.near(at), weights.near),
        ];
        for (chosen, (rule, preference)) in self.prefer.iter().zip(&self.demand.needs.prefer) {
            let share = if self.snapshot.pool.fits(at, chosen) { 1000 } else { 0 };
            parts.push(part(rule.clone().into(), share, preference.weight));
        }
        if let ramp @ ..1000 = self.ramp(at) {
            parts.push(part("newcomer: of all this".into(), ramp as u16, 0));
        }
        parts
    }
}

fn round_trip(snapshot: &Snapshot<'_>, at: usize) -> Option<u64> {
    snapshot.round_trips.get(&snapshot.pool.cold[at].candidate.id).copied()
}

/// Sets the scores of the appliances that can serve.
pub(super) fn fill(snapshot: &Snapshot<'_>, demand: &Demand, seen: &mut [Seen], rooms: &Rooms) {
    let scorer = Scorer::new(snapshot, demand, rooms.most_free);
    for room in &rooms.list {
        let at = room.at as usize;
        seen[at].score = scorer.score(at, 0);
    }
}
