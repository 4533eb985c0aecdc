//! Operations as work requests: an operation is cut where regions end, its data are copied where the buffer
//! is not registered, and parts complete in the order of posting. Knows no device.

use std::collections::VecDeque;

use super::verbs::Request;
use super::wire::Entry;
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::slots::Slots;

/// Every 16th request in a row is signalled, so that the queue drains while a long operation runs.
const SIGNAL_EVERY: u32 = 16;
/// Longest access of one request, in bytes; devices take 1 GiB or more.
const REQUEST_LEN_MAX: u64 = 16 << 20;

/// How the device accesses memory of this end.
pub(super) trait Reach {
    /// The key of a registered buffer.
    fn key(&self, buffer: IoBuf) -> Option<u32>;

    /// Takes a bounce buffer for up to `len` bytes. Returns its number, its memory (perhaps less) and its
    /// key; none when all are in use.
    fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)>;

    /// The memory of a bounce buffer that is in use.
    fn piece(&self, place: u32, len: usize) -> IoBuf;

    /// Frees a bounce buffer.
    fn give_back(&mut self, place: u32);
}

/// The capacity of a connection's queue pair.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueSize {
    /// Operations in flight.
    pub(super) depth: usize,
    /// Work requests in flight.
    pub(super) requests: usize,
    /// Inline capacity of a request in bytes.
    pub(super) inline: usize,
}

/// The addresses of the export's regions at the appliance.
#[derive(Debug, Clone)]
pub struct Table {
    entries: Box<[Entry]>,
    shift: u32,
}

impl Table {
    /// A table of regions of two to the power of `shift` bytes.
    pub(super) fn new(entries: Box<[Entry]>, shift: u32) -> Table {
        Table { entries, shift }
    }

    /// Length of the export in bytes.
    pub const fn len(&self) -> u64 {
        (self.entries.len() as u64) << self.shift
    }

    /// Whether it has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Address and key of the byte at `offset`, and the number of bytes from there to the end of its region.
    fn at(&self, offset: u64) -> Option<(u64, u32, u64)> {
        let entry = self.entries.get((offset >> self.shift) as usize)?;
        let within = offset & ((1 << self.shift) - 1);
        // The appliance may send any address: only the appliance's device uses it.
        Some((entry.address.wrapping_add(within), entry.rkey, (1 << self.shift) - within))
    }
}

/// Reads and writes in flight.
pub(super) struct Engine {
    table: Table,
    size: QueueSize,
    operations: Slots<Progress>,
    /// Operations with parts left to be cut, oldest first.
    cutting: VecDeque<u32>,
    /// Parts in flight, in the order of their numbers, in which they also end.
    parts: VecDeque<Part>,
    /// Number of the first part in `parts`.
    first: u64,
    unsignalled: u32,
}

struct Progress {
    operation: Operation,
    buf: IoBuf,
    /// Bytes for which parts were cut.
    cut: u64,
    /// Parts in flight.
    open: u32,
}

/// A work request.
struct Part {
    operation: u32,
    /// The number of the bounce buffer, and the memory of the operation that the data belong to.
    bounce: Option<(u32, IoBuf)>,
}

impl Engine {
    pub(super) fn new(table: Table, size: QueueSize) -> Engine {
        Engine {
            table,
            size,
            operations: Slots::new(size.depth),
            cutting: VecDeque::with_capacity(size.depth),
            parts: VecDeque::with_capacity(size.requests),
            first: 0,
            unsignalled: 0,
        }
    }

    pub(super) const fn table(&self) -> &Table {
        &self.table
    }

    pub(super) fn replace_table(&mut self, table: Table) {
        self.table = table;
    }

