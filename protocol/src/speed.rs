//! Speeds of links, and percentages, with their text forms.

use std::fmt;
use std::str::FromStr;

use crate::text::serde_as_text;

/// The speed of a network link in bits per second. Written `10Gbps`, `2.5Gbps`, `100Mbps`, in powers of 1000, as
/// usual for links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LinkSpeed(pub u64);

/// A part of a whole in percent, 0 to 100. Written `25%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Percent(u8);

/// The text is no speed or no percentage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseSpeedError {
    text: String,
    expected: &'static str,
}

impl ParseSpeedError {
    fn new(text: &str, expected: &'static str) -> ParseSpeedError {
        ParseSpeedError { text: text.chars().take(80).collect(), expected }
    }
}

const UNITS: [(&str, u32); 4] = [("T", 12), ("G", 9), ("M", 6), ("K", 3)];

impl FromStr for LinkSpeed {
    type Err = ParseSpeedError;

    fn from_str(text: &str) -> Result<LinkSpeed, ParseSpeedError> {
        parse_speed(text)
            .ok_or_else(|| ParseSpeedError::new(text, "a link speed: write it like 10Gbps or 2.5Gbps"))
    }
}

fn parse_speed(text: &str) -> Option<LinkSpeed> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(split);
    let unit = unit.trim();
    let unit = ["bps", "bit/s", "bit"].into_iter().find_map(|end| unit.strip_suffix(end))?;
    let zeros = match unit {
        "" => 0,
        _ => UNITS.into_iter().find(|(letter, _)| letter.eq_ignore_ascii_case(unit))?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() as u32 > zeros || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let digits: u64 = format!("{whole}{fraction}").parse().ok()?;
    digits.checked_mul(10_u64.checked_pow(zeros - fraction.len() as u32)?).map(LinkSpeed)
}

/// Exact, in the largest unit in which the number has at most one decimal place.
impl fmt::Display for LinkSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |zeros: u32| self.0 >= 10_u64.pow(zeros) && self.0.is_multiple_of(10_u64.pow(zeros - 1));
        let text = match UNITS.into_iter().find(|&(_, zeros)| exact(zeros)) {
            None => format!("{}bps", self.0),
            Some((letter, zeros)) => {
                match (self.0 / 10_u64.pow(zeros), self.0 / 10_u64.pow(zeros - 1) % 10) {
                    (whole, 0) => format!("{whole}{letter}bps"),
                    (whole, tenth) => format!("{whole}.{tenth}{letter}bps"),
                }
            }
        };
        f.pad(&text)
    }
}

impl Percent {
    /// A percentage, if the number is 0 to 100.
    pub const fn new(percent: u8) -> Option<Percent> {
        if percent <= 100 { Some(Percent(percent)) } else { None }
    }

    /// The number, 0 to 100.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// This percentage of `whole`, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        (u128::from(whole) * u128::from(self.0) / 100) as u64
    }
}

impl FromStr for Percent {
    type Err = ParseSpeedError;

    fn from_str(text: &str) -> Result<Percent, ParseSpeedError> {
        let number = text.trim().strip_suffix('%').and_then(|number| number.trim_end().parse().ok());
        number.and_then(Percent::new).ok_or_else(|| {
            ParseSpeedError::new(text, "a share of 0% to 100%: write it as a whole percentage like 25%")
        })
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

serde_as_text!(LinkSpeed, Percent);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn speeds_are_parsed_and_printed() {
        for (text, bits, shown) in [
            ("10Gbps", 10_000_000_000, "10Gbps"),
            ("2.5Gbit", 2_500_000_000, "2.5Gbps"),
            ("100Mbit/s", 100_000_000, "100Mbps"),
            ("1 gbps", 1_000_000_000, "1Gbps"),
            ("1234567bps", 1_234_567, "1234567bps"),
            ("0bps", 0, "0bps"),
        ] {
            assert_eq!(text.parse::<LinkSpeed>().unwrap(), LinkSpeed(bits), "{text}");
            assert_eq!(LinkSpeed(bits).to_string(), shown);
        }
        for bad in ["", "10", "Gbps", "10GBps", "1.Gbps", "1.5bps", "-1Gbps", "99999999999Tbps", "10 G"] {
            assert!(bad.parse::<LinkSpeed>().is_err(), "{bad}");
        }
    }

    #[test]
    fn percentages_are_parsed_and_printed() {
        assert_eq!("25%".parse::<Percent>().unwrap().of(1000), 250);
        assert_eq!("100 %".parse::<Percent>().unwrap().of(u64::MAX), u64::MAX);
        for bad in ["25", "101%", "-1%", "1.5%", "%"] {
            assert!(bad.parse::<Percent>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn speeds_round_trip(bits: u64) {
            prop_assert_eq!(LinkSpeed(bits).to_string().parse::<LinkSpeed>().unwrap(), LinkSpeed(bits));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,30}") {
            let _ = text.parse::<LinkSpeed>();
            let _ = text.parse::<Percent>();
        }
    }
}
