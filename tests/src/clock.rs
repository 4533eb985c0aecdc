//! A clock that tests set: libfaketime, between a daemon and its C library.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where Debian has the library, whatever the machine's architecture.
const LIBRARIES: &str = "/usr/lib";
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";
/// File with the difference to the real time.
const FILE: &str = "clock";

/// The time that a daemon sees: that of the file in its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    /// Another time of day, as after a change of the clock by hand. Spans are measured by the real clock.
    TimeOfDay,
    /// Time passes: both clocks go forward together.
    BothClocks,
}

/// The environment of a daemon that sees this time, in seconds since 1970.
///
/// # Panics
/// When the library is not there.
pub(crate) fn environment(dir: &Path, unix: u64, sees: Sees) -> Vec<(String, String)> {
    set(dir, unix);
    let file = dir.join(FILE);
    let variable = |name: &str, value: String| (name.to_owned(), value);
    let spans = if sees == Sees::TimeOfDay { "1" } else { "0" };
    vec![
        variable("LD_PRELOAD", library().expect("libfaketime is there: apt-get install faketime")),
        variable("FAKETIME_TIMESTAMP_FILE", file.display().to_string()),
        variable("FAKETIME_NO_CACHE", "1".to_owned()),
        variable("FAKETIME_DONT_FAKE_MONOTONIC", spans.to_owned()),
    ]
}

fn library() -> Option<String> {
    let places = std::fs::read_dir(LIBRARIES).ok()?.flatten();
    let found = places.map(|place| place.path().join(LIBRARY)).find(|path| path.is_file());
    found.map(|path| path.display().to_string())
}

/// Sets the clock; it goes on from there.
///
/// # Panics
/// When the file cannot be replaced.
pub(crate) fn set(dir: &Path, unix: u64) {
    let difference = i128::from(unix) - i128::from(now());
    let new = dir.join("clock.new");
    std::fs::write(&new, format!("{difference:+}")).expect("the clock can be set");
    std::fs::rename(new, dir.join(FILE)).expect("the clock can be set");
}

/// The real time, in seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
