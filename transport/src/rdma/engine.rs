//! Operations as work requests: cut where regions end, copied where a buffer is not registered, and ended in
//! the order of posting. Knows no device.

use std::collections::VecDeque;

use super::verbs::Request;
use super::wire::Entry;
use crate::io::{Completion, IoBuf, IoError, Kind, Operation};
use crate::slots::Slots;

/// A request of so many in a row is signalled, for the queue to drain while a long operation runs.
const SIGNAL_EVERY: u32 = 16;
/// Longest access of one request, in bytes; devices take 1 GiB or more.
const REQUEST_LEN_MAX: u64 = 16 << 20;

/// How the device reaches memory of this end.
pub(super) trait Reach {
    /// The key of a buffer that is registered.
    fn key(&self, buffer: IoBuf) -> Option<u32>;

    /// A place to copy through, for up to `len` bytes: its number, its memory (perhaps less), and its
    /// key. None when all are taken.
    fn take(&mut self, len: usize) -> Option<(u32, IoBuf, u32)>;

    /// The memory of a place that is taken.
    fn piece(&self, place: u32, len: usize) -> IoBuf;

    /// The place is free again.
    fn give_back(&mut self, place: u32);
}

/// What a connection's queue pair takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueSize {
    /// Operations in flight.
    pub(super) depth: usize,
    /// Work requests in flight.
    pub(super) requests: usize,
    /// Bytes that a request may carry itself.
    pub(super) inline: usize,
}

/// Where the bytes of the export lie at the appliance.
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

    /// Address and key of the byte at `offset`, and how many follow in the same region.
    fn at(&self, offset: u64) -> Option<(u64, u32, u64)> {
        let entry = self.entries.get((offset >> self.shift) as usize)?;
        let within = offset & ((1 << self.shift) - 1);
        // An appliance can say any address; it means something at its end only.
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
    /// Parts in flight, in the order of their numbers, which is that in which they end.
    parts: VecDeque<Part>,
    /// Number of the first of them.
    first: u64,
    unsignalled: u32,
}

struct Progress {
    operation: Operation,
    buf: IoBuf,
    /// Bytes that parts were cut for.
    cut: u64,
    /// Parts in flight.
    open: u32,
}

/// One work request.
struct Part {
    operation: u32,
    /// The place that it is copied through, and the memory that it is for.
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

    /// Whether work requests are in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.parts.is_empty()
    }

    /// Takes a read or a write, for which there must be room.
    ///
    /// # Errors
    /// When it lies outside of the export, or its buffer is not of its length; it was not taken.
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

    /// The next work request, to be posted at once. None: there is none, or no room for it now.
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
        // Room, in places or in the queue, comes back only with what is told.
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

    /// The work request of this number ended well, and so did all before it.
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

/// The memory of this end that a request uses.
struct Local {
    buffer: IoBuf,
    key: Option<u32>,
    bounce: Option<(u32, IoBuf)>,
}

impl Local {
    /// The buffer itself where it is registered, else a place, into which a write is copied.
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
    /// Address of a region at the appliance: nothing of the sort at this end.
    const ADDRESS: u64 = 1 << 40;

    /// Memory that lives as long as the test.
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

    /// Nothing is registered, or all of one memory is; three places.
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

    /// The appliance's device: regions by their addresses and keys.
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
        /// Operations one after the other, on registered memory or not, have the effect that they say.
        #[test]
        fn bytes_go_where_they_belong(
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

        /// Many at once: each ends once, and no more requests are in flight than the queue takes.
        #[test]
        fn each_ends_once(lens in proptest::collection::vec(1_usize..5000, 1..30), batch in 1_usize..20) {
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
    fn what_lies_outside_is_refused() {
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
