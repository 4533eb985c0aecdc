//! `memhog MB [--seed N] [--passes N] [--until FILE] [--run PAGES] [--map FILE]`: uses memory, and checks that it
//! keeps what was written. With `--map` the memory is that of a file, mapped and shared.
//!
//! Each page gets a pattern of its own that no compression makes smaller and that depends on the page's number and
//! the seed, so that a lost, stale or exchanged page is found. Then all pages are verified in random order, as often
//! as asked and until a file is there, one by one or in runs of some pages (the order of the runs is random then).
//! Ends with status 1 when a page was bad.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use xpm_tests::mapped::Mapped;

const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Bad pages that are shown one by one.
const SHOWN_MAX: usize = 10;

/// The options of the command line.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    pages: usize,
    seed: u64,
    passes: u32,
    until: Option<PathBuf>,
    run_pages: NonZeroUsize,
    map: Option<PathBuf>,
}

fn main() -> ExitCode {
    match Options::parse(std::env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(bad) => {
            println!("memhog: {bad} bad pages");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("memhog: {error:#}");
            ExitCode::from(2)
        }
    }
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Options> {
        let megabytes: usize = number(words.next(), "how many MB")?;
        let pages = megabytes.checked_mul((1 << 20) / PAGE_BYTES).context("so much memory does not exist")?;
        let mut options =
            Options { pages, seed: 1, passes: 1, until: None, run_pages: NonZeroUsize::MIN, map: None };
        while let Some(word) = words.next() {
            match word.as_str() {
                "--seed" => options.seed = number(words.next(), "--seed")?,
                "--passes" => options.passes = number(words.next(), "--passes")?,
                "--until" => options.until = Some(words.next().context("--until: a file is missing")?.into()),
                "--map" => options.map = Some(words.next().context("--map: a file is missing")?.into()),
                "--run" => options.run_pages = number(words.next(), "--run")?,
                _ => bail!(
                    "unknown option {word}; usage: memhog MB [--seed N] [--passes N] [--until FILE] [--run PAGES] \
                     [--map FILE]"
                ),
            }
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(word: Option<String>, what: &str) -> Result<T> {
    let word = word.with_context(|| format!("{what}: a number is missing"))?;
    word.parse().ok().with_context(|| format!("{what}: {word} is not a number"))
}

/// Fills and verifies; gives the number of bad pages found in all passes.
fn run(options: &Options) -> Result<usize> {
    let start = Instant::now();
    let memory = Memory::filled(options)?;
    println!("memhog: {} pages filled in {:.1} s", options.pages, start.elapsed().as_secs_f64());
    let is_asked = |pass| pass <= options.passes || options.until.as_ref().is_some_and(|file| !file.exists());
    Ok((1..).take_while(|pass| is_asked(*pass)).map(|pass| verify(options, &memory, pass)).sum())
}

/// The memory to fill.
enum Memory {
    Own(Vec<u64>),
    Mapped(Mapped),
}

impl Memory {
    fn filled(options: &Options) -> Result<Memory> {
        let Some(file) = &options.map else {
            let mut memory = Vec::with_capacity(options.pages * PAGE_WORDS);
            (0..options.pages).for_each(|page| memory.extend(pattern(options.seed, page)));
            return Ok(Memory::Own(memory));
        };
        let opened = std::fs::OpenOptions::new().read(true).write(true).open(file);
        let file = opened.with_context(|| format!("open {}", file.display()))?;
        let mapped = Mapped::new(&file, options.pages * PAGE_BYTES);
        for page in 0..options.pages {
            let bytes: Vec<u8> = pattern(options.seed, page).flat_map(u64::to_ne_bytes).collect();
            mapped.write(page * PAGE_BYTES, &bytes);
        }
        Ok(Memory::Mapped(mapped))
    }

    /// The words of a page, or their copy.
    fn page<'a>(&'a self, page: usize, copy: &'a mut [u64; PAGE_WORDS]) -> &'a [u64] {
        match self {
            Memory::Own(words) => &words[page * PAGE_WORDS..][..PAGE_WORDS],
            Memory::Mapped(mapped) => {
                let mut bytes = [0; PAGE_BYTES];
                mapped.read(page * PAGE_BYTES, &mut bytes);
                let words = bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
                copy.iter_mut().zip(words).for_each(|(place, word)| *place = word);
                copy
            }
        }
    }
}

/// Verifies all pages once, in an order that differs from pass to pass; gives how many are bad.
fn verify(options: &Options, memory: &Memory, pass: u32) -> usize {
    let start = Instant::now();
    let mut bad = 0;
    for page in order(options, pass) {
        let mut copy = [0; PAGE_WORDS];
        let words = memory.page(page, &mut copy);
        if let Some(at) = words.iter().zip(pattern(options.seed, page)).position(|(is, should)| *is != should)
        {
            bad += 1;
            if bad <= SHOWN_MAX {
                println!(
                    "memhog: page {page} is bad from byte {}: {:#018x}",
                    at * size_of::<u64>(),
                    words[at]
                );
            }
        }
    }
    let good = options.pages - bad;
    println!("memhog: pass {pass}: {good} pages good, {bad} bad, {:.1} s", start.elapsed().as_secs_f64());
    bad
}

/// The numbers of all pages in the order of a pass.
fn order(options: &Options, pass: u32) -> impl Iterator<Item = usize> {
    let Options { pages, seed, run_pages, .. } = *options;
    let runs = shuffled(pages.div_ceil(run_pages.get()), seed ^ (u64::from(pass) << 32));
    let pages_of = move |run: usize| run * run_pages.get()..((run + 1) * run_pages.get()).min(pages);
    runs.into_iter().flat_map(pages_of)
}

/// The words of a page.
fn pattern(seed: u64, page: usize) -> impl Iterator<Item = u64> {
    let mut random = Random::new(mix(seed) ^ mix(page as u64 + 1));
    (0..PAGE_WORDS).map(move |_| random.next())
}

/// All numbers below `count` in random order (Fisher-Yates).
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = Random::new(mix(seed));
    for last in (1..count).rev() {
        let other = random.next() % (last as u64 + 1);
        order.swap(last, usize::try_from(other).unwrap_or(last));
    }
    order
}

/// Spreads close numbers far apart (the finalizer of splitmix64).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The generator xorshift64.
struct Random(u64);

impl Random {
    /// A generator; its state must not be zero.
    fn new(seed: u64) -> Random {
        Random(seed.max(1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn command_lines() {
        let parsed = options("2 --passes 3").unwrap();
        assert_eq!(
            parsed,
            Options { pages: 512, seed: 1, passes: 3, until: None, run_pages: NonZeroUsize::MIN, map: None }
        );
        for wrong in ["", "x", "2 --seed", "2 --sed 1", "2 --run 0", "18446744073709551615"] {
            assert!(options(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_changed_or_exchanged_page_is_found() {
        let options = options("1").unwrap();
        let memory = Memory::filled(&options).unwrap();
        assert_eq!(verify(&options, &memory, 1), 0);
        let Memory::Own(mut memory) = memory else { panic!("no file was named") };
        memory[5 * PAGE_WORDS + 511] ^= 1;
        let memory = Memory::Own(memory);
        assert_eq!(verify(&options, &memory, 1), 1);
        let Memory::Own(mut memory) = memory else { panic!("no file was named") };
        memory[5 * PAGE_WORDS + 511] ^= 1;
        let (first, second) = memory.split_at_mut(PAGE_WORDS);
        first.swap_with_slice(&mut second[..PAGE_WORDS]);
        assert_eq!(verify(&options, &Memory::Own(memory), 2), 2);
    }

    #[test]
    fn a_file_is_filled_and_verified_as_memory_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = options(&format!("1 --map {}", file.path().display())).unwrap();
        let memory = Memory::filled(&options).unwrap();
        assert_eq!(verify(&options, &memory, 1), 0);
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[1, 2, 3], 4 * PAGE_BYTES as u64).unwrap();
        assert_eq!(verify(&options, &memory, 1), 1);
    }

    #[test]
    fn the_order_has_each_page_once() {
        for line in ["4", "4 --run 7", "4 --run 5000"] {
            let options = options(line).unwrap();
            let mut pages: Vec<usize> = order(&options, 1).collect();
            let sorted: Vec<usize> = (0..options.pages).collect();
            assert_eq!(pages == sorted, line.ends_with("5000"), "{line}");
            pages.sort_unstable();
            assert_eq!(pages, sorted, "{line}");
        }
    }
}
