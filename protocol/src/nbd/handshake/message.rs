//! The messages of the handshake as bytes.

use crate::nbd::constants::*;

/// Reads big-endian numbers and strings from a message.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.chunk().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_be_bytes)
    }

    /// A string that follows its 32-bit length.
    pub(super) fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        string(self.take(len)?)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A valid string of the protocol: UTF-8 without NUL, of limited length.
pub(super) fn string(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| is_string(text))
}

pub(super) fn is_string(text: &str) -> bool {
    text.len() <= STRING_MAX && !text.contains('\0')
}

/// Appends a length and the string. Callers pass checked or short texts.
pub(super) fn put_string(output: &mut Vec<u8>, text: &str) {
    output.extend((text.len() as u32).to_be_bytes());
    output.extend_from_slice(text.as_bytes());
}

pub(super) fn put_option(output: &mut Vec<u8>, option: u32, data: &[u8]) {
    output.extend(OPTION_MAGIC.to_be_bytes());
    output.extend(option.to_be_bytes());
    output.extend((data.len() as u32).to_be_bytes());
    output.extend_from_slice(data);
}

pub(super) fn put_reply(output: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    output.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    output.extend(option.to_be_bytes());
    output.extend(kind.to_be_bytes());
    output.extend((data.len() as u32).to_be_bytes());
    output.extend_from_slice(data);
}

/// The data of `OPT_INFO` and `OPT_GO`: an export's name, and the kinds of information requested.
pub(super) fn parse_info(data: &[u8]) -> Option<(String, Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?.to_owned();
    let count = reader.u16()?;
    let asks = (0..count).map(|_| reader.u16()).collect::<Option<Vec<u16>>>()?;
    reader.is_empty().then_some((name, asks))
}

/// The data of the options on metadata contexts: an export's name, and queries.
pub(super) fn parse_contexts(data: &[u8]) -> Option<(String, Vec<&str>)> {
    let mut reader = Reader(data);
    let export = reader.string()?.to_owned();
    let count = reader.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(reader.string()?);
    }
    reader.is_empty().then_some((export, queries))
}
