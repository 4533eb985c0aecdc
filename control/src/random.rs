//! Random ids and keys from the kernel (getrandom(2)), fit for secrets.

use std::io;

/// 128 random bits, for an id. Blocks only until the kernel's source is seeded, early at boot.
pub fn u128() -> io::Result<u128> {
    Ok(u128::from_ne_bytes(bytes()?))
}

/// `N` random bytes, for a key. Blocks as [`u128()`] does.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

/// Fills with random bytes. Blocks as [`u128()`] does.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes)
        .map_err(|error| io::Error::other(format!("the kernel gives no random numbers: {error}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_alike() {
        assert_ne!(super::u128().unwrap(), super::u128().unwrap());
        assert_ne!(super::bytes::<32>().unwrap(), [0; 32]);
    }
}
