//! Requests by hand.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use xpm_protocol::Name;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::swapd::{Area, Drain, Grow, Origin, Shrink};
use xpm_protocol::units::ByteSize;

use super::Daemon;
use crate::error::Error;
use crate::policy::{AREA_LEN_MIN, AREAS_MAX, Cause, Phase, Standing, fits_all};
use crate::state::{Record, Rest, Stage};

/// How long a request by hand waits while another area is being made.
const TURN_LIMIT: Duration = Duration::from_secs(30);
const TURN_PAUSE: Duration = Duration::from_millis(50);

impl Daemon {
    /// Makes an area that stays until it is removed by hand. Runs to its end even if its caller no longer
    /// waits.
    ///
    /// # Errors
    /// When the maximum would be exceeded, or the allocator or xpm-blk refuses.
    pub(crate) async fn grow(self: &Arc<Daemon>, asked: Grow) -> Result<Area, Error> {
        let size = asked.size.0.checked_next_multiple_of(AREA_LEN_MIN).unwrap_or(u64::MAX);
        loop {
            let record = self.wait_turn(size).await?;
            let name = record.name.clone();
            tracing::info!("{name} of {} is made: asked for by hand", record.size);
            let daemon = Arc::clone(self);
            let made = tokio::spawn(async move { daemon.make(record).await });
            match made.await.map_err(|error| Error::internal(format!("a task failed: {error}")))? {
                Ok(made) => return Ok(self.view_of(&made)),
                // The name belonged to another user, so the next one is tried.
                Err(_) if self.store.get().foreign.contains(&name) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits while another area is being made, and records that this one is next.
    async fn wait_turn(&self, size: u64) -> Result<Record, Error> {
        let deadline = Instant::now() + TURN_LIMIT;
        loop {
            self.check_grow(size)?;
            {
                let mut live = self.live();
                if live.making.is_none() {
                    let record = self.intend(size, Origin::Hand)?;
                    live.making = Some(record.name.clone());
                    return Ok(record);
                }
            }
            if Instant::now() > deadline {
                return Err(Error::conflict(
                    "an area is being made for long: `xpm swap status` shows which, and why",
                ));
            }
            tokio::time::sleep(TURN_PAUSE).await;
        }
    }

    fn check_grow(&self, size: u64) -> Result<(), Error> {
        let standing = self.standing(&self.store.get());
        let room = self.rules.maximum.saturating_sub(standing.size());
        if size == 0 {
            return Err(Error::new(ErrorKind::Invalid, "the size is 0: say by how much swap is to grow"));
        }
        if size > room {
            let line = format!(
                "the maximum is {}, and {} are there: there is room for {}; raise `maximum` in the configuration, or ask \
                 for less",
                ByteSize(self.rules.maximum),
                ByteSize(standing.size()),
                ByteSize(room)
            );
            return Err(Error::new(ErrorKind::Denied, line));
        }
        match standing.areas.len() >= AREAS_MAX {
            true => Err(Error::new(
                ErrorKind::Denied,
                format!("there are {AREAS_MAX} areas, the most: drain some, and ask for a larger one"),
            )),
            false => Ok(()),
        }
    }

    /// Removes the emptiest areas that together are no larger than requested, and not part of the base.
    ///
    /// # Errors
    /// When there are none, or their contents fit nowhere else.
    pub(crate) fn shrink(self: &Arc<Daemon>, asked: Shrink) -> Result<Vec<Name>, Error> {
        let standing = self.standing(&self.store.get());
        let mut areas: Vec<_> = standing.areas.iter().filter(|area| area.phase == Phase::On).collect();
        areas.sort_by_key(|area| (area.used, std::cmp::Reverse(area.size)));
        let most = asked.size.0.min(standing.lasting_size().saturating_sub(self.rules.base));
        let mut left = most;
        let chosen: Vec<Name> = areas
            .iter()
            .filter(|area| {
                let fits = area.size <= left;
                left -= if fits { area.size } else { 0 };
                fits
            })
            .map(|area| area.name.clone())
            .collect();
        if chosen.is_empty() {
            let smallest = areas.iter().map(|area| area.size).min().unwrap_or(0);
            let line = format!(
                "no area is as small as {}: the smallest has {}, and {} of {} are the base; `xpm swap status` shows them",
                ByteSize(most),
                ByteSize(smallest),
                ByteSize(self.rules.base),
                ByteSize(standing.lasting_size())
            );
            return Err(Error::new(ErrorKind::Denied, line));
        }
        self.take_away(&standing, chosen)
    }

    /// Removes areas; if all are removed, the policy rests from then on.
    ///
    /// # Errors
    /// When an area does not exist, or the contents fit nowhere else.
    pub(crate) fn drain(self: &Arc<Daemon>, asked: &Drain) -> Result<Vec<Name>, Error> {
        let state = self.store.get();
        let standing = self.standing(&state);
        let all = || standing.areas.iter().filter(|area| area.phase == Phase::On);
        let chosen = match (asked.all, asked.areas.is_empty()) {
            (true, true) => all().map(|area| area.name.clone()).collect(),
            (false, false) => {
                let find = |text: &String| self.find(text);
                asked.areas.iter().map(find).collect::<Result<Vec<Name>, Error>>()?
            }
            _ => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "say which areas, or all, and not both or neither",
                ));
            }
        };
        let chosen = self.take_away(&standing, chosen)?;
        if asked.all {
            let why =
                "everything was drained by hand; `xpm swap resume` has the policy followed again".to_owned();
            let rest = Rest { why, boot: self.boot, by_drain: true };
            self.store.change(|state| state.rest = Some(rest))?;
        }
        Ok(chosen)
    }

