//! The secret of a grant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The secret key of a grant: 256 random bits. Whoever knows it can use the grant's regions, so `Debug` never prints
/// it; only [`GrantKey::reveal`] gives its text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct GrantKey([u8; 32]);

/// The text is no grant key. The error does not repeat the text, which may be most of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a grant key (64 hexadecimal digits)")]
pub struct ParseKeyError;

impl GrantKey {
    /// Placeholder for a hidden key. No grant has it.
    pub const NONE: GrantKey = GrantKey([0; 32]);

    /// The key with these bytes, which must come from a cryptographic random source.
    pub const fn from_bytes(bytes: [u8; 32]) -> GrantKey {
        GrantKey(bytes)
    }

    /// The bytes of the key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key as 64 hexadecimal digits, for the wire and for files of mode 0600.
    pub fn reveal(&self) -> String {
        self.0.iter().fold(String::with_capacity(64), |mut text, byte| {
            for nibble in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
            }
            text
        })
    }
}

impl fmt::Debug for GrantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrantKey(secret)")
    }
}

impl FromStr for GrantKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<GrantKey, ParseKeyError> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(ParseKeyError);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(GrantKey(bytes))
    }
}

fn nibble(digit: u8) -> Result<u8, ParseKeyError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(ParseKeyError),
    }
}

impl Serialize for GrantKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.reveal())
    }
}

impl<'de> Deserialize<'de> for GrantKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GrantKey, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_round_trips_and_does_not_leak() {
        let key = GrantKey::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(key.reveal().parse::<GrantKey>().unwrap(), key);
        assert_eq!(key.reveal().to_uppercase().parse::<GrantKey>().unwrap(), key);
        assert!(!format!("{key:?}").contains(&key.reveal()[..8]));
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(63), &"0".repeat(65)] {
            assert_eq!(bad.parse::<GrantKey>(), Err(ParseKeyError));
        }
    }
}
