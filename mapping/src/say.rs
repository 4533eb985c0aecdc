//! Log lines that are written without allocating memory or taking a lock: by a signal handler, and by threads that
//! other threads wait for.

#![allow(unsafe_code)]

use std::fmt::{Arguments, Write as _};

/// A line that is formatted without heap memory; a longer text is cut off.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // One byte is left for the newline.
        let count = text.len().min(self.bytes.len() - 1 - self.len);
        self.bytes[self.len..self.len + count].copy_from_slice(&text.as_bytes()[..count]);
        self.len += count;
        Ok(())
    }
}

/// Writes one line to standard error, by one system call. An error is ignored.
pub(crate) fn say(text: Arguments<'_>) {
    let mut line = Line { bytes: [0; 512], len: 0 };
    let _ = line.write_fmt(text);
    line.bytes[line.len] = b'\n';
    // SAFETY: the bytes are this function's.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len + 1) };
}
