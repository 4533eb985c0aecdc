//! Checks sizes, durations, leases and times of day.

use std::time::Duration;

use xpm_protocol::policy::{LeaseTerms, Window};
use xpm_protocol::{ByteSize, Span};

use super::Check;
use crate::policy::Windows;

/// Largest size in a document, in bytes: the largest integer of TOML.
const SIZE_MAX: u64 = i64::MAX as u64;
/// Longest duration in a document: a hundred years.
const DURATION_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

impl Check<'_> {
    pub(super) fn size(&mut self, key: impl AsRef<str>, size: Option<ByteSize>) {
        if size.is_some_and(|size| size.0 > SIZE_MAX) {
            self.say(key, format!("a size is below {}", ByteSize(SIZE_MAX)));
        }
    }

    pub(super) fn duration(&mut self, key: impl AsRef<str>, duration: Option<Span>) {
        if duration.is_some_and(|duration| duration.0 > DURATION_MAX) {
            self.say(key, "a duration is at most a hundred years");
        }
    }

    pub(super) fn lease(&mut self, key: &str, lease: &LeaseTerms) {
        let duration = lease.duration;
        if duration.0.as_secs() == 0 {
            self.say(format!("{key}.duration"), "a lease lasts a second at least");
        }
        if lease.warning.is_some_and(|warning| warning > duration) {
            let text = format!("it would be announced before it begins: it lasts {duration}");
            self.say(format!("{key}.warning"), text);
        }
        if lease.total_max.is_some_and(|most| most < duration) {
            let text = format!("it is shorter than one lease of {duration}");
            self.say(format!("{key}.total-max"), text);
        }
        for (name, duration) in [
            ("duration", Some(lease.duration)),
            ("warning", lease.warning),
            ("grace", lease.grace),
            ("total-max", lease.total_max),
        ] {
            self.duration(format!("{key}.{name}"), duration);
        }
    }

    /// Checks the windows under the key `name` of the table `base`, with the time zone beside them.
    pub(super) fn windows(&mut self, base: &str, name: &str, zone: Option<&str>, windows: &[Window]) {
        let dot = if base.is_empty() { "" } else { "." };
        let key = format!("{base}{dot}time-zone");
        match zone {
            Some(zone) if Windows::new(Some(zone), &[]).is_none() => {
                let text = format!("the time zone `{zone}` is unknown: write it like Europe/Berlin or UTC");
                self.say(key, text);
            }
            Some(_) if windows.is_empty() => {
                self.say(key, format!("a time zone means nothing without `{name}`"));
            }
            _ => {}
        }
    }
}
