//! Blocks: runs of pages that have left local memory, which are kept so that later pages can be read into them.

use std::io;
use std::ops::Range;

use crossbeam_queue::ArrayQueue;
use xpm_transport::IoBuf;

use super::{PAGE, Staging, dont_need};

/// Pages of a block.
pub(crate) const BLOCK: u32 = 64;

/// A run of addresses for [`BLOCK`] pages, of which the first `missing` are absent. The holder of the value is the only
/// user of the addresses.
#[derive(Debug)]
pub(crate) struct Block {
    address: usize,
    pub(crate) missing: u32,
    buffer: IoBuf,
}

impl Block {
    /// Memory of its first pages, all of which are present.
    pub(crate) fn buffer(&self, pages: u32) -> IoBuf {
        debug_assert_eq!(self.missing, 0, "only full blocks are given out");
        self.buffer.part(0, pages as usize * PAGE)
    }

    pub(crate) fn address_of(&self, index: u32) -> usize {
        self.address + index as usize * PAGE
    }

    /// Frees all of its pages.
    pub(crate) fn wipe(&mut self) {
        // An error is ignored: the next move to the block is refused then, and wipes it again.
        dont_need(self.address, BLOCK as usize * PAGE);
        self.missing = BLOCK;
    }
}

pub(crate) struct Blocks {
    full: ArrayQueue<Block>,
    /// The blocks with absent pages.
    hollow: ArrayQueue<Block>,
    /// The addresses of all blocks.
    memory: Staging,
}

impl Blocks {
    /// Creates `count` blocks without pages. `register` is called with their addresses.
    pub(crate) fn new(
        count: usize,
        register: impl FnOnce(usize, usize) -> io::Result<()>,
    ) -> io::Result<Blocks> {
        let count = count.max(1);
        let len = BLOCK as usize * PAGE;
        let memory = Staging::new(count * len)?;
        let all = memory.all();
        register(all.as_ptr() as usize, all.len())?;
        let blocks = Blocks { full: ArrayQueue::new(count), hollow: ArrayQueue::new(count), memory };
        for index in 0..count {
            let buffer = all.part(index * len, len);
            blocks.give(Block { address: buffer.as_ptr() as usize, missing: BLOCK, buffer });
        }
        Ok(blocks)
    }

    pub(crate) fn addresses(&self) -> Range<usize> {
        let all = self.memory.all();
        all.as_ptr() as usize..all.as_ptr() as usize + all.len()
    }

    /// Takes a block whose pages are all present.
    pub(crate) fn take_full(&self) -> Option<Block> {
        self.full.pop()
    }

    /// Takes a block with absent pages.
    pub(crate) fn take_hollow(&self) -> Option<Block> {
        self.hollow.pop()
    }

    pub(crate) fn give(&self, block: Block) {
        let queue = if block.missing == 0 { &self.full } else { &self.hollow };
        let given = queue.push(block);
        debug_assert!(given.is_ok(), "there are no more blocks than places");
    }

    /// Frees the memory of full blocks.
    pub(crate) fn trim(&self) {
        while let Some(mut block) = self.full.pop() {
            block.wipe();
            self.give(block);
        }
    }
}
