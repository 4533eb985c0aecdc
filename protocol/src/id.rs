//! Ids: 128-bit numbers written as 32 hexadecimal digits, the epoch, and names that people give.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::text::serde_as_text;

/// The text is not a valid id, name or number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseIdError {
    text: String,
    expected: &'static str,
}

/// Longest part of a refused text that an error repeats, in characters.
const SHOWN_MAX: usize = 80;

impl ParseIdError {
    fn new(text: &str, expected: &'static str) -> ParseIdError {
        ParseIdError { text: text.chars().take(SHOWN_MAX).collect(), expected }
    }
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// The id with this number. The caller provides random numbers: this crate makes none.
            pub const fn from_u128(number: u128) -> $name {
                $name(number)
            }

            /// The number of the id.
            pub const fn as_u128(self) -> u128 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<$name, ParseIdError> {
                let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                match u128::from_str_radix(text, 16) {
                    Ok(number) if digits => Ok($name(number)),
                    _ => Err(ParseIdError::new(text, $expected)),
                }
            }
        }

        serde_as_text!($name);
    };
}

hex_id!(
    /// An appliance, for as long as its state directory exists.
    ApplianceId,
    "an appliance id (32 hexadecimal digits)"
);
hex_id!(
    /// A region on an appliance; never reused.
    RegionId,
    "a region id (32 hexadecimal digits)"
);
hex_id!(
    /// An allocation. Its name may be reused after it is deleted, its id never.
    AllocationId,
    "an allocation id (32 hexadecimal digits)"
);
hex_id!(
    /// A client's memory on one appliance for one allocation.
    GrantId,
    "a grant id (32 hexadecimal digits)"
);
hex_id!(
    /// A client: a process on some machine that uses external memory.
    ClientId,
    "a client id (32 hexadecimal digits)"
);
hex_id!(
    /// The metadata of one pool, from their creation on; a copy of them has the same id.
    PoolId,
    "a pool id (32 hexadecimal digits)"
);
hex_id!(
    /// A running kernel: `/proc/sys/kernel/random/boot_id` without its dashes. Two processes that read the same id
    /// can share memory.
    HostId,
    "a host id (32 hexadecimal digits)"
);

hex_id!(
    /// A request for an allocation; the requester makes the id. With the same id it is the same request when it is
    /// repeated, and a cancelled request stays cancelled.
    RequestId,
    "a request id (32 hexadecimal digits)"
);
hex_id!(
    /// A hand-over of allocations from a client to another one that stands by.
    HandoverId,
    "a hand-over id (32 hexadecimal digits)"
);
hex_id!(
    /// A machine: a hash of its `/etc/machine-id`, which itself must not be shown to others (machine-id(5)).
    MachineId,
    "a machine id (32 hexadecimal digits)"
);
hex_id!(
    /// A state directory: the random number that was written into it when it was made; a copy has the same one. 0: a
    /// program without a state directory.
    InstallationId,
    "an installation id (32 hexadecimal digits)"
);
hex_id!(
    /// The right to serve with one state directory on one running kernel: a hash of the boot id and of the locked
    /// file. At most one process has it at a time. A copy of the directory has another one, and so has another
    /// kernel.
    SeatId,
    "a seat id (32 hexadecimal digits)"
);

/// Counter of an allocation's ownership. It starts at 1 and only grows; an appliance refuses access with an older
/// epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a new allocation.
    pub const FIRST: Epoch = Epoch(1);

    /// The epoch of the next owner.
    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A name that a person gave to an object, such as an allocation or an appliance: 1 to 64 of `A-Z a-z 0-9 . _ -`, not
/// starting with a dot or a dash, so that it is safe in a path, a unit name and a URL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

impl Name {
    /// Longest name, in bytes.
    pub const LEN_MAX: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Name, ParseIdError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let first = text.bytes().next();
        if text.len() > Name::LEN_MAX
            || matches!(first, None | Some(b'.' | b'-'))
            || !text.bytes().all(allowed)
        {
            return Err(ParseIdError::new(
                text,
                "a name (1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot or a dash)",
            ));
        }
        Ok(Name(text.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_exactly_32_hex_digits() {
        let id = RegionId::from_u128(0xab);
        assert_eq!(id.to_string(), format!("{}ab", "0".repeat(30)));
        assert_eq!(id.to_string().parse::<RegionId>().unwrap(), id);
        let long = "0".repeat(33);
        let signed = format!("+{}", "0".repeat(31));
        for bad in ["", "ab", long.as_str(), signed.as_str(), "zz"] {
            assert!(bad.parse::<RegionId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_safe_in_paths() {
        for good in ["a", "swap0", "db-1.data_2", &"x".repeat(64)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Name>("\"../etc\"").is_err());
    }
}
