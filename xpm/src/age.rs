//! Times and durations for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A duration in its two largest units: `3d 4h`, `5m 10s`, `42s`, `250ms`.
pub(crate) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds == 0 {
        return format!("{}ms", duration.as_millis());
    }
    let units =
        [("d", seconds / 86_400), ("h", seconds / 3600 % 24), ("m", seconds / 60 % 60), ("s", seconds % 60)];
    let first = units.iter().position(|&(_, count)| count > 0).unwrap_or(units.len() - 1);
    let shown = units[first..].iter().take(2).filter(|&&(_, count)| count > 0);
    shown.map(|(unit, count)| format!("{count}{unit}")).collect::<Vec<_>>().join(" ")
}

/// How long ago a time was, given in seconds since 1970; a time to come counts as now.
pub(crate) fn since(unix_seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match now.as_secs().saturating_sub(unix_seconds) {
        0 => "now".to_owned(),
        seconds => format!("{} ago", short(Duration::from_secs(seconds))),
    }
}

/// A moment in seconds since 1970 as RFC 3339 has it, in UTC.
pub(crate) fn rfc3339(unix_seconds: u64) -> String {
    let moment =
        i64::try_from(unix_seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    moment.map_or_else(|| format!("@{unix_seconds}"), |moment| moment.to_string())
}

/// How long until a time, given in seconds since 1970; one that is over counts as now.
pub(crate) fn until(unix_seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match unix_seconds.saturating_sub(now.as_secs()) {
        0 => "now".to_owned(),
        seconds => format!("in {}", short(Duration::from_secs(seconds))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_largest_units() {
        for (seconds, text) in
            [(0, "0ms"), (42, "42s"), (310, "5m 10s"), (3600, "1h"), (273_600, "3d 4h"), (86_401, "1d")]
        {
            assert_eq!(short(Duration::from_secs(seconds)), text);
        }
        assert_eq!(short(Duration::from_millis(250)), "250ms");
        assert_eq!(since(u64::MAX), "now");
        assert_eq!(until(0), "now");
        assert!(until(u64::MAX).starts_with("in "));
        assert_eq!(rfc3339(1_774_738_800), "2026-03-28T23:00:00Z");
        assert_eq!(rfc3339(u64::MAX), format!("@{}", u64::MAX));
    }
}
