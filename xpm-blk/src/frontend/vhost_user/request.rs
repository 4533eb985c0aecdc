//! Translates the memory of a chain to operations on the volume. Names of virtio-blk are not used beyond this
//! module (virtio 1.2, 5.2.6).

use xpm_transport::io::{IoBuf, IoError, Kind};

use super::chain::{PIECES_MAX, Pieces};

/// The result of a request, as its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub(super) u8);

impl Status {
    pub(super) const OK: Status = Status(0);
    pub(super) const FAILED: Status = Status(1);
    pub(super) const UNSUPPORTED: Status = Status(2);

    /// The status for the result of an operation.
    pub(super) const fn of(result: Result<(), IoError>) -> Status {
        match result {
            Ok(()) => Status::OK,
            Err(IoError::Unsupported) => Status::UNSUPPORTED,
            Err(
                IoError::Unreachable
                | IoError::Lost
                | IoError::Fenced
                | IoError::NoSpace
                | IoError::Invalid
                | IoError::BadMemory
                | IoError::Failed,
            ) => Status::FAILED,
        }
    }
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`: the memory may be freed.
const FLAG_UNMAP: u32 = 1;

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;
/// Length of the field for the device's name in bytes.
pub(super) const ID_LEN: usize = 20;
/// Most ranges of one discard or write-zeroes request; the guest receives this number.
pub(super) const RANGES_MAX: u32 = 32;

const SECTOR_SHIFT: u32 = 9;
const SECTOR_LEN: u64 = 1 << SECTOR_SHIFT;

/// An operation of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) buf: Option<IoBuf>,
}

/// Most parts of a request.
pub(super) const PARTS_MAX: usize = PIECES_MAX;

/// The result of decoding a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The parts have to be posted; they write `written` bytes of guest memory.
    Post { written: u32 },
    /// The request has ended, and `written` bytes of guest memory were written.
    Ended { status: Status, written: u32 },
}

const fn failed(status: Status) -> Outcome {
    Outcome::Ended { status, written: 0 }
}

/// Decodes a request to a device of `size` bytes that is called `id`. Puts the operations to be posted into
/// `parts`.
pub(super) fn decode(pieces: &Pieces, size: u64, id: &[u8; ID_LEN], parts: &mut Vec<Part>) -> Outcome {
    parts.clear();
    let mut header = [0; HEADER_LEN];
    let mut input = Reader { pieces: &pieces.readable, start: 0 };
    if pieces.faulty || !input.read(&mut header) {
        return failed(Status::FAILED);
    }
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let offset = u64::from_le_bytes(sector).checked_mul(SECTOR_LEN);
    let decoded = match u32::from_le_bytes([t0, t1, t2, t3]) {
        T_IN => data(Kind::Read, offset, size, &Reader { pieces: &pieces.writable, start: 0 }, parts),
        T_OUT => data(Kind::Write, offset, size, &input, parts).map(|_| 0),
        T_FLUSH => {
            parts.push(Part { kind: Kind::Flush, offset: 0, len: 0, buf: None });
            Ok(0)
        }
        T_GET_ID => return tell_id(&pieces.writable, id),
        T_DISCARD => ranges(false, size, input, parts),
        T_WRITE_ZEROES => ranges(true, size, input, parts),
        _ => Err(Status::UNSUPPORTED),
    };
    match decoded {
        Ok(written) => Outcome::Post { written },
        Err(status) => {
            parts.clear();
            failed(status)
        }
    }
}

/// Reads the bytes of several pieces, one after the other.
struct Reader<'a> {
    pieces: &'a [IoBuf],
    /// Bytes of the first piece that were read already.
    start: usize,
}

impl Reader<'_> {
    /// Fills `bytes`; returns false if there are not enough bytes.
    fn read(&mut self, mut bytes: &mut [u8]) -> bool {
        while !bytes.is_empty() {
            let Some((&first, rest)) = self.pieces.split_first() else { return false };
            let len = bytes.len().min(first.len() - self.start);
            let (now, later) = bytes.split_at_mut(len);
            first.part(self.start, len).copy_to_slice(now);
            bytes = later;
            self.start += len;
            if self.start == first.len() {
                *self = Reader { pieces: rest, start: 0 };
            }
        }
        true
    }

    fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum::<u64>() - self.start as u64
    }

    /// The unread bytes, piece by piece.
    fn rest(&self) -> impl Iterator<Item = IoBuf> {
        let part = |(index, piece): (usize, &IoBuf)| match index {
            0 => piece.part(self.start, piece.len() - self.start),
            _ => *piece,
        };
        self.pieces.iter().enumerate().map(part)
    }
}

/// Adds the operations of a read or write. Returns the bytes of guest memory that a read writes on success.
fn data(
    kind: Kind,
    offset: Option<u64>,
    size: u64,
    buffers: &Reader<'_>,
    parts: &mut Vec<Part>,
) -> Result<u32, Status> {
    let len = buffers.len();
    let end = offset.and_then(|offset| offset.checked_add(len)).ok_or(Status::FAILED)?;
    let written = u32::try_from(len).map_err(|_| Status::FAILED)?;
    if len == 0 || !len.is_multiple_of(SECTOR_LEN) || end > size {
        return Err(Status::FAILED);
    }
    let mut offset = end - len;
    for buf in buffers.rest() {
        let len = buf.len() as u64;
        parts.push(Part { kind, offset, len, buf: Some(buf) });
        offset += len;
    }
    Ok(written)
}

fn ranges(zeroes: bool, size: u64, mut input: Reader<'_>, parts: &mut Vec<Part>) -> Result<u32, Status> {
    let (len, each) = (input.len(), SEGMENT_LEN as u64);
    if len == 0 || !len.is_multiple_of(each) || len / each > u64::from(RANGES_MAX) {
        return Err(Status::FAILED);
    }
    let mut segment = [0; SEGMENT_LEN];
    while input.read(&mut segment) {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
        let flags = u32::from_le_bytes(flags);
        let kind = match (zeroes, flags) {
            (false, 0) | (true, FLAG_UNMAP) => Kind::Trim,
            (true, 0) => Kind::Zero,
            _ => return Err(Status::UNSUPPORTED),
        };
        let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) << SECTOR_SHIFT;
        let offset = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_mul(SECTOR_LEN);
        let end = offset.and_then(|offset| offset.checked_add(len)).ok_or(Status::FAILED)?;
        if len == 0 || end > size {
            return Err(Status::FAILED);
        }
        parts.push(Part { kind, offset: end - len, len, buf: None });
    }
    Ok(0)
}

fn tell_id(buffers: &[IoBuf], id: &[u8; ID_LEN]) -> Outcome {
    let mut left = id.as_slice();
    for buffer in buffers {
        let (now, later) = left.split_at(left.len().min(buffer.len()));
        buffer.part(0, now.len()).copy_from_slice(now);
        left = later;
    }
    Outcome::Ended { status: Status::OK, written: (ID_LEN - left.len()) as u32 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ring::Features;
    use super::super::ring::tests::Driver;
    use super::*;

    const SIZE: u64 = 1 << 30;
    const ID: &[u8; ID_LEN] = b"data\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    /// Decodes a request with this input, and with writable buffers of these lengths before its status.
    fn run(input: &[u8], output: &[u32]) -> (Outcome, Vec<Part>) {
        run_in(&Driver::new(16), input, output)
    }

    fn run_in(driver: &Driver, input: &[u8], output: &[u32]) -> (Outcome, Vec<Part>) {
        driver.write(0x8000, input);
        let mut buffers = vec![(0x8000, input.len() as u32, false)];
        buffers.extend(output.iter().zip(1..).map(|(len, place)| (0x8000 + place * 0x4000, *len, true)));
        buffers.push((0x7000, 1, true));
        driver.chain(0, &buffers);
        let mut pieces = Pieces::new();
        pieces.walk(&driver.ring(Features::default()), &driver.memory, 0).unwrap();
        let mut parts = Vec::new();
        let outcome = decode(&pieces, SIZE, ID, &mut parts);
        (outcome, parts)
    }

    fn shape(parts: &[Part]) -> Vec<(Kind, u64, u64)> {
        parts.iter().map(|part| (part.kind, part.offset, part.len)).collect()
    }

    #[test]
    fn reads_and_writes() {
        let (outcome, parts) = run(&header(T_IN, 8), &[4096, 512]);
        assert_eq!(outcome, Outcome::Post { written: 4608 });
        assert_eq!(shape(&parts), [(Kind::Read, 4096, 4096), (Kind::Read, 8192, 512)]);
        let driver = Driver::new(16);
        let (outcome, parts) = run_in(&driver, &[header(T_OUT, 1), vec![7; 1024]].concat(), &[]);
        assert_eq!(outcome, Outcome::Post { written: 0 });
        assert_eq!(shape(&parts), [(Kind::Write, 512, 1024)]);
        let mut first = [0; 1024];
        parts[0].buf.unwrap().copy_to_slice(&mut first);
        assert_eq!(first, [7; 1024], "what follows the header in the same buffer");
    }

    #[test]
    fn others() {
        let (outcome, parts) = run(&header(T_FLUSH, u64::MAX), &[]);
        assert_eq!(outcome, Outcome::Post { written: 0 });
        assert_eq!(shape(&parts), [(Kind::Flush, 0, 0)]);
        let two = [header(T_DISCARD, 0), segment(8, 8, 0), segment(80, 1, 0)].concat();
        assert_eq!(shape(&run(&two, &[]).1), [(Kind::Trim, 4096, 4096), (Kind::Trim, 40960, 512)]);
        let zeroes = |flags| [header(T_WRITE_ZEROES, 0), segment(8, 8, flags)].concat();
        assert_eq!(shape(&run(&zeroes(0), &[]).1), [(Kind::Zero, 4096, 4096)]);
        assert_eq!(shape(&run(&zeroes(FLAG_UNMAP), &[]).1), [(Kind::Trim, 4096, 4096)]);
        assert_eq!(run(&zeroes(2), &[]).0, failed(Status::UNSUPPORTED));
        assert_eq!(run(&header(99, 0), &[]).0, failed(Status::UNSUPPORTED));
        let ended = |written| Outcome::Ended { status: Status::OK, written };
        assert_eq!(run(&header(T_GET_ID, 0), &[20]).0, ended(20));
        assert_eq!(run(&header(T_GET_ID, 0), &[3, 2]).0, ended(5));
    }

    #[test]
    fn invalid_requests_fail() {
        let last = SIZE / 512 - 1;
        assert!(matches!(run(&header(T_IN, last), &[512]).0, Outcome::Post { .. }));
        let range = |sector, sectors| [header(T_DISCARD, 0), segment(sector, sectors, 0)].concat();
        for (what, input, output) in [
            ("beyond the end", header(T_IN, last), vec![1024]),
            ("far beyond the end", header(T_IN, u64::MAX), vec![512]),
            ("no data", header(T_IN, 0), vec![]),
            ("half a sector", header(T_IN, 0), vec![256]),
            ("a short header", header(T_IN, 0)[..15].to_vec(), vec![512]),
            ("no header", vec![], vec![512]),
            ("no ranges", header(T_DISCARD, 0), vec![]),
            ("half a range", range(0, 8)[..24].to_vec(), vec![]),
            ("an empty range", range(0, 0), vec![]),
            ("a range beyond the end", range(last, 2), vec![]),
            ("a range beyond all", range(u64::MAX, 2), vec![]),
            ("too many ranges", [header(T_DISCARD, 0), segment(0, 8, 0).repeat(33)].concat(), vec![]),
        ] {
            let (outcome, parts) = run(&input, &output);
            assert_eq!(outcome, failed(Status::FAILED), "{what}");
            assert!(parts.is_empty(), "{what}");
        }
    }

    #[test]
    fn errors_have_a_status() {
        assert_eq!(Status::of(Ok(())), Status::OK);
        assert_eq!(Status::of(Err(IoError::Lost)), Status::FAILED);
        assert_eq!(Status::of(Err(IoError::Unsupported)), Status::UNSUPPORTED);
    }

    proptest! {
        #[test]
        fn any_request_stays_within_the_device(
            kind in prop_oneof![0..16_u32, any::<u32>()],
            sector in prop_oneof![0..(SIZE / 512 + 10), any::<u64>()],
            body in prop::collection::vec(any::<u8>(), 0..2048),
            output in prop::collection::vec(0..2048_u32, 0..8),
        ) {
            let (outcome, parts) = run(&[header(kind, sector), body].concat(), &output);
            prop_assert!(parts.iter().all(|part| part.offset + part.len <= SIZE));
            prop_assert!(parts.len() <= PARTS_MAX);
            prop_assert_eq!(matches!(outcome, Outcome::Post { .. }), !parts.is_empty());
            for part in &parts {
                prop_assert_eq!(part.buf.is_some(), matches!(part.kind, Kind::Read | Kind::Write));
                prop_assert!(part.buf.is_none_or(|buf| buf.len() as u64 == part.len));
            }
        }
    }
}
