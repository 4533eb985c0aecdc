//! The logical block size of an allocation.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::serde_as_text;

/// The logical block size of an allocation, the same for every device form. Partition tables and file systems count
/// in blocks: they are unreadable on a device with the other size. A number of bytes in JSON and TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum BlockSize {
    /// 512 bytes: for data from such a device, and for disks that a BIOS boots from.
    B512,
    /// 4096 bytes, a page.
    #[default]
    B4096,
}

/// The number is no block size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no block size: it is 512 or 4096")]
pub struct ParseBlockSizeError(String);

impl BlockSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            BlockSize::B512 => 512,
            BlockSize::B4096 => 4096,
        }
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = ParseBlockSizeError;

    fn try_from(bytes: u32) -> Result<BlockSize, ParseBlockSizeError> {
        match bytes {
            512 => Ok(BlockSize::B512),
            4096 => Ok(BlockSize::B4096),
            _ => Err(ParseBlockSizeError(bytes.to_string())),
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.bytes()
    }
}

impl FromStr for BlockSize {
    type Err = ParseBlockSizeError;

    fn from_str(text: &str) -> Result<BlockSize, ParseBlockSizeError> {
        let unknown = || ParseBlockSizeError(text.chars().take(20).collect());
        text.parse::<u32>().map_err(|_| unknown())?.try_into().map_err(|_| unknown())
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// A client's wish for the block size, when it attaches an allocation as a block device. Written `kept`, `512` or
/// `4096`.
///
/// A client without a wish shows no block device, or is of a version that chose the size by the form
/// ([`Form::block_size_of_before`](crate::api::blk::Form::block_size_of_before)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockWish {
    /// The block size that the allocation has.
    Kept,
    /// This block size, by order of the operator.
    Is(BlockSize),
}

impl FromStr for BlockWish {
    type Err = ParseBlockSizeError;

    fn from_str(text: &str) -> Result<BlockWish, ParseBlockSizeError> {
        match text {
            "kept" => Ok(BlockWish::Kept),
            size => size.parse().map(BlockWish::Is),
        }
    }
}

impl fmt::Display for BlockWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockWish::Kept => f.write_str("kept"),
            BlockWish::Is(size) => size.fmt(f),
        }
    }
}

serde_as_text!(BlockWish);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_numbers_are_block_sizes_in_json() {
        assert_eq!(serde_json::to_string(&BlockSize::B512).unwrap(), "512");
        assert_eq!(serde_json::from_str::<BlockSize>("4096").unwrap(), BlockSize::B4096);
        assert!(serde_json::from_str::<BlockSize>("1024").unwrap_err().to_string().contains("512 or 4096"));
        assert!("4k".parse::<BlockSize>().is_err());
        for text in ["kept", "512", "4096"] {
            assert_eq!(text.parse::<BlockWish>().unwrap().to_string(), text);
        }
    }
}
