//! Which appliances can serve at all.

use std::fmt;

use xpm_protocol::{ByteSize, Name};

use super::Candidate;

/// Why an appliance cannot serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Its name.
    pub name: Name,
    /// Why.
    pub reason: Reason,
}

/// Reasons against an appliance, the first that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is not heard.
    Silent,
    /// It refused this request, or did not answer.
    Failed,
    /// It has no room for one region.
    Full {
        /// Memory that it has, in bytes.
        free: u64,
        /// Length of a region in bytes.
        region_len: u64,
    },
}

/// The appliances that have room for one region of `region_len` bytes at least, and why the
/// others cannot serve.
pub fn filter(snapshot: &[Candidate], region_len: u64) -> (Vec<&Candidate>, Vec<Rejection>) {
    let mut usable = Vec::new();
    let mut rejections = Vec::new();
    for candidate in snapshot {
        match reason_against(candidate, region_len) {
            None => usable.push(candidate),
            Some(reason) => rejections.push(Rejection { name: candidate.name.clone(), reason }),
        }
    }
    (usable, rejections)
}

fn reason_against(candidate: &Candidate, region_len: u64) -> Option<Reason> {
    if !candidate.up {
        Some(Reason::Silent)
    } else if candidate.failed {
        Some(Reason::Failed)
    } else if candidate.free < region_len {
        Some(Reason::Full { free: candidate.free, region_len })
    } else {
        None
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match self.reason {
            Reason::Silent => write!(f, "{name} is silent"),
            Reason::Failed => write!(f, "{name} refused or did not answer"),
            Reason::Full { free, region_len } => {
                write!(f, "{name} has {} free, a region takes {}", ByteSize(free), ByteSize(region_len))
            }
        }
    }
}