    /// Operations in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.operations.used()
    }

    /// Whether no work request is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.parts.is_empty()
    }

    /// Takes a read or a write; the caller has checked that there is room.
    ///
    /// # Errors
    /// When the operation lies outside of the export, or its buffer has another length; it was not taken.
    pub(super) fn add(&mut self, operation: Operation) -> Result<(), IoError> {
        let inside = operation.offset.checked_add(operation.len).is_some_and(|end| end <= self.table.len());
        match operation.buf {
            Some(buf) if inside && buf.len() as u64 == operation.len && operation.len > 0 => {
                let id = self.operations.insert(Progress { operation, buf, cut: 0, open: 0 });
                self.cutting.push_back(id);
                Ok(())
            }
            _ => Err(IoError::Invalid),
        }
    }

    /// The next work request, which the caller posts at once. None when no request is left, or there is no
    /// room for it now.
    pub(super) fn next(&mut self, reach: &mut impl Reach) -> Option<Request> {
        let id = *self.cutting.front()?;
        if self.parts.len() >= self.size.requests {
            return None;
        }
        let progress = self.operations.get_mut(id)?;
        let Progress { operation, buf, cut, open } = progress;
        let (address, remote_key, rest) = self.table.at(operation.offset + *cut)?;
        let len = (operation.len - *cut).min(rest).min(REQUEST_LEN_MAX) as usize;
        let whole = buf.part(*cut as usize, len);
        let is_read = operation.kind == Kind::Read;
        let local = match !is_read && len <= self.size.inline {
            true => Local { buffer: whole, key: None, bounce: None },
            false => Local::of(whole, is_read, reach)?,
        };
        *cut += local.buffer.len() as u64;
        *open += 1;
        let is_last = *cut == operation.len;
        if is_last {
            self.cutting.pop_front();
        }
        self.unsignalled += 1;
        // Bounce buffers and places in the queue are freed only by reported completions.
        let scarce = local.bounce.is_some() || self.parts.len() + 1 == self.size.requests;
        let signalled = is_last || scarce || self.unsignalled == SIGNAL_EVERY;
        if signalled {
            self.unsignalled = 0;
        }
        let number = self.first + self.parts.len() as u64;
        self.parts.push_back(Part { operation: id, bounce: local.bounce });
        Some(Request {
            id: number,
            is_read,
            buffer: local.buffer,
            local_key: local.key,
            address,
            remote_key,
            signalled,
        })
    }

    /// Ends the work requests up to number `last`, all of which succeeded.
    pub(super) fn end(&mut self, last: u64, reach: &mut impl Reach, ended: &mut Vec<Completion>) {
        while self.first <= last {
            let Some(part) = self.parts.pop_front() else { return };
            self.first += 1;
            let Some(progress) = self.operations.get_mut(part.operation) else { continue };
            if let Some((place, own)) = part.bounce {
                if progress.operation.kind == Kind::Read {
                    reach.piece(place, own.len()).copy_to(own);
                }
                reach.give_back(place);
            }
            progress.open -= 1;
            if progress.open == 0 && progress.cut == progress.operation.len {
                ended.push(Completion { token: progress.operation.token, result: Ok(()) });
                self.operations.remove(part.operation);
            }
        }
    }
}

/// The local memory of a request.
struct Local {
    buffer: IoBuf,
    key: Option<u32>,
    bounce: Option<(u32, IoBuf)>,
}

