//! The requests of a change to appliances: to copy runs of regions to each other, and to describe the content
//! of a run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use xpm_control::client::Client;
use xpm_control::error_line;
use xpm_protocol::api::allocator::{Grant, Map, MapChange, Report};
use xpm_protocol::api::appliance::{COPY_LEN_MAX, Copy, Digest, Range};
use xpm_protocol::{ByteSize, GrantId, Name};

use super::Owner;
use crate::volume::{Change, ChangeError, Run};

/// Length of a run in bytes: the unit that is copied, and locked, at once.
const RUN_LEN: u64 = 16 << 20;
/// Length of a piece in bytes: the unit that one order copies, and then compares.
const PIECE_LEN: u64 = 4 << 20;
/// Concurrent pieces: one is compared while another one is copied.
const LANES: u64 = 2;
/// Shortest run in bytes, where copying is throttled.
const RUN_LEN_MIN: u64 = 256 << 10;
/// Time limit for one run: writes to it wait.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// Interval of the progress reports to the allocator.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Sends a change's requests to appliances. Blocks; to be used on a thread that may block, within a tokio
/// runtime.
pub struct Mover<'a> {
    owner: &'a Owner,
    change: &'a MapChange,
    grants: BTreeMap<GrantId, &'a Grant>,
    clients: Mutex<BTreeMap<GrantId, Client>>,
    end: Option<&'a AtomicBool>,
}

/// Why an allocation cannot become smaller.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// There is data beyond the new size.
    #[error(
        "{data} are in use beyond the new size, in region {region} of `{name}`: trim them (fstrim, blkdiscard, or shrink the file \
         system first), or choose a larger size"
    )]
    InTheWay {
        /// The allocation.
        name: Name,
        /// The region, by its place in the allocation.
        region: u32,
        /// Bytes of pages that are not zeros.
        data: ByteSize,
    },
    /// An appliance did not describe its content.
    #[error("cannot check the data beyond the new size: {0}")]
    Unseen(String),
}

