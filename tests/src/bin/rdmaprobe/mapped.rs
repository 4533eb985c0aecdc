//! An allocation at addresses, over RDMA: pages that are touched, and calls on memory that is registered and memory
//! that is not.

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use xpm_mapping::{Access, Attachment, Faults, Mapping, Space, Volume};
use xpm_protocol::api::blk::{LinkState, TransportKind};
use xpm_tests::mapping::{Dice, MIB, PAGE, attach_options, options, words};

/// Bytes that are mapped, of which an eighth may be local.
const LEN: u64 = 16 * MIB;
/// Bytes of one call, and where it begins: in the middle of a page.
const CALL: usize = 3 << 20;
const CALL_START: usize = PAGE + 1234;
/// Words of a page.
const WORDS: usize = PAGE / 8;

/// Fails with what was not as it was written.
pub(crate) fn run(url: &str, name: &str) -> Result<()> {
    let mut wanted = attach_options(url, name);
    wanted.transport = Some(TransportKind::Rdma);
    for faults in [Faults::Inline, Faults::Handled(2)] {
        let (attachment, volume) = Attachment::attach(&wanted)?;
        all_rdma(&volume)?;
        let space = Space::open(volume.clone(), &options(LEN / 8, faults, LEN))?;
        let mapping = space.map(0..LEN, Access::ReadWrite)?;
        touches(&mapping)?;
        calls(&space, &mapping)?;
        let stats = space.stats();
        println!(
            "{faults:?}: {} faults, {} pages fetched, {} written, {} bytes at once by calls",
            stats.faults, stats.fetched, stats.written, CALL
        );
        let pages = LEN / PAGE as u64;
        ensure!(stats.errors == 0 && stats.fetched > pages / 2 && stats.written > pages / 2, "{stats:?}");
        all_rdma(&volume)?;
        drop((mapping, space, volume));
        attachment.detach()?;
    }
    Ok(())
}

fn all_rdma(volume: &Volume) -> Result<()> {
    let links = volume.status().links;
    let good = links.iter().all(|link| link.state == LinkState::Up && link.transport == TransportKind::Rdma);
    ensure!(good && !links.is_empty(), "not over RDMA: {links:?}");
    Ok(())
}

/// Every page is written, in any order, and read again in another one.
fn touches(mapping: &Mapping) -> Result<()> {
    let words = words(mapping);
    let pages = words.len() / WORDS;
    let mut dice = Dice(7);
    let mut order: Vec<usize> = (0..pages).collect();
    (1..pages).for_each(|at| order.swap(at, dice.below(at + 1)));
    for &page in &order {
        for (at, word) in words[page * WORDS..][..WORDS].iter().enumerate() {
            word.store(value(page, at), Ordering::Relaxed);
        }
    }
    for page in (0..pages).rev() {
        for (at, word) in words[page * WORDS..][..WORDS].iter().enumerate() {
            let found = word.load(Ordering::Relaxed);
            ensure!(found == value(page, at), "word {at} of page {page} is {found:#x}");
        }
    }
    Ok(())
}

fn value(page: usize, word: usize) -> u64 {
    ((page as u64) << 20 | word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Calls and touches see the bytes that were put, and no neighbouring byte has changed.
fn calls(space: &Space, mapping: &Mapping) -> Result<()> {
    let mut dice = Dice(11);
    let mut registered = space.buffer(CALL)?;
    let mut plain = vec![0_u8; CALL];
    mapping.get(CALL_START, &mut plain)?;
    mapping.get(CALL_START, &mut registered)?;
    ensure!(plain == registered[..], "what two calls got is not the same");
    plain.iter_mut().for_each(|byte| *byte = dice.below(256) as u8);
    registered.copy_from_slice(&plain);
    mapping.put(CALL_START, &registered)?;
    mapping.flush()?;
    registered.fill(0);
    mapping.get(CALL_START, &mut registered)?;
    ensure!(plain == registered[..], "what was put is not there");
    let words = words(mapping);
    let byte = |at: usize| words[at / 8].load(Ordering::Relaxed).to_le_bytes()[at % 8];
    let seen = |at: usize| byte(CALL_START + at) == plain[at];
    ensure!((0..CALL).step_by(61).chain([CALL - 1]).all(seen), "what was put is not seen by touches");
    for at in [CALL_START - 1, CALL_START + CALL] {
        let expected = value(at / PAGE, at % PAGE / 8).to_le_bytes()[at % 8];
        ensure!(byte(at) == expected, "byte {at} beside what was put has changed");
    }
    Ok(())
}
