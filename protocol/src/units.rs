//! Sizes and durations with their text forms.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::text::serde_as_text;

/// Length in bytes of a page, the smallest unit of devices and slabs.
pub const PAGE_LEN: u64 = 4096;
/// Smallest region, in bytes.
pub const REGION_LEN_MIN: u64 = 16 << 20;
/// Largest region, in bytes.
pub const REGION_LEN_MAX: u64 = 64 << 30;
/// Default region size, in bytes.
pub const REGION_LEN_DEFAULT: u64 = 256 << 20;

/// Whether `len` may be the length of a region: a power of two, 16 MiB to 64 GiB.
pub const fn is_region_len(len: u64) -> bool {
    len.is_power_of_two() && len >= REGION_LEN_MIN && len <= REGION_LEN_MAX
}

/// A number of bytes. Written `4096`, `64MiB`, `1.5GiB` or `2T`: the suffixes K, M, G, T, P, with or without `i` and
/// `B`, in either case, are powers of 1024, as is usual for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// The text is no size; with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size: {reason}; write it like 4096, 64MiB, 1.5GiB or 2T")]
pub struct ParseSizeError {
    text: String,
    reason: &'static str,
}

const SUFFIXES: [(&str, u32); 6] = [("", 0), ("k", 10), ("m", 20), ("g", 30), ("t", 40), ("p", 50)];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<ByteSize, ParseSizeError> {
        parse_size(text.trim())
            .map(ByteSize)
            .map_err(|reason| ParseSizeError { text: text.chars().take(80).collect(), reason })
    }
}

fn parse_size(text: &str) -> Result<u64, &'static str> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) || fraction.contains('.') {
        return Err("it does not start with a number");
    }
    if fraction.len() > 9 {
        return Err("it has more than nine decimal places");
    }
    let shift = suffix_shift(suffix.trim()).ok_or("its unit is unknown")?;
    let whole: u128 = whole.parse().map_err(|_| "it is too large")?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let fraction: u128 =
        if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| "its fraction is no number")? };
    let scaled = whole
        .checked_mul(scale)
        .and_then(|n| n.checked_add(fraction))
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or("it is too large")?;
    if scaled % scale != 0 {
        return Err("it is not a whole number of bytes");
    }
    u64::try_from(scaled / scale).map_err(|_| "it is too large")
}

fn suffix_shift(suffix: &str) -> Option<u32> {
    let suffix = suffix.to_ascii_lowercase();
    SUFFIXES.iter().find_map(|&(letter, shift)| {
        let forms = [letter.to_owned(), format!("{letter}b"), format!("{letter}ib")];
        let known = forms.iter().take(if letter.is_empty() { 2 } else { 3 }).any(|form| *form == suffix);
        known.then_some(shift)
    })
}

/// The exact size if it has a short form (`1.5GiB`), else rounded to two decimal places (`1.37GiB`). For people;
/// programs get the number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)]
            .into_iter()
            .find(|&(_, shift)| self.0 >= 1 << shift)
            .unwrap_or(("B", 0));
        let hundredths = (u128::from(self.0) * 100 + (1_u128 << shift) / 2) >> shift;
        let text = match (hundredths / 100, hundredths % 100) {
            (whole, 0) => format!("{whole}{unit}"),
            (whole, part) if part % 10 == 0 => format!("{whole}.{}{unit}", part / 10),
            (whole, part) => format!("{whole}.{part:02}{unit}"),
        };
        f.pad(&text)
    }
}

/// In JSON and TOML a size is a number of bytes, or a text such as `64MiB`.
impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096 or \"64MiB\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A duration, written `250ms`, `30s`, `5m`, `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span(pub Duration);

/// The text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a duration: write it like 250ms, 30s, 5m or 1h30m")]
pub struct ParseSpanError {
    text: String,
}

impl FromStr for Span {
    type Err = ParseSpanError;

    fn from_str(text: &str) -> Result<Span, ParseSpanError> {
        humantime::parse_duration(text)
            .map(Span)
            .map_err(|_| ParseSpanError { text: text.chars().take(80).collect() })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&humantime::format_duration(self.0).to_string())
    }
}

serde_as_text!(Span);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("64m", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2T", 2 << 40),
            ("1 GiB", 1 << 30),
            ("100B", 100),
            ("0.5KiB", 512),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
    }

    #[test]
    fn invalid_sizes_are_refused() {
        for text in ["", "GiB", "-1", "1.G", "1..5G", ".5G", "1X", "1iB", "17000P", "1.5B", "0x10", "1e3"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.to_string().contains("write it like"), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_short_or_rounded() {
        for (bytes, text) in [(0, "0B"), (1023, "1023B"), (3 << 29, "1.5GiB"), (1 << 40, "1TiB")] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        assert_eq!(ByteSize((1 << 30) + (5 << 20)).to_string(), "1GiB");
        assert_eq!(ByteSize(u64::MAX).to_string(), "16384PiB");
    }

    #[test]
    fn sizes_are_read_from_json_numbers_and_texts() {
        assert_eq!(serde_json::from_str::<ByteSize>("\"64MiB\"").unwrap(), ByteSize(64 << 20));
        assert_eq!(serde_json::from_str::<ByteSize>("512").unwrap(), ByteSize(512));
        assert!(serde_json::from_str::<ByteSize>("-1").is_err());
        assert!(serde_json::from_str::<ByteSize>("1.5").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<Span>();
        }

        #[test]
        fn whole_numbers_round_trip(bytes: u64) {
            prop_assert_eq!(bytes.to_string().parse::<ByteSize>().unwrap(), ByteSize(bytes));
        }
    }
}
