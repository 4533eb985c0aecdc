//! Many durations in little memory, so that counting them does not disturb what is measured.

/// Buckets of each power of two: a duration is known to 1 part in 64.
const STEPS: u64 = 64;
const STEPS_LOG2: u32 = STEPS.ilog2();
/// Every `u64` has a bucket.
const BUCKETS: usize = ((u64::BITS - STEPS_LOG2 + 1) as u64 * STEPS) as usize;

/// How often which duration was seen, in nanoseconds.
pub(crate) struct Times {
    counts: Box<[u64]>,
}

impl Times {
    pub(crate) fn new() -> Times {
        Times { counts: vec![0; BUCKETS].into_boxed_slice() }
    }

    pub(crate) fn add(&mut self, nanoseconds: u64) {
        self.counts[bucket(nanoseconds)] += 1;
    }

    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The duration that `percent` of all do not exceed, to 1 part in 64; 0 of none.
    pub(crate) fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.count() * percent).div_ceil(100);
        let mut seen = 0;
        let reached = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        reached.map_or(0, lowest)
    }
}

/// The durations below twice [`STEPS`] have a bucket each, those of each power of two above it [`STEPS`].
fn bucket(nanoseconds: u64) -> usize {
    let shift = nanoseconds.max(1).ilog2().saturating_sub(STEPS_LOG2);
    (u64::from(shift) * STEPS + (nanoseconds >> shift)) as usize
}

/// The shortest duration of a bucket.
fn lowest(bucket: usize) -> u64 {
    let shift = (bucket as u64 / STEPS).saturating_sub(1);
    (bucket as u64 - shift * STEPS) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_near_its_bucket() {
        for power in 0..u64::BITS {
            for nanoseconds in [1 << power, (1_u64 << power) + (1_u64 << power) / 3, (1 << power) - 1] {
                let low = lowest(bucket(nanoseconds));
                assert!(low <= nanoseconds && nanoseconds - low <= nanoseconds / STEPS, "{nanoseconds}");
            }
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn percentiles() {
        let mut times = Times::new();
        assert_eq!((times.count(), times.percentile(50)), (0, 0));
        for nanoseconds in 1..=100 {
            times.add(nanoseconds);
        }
        assert_eq!((times.count(), times.percentile(50), times.percentile(99)), (100, 50, 99));
    }
}
