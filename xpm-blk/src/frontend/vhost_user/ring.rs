//! A split virtqueue, the device's side (virtio 1.2, 2.7): the available and the used ring.
//!
//! The driver can write anything at any time. Every value is read once, and checked before it is used; an
//! invalid value makes the ring [`Broken`].

use std::fmt;
use std::sync::atomic::{Ordering, fence};

use super::memory::{GuestMemory, Window};

/// Longest supported ring; also QEMU's longest.
pub(super) const SIZE_MAX: u16 = 1024;

const DESCRIPTOR_LEN: usize = 16;
/// Flag of both rings: the other side wants no notification.
const NO_NOTIFY: u16 = 1;

/// The rule that a driver violated; its ring is not read any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken(pub(super) &'static str);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The addresses of a ring in the front end's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// The three parts of a ring, mapped.
#[derive(Debug)]
pub(super) struct Parts {
    descriptors: Window,
    available: Window,
    used: Window,
}

impl Parts {
    /// Finds the parts of a ring of `size` entries; fails if they are not in guest memory.
    pub(super) fn find(memory: &GuestMemory, addresses: Addresses, size: u16) -> Result<Parts, Broken> {
        let size = usize::from(size);
        let part = |address, len, alignment, what| {
            let window = memory.window_of_user(address, len).ok_or(Broken(what))?;
            if window.is_aligned(alignment) { Ok(window) } else { Err(Broken(what)) }
        };
        Ok(Parts {
            descriptors: part(
                addresses.descriptors,
                size * DESCRIPTOR_LEN,
                16,
                "the descriptors of a ring are outside of guest memory or not aligned",
            )?,
            available: part(
                addresses.available,
                6 + 2 * size,
                2,
                "the available ring is outside of guest memory or not aligned",
            )?,
            used: part(
                addresses.used,
                6 + 8 * size,
                4,
                "the used ring is outside of guest memory or not aligned",
            )?,
        })
    }
}

