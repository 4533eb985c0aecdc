//! Measures carving and freeing slabs with a million live ones; a JSON object a line.

use std::hint::black_box;
use std::time::Instant;

use xpm_mapping::slab::{Slab, SlabAllocator, SlabError};

const REGIONS: u32 = 17;
const REGION_LEN: u64 = 256 << 20;
const LIVE: usize = 1_000_000;
/// Calls in one sample: one call alone is below the clock's resolution.
const BATCH: usize = 64;
const SAMPLES: usize = 4000;

fn main() -> Result<(), SlabError> {
    let mut allocator = SlabAllocator::new();
    for _ in 0..REGIONS {
        allocator.add_region(REGION_LEN)?;
    }
    let mut live: Vec<Slab> = (0..LIVE).map(|_| allocator.allocate(4096)).collect::<Result<_, _>>()?;
    let (mut allocating, mut freeing) = (Vec::with_capacity(SAMPLES), Vec::with_capacity(SAMPLES));
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..SAMPLES {
        // Slabs from anywhere, so that neither caches nor neighbours help.
        let mut batch = [live[0]; BATCH];
        for slab in &mut batch {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let pick = (random % live.len() as u64) as usize;
            *slab = live.swap_remove(pick);
        }
        let start = Instant::now();
        for slab in batch {
            allocator.free(black_box(slab))?;
        }
        freeing.push(start.elapsed().as_nanos() as f64 / BATCH as f64);
        let start = Instant::now();
        for slab in &mut batch {
            *slab = allocator.allocate(black_box(4096))?;
        }
        allocating.push(start.elapsed().as_nanos() as f64 / BATCH as f64);
        live.extend_from_slice(&batch);
    }
    print("allocate", &mut allocating);
    print("free", &mut freeing);
    Ok(())
}

fn print(case: &str, samples: &mut [f64]) {
    samples.sort_by(f64::total_cmp);
    let at = |share: usize| samples[samples.len() * share / 100];
    println!("{{\"case\":\"{case} 4 KiB, {LIVE} live\",\"ns_p50\":{:.1},\"ns_p99\":{:.1}}}", at(50), at(99));
}
