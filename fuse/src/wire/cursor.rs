//! Reading numbers and names off the front of a request.

use super::name::{NAME_LEN_MAX, Name};

/// The reason for which a request's bytes are not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// There are fewer bytes than the operation's fields need.
    #[error("the request ends within its fields")]
    TooShort,
    /// The header's length is not that of the bytes.
    #[error("the header says {said} bytes and there are {read}")]
    Length {
        /// The header's length, in bytes.
        said: u32,
        /// The bytes that were read.
        read: usize,
    },
    /// There are bytes behind the last name, or the data are not as long as their length says.
    #[error("the variable part has another length than its fields say")]
    Trailing,
    /// The extensions are longer than the request.
    #[error("the extensions are longer than the request")]
    Extensions,
    /// A name does not end with a NUL.
    #[error("a name has no end")]
    Unterminated,
    /// A name is empty, is "." or "..", or contains a slash.
    #[error("a name is empty, \".\", \"..\", or contains a slash")]
    Name,
    /// A name, or the target of a symbolic link, is longer than the kernel allows.
    #[error("a name is longer than {NAME_LEN_MAX} bytes, or a link's target longer than 4095")]
    NameTooLong,
    /// An offset, or an offset plus a length, is above 2^63 - 1.
    #[error("offset and length leave the range of a file's offsets")]
    Range,
    /// A field has a value that the protocol does not know.
    #[error("a field has an unknown value")]
    Value,
}

/// The bytes of a request that are not decoded yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Fault::TooShort)?;
        self.0 = rest;
        Ok(*array)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_ne_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_ne_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_ne_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64, Fault> {
        Ok(i64::from_ne_bytes(self.array()?))
    }

    /// Leaves out padding and fields that nobody needs.
    pub(super) fn skip(&mut self, len: usize) -> Result<(), Fault> {
        self.0 = self.0.get(len..).ok_or(Fault::TooShort)?;
        Ok(())
    }

    /// Whatever is left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    /// The rest, which must have exactly this length.
    pub(super) fn exactly(self, len: usize) -> Result<&'a [u8], Fault> {
        if self.0.len() == len { Ok(self.0) } else { Err(Fault::Trailing) }
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), Fault> {
        self.exactly(0).map(|_| ())
    }

    /// Bytes up to a NUL, at most so many.
    pub(super) fn text(&mut self, len_max: usize) -> Result<&'a [u8], Fault> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Fault::Unterminated)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        if text.len() > len_max { Err(Fault::NameTooLong) } else { Ok(text) }
    }

    /// The name of a file in a directory.
    pub(super) fn name(&mut self) -> Result<Name<'a>, Fault> {
        let name = Name::new(self.text(NAME_LEN_MAX)?)?;
        if name.is_dots() { Err(Fault::Name) } else { Ok(name) }
    }

    /// The last name.
    pub(super) fn last_name(mut self) -> Result<Name<'a>, Fault> {
        let name = self.name()?;
        self.end()?;
        Ok(name)
    }
}