impl Local {
    /// The buffer itself if it is registered, else a bounce buffer, into which the data of a write are
    /// copied.
    fn of(whole: IoBuf, is_read: bool, reach: &mut impl Reach) -> Option<Local> {
        if let Some(key) = reach.key(whole) {
            return Some(Local { buffer: whole, key: Some(key), bounce: None });
        }
        let (place, piece, key) = reach.take(whole.len())?;
        let own = whole.part(0, piece.len());
        if !is_read {
            own.copy_to(piece);
        }
        Some(Local { buffer: piece, key: Some(key), bounce: Some((place, own)) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code)]

    use std::ptr::NonNull;

    use proptest::prelude::*;

    use super::*;

    const SHIFT: u32 = 12;
    const REGIONS: usize = 4;
    const PLACE_LEN: usize = 1000;
    /// Address of a region at the appliance; no memory of this process lies there.
    const ADDRESS: u64 = 1 << 40;

    /// Memory that lives until the process ends.
    struct Memory(NonNull<u8>, usize);

    impl Memory {
        fn new(len: usize) -> Memory {
            let bytes = Box::leak(vec![0_u8; len].into_boxed_slice());
            Memory(NonNull::new(bytes.as_mut_ptr()).unwrap(), len)
        }

        fn buf(&self) -> IoBuf {
            // SAFETY: the memory is leaked, and no reference to it is kept.
            unsafe { IoBuf::new(self.0, self.1) }
        }

        fn bytes(&self, start: usize, len: usize) -> Vec<u8> {
            let mut found = vec![0; len];
            self.buf().part(start, len).copy_to_slice(&mut found);
            found
        }
    }

    /// A test double with three bounce buffers, where either nothing or all of one memory is registered.
    struct Places {
        registered: Option<IoBuf>,
        memory: Memory,
        free: Vec<u32>,
    }

    impl Reach for Places {
        fn key(&self, buffer: IoBuf) -> Option<u32> {
            let all = self.registered?;
            let start = buffer.as_ptr().addr().checked_sub(all.as_ptr().addr())?;
            (start + buffer.len() <= all.len()).then_some(7)
        }

        fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)> {
            let place = self.free.pop()?;
            Some((place, self.piece(place, len.min(PLACE_LEN)), 8))
        }

        fn piece(&self, place: u32, len: usize) -> IoBuf {
            self.memory.buf().part(place as usize * PLACE_LEN, len)
        }

        fn give_back(&mut self, place: u32) {
            assert!(!self.free.contains(&place), "given back twice");
            self.free.push(place);
        }
    }

    fn engine(depth: usize, inline: usize) -> Engine {
        let entry = |region: usize| Entry { address: ADDRESS * (region as u64 + 1), rkey: region as u32 };
        let table = Table::new((0..REGIONS).map(entry).collect(), SHIFT);
        Engine::new(table, QueueSize { depth, requests: 16, inline })
    }

    /// The appliance's device: accesses regions by their addresses and keys.
    fn carry_out(request: &Request, regions: &mut [Vec<u8>]) {
        let region = request.remote_key as usize;
        let start = (request.address - ADDRESS * (region as u64 + 1)) as usize;
        let remote = &mut regions[region][start..start + request.buffer.len()];
        match request.is_read {
            true => request.buffer.copy_from_slice(remote),
            false => request.buffer.copy_to_slice(remote),
        }
    }

    #[derive(Debug, Clone)]
    struct Io {
        is_read: bool,
        offset: usize,
        len: usize,
    }

    fn io() -> impl Strategy<Value = Io> {
        let size = REGIONS << SHIFT;
        (any::<bool>(), 0..size, 1..size).prop_map(move |(is_read, offset, len)| Io {
            is_read,
            offset,
            len: len.min(size - offset),
        })
    }

