//! Checks the nesting depth of a TOML text before a parser descends into it.
//!
//! Values nest by brackets and by the dots of keys. The parser limits each of the two but not their product, and
//! nested values are dropped recursively: a text of a few kilobytes could use up the stack.

/// Largest nesting depth; more than any document needs.
pub(super) const DEPTH_MAX: usize = 40;
/// Most dots of one key.
const DOTS_MAX: usize = 16;

/// The position at which a text nests too deeply. Strings and comments are skipped. A text that passes nests at most
/// [`DEPTH_MAX`] deep below a key at the top, and that key is at most [`DOTS_MAX`] deep.
pub(super) fn too_deep(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, Depth::default());
    while at < bytes.len() {
        match bytes[at] {
            b'#' => {
                at = end_of_line(bytes, at);
                continue;
            }
            quote @ (b'"' | b'\'') => {
                at = end_of_text(bytes, at, quote);
                continue;
            }
            byte => depth.take(byte),
        }
        if depth.below > DEPTH_MAX || depth.dots > DOTS_MAX {
            return Some(at);
        }
        at += 1;
    }
    None
}

#[derive(Default)]
struct Depth {
    /// Depth that each open bracket adds: itself and the dots of the key before it.
    open: Vec<usize>,
    /// Sum of `open`.
    below: usize,
    /// Dots of the key that is being read; dots of a number after it count, too.
    dots: usize,
}

impl Depth {
    fn take(&mut self, byte: u8) {
        match byte {
            b'[' | b'{' => {
                self.open.push(1 + self.dots);
                self.below += 1 + self.dots;
                self.dots = 0;
            }
            b']' | b'}' => {
                self.below -= self.open.pop().unwrap_or(0);
                self.dots = 0;
            }
            b',' => self.dots = 0,
            b'\n' if self.open.is_empty() => self.dots = 0,
            b'.' => self.dots += 1,
            _ => {}
        }
    }
}

fn end_of_line(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |len| at + len)
}

/// The position after a string that begins here. `"..."` and `'...'` end on their line; `"""..."""` and `'''...'''`
/// end at three quotes, of a longer run at the last three.
fn end_of_text(bytes: &[u8], at: usize, quote: u8) -> usize {
    let long = bytes[at..].starts_with(&[quote; 3]);
    let mut at = at + if long { 3 } else { 1 };
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if quote == b'"' => at += 1,
            b'\n' if !long => return at,
            byte if byte == quote && !long => return at + 1,
            byte if byte == quote && bytes[at..].starts_with(&[quote; 3]) => {
                let more = bytes[at + 3..].iter().take(2).take_while(|&&byte| byte == quote).count();
                return at + 3 + more;
            }
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_do_not_count() {
        let (dots, brackets) = (".".repeat(100), "[".repeat(100));
        for text in [
            format!("# {dots}{brackets}\na = 1"),
            format!("a = \"{dots}\\\"{brackets}\""),
            format!("a = '{dots}{brackets}\\'"),
            format!("a = \"\"\"\n{dots}\"{brackets}\"\"\n\"\"\"\"\""),
            format!("a = '''\n{dots}'{brackets}\n'''"),
            "a.b.c = 1.5\n".repeat(50),
            "[[a.b.c]]\nd.e = [1.5, 2.5]\n".repeat(50),
        ] {
            assert_eq!(too_deep(&text), None, "{text}");
        }
    }

    #[test]
    fn texts_that_nest_too_deeply_are_found() {
        let (dots, brackets) = ("a.".repeat(17), "[".repeat(41));
        for text in [
            brackets.clone(),
            format!("a = {brackets}"),
            format!("{dots}a = 1"),
            format!("\"=\".{dots}a = 1"),
            format!("a = {{ b = 1, {dots}a = 1 }}"),
            format!("[{dots}a]"),
            format!("a = \"b\n{brackets}"),
            format!("a = \"\"\"b\"\"\"\"\"{brackets}"),
            format!("a = \"b\\\\\"{brackets}"),
            format!("a = 'b\\'{brackets}"),
            "a = {".repeat(41),
            "a.a.a = {".repeat(14),
        ] {
            assert!(too_deep(&text).is_some(), "{text}");
        }
    }
}
