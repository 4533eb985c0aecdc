//! Random operations on a link, compared with a vector of bytes.

use std::collections::HashMap;
use std::ops::Range;

use xpm_transport::{Completion, Kind, Link, Operation};

use super::memory::Memory;

/// The parameters of a test.
pub(crate) struct Shape {
    pub(crate) size: u64,
    pub(crate) depth: usize,
    pub(crate) len_max: u64,
    /// Trims and zeros start and end at multiples of this.
    pub(crate) hole: u64,
    pub(crate) operations: u32,
    pub(crate) seed: u64,
}

/// A small generator (xorshift64*), so that a seed gives the same test everywhere.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit
    }
}

struct Flying {
    kind: Kind,
    range: Range<u64>,
    memory: Memory,
}

struct Run<'a> {
    link: &'a mut dyn Link,
    model: Vec<u8>,
    flying: HashMap<u64, Flying>,
    random: Random,
    shape: Shape,
}

/// Runs the operations, always with `depth` of them in flight, and checks all data that are read, and all
/// bytes at the end.
pub(crate) fn check(link: &mut dyn Link, shape: Shape) {
    let random = Random::new(shape.seed);
    let mut run = Run { link, model: vec![0; shape.size as usize], flying: HashMap::new(), random, shape };
    // Data that an earlier run left are overwritten.
    run.one(Operation { kind: Kind::Zero, offset: 0, len: run.shape.size, buf: None, token: u64::MAX });
    let mut token = 0;
    while token < u64::from(run.shape.operations) {
        while run.flying.len() < run.shape.depth && token < u64::from(run.shape.operations) {
            token += 1;
            run.post(token);
        }
        run.link.submit();
        run.reap();
    }
    while !run.flying.is_empty() {
        run.reap();
    }
    run.read_all();
}

impl Run<'_> {
    fn one(&mut self, operation: Operation) {
        self.link.post(operation).unwrap();
        self.link.submit();
        let mut completions = Vec::new();
        super::wait(self.link, &mut completions).unwrap();
        assert_eq!(completions, [Completion { token: operation.token, result: Ok(()) }]);
    }

    fn post(&mut self, token: u64) {
        let kind = [Kind::Read, Kind::Write, Kind::Write, Kind::Trim, Kind::Zero, Kind::Flush]
            [self.random.below(6) as usize];
        let range = self.range(kind);
        if self.flying.values().any(|other| other.range.start < range.end && range.start < other.range.end) {
            return;
        }
        let (start, end) = (range.start as usize, range.end as usize);
        let memory = Memory::new(end - start);
        match kind {
            Kind::Write => {
                let bytes: Vec<u8> = (start..end).map(|i| (i as u64 * 31 + token * 7) as u8).collect();
                memory.set(0, &bytes);
                self.model[start..end].copy_from_slice(&bytes);
            }
            Kind::Trim | Kind::Zero => self.model[start..end].fill(0),
            Kind::Read | Kind::Flush => {}
        }
        let len = range.end - range.start;
        let buf = matches!(kind, Kind::Read | Kind::Write).then(|| memory.buf().part(0, len as usize));
        self.link.post(Operation { kind, offset: range.start, len, buf, token }).unwrap();
        self.flying.insert(token, Flying { kind, range, memory });
    }

    fn range(&mut self, kind: Kind) -> Range<u64> {
        let unit = match kind {
            Kind::Flush => return 0..0,
            Kind::Trim | Kind::Zero => self.shape.hole,
            Kind::Read | Kind::Write => [1, 512, 4096, 4096][self.random.below(4) as usize],
        };
        // Lengths of all magnitudes.
        let limit = (unit << self.random.below(16)).min(self.shape.len_max).max(unit);
        let len = (1 + self.random.below(limit / unit)) * unit;
        let start = self.random.below((self.shape.size - len) / unit + 1) * unit;
        start..start + len
    }

    fn reap(&mut self) {
        let mut completions = Vec::new();
        super::wait(self.link, &mut completions).unwrap();
        for completion in completions {
            assert_eq!(completion.result, Ok(()));
            let flying = self.flying.remove(&completion.token).expect("a completion of what was posted");
            if flying.kind == Kind::Read {
                let (start, end) = (flying.range.start as usize, flying.range.end as usize);
                assert!(flying.memory.get(0, end - start) == self.model[start..end], "{:?}", flying.range);
            }
        }
    }

    fn read_all(&mut self) {
        let memory = Memory::new(self.model.len());
        self.one(Operation {
            kind: Kind::Read,
            offset: 0,
            len: self.shape.size,
            buf: Some(memory.buf()),
            token: u64::MAX,
        });
        assert!(memory.get(0, self.model.len()) == self.model, "the whole export");
    }
}
