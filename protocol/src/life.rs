//! Lives: an allocation is owned by a client on one machine in one of its lives, which is more exact than the
//! client's id. A copy of a client's state directory has the same client id, but another machine or another seat.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{InstallationId, MachineId, ParseIdError, SeatId};
use crate::text::serde_as_text;

/// Longest host name of a visitor, in bytes.
const HOST_NAME_MAX: usize = 64;

/// A life of a client. Written as `MACHINE.INSTALLATION.SEAT.NUMBER`: three times 32 hexadecimal digits, and a
/// decimal number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Life {
    /// The machine that it runs on.
    pub machine: MachineId,
    /// Its state directory, or a copy of it.
    pub installation: InstallationId,
    /// Its state directory on the running kernel; a copy has another seat.
    pub seat: SeatId,
    /// Number of the start with this state directory, from 1. It is on disk before it is used. 0 without a state
    /// directory.
    pub number: u64,
}

/// Relation of a life to the life that holds an allocation.
///
/// ```text
///                   same machine and installation?
///                    no /                 \ yes
///                Stranger              same seat?
///                                 yes /          \ no
///                      number is lower?       number is higher, or there are no numbers?
///                      yes /      \ no           yes /            \ no
///                      Past       Same        IfEnded             Copy
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// The same life, or a later one under the lock of the same state directory: the earlier process has ended,
    /// because only one process can have the lock.
    Same,
    /// An earlier life: a later one has had the lock since.
    Past,
    /// The machine was restarted, or this is a copy of the whole machine. The life may follow only if the holding
    /// life has ended.
    IfEnded,
    /// A copy: another life has used this number already.
    Copy,
    /// Another machine, or another installation with the same client id.
    Stranger,
}

impl Life {
    /// The relation of `self` to `holder`.
    pub fn after(&self, holder: &Life) -> Succession {
        if (self.machine, self.installation) != (holder.machine, holder.installation) {
            return Succession::Stranger;
        }
        if self.seat == holder.seat {
            return if self.number < holder.number { Succession::Past } else { Succession::Same };
        }
        let is_counted = self.installation.as_u128() != 0;
        if !is_counted || self.number > holder.number { Succession::IfEnded } else { Succession::Copy }
    }

    /// The machine, by its first digits, and the number of the life, for people.
    pub fn shown(&self) -> String {
        let machine = self.machine.to_string();
        let machine = &machine[..8];
        match self.installation.as_u128() {
            0 => format!("machine {machine}"),
            _ => format!("machine {machine}, life {}", self.number),
        }
    }
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}.{}", self.machine, self.installation, self.seat, self.number)
    }
}

/// The text is no life.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a life (MACHINE.INSTALLATION.SEAT.NUMBER)")]
pub struct ParseLifeError;

impl From<ParseIdError> for ParseLifeError {
    fn from(_: ParseIdError) -> ParseLifeError {
        ParseLifeError
    }
}

impl FromStr for Life {
    type Err = ParseLifeError;

    fn from_str(text: &str) -> Result<Life, ParseLifeError> {
        let mut parts = text.split('.');
        let mut next = || parts.next().ok_or(ParseLifeError);
        let life = Life {
            machine: next()?.parse()?,
            installation: next()?.parse()?,
            seat: next()?.parse()?,
            number: next()?.parse().map_err(|_| ParseLifeError)?,
        };
        // The parser of numbers also accepts a sign and leading zeros.
        let is_canonical = parts.next().is_none() && life.to_string() == text.to_ascii_lowercase();
        if is_canonical { Ok(life) } else { Err(ParseLifeError) }
    }
}

serde_as_text!(Life);

/// A life that asks for access, with the name of its host. Written as the life, a space, and the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visitor {
    /// The life.
    pub life: Life,
    /// Its host, for people: at most 64 bytes, without control characters.
    pub host_name: String,
}

impl Visitor {
    /// A visitor; the name is cut to the allowed length.
    pub fn new(life: Life, host_name: &str) -> Visitor {
        let mut name = String::new();
        for one in host_name.chars().filter(|one| !one.is_control()) {
            if name.len() + one.len_utf8() > HOST_NAME_MAX {
                break;
            }
            name.push(one);
        }
        Visitor { life, host_name: name }
    }

    /// The host, the machine and the life, for people.
    pub fn shown(&self) -> String {
        format!("{} ({})", self.host_name, self.life.shown())
    }
}

impl fmt::Display for Visitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.life, self.host_name)
    }
}

impl FromStr for Visitor {
    type Err = ParseLifeError;

    fn from_str(text: &str) -> Result<Visitor, ParseLifeError> {
        let (life, host_name) = text.split_once(' ').ok_or(ParseLifeError)?;
        Ok(Visitor::new(life.parse()?, host_name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn life(machine: u128, installation: u128, seat: u128, number: u64) -> Life {
        Life {
            machine: MachineId::from_u128(machine),
            installation: InstallationId::from_u128(installation),
            seat: SeatId::from_u128(seat),
            number,
        }
    }

    #[test]
    fn only_a_life_with_the_same_lock_follows_at_once() {
        let holder = life(1, 2, 3, 5);
        for (other, is) in [
            (life(1, 2, 3, 5), Succession::Same),
            (life(1, 2, 3, 6), Succession::Same),
            (life(1, 2, 3, 4), Succession::Past),
            (life(1, 2, 4, 6), Succession::IfEnded),
            (life(1, 2, 4, 5), Succession::Copy),
            (life(1, 2, 4, 4), Succession::Copy),
            (life(9, 2, 3, 6), Succession::Stranger),
            (life(1, 9, 3, 6), Succession::Stranger),
        ] {
            assert_eq!(other.after(&holder), is, "{other}");
        }
        assert_eq!(life(1, 0, 4, 0).after(&life(1, 0, 3, 0)), Succession::IfEnded, "it has no numbers");
    }

    #[test]
    fn golden_text() {
        let visitor = Visitor::new(life(0xab, 1, 2, 17), "web1\n\u{7}");
        let zeros = "0".repeat(31);
        let text = format!("{}ab.{zeros}1.{zeros}2.17 web1", "0".repeat(30));
        assert_eq!(visitor.to_string(), text);
        assert_eq!(text.parse::<Visitor>().unwrap(), visitor);
        let bad = [text.replace(".17", ".+17"), text.replace(".17", ".17.1"), text.replace(' ', "")];
        for bad in bad.iter().map(String::as_str).chain(["", "1.2.3.4 a"]) {
            assert!(bad.parse::<Visitor>().is_err(), "{bad}");
        }
        assert_eq!(Visitor::new(visitor.life, &"\u{e4}".repeat(100)).host_name.len(), HOST_NAME_MAX);
    }
}
