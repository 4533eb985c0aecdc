//! Opening a space: its parts are chosen, checked and started.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use xpm_client_core::volume::Volume;

use super::CHUNK_LEN;
use super::carver::Carver;
use super::error::{MapError, system};
use super::named::Known;
use super::options::SpaceOptions;
use super::space::{Inner, Listed, Space};
use crate::evict::budget::Governor;
use crate::evict::evictor::{self, Evictor};
use crate::fault::calls::Calls;
use crate::fault::fetch::Fetcher;
use crate::fault::handler;
use crate::fault::sigbus::Registered;
use crate::fault::tend::Tender;
use crate::page::uffd::{self, Backing, FEATURE_SIGBUS, Uffd};
use crate::page::window::{BLOCK, PAGE, Window};
use crate::pager::{Faults, Pager, Shared};

/// Number of blocks that keep pages for reuse: one for this number of blocks in the budget, and at most `BLOCKS_MAX`
/// (12 MiB).
const BLOCKS_PART: usize = 16;
const BLOCKS_MAX: usize = 48;

/// Threads that fetch ahead, if the faulting threads serve their faults themselves.
const AHEAD_THREADS: usize = 2;

impl Space {
    /// Shows an allocation at addresses. Reserves addresses, and memory for the state of each page (12 bytes, and 9
    /// more in slabs, used only for pages that are used); starts threads. Brings no page into local memory.
    ///
    /// # Errors
    /// [`MapError::Invalid`] for invalid options, [`MapError::Userfaultfd`], or [`MapError::System`].
    pub fn open(volume: Volume, options: &SpaceOptions) -> Result<Space, MapError> {
        let size = volume.size();
        options.budget.check().map_err(MapError::Invalid)?;
        if volume.depth() < evictor::DEPTH {
            let (depth, least) = (volume.depth(), evictor::DEPTH);
            return Err(MapError::Invalid(format!(
                "a volume of depth {depth} cannot be mapped: open it with {least} or more"
            )));
        }
        check_kept(options.kept, size)?;
        let mut carver = Carver::new(options.kept, size);
        let named = Known::place(volume.slabs(), &mut carver)?;
        let handlers = match options.faults {
            Faults::Handled(0) => {
                return Err(MapError::Invalid("no threads to bring pages: choose one or more".to_owned()));
            }
            Faults::Handled(threads) => threads.min(64),
            // Faulting threads fetch by themselves; these threads fetch ahead.
            Faults::Inline => std::thread::available_parallelism().map_or(1, usize::from).min(AHEAD_THREADS),
        };
        let pages = size / PAGE as u64;
        if pages == 0 || pages > u64::from(u32::MAX / 2) {
            return Err(MapError::Invalid(format!(
                "an allocation of {size} bytes cannot be mapped: choose 4 KiB to 8 TiB"
            )));
        }
        let wanted = if options.faults == Faults::Inline { FEATURE_SIGBUS } else { uffd::FEATURE_POISON };
        let mut governor =
            Governor::new(options.budget.within(size)).map_err(system("see how much memory is free"))?;
        let budget = governor.first();
        let window = window(pages as usize * PAGE, wanted, budget)?;
        let seed = rand_seed().map_err(system("get a random number"))?;
        let pager = Pager::new(volume.name(), window, options.faults, budget, handlers, seed)
            .map_err(system("make the bells of the threads that bring pages"))?;
        let pager = Arc::new(pager);
        let kept_pages = (options.kept / PAGE as u64) as u32;
        let behind = pages as u32 - kept_pages;
        if behind > 0 {
            pager.set_fresh(kept_pages, behind);
        }
        named.parts().for_each(|(first, pages)| pager.set_kept(first, pages));
        let calls =
            Arc::new(Mutex::new(Calls::new(pager.clone(), &volume).map_err(system("open a channel"))?));
        let inline = match options.faults {
            Faults::Handled(_) => None,
            Faults::Inline => Some(Arc::new(seats(&pager, &volume)?)),
        };
        let tender = Tender {
            pager: pager.clone(),
            volume: volume.clone(),
            calls: calls.clone(),
            inline: inline.clone(),
        };
        let threads =
            xpm_client_core::signals::blocked(|| start(&pager, &volume, governor, handlers, tender))?;
        let inner = Inner {
            listed: Listed::new(&pager.window),
            calls,
            carver: Mutex::new(carver),
            named: Mutex::new(named),
            mapped: Mutex::default(),
            kept: options.kept,
            size,
            pinned: Mutex::new(0),
            inline,
            threads,
            pager,
            _volume: volume,
        };
        Ok(Space { inner: Arc::new(inner) })
    }
}