/// A descriptor as the driver wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// Another descriptor follows.
    pub(super) const NEXT: u16 = 1;
    /// The device writes to the buffer.
    pub(super) const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub(super) const INDIRECT: u16 = 4;

    /// Descriptor `index` of a table; none beyond the table's end.
    pub(super) fn read(table: &Window, count: usize, index: usize) -> Option<Descriptor> {
        if index >= count {
            return None;
        }
        let mut bytes = [0; DESCRIPTOR_LEN];
        table.read(index * DESCRIPTOR_LEN, &mut bytes);
        let [a, b, c, d, e, f, g, h, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Some(Descriptor {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    /// Whether the descriptor has this flag.
    pub(super) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The features that the driver and the device agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Features {
    /// Each side states the index at which it wants to be notified.
    pub(super) event_index: bool,
    /// Descriptors can be tables.
    pub(super) indirect: bool,
}

/// A ring in service.
#[derive(Debug)]
pub(super) struct Ring {
    size: u16,
    parts: Parts,
    features: Features,
    next_available: u16,
    next_used: u16,
    /// Index of the used ring at the last call of [`Ring::wants_call`].
    asked_at: Option<u16>,
}

impl Ring {
    /// A ring of `size` entries (a power of two, at most [`SIZE_MAX`]); `next_available` is the next entry to
    /// be taken.
    pub(super) fn new(size: u16, parts: Parts, features: Features, next_available: u16) -> Ring {
        debug_assert!(size.is_power_of_two() && size <= SIZE_MAX);
        let next_used = parts.used.load16(2, Ordering::Acquire);
        Ring { size, parts, features, next_available, next_used, asked_at: None }
    }

    /// Number of entries.
    pub(super) const fn size(&self) -> u16 {
        self.size
    }

    /// The agreed features.
    pub(super) const fn features(&self) -> Features {
        self.features
    }

    /// Moves the ring to other addresses of this process.
    pub(super) fn replace(&mut self, parts: Parts) {
        self.parts = parts;
    }

    /// Index of the next entry to be taken.
    pub(super) const fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Index behind the last entry that was used.
    pub(super) const fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The head of the next chain that the driver made available.
    pub(super) fn pop(&mut self) -> Result<Option<u16>, Broken> {
        let behind = self.parts.available.load16(2, Ordering::Acquire);
        match behind.wrapping_sub(self.next_available) {
            0 => return Ok(None),
            count if count > self.size => return Err(Broken("more entries available than the ring has")),
            _ => {}
        }
        let place = usize::from(self.next_available % self.size);
        let head = self.parts.available.load16(4 + 2 * place, Ordering::Relaxed);
        if head >= self.size {
            return Err(Broken("an available entry that is no descriptor of the ring"));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// The table of descriptors, and their number.
    pub(super) fn table(&self) -> (&Window, usize) {
        (&self.parts.descriptors, usize::from(self.size))
    }

    /// Returns a chain to the driver; the device has written `written` bytes.
    pub(super) fn push(&mut self, head: u16, written: u32) {
        let place = usize::from(self.next_used % self.size);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        self.parts.used.write(4 + 8 * place, &element);
        self.next_used = self.next_used.wrapping_add(1);
        // Stored after the element, and after the data in the chain's buffers.
        self.parts.used.store16(2, self.next_used, Ordering::Release);
    }

    /// Whether the driver wants to be notified of the requests used since the last call.
    pub(super) fn wants_call(&mut self) -> bool {
        // The used index has to be visible before the driver's wish is read: a driver that wants no
        // notification yet must see it.
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_used, self.asked_at.replace(self.next_used));
        if !self.features.event_index {
            return self.parts.available.load16(0, Ordering::Relaxed) & NO_NOTIFY == 0;
        }
        let event = self.parts.available.load16(4 + 2 * usize::from(self.size), Ordering::Relaxed);
        old.is_none_or(|old| passes(event, new, old))
    }

    /// Asks the driver to kick when it adds requests. Returns true when it has added some already, which may
    /// cause no kick.
    pub(super) fn ask_for_kicks(&mut self) -> bool {
        match self.features.event_index {
            true => {
                let place = 4 + 8 * usize::from(self.size);
                self.parts.used.store16(place, self.next_available, Ordering::Relaxed);
            }
            false => self.parts.used.store16(0, 0, Ordering::Relaxed),
        }
        // Either the driver sees this request, or this code sees the entries that the driver added before.
        fence(Ordering::SeqCst);
        self.parts.available.load16(2, Ordering::Acquire) != self.next_available
    }

    /// Tells the driver that its ring is polled without kicks.
    pub(super) fn decline_kicks(&mut self) {
        // With event indices, the driver kicks once for each request to do so.
        if !self.features.event_index {
            self.parts.used.store16(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }
}

/// Whether an index that goes from `old` to `new` passes `event` (virtio 1.2, 2.7.7.2).
const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::memory::tests::memory;
    use super::*;

    /// Guest addresses of the ring of [`Driver`].
    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;

    /// The driver's side of a ring in the first 16 KiB of guest memory at 0. The memory has 1 MiB at 0 and
    /// another region behind a hole.
    pub(in super::super) struct Driver {
        pub(in super::super) memory: GuestMemory,
        pub(in super::super) size: u16,
        available: u16,
    }

    impl Driver {
        pub(in super::super) fn new(size: u16) -> Driver {
            Driver { memory: memory(&[(0, 1 << 20), (1 << 30, 1 << 16)]), size, available: 0 }
        }

        pub(in super::super) fn ring(&self, features: Features) -> Ring {
            let user = |guest| guest + (1 << 40);
            let addresses =
                Addresses { descriptors: user(DESCRIPTORS), available: user(AVAILABLE), used: user(USED) };
            let parts = Parts::find(&self.memory, addresses, self.size).unwrap();
            Ring::new(self.size, parts, features, 0)
        }

        pub(in super::super) fn write(&self, guest: u64, bytes: &[u8]) {
            self.memory.window_of_guest(guest, bytes.len()).unwrap().write(0, bytes);
        }

        pub(in super::super) fn read(&self, guest: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.memory.window_of_guest(guest, len).unwrap().read(0, &mut bytes);
            bytes
        }

        pub(in super::super) fn describe(&self, table: u64, index: u16, it: Descriptor) {
            let bytes = [
                it.address.to_le_bytes().as_slice(),
                &it.len.to_le_bytes(),
                &it.flags.to_le_bytes(),
                &it.next.to_le_bytes(),
            ]
            .concat();
            self.write(table + 16 * u64::from(index), &bytes);
        }

        /// Writes a chain of `(address, length, writable)` into the ring's table, starting at `first`.
        pub(in super::super) fn chain(&self, first: u16, buffers: &[(u64, u32, bool)]) {
            for (index, &(address, len, writable)) in (first..).zip(buffers) {
                let last = usize::from(index - first) + 1 == buffers.len();
                let next = if last { 0 } else { Descriptor::NEXT };
                let flags = next | if writable { Descriptor::WRITE } else { 0 };
                self.describe(DESCRIPTORS, index, Descriptor { address, len, flags, next: index + 1 });
            }
        }

        pub(in super::super) fn offer(&mut self, head: u16) {
            let place = u64::from(self.available % self.size);
            self.write(AVAILABLE + 4 + 2 * place, &head.to_le_bytes());
            self.available = self.available.wrapping_add(1);
            self.set_available(self.available);
        }

        pub(in super::super) fn set_available(&self, index: u16) {
            self.write(AVAILABLE + 2, &index.to_le_bytes());
        }

        pub(in super::super) fn descriptors(&self) -> u64 {
            DESCRIPTORS
        }
    }

    const EVENTS: Features = Features { event_index: true, indirect: true };

    #[test]
    fn available_chains_are_taken_and_used_chains_are_returned() {
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(Features::default());
        assert_eq!(ring.pop(), Ok(None));
        for round in 0..40_u16 {
            driver.offer(round % 8);
            assert_eq!(ring.pop(), Ok(Some(round % 8)));
            assert_eq!(ring.pop(), Ok(None));
            ring.push(round % 8, 7);
            let element = driver.read(USED + 4 + 8 * u64::from(round % 8), 8);
            assert_eq!(element, [(round % 8) as u8, 0, 0, 0, 7, 0, 0, 0]);
            assert_eq!(driver.read(USED + 2, 2), (round + 1).to_le_bytes());
        }
    }

    #[test]
    fn invalid_indices_break_the_ring() {
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(Features::default());
        driver.set_available(9);
        assert!(ring.pop().is_err());
        driver.set_available(u16::MAX);
        assert!(ring.pop().is_err());
        driver.set_available(0);
        driver.offer(8);
        assert!(ring.pop().is_err());
    }

    #[test]
    fn rings_outside_of_memory_are_refused() {
        let memory = memory(&[(0, 0x10000)]);
        let good = Addresses {
            descriptors: (1 << 40) + 0x1000,
            available: (1 << 40) + 0x2000,
            used: (1 << 40) + 0x3000,
        };
        assert!(Parts::find(&memory, good, 256).is_ok());
        for bad in [
            Addresses { descriptors: (1 << 40) + 0xfff0, ..good },
            Addresses { available: 0x2000, ..good },
            Addresses { used: u64::MAX, ..good },
            Addresses { descriptors: (1 << 40) + 0x1008, ..good },
            Addresses { used: (1 << 40) + 0x3002, ..good },
            Addresses { available: (1 << 40) + 0x2001, ..good },
        ] {
            assert!(Parts::find(&memory, bad, 256).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_driver_is_notified_when_it_wants_to_be() {
        let driver = Driver::new(8);
        let mut ring = driver.ring(Features::default());
        ring.push(0, 0);
        assert!(ring.wants_call());
        driver.write(AVAILABLE, &[1, 0]);
        ring.push(0, 0);
        assert!(!ring.wants_call());

        let driver = Driver::new(8);
        let mut ring = driver.ring(EVENTS);
        ring.push(0, 0);
        assert!(ring.wants_call(), "the first time nothing is known");
        driver.write(AVAILABLE + 4 + 16, &3_u16.to_le_bytes());
        ring.push(0, 0);
        assert!(!ring.wants_call());
        ring.push(0, 0);
        ring.push(0, 0);
        assert!(ring.wants_call(), "index 3 is used");
        ring.push(0, 0);
        assert!(!ring.wants_call());
    }

    #[test]
    fn kicks_are_requested_and_no_request_is_missed() {
        let mut driver = Driver::new(8);
        let mut ring = driver.ring(EVENTS);
        assert!(!ring.ask_for_kicks());
        driver.offer(0);
        assert!(ring.ask_for_kicks(), "it came before it was asked for");
        ring.pop().unwrap();
        assert!(!ring.ask_for_kicks());
        assert_eq!(driver.read(USED + 4 + 64, 2), [1, 0]);

        let mut ring = driver.ring(Features::default());
        ring.pop().unwrap();
        ring.decline_kicks();
        assert_eq!(driver.read(USED, 2), [1, 0]);
        assert!(!ring.ask_for_kicks());
        assert_eq!(driver.read(USED, 2), [0, 0]);
    }

    #[test]
    fn events_pass_also_when_indices_wrap_around() {
        assert!(passes(5, 6, 5));
        assert!(!passes(5, 5, 4));
        assert!(passes(u16::MAX, 0, u16::MAX));
        assert!(!passes(7, 6, 2));
        assert!(passes(3, 6, 2));
    }
}
