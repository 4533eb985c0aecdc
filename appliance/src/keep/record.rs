//! The form in which grants are stored for the next life of the appliance. It is separate from the live
//! structures, because it must not change.

use serde::{Deserialize, Serialize};
use xpm_protocol::{AllocationId, Epoch, GrantId, GrantKey, Name, RegionId, Visitor};

/// A change of the stored grants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Entry {
    /// The grant exists with this content.
    Put(SavedGrant),
    /// The grant was deleted.
    Delete(GrantId),
    /// These grants were deleted lately.
    Gone(Vec<GrantId>),
}

/// A grant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedGrant {
    pub(crate) id: GrantId,
    pub(crate) allocation: AllocationId,
    pub(crate) name: Name,
    pub(crate) epoch: Epoch,
    pub(crate) key: GrantKey,
    pub(crate) regions: Vec<SavedRegion>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) descriptor: Option<String>,
    pub(crate) condition: Condition,
    /// The life of its owner that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) holder: Option<Box<Visitor>>,
}

/// Whether a grant can be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Condition {
    /// It admits clients.
    Open,
    /// It admits no client until the order that closed it is repeated.
    Closed,
    /// Its content is being moved from one memory to another, so it is complete in neither.
    Moving,
}

/// A region of a grant.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedRegion {
    pub(crate) id: RegionId,
    /// Length in bytes.
    pub(crate) len: u64,
    pub(crate) place: SavedPlace,
    /// Whether another process may have it mapped.
    pub(crate) shared: bool,
}

/// Where a region's memory can be found again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SavedPlace {
    /// The memfd of this number.
    Memfd(MemfdId),
    /// In the backing file, from this byte.
    File(u64),
}

/// The number in the name of a memfd: random, so that no two ever have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct MemfdId(pub(crate) u128);

impl From<MemfdId> for String {
    fn from(id: MemfdId) -> String {
        format!("{:032x}", id.0)
    }
}

impl TryFrom<String> for MemfdId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<MemfdId, &'static str> {
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        number.map(MemfdId).ok_or("32 hexadecimal digits are expected")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn grant(id: GrantId, epoch: u64, padding: usize) -> SavedGrant {
        SavedGrant {
            id,
            allocation: AllocationId::from_u128(1),
            name: "a".parse().unwrap(),
            epoch: Epoch(epoch),
            key: GrantKey::from_bytes([1; 32]),
            regions: vec![SavedRegion {
                id: RegionId::from_u128(1),
                len: 16 << 20,
                place: SavedPlace::Memfd(MemfdId(2)),
                shared: false,
            }],
            descriptor: (padding > 0).then(|| "x".repeat(padding)),
            condition: Condition::Open,
            holder: None,
        }
    }

    /// Another life of the program, possibly a newer version, has to read it.
    #[test]
    fn the_form_stays() {
        let text = serde_json::to_string(&Entry::Put(grant(GrantId::from_u128(3), 4, 0))).unwrap();
        let region = format!(
            "{{\"id\":\"{}\",\"len\":16777216,\"place\":{{\"memfd\":\"{}2\"}},\"shared\":false}}",
            RegionId::from_u128(1),
            "0".repeat(31)
        );
        assert_eq!(
            text,
            format!(
                "{{\"put\":{{\"id\":\"{}\",\"allocation\":\"{}\",\"name\":\"a\",\"epoch\":4,\"key\":\"{}\",\"regions\":[{region}],\
                 \"condition\":\"open\"}}}}",
                GrantId::from_u128(3),
                AllocationId::from_u128(1),
                "01".repeat(32)
            )
        );
        assert!(matches!(serde_json::from_str(&text).unwrap(), Entry::Put(grant) if grant.epoch == Epoch(4)));
    }
}
