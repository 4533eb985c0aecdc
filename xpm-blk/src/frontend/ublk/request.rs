//! Translates the kernel's request for a tag to an operation on the volume, and the result back. Names of
//! ublk are not used beyond this module.

use xpm_transport::io::{IoBuf, IoError, Kind};

/// `struct ublksrv_io_desc`, read from the memory that the kernel shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Operation in the low byte, flags above it.
    pub(super) op_flags: u32,
    /// Length in sectors.
    pub(super) sectors: u32,
    /// First sector; `u64::MAX` for a flush.
    pub(super) start: u64,
}

const OP_READ: u32 = 0;
const OP_WRITE: u32 = 1;
const OP_FLUSH: u32 = 2;
const OP_DISCARD: u32 = 3;
const OP_WRITE_ZEROES: u32 = 5;
/// `UBLK_IO_F_NOUNMAP`: zeros have to be written, the memory must not be freed.
const F_NOUNMAP: u32 = 1 << 15;

const SECTOR_SHIFT: u32 = 9;

/// A valid request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// In bytes; 0 for a flush.
    pub(super) offset: u64,
    /// In bytes; 0 for a flush.
    pub(super) len: u64,
}

impl Request {
    /// The request of a descriptor, within a device of `size` bytes and buffers of `io_len_max`.
    ///
    /// # Errors
    /// [`IoError::Invalid`] for a range outside of the device, [`IoError::Unsupported`] for an operation that
    /// the device's parameters do not offer.
    pub(super) fn decode(descriptor: Descriptor, size: u64, io_len_max: u64) -> Result<Request, IoError> {
        let kind = match descriptor.op_flags & 0xff {
            OP_READ => Kind::Read,
            OP_WRITE => Kind::Write,
            // The start sector of a flush is no place on the device.
            OP_FLUSH => return Ok(Request { kind: Kind::Flush, offset: 0, len: 0 }),
            OP_DISCARD => Kind::Trim,
            OP_WRITE_ZEROES if descriptor.op_flags & F_NOUNMAP == 0 => Kind::Trim,
            OP_WRITE_ZEROES => Kind::Zero,
            _ => return Err(IoError::Unsupported),
        };
        let len = u64::from(descriptor.sectors) << SECTOR_SHIFT;
        let offset = descriptor.start.checked_mul(1 << SECTOR_SHIFT).ok_or(IoError::Invalid)?;
        let end = offset.checked_add(len).ok_or(IoError::Invalid)?;
        let too_long = matches!(kind, Kind::Read | Kind::Write) && len > io_len_max;
        if len == 0 || end > size || too_long {
            return Err(IoError::Invalid);
        }
        Ok(Request { kind, offset, len })
    }

    /// The part of the tag's buffer that the request uses.
    pub(super) fn buffer(&self, whole: IoBuf) -> Option<IoBuf> {
        matches!(self.kind, Kind::Read | Kind::Write).then(|| whole.part(0, self.len as usize))
    }

    /// The result for the kernel: bytes done, or a negative errno.
    pub(super) fn answer(&self, result: Result<(), IoError>) -> i32 {
        match (result, self.kind) {
            (Ok(()), Kind::Read | Kind::Write) => self.len as i32,
            (Ok(()), Kind::Trim | Kind::Zero | Kind::Flush) => 0,
            (Err(error), _) => -error.errno(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;
    const IO_LEN_MAX: u64 = 1 << 17;

    fn decode(op_flags: u32, start: u64, sectors: u32) -> Result<Request, IoError> {
        Request::decode(Descriptor { op_flags, sectors, start }, SIZE, IO_LEN_MAX)
    }

    #[test]
    fn kinds() {
        let swap_flag = 1 << 16;
        let request = |kind| Ok(Request { kind, offset: 4096, len: 8192 });
        assert_eq!(decode(OP_READ, 8, 16), request(Kind::Read));
        assert_eq!(decode(OP_WRITE | swap_flag, 8, 16), request(Kind::Write));
        assert_eq!(decode(OP_DISCARD, 8, 16), request(Kind::Trim));
        assert_eq!(decode(OP_WRITE_ZEROES, 8, 16), request(Kind::Trim));
        assert_eq!(decode(OP_WRITE_ZEROES | F_NOUNMAP, 8, 16), request(Kind::Zero));
        assert_eq!(decode(4, 8, 16), Err(IoError::Unsupported));
    }

    #[test]
    fn a_flush_has_no_place() {
        assert_eq!(decode(OP_FLUSH, u64::MAX, 0), Ok(Request { kind: Kind::Flush, offset: 0, len: 0 }));
    }

    #[test]
    fn edges_of_the_device() {
        let last = SIZE / 512 - 1;
        assert!(decode(OP_READ, last, 1).is_ok());
        assert_eq!(decode(OP_READ, last, 2), Err(IoError::Invalid));
        assert_eq!(decode(OP_READ, u64::MAX, 1), Err(IoError::Invalid));
        assert_eq!(decode(OP_READ, 0, 0), Err(IoError::Invalid));
        assert_eq!(decode(OP_WRITE, 0, 257), Err(IoError::Invalid), "longer than a buffer");
        assert!(decode(OP_DISCARD, 0, (SIZE / 512) as u32).is_ok(), "the whole device at once");
    }

    #[test]
    fn answers() {
        let read = decode(OP_READ, 0, 8).unwrap();
        assert_eq!(read.answer(Ok(())), 4096);
        assert_eq!(read.answer(Err(IoError::Lost)), -libc::EIO);
        assert_eq!(decode(OP_DISCARD, 0, 8).unwrap().answer(Ok(())), 0);
    }

    proptest! {
        #[test]
        fn any_request_stays_within_the_device(op_flags: u32, start: u64, sectors: u32) {
            if let Ok(request) = decode(op_flags, start, sectors) {
                prop_assert!(request.offset + request.len <= SIZE);
                if matches!(request.kind, Kind::Read | Kind::Write) {
                    prop_assert!(request.len <= IO_LEN_MAX);
                }
            }
        }
    }
}