impl<'a> Mover<'a> {
    /// A mover for a change that the allocator ordered.
    pub fn new(owner: &'a Owner, change: &'a MapChange) -> Mover<'a> {
        let grants = change.next.grants.iter().map(|grant| (grant.id, grant)).collect();
        Mover { owner, change, grants, clients: Mutex::default(), end: None }
    }

    /// Makes copying stop when `end` becomes true.
    pub const fn with_end(mut self, end: &'a AtomicBool) -> Mover<'a> {
        self.end = Some(end);
        self
    }

    /// Copies all regions that move, no faster than the change allows, and reports the progress to the
    /// allocator. Blocks.
    ///
    /// # Errors
    /// As [`Change::copy`].
    pub fn copy(&self, change: &Change) -> Result<(), ChangeError> {
        let began = Instant::now();
        let rate = self.change.rate.map(|rate| rate.0.max(1));
        // At a low rate the runs are short, because writes to a run wait while it is copied.
        let run_len =
            rate.map_or(RUN_LEN, |rate| (rate / 16).next_power_of_two().clamp(RUN_LEN_MIN, RUN_LEN));
        let mut told = began;
        change.copy(
            run_len,
            |run| self.copy_run(run),
            |copied, _| {
                if self.end.is_some_and(|end| end.load(Ordering::Acquire)) {
                    return Err("the program ends".to_owned());
                }
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    self.tell(copied)?;
                }
                if let Some(rate) = rate {
                    let due = Duration::from_secs_f64(copied as f64 / rate as f64);
                    std::thread::sleep(due.saturating_sub(began.elapsed()));
                }
                Ok(())
            },
        )
    }

    /// Reports the progress. When the allocator answers that the change does not exist any more, copying is
    /// cancelled; when it does not answer, copying continues.
    fn tell(&self, bytes: u64) -> Result<(), String> {
        let report = Report::Copied { number: self.change.number, bytes };
        let said = Handle::current().block_on(self.owner.say(&self.change.next.name, &report));
        match said {
            Ok(orders) if orders.change.as_ref().is_none_or(|change| change.number != self.change.number) => {
                Err("the allocator gave the change up".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Copies a run, in pieces if it is long.
    fn copy_run(&self, run: &Run) -> Result<(), String> {
        let lanes = LANES.min(run.len.div_ceil(PIECE_LEN));
        let (next, runtime) = (AtomicU64::new(0), Handle::current());
        let lane = || {
            loop {
                let start = next.fetch_add(PIECE_LEN, Ordering::Relaxed);
                if start >= run.len {
                    return Ok(());
                }
                let copied = self.copy_piece(&runtime, run, start, PIECE_LEN.min(run.len - start));
                // On an error the other lanes end, too.
                copied.inspect_err(|_| next.store(run.len, Ordering::Relaxed))?;
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..lanes).map(|_| scope.spawn(lane)).collect();
            let ended = lane();
            let panicked = |_| Err("the copying ended by a fault of its own".to_owned());
            others.into_iter().fold(ended, |ended, other| ended.and(other.join().unwrap_or_else(panicked)))
        })
    }

    fn copy_piece(&self, runtime: &Handle, run: &Run, start: u64, len: u64) -> Result<(), String> {
        let target = self.grants.get(&run.to.0).ok_or("the new map lacks a grant of its own")?;
        let order = Copy {
            range: Range { offset: run.from.1 + start, len },
            nbd: target.endpoints.nbd.clone(),
            key: target.key.clone(),
            to: run.to.1 + start,
        };
        let there = Range { offset: run.to.1 + start, len };
        let sent: Digest = self.order(runtime, run.from.0, "copies", &order)?;
        let arrived: Digest = self.order(runtime, run.to.0, "digests", &there)?;
        match sent.xxh3 == arrived.xxh3 {
            true => Ok(()),
            false => Err(format!(
                "appliance `{}` has other data after copying than were sent: check its memory",
                target.appliance_name
            )),
        }
    }

    /// Checks that all bytes beyond `size` are zeros. Blocks.
    ///
    /// # Errors
    /// [`TailError::InTheWay`] with the data that are there.
    pub fn check_tail(&self, map: &Map, size: u64) -> Result<(), TailError> {
        let (region_len, runtime) = (map.region_len.0, Handle::current());
        for (region, slot) in (0..).zip(&map.regions) {
            let mut start = map.layout.bytes_before(region_len, region, size);
            while start < region_len {
                let len = COPY_LEN_MAX.min(region_len - start);
                let grant = map.grants[slot.grant as usize].id;
                let range = Range { offset: u64::from(slot.slot) * region_len + start, len };
                let digest: Digest =
                    self.order(&runtime, grant, "digests", &range).map_err(TailError::Unseen)?;
                if digest.data.0 > 0 {
                    let name = map.name.clone();
                    return Err(TailError::InTheWay { name, region, data: digest.data });
                }
                start += len;
            }
        }
        Ok(())
    }

    fn order<T: serde::de::DeserializeOwned>(
        &self,
        runtime: &Handle,
        grant: GrantId,
        what: &str,
        order: &impl serde::Serialize,
    ) -> Result<T, String> {
        let client = self.client(grant)?;
        let path = format!("/v1/grants/{grant}/{what}");
        runtime.block_on(client.post(&path, order)).map_err(|error| error_line(&error))
    }

    fn client(&self, grant: GrantId) -> Result<Client, String> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&grant) {
            return Ok(client.clone());
        }
        let url = self.change.control.get(&grant).ok_or("the allocator did not say where an appliance is")?;
        let client = Client::new(url, self.owner.token.clone()).map_err(|error| error.to_string())?;
        let client = client.with_limit(RUN_LIMIT);
        clients.insert(grant, client.clone());
        Ok(client)
    }
}
