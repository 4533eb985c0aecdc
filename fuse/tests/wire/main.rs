//! Messages against bytes that a C program made of the kernel's header (`layout.c`), not of this crate's own encoder.

mod encode;
mod malformed;
mod parse;

use xpm_fuse::wire::Unique;

const UNIQUE: Unique = Unique::from_raw(0x1122_3344_5566_7788);

/// The message of this name in `layout.txt`.
fn layout(name: &str) -> Vec<u8> {
    let lines = include_str!("layout.txt").lines();
    let message = lines.filter_map(|line| line.split_once(' ')).find(|(key, _)| *key == name);
    let (_, hex) = message.unwrap_or_else(|| panic!("no message {name} in layout.txt"));
    let digits = hex.as_bytes().chunks(2).map(|pair| str::from_utf8(pair).unwrap());
    digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}