    proptest! {
        /// Operations one after the other, on registered memory or not, have the requested effect.
        #[test]
        fn bytes_reach_their_destination(
            ios in proptest::collection::vec(io(), 1..20), registered: bool, inline in 0_usize..200,
        ) {
            let size = REGIONS << SHIFT;
            let own = Memory::new(size);
            let registered = registered.then(|| own.buf());
            let mut places = Places { registered, memory: Memory::new(3 * PLACE_LEN), free: vec![0, 1, 2] };
            let mut engine = engine(1, inline);
            let mut regions = vec![vec![0_u8; 1 << SHIFT]; REGIONS];
            let mut model = vec![0_u8; size];
            for (step, io) in ios.iter().enumerate() {
                let buf = own.buf().part(0, io.len);
                if io.is_read {
                    buf.zero();
                } else {
                    let bytes: Vec<u8> = (0..io.len).map(|at| (at * 31 + step * 7) as u8).collect();
                    buf.copy_from_slice(&bytes);
                    model[io.offset..io.offset + io.len].copy_from_slice(&bytes);
                }
                let kind = if io.is_read { Kind::Read } else { Kind::Write };
                let (offset, len) = (io.offset as u64, io.len as u64);
                engine.add(Operation { kind, offset, len, buf: Some(buf), token: step as u64 }).unwrap();
                let mut ended = Vec::new();
                while ended.is_empty() {
                    let mut last = None;
                    while let Some(request) = engine.next(&mut places) {
                        let keyless = request.local_key.is_none();
                        prop_assert!(!keyless || (!io.is_read && request.buffer.len() <= inline));
                        carry_out(&request, &mut regions);
                        last = Some(request).filter(|request| request.signalled).map(|request| request.id).or(last);
                    }
                    engine.end(last.expect("nothing is signalled, so it would never end"), &mut places, &mut ended);
                }
                prop_assert_eq!(ended.len(), 1);
                prop_assert_eq!(ended[0], Completion { token: step as u64, result: Ok(()) });
                prop_assert_eq!(engine.in_flight(), 0);
                if io.is_read {
                    prop_assert_eq!(own.bytes(0, io.len), &model[io.offset..io.offset + io.len]);
                }
            }
            prop_assert_eq!(regions.concat(), model);
            prop_assert_eq!(places.free.len(), 3);
        }

        /// With many operations in flight, each ends once, and the queue's limit of requests in flight is
        /// kept.
        #[test]
        fn each_operation_ends_once(lens in proptest::collection::vec(1_usize..5000, 1..30), batch in 1_usize..20) {
            let own = Memory::new(5000);
            let mut places = Places { registered: None, memory: Memory::new(3 * PLACE_LEN), free: vec![0, 1, 2] };
            let mut engine = engine(30, 0);
            let mut regions = vec![vec![0_u8; 1 << SHIFT]; REGIONS];
            for (token, len) in lens.iter().enumerate() {
                let buf = Some(own.buf().part(0, *len));
                engine
                    .add(Operation { kind: Kind::Write, offset: 0, len: *len as u64, buf, token: token as u64 })
                    .unwrap();
            }
            let mut ended = Vec::new();
            let mut told = Vec::new();
            for _ in 0..10_000 {
                if ended.len() == lens.len() {
                    break;
                }
                for _ in 0..batch {
                    let Some(request) = engine.next(&mut places) else { break };
                    carry_out(&request, &mut regions);
                    if request.signalled {
                        told.push(request.id);
                    }
                    prop_assert!(engine.parts.len() <= 16);
                }
                for id in told.drain(..) {
                    engine.end(id, &mut places, &mut ended);
                }
            }
            let tokens: Vec<u64> = ended.iter().map(|completion| completion.token).collect();
            let all: Vec<u64> = (0..lens.len() as u64).collect();
            prop_assert_eq!(tokens, all);
            prop_assert!(engine.is_idle() && engine.in_flight() == 0);
        }
    }

    #[test]
    fn operations_outside_the_export_are_refused() {
        let own = Memory::new(8192);
        let mut engine = engine(4, 0);
        let size = (REGIONS << SHIFT) as u64;
        let whole = own.buf();
        for (offset, len, buf) in [
            (size, 1, Some(whole.part(0, 1))),
            (size - 1, 2, Some(whole.part(0, 2))),
            (u64::MAX, 2, Some(whole.part(0, 2))),
            (0, 4096, Some(whole)),
            (0, 4096, None),
            (0, 0, Some(whole.part(0, 0))),
        ] {
            let operation = Operation { kind: Kind::Read, offset, len, buf, token: 0 };
            assert_eq!(engine.add(operation), Err(IoError::Invalid), "{operation:?}");
        }
        assert_eq!(engine.in_flight(), 0);
    }
}