    fn find(&self, text: &str) -> Result<Name, Error> {
        let state = self.store.get();
        let found = state.areas.iter().find(|area| {
            area.name.as_str() == text || self.entry(area).is_some_and(|entry| entry.path == text)
        });
        found.map(|area| area.name.clone()).ok_or_else(|| {
            let line = format!("{text} is no swap of xpm-swapd's: `xpm swap status` lists what is");
            Error::new(ErrorKind::NotFound, line)
        })
    }

    fn take_away(self: &Arc<Daemon>, standing: &Standing, chosen: Vec<Name>) -> Result<Vec<Name>, Error> {
        let reading = self.reading(&self.store.get(), false);
        fits_all(&self.rules, standing, &reading, &chosen).map_err(|why| {
            Error::new(ErrorKind::NoSpace, format!("{why}: end programs, or `xpm swap grow` first"))
        })?;
        let mut live = self.live();
        for name in &chosen {
            if !live.waiting.contains(name) {
                live.waiting.push_back(name.clone());
            }
        }
        live.drain_not_before = self.now();
        drop(live);
        self.wake();
        Ok(chosen)
    }

    /// Starts removing the next area that is to be removed by hand.
    pub(super) fn begin_next_by_hand(self: &Arc<Daemon>) -> Result<(), Error> {
        let name = {
            let mut live = self.live();
            match live.waiting.front() {
                Some(first) if live.making.as_ref() != Some(first) => live.waiting.pop_front(),
                Some(_) | None => None,
            }
        };
        let Some(name) = name else { return Ok(()) };
        tracing::info!("{name} is taken away: asked for by hand");
        self.begin_leave(&name, Cause::Hand, "asked for by hand")
    }

    /// Cancels all removals in progress and waiting: their areas stay.
    ///
    /// # Errors
    /// When the change cannot be recorded.
    pub(crate) fn stop_draining(&self) -> Result<(), Error> {
        let mut live = self.live();
        live.waiting.clear();
        if let Some(job) = &live.leaving {
            job.stop.store(true, Ordering::Relaxed);
        }
        drop(live);
        self.store.change(|state| state.rest.take_if(|rest| rest.by_drain).map(drop))?;
        self.wake();
        Ok(())
    }

    /// Follows the policy again, and turns areas on again that others turned off.
    ///
    /// # Errors
    /// When the change cannot be recorded.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        let state = self.store.get();
        let off: Vec<Name> = state
            .areas
            .iter()
            .filter(|area| matches!(area.stage, Stage::On { .. }) && self.entry(area).is_none())
            .map(|area| area.name.clone())
            .collect();
        self.store.change(|state| {
            state.rest = None;
            off.iter().for_each(|name| state.set_stage(name, Stage::Making));
        })?;
        tracing::info!("the policy is followed again");
        self.wake();
        Ok(())
    }
}
