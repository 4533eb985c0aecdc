//! Checksums of stored values: XXH3, 64 bits, over the table, the key and the value. The checksum is appended to the
//! value as a line break and 16 hexadecimal digits. The JSON of values contains no line break.

use xxhash_rust::xxh3::Xxh3;

/// Length of the appended checksum, in bytes.
pub(super) const LEN: usize = 17;

/// The value with its checksum.
pub(super) fn seal(table: &str, key: &[u8], mut value: Vec<u8>) -> Vec<u8> {
    let sum = sum(table, key, &value);
    value.extend(format!("\n{sum:016x}").into_bytes());
    value
}

/// The value, if its checksum is right.
pub(super) fn unseal<'v>(table: &str, key: &[u8], value: &'v [u8]) -> Option<&'v [u8]> {
    if !is_sealed(value) {
        return None;
    }
    let (value, said) = value.split_at(value.len() - LEN);
    (said[1..] == *format!("{:016x}", sum(table, key, value)).as_bytes()).then_some(value)
}

/// Whether the value has a checksum.
pub(super) fn is_sealed(value: &[u8]) -> bool {
    value.len().checked_sub(LEN).is_some_and(|at| value[at] == b'\n')
}

fn sum(table: &str, key: &[u8], value: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    for part in [table.as_bytes(), b"\0", key, b"\0", value] {
        sum.update(part);
    }
    sum.digest()
}

/// The key of a record, in the form for checksums and messages.
pub(super) fn number_key(key: u128) -> Vec<u8> {
    format!("{key:032x}").into_bytes()
}

/// The key of a document, in the same form.
pub(super) fn document_key((kind, name): (&str, &str)) -> Vec<u8> {
    format!("{kind}\0{name}").into_bytes()
}

/// The key of a decision, in the same form.
pub(super) fn decision_key((name, number): (&str, u64)) -> Vec<u8> {
    format!("{name}\0{number:016x}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let sealed = seal("t", b"key", b"{\"a\":1}".to_vec());
        assert_eq!(unseal("t", b"key", &sealed), Some(b"{\"a\":1}".as_slice()));
        assert_eq!(unseal("t", b"kex", &sealed), None);
        assert_eq!(unseal("u", b"key", &sealed), None);
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unseal("t", b"key", &flipped), None, "bit {bit}");
        }
        assert_eq!(unseal("t", b"", b"{}"), None);
    }
}
