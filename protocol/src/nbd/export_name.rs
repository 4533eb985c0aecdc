//! Names of an appliance's exports: the key of a grant, and the tag of the connection.

use std::fmt;
use std::str::FromStr;

use crate::GrantKey;

/// Identifies a connection of a client. Within a session and queue, a connection of a newer generation replaces an
/// older one: the server closes the old connection before it accepts the new one, so that a request left on the old
/// one cannot take effect later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionTag {
    /// Random number of the client's use of the allocation.
    pub id: u128,
    /// Queue within it.
    pub queue: u16,
    /// Number of the connection among those of that queue.
    pub generation: u32,
}

/// The name of a grant's export: `KEY` or `KEY.SESSION.QUEUE.GENERATION`, with 64 and 32 hexadecimal digits and two
/// decimal numbers. It is a secret: `Debug` does not print the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportName {
    /// The grant's key.
    pub key: GrantKey,
    /// Tag of the connection; none for clients other than xpm's.
    pub session: Option<SessionTag>,
}

/// The text is no export name of an appliance. The error does not repeat the text, which may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the name of a grant's export")]
pub struct ParseExportNameError;

impl FromStr for ExportName {
    type Err = ParseExportNameError;

    fn from_str(text: &str) -> Result<ExportName, ParseExportNameError> {
        let mut parts = text.split('.');
        let key = parts.next().and_then(|key| key.parse().ok()).ok_or(ParseExportNameError)?;
        let session = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (None, ..) => None,
            (Some(id), Some(queue), Some(generation), None) => Some(parse_session(id, queue, generation)?),
            _ => return Err(ParseExportNameError),
        };
        Ok(ExportName { key, session })
    }
}

fn parse_session(id: &str, queue: &str, generation: &str) -> Result<SessionTag, ParseExportNameError> {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if id.len() != 32 || id.starts_with('+') || !digits(queue) || !digits(generation) {
        return Err(ParseExportNameError);
    }
    Ok(SessionTag {
        id: u128::from_str_radix(id, 16).map_err(|_| ParseExportNameError)?,
        queue: queue.parse().map_err(|_| ParseExportNameError)?,
        generation: generation.parse().map_err(|_| ParseExportNameError)?,
    })
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key.reveal())?;
        match self.session {
            None => Ok(()),
            Some(SessionTag { id, queue, generation }) => write!(f, ".{id:032x}.{queue}.{generation}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_golden() {
        let name = ExportName {
            key: GrantKey::from_bytes([0xa5; 32]),
            session: Some(SessionTag { id: 0xbeef, queue: 3, generation: 17 }),
        };
        let golden = format!("{}.{}beef.3.17", "a5".repeat(32), "0".repeat(28));
        assert_eq!(name.to_string(), golden);
        let odd = format!("{}.{}BEEF.03.017", "A5".repeat(32), "0".repeat(28));
        assert_eq!(odd.parse(), Ok(name));
    }

    #[test]
    fn round_trip_and_refusal() {
        let key = GrantKey::from_bytes([7; 32]);
        let plain = ExportName { key: key.clone(), session: None };
        let tag = SessionTag { id: u128::MAX - 3, queue: 12, generation: 900 };
        let tagged = ExportName { key, session: Some(tag) };
        for name in [plain, tagged] {
            assert_eq!(name.to_string().parse::<ExportName>().unwrap(), name);
            assert!(!format!("{name:?}").contains("0707"));
        }
        let key = "07".repeat(32);
        let id = "0".repeat(32);
        for tail in
            [".", ".1", ".0.0.0", &format!(".{id}.0"), &format!(".{id}.70000.0"), &format!(".{id}.0.0.0")]
        {
            assert!(format!("{key}{tail}").parse::<ExportName>().is_err(), "{tail}");
        }
        assert!(format!("{key}.{id}.+1.1").parse::<ExportName>().is_err());
    }
}