fn check_kept(kept: u64, size: u64) -> Result<(), MapError> {
    match kept {
        _ if kept > size => Err(MapError::Range { start: 0, end: kept, kept: size, size }),
        _ if kept != size && !kept.is_multiple_of(CHUNK_LEN) => Err(MapError::Invalid(format!(
            "what is kept must be a multiple of 2 MiB, or all of {size} bytes: {kept} is not"
        ))),
        _ => Ok(()),
    }
}

/// Chooses the kind of window: private memory if the kernel can move pages, else shared memory. `XPM_WINDOW` in the
/// environment, `private` or `shared`, forces the kind, for tests and comparisons.
fn window(len: usize, wanted: u64, budget: usize) -> Result<Window, MapError> {
    let open = |backing| {
        let uffd = Uffd::new(wanted, backing).map_err(MapError::Userfaultfd)?;
        let blocks = (budget / BLOCK as usize / BLOCKS_PART).clamp(4, BLOCKS_MAX);
        Window::new(len, uffd, backing, blocks)
            .map_err(system("reserve addresses and register them with userfaultfd"))
    };
    match std::env::var("XPM_WINDOW").as_deref() {
        Ok("private") => open(Backing::Private),
        Ok("shared") => open(Backing::Shared),
        Ok(other) => Err(MapError::Invalid(format!("XPM_WINDOW is `{other}`: choose private or shared"))),
        // Not only the kernel's version, also limits of the process can exclude private memory.
        Err(_) => open(Backing::Private).or_else(|_| open(Backing::Shared)),
    }
}

fn rand_seed() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    let mut filled = 0;
    while filled < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags)?;
    }
    Ok(u64::from_ne_bytes(bytes))
}

/// Starts the threads: all of them, or none on an error.
fn start(
    pager: &Shared,
    volume: &Volume,
    governor: Governor,
    handlers: usize,
    tender: Tender,
) -> Result<Vec<JoinHandle<()>>, MapError> {
    let mut threads = Vec::new();
    let made = (|| {
        threads.push(std::thread::Builder::new().name("xpm-tend".to_owned()).spawn(move || tender.run())?);
        let channel = volume.channel()?;
        let evictor = Evictor::new(pager.clone(), channel, governor);
        threads.push(std::thread::Builder::new().name("xpm-evict".to_owned()).spawn(move || evictor.run())?);
        for number in 0..handlers {
            let fetcher = Fetcher::new(pager.clone(), volume, 8, BLOCK)?;
            let builder = std::thread::Builder::new().name(format!("xpm-fetch-{number}"));
            threads.push(builder.spawn(move || handler::run(fetcher, number))?);
        }
        Ok(())
    })();
    match made {
        Ok(()) => Ok(threads),
        Err(error) => {
            end(pager, threads);
            Err(MapError::System { what: "start the threads that bring pages", error })
        }
    }
}

fn seats(pager: &Shared, volume: &Volume) -> Result<Registered, MapError> {
    let count = std::thread::available_parallelism().map_or(4, usize::from).clamp(2, 32);
    let fetchers: std::io::Result<Vec<Fetcher>> =
        (0..count).map(|_| Fetcher::new(pager.clone(), volume, 2, 1)).collect();
    fetchers
        .and_then(|fetchers| Registered::new(pager.clone(), fetchers))
        .map_err(system("serve faults in line"))
}

pub(crate) fn end(pager: &Shared, threads: Vec<JoinHandle<()>>) {
    pager.stop();
    for thread in threads {
        // A panic of the thread was reported when it happened.
        let _ = thread.join();
    }
}
