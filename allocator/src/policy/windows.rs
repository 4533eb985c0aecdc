//! Windows of time: times of day and days of the week, by the clock of a time zone.

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use xpm_protocol::policy::{Day, Window};

/// Days to look ahead. Windows repeat each week; but a window, or the gap between two, may be skipped when clocks are
/// put forward, and then comes a week later.
const AHEAD: [i32; 2] = [9, 16];
/// Clock changes of a zone to look ahead; there are two a year.
const TRANSITIONS: usize = 4;

/// Windows in a time zone, by local time: a time that is skipped when clocks are put forward never comes, and a time
/// that occurs twice is in its window both times.
#[derive(Debug, Clone)]
pub struct Windows {
    zone: TimeZone,
    windows: Vec<Window>,
}

impl Windows {
    /// The windows in the zone of this IANA name; without a name, UTC. None if the zone is unknown.
    pub fn new(zone: Option<&str>, windows: &[Window]) -> Option<Windows> {
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).ok()?,
        };
        Some(Windows { zone, windows: windows.to_vec() })
    }

    /// Whether a moment, seconds since 1970, is in one of the windows.
    pub fn contains(&self, unix: i64) -> bool {
        let Some(now) = self.wall(unix) else { return false };
        let minute = (i32::from(now.hour()) * 60 + i32::from(now.minute())) as u16;
        self.windows.iter().any(|window| holds(window, now.weekday(), minute))
    }

    /// The first moment after `unix` that is in no window; none if some window is always open.
    pub fn next_close(&self, unix: i64) -> Option<i64> {
        self.next(unix, false)
    }

    /// The first moment after `unix` that is in a window; none if no window ever opens.
    pub fn next_open(&self, unix: i64) -> Option<i64> {
        self.next(unix, true)
    }

    fn next(&self, unix: i64, open: bool) -> Option<i64> {
        let find = |moments: Vec<i64>| moments.into_iter().find(|&moment| self.contains(moment) == open);
        AHEAD.into_iter().find_map(|days| find(self.changes(unix, days)))
    }

    /// The moment as local time of the zone.
    pub fn shown(&self, unix: i64) -> String {
        let zone = self.zone.iana_name().unwrap_or("UTC").to_owned();
        self.wall(unix).map_or_else(String::new, |now| format!("{} ({zone})", now.strftime("%a %F %H:%M")))
    }

    fn wall(&self, unix: i64) -> Option<DateTime> {
        Timestamp::from_second(unix).ok().map(|moment| self.zone.to_datetime(moment))
    }

    /// The moments in the next `days` days at which a window may begin or end, in order: those at which local time
    /// reaches an edge, and those at which the clock itself is changed.
    fn changes(&self, unix: i64, days: i32) -> Vec<i64> {
        let Some(now) = self.wall(unix) else { return Vec::new() };
        let mut moments: Vec<i64> = Vec::new();
        for ahead in -1..=days {
            let Ok(day) = now.date().checked_add(ahead.days()) else { continue };
            for window in &self.windows {
                for minute in [window.from.minutes(), window.to.minutes()] {
                    moments.extend(self.moments(day, minute));
                }
            }
        }
        if let Ok(moment) = Timestamp::from_second(unix) {
            let changes = self.zone.following(moment).take(TRANSITIONS);
            moments.extend(changes.map(|change| change.timestamp().as_second()));
        }
        // Clock changes may lie months ahead, beyond the days whose edges are included.
        let end = unix.saturating_add(i64::from(days) * 86_400);
        moments.retain(|&moment| moment > unix && moment <= end);
        moments.sort_unstable();
        moments.dedup();
        moments
    }

    /// The moments at which local time reaches this minute of this day: one, or two if the clock is put back.
    fn moments(&self, day: Date, minute: u16) -> Vec<i64> {
        let wall = day.at(0, 0, 0, 0).checked_add(i64::from(minute).minutes());
        let Ok(wall) = wall else { return Vec::new() };
        let moment = self.zone.to_ambiguous_timestamp(wall);
        [moment.earlier(), moment.later()].into_iter().flatten().map(jiff::Timestamp::as_second).collect()
    }
}

fn holds(window: &Window, today: Weekday, minute: u16) -> bool {
    let (from, to) = (window.from.minutes(), window.to.minutes());
    let on = |day: Weekday| window.days.is_empty() || window.days.iter().any(|one| weekday(*one) == day);
    match from < to {
        true => on(today) && (from..to).contains(&minute),
        false => (on(today) && minute >= from) || (on(today.previous()) && minute < to),
    }
}

fn weekday(day: Day) -> Weekday {
    match day {
        Day::Mon => Weekday::Monday,
        Day::Tue => Weekday::Tuesday,
        Day::Wed => Weekday::Wednesday,
        Day::Thu => Weekday::Thursday,
        Day::Fri => Weekday::Friday,
        Day::Sat => Weekday::Saturday,
        Day::Sun => Weekday::Sunday,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: i64 = 3600;
    /// Sunday 2026-03-29 00:00 in Berlin, on which 02:00 to 03:00 is left out.
    const SPRING: i64 = 1_774_738_800;
    /// Sunday 2026-10-25 00:00 in Berlin, on which 02:00 to 03:00 comes twice.
    const AUTUMN: i64 = 1_792_879_200;

    fn berlin(windows: &[(&[Day], &str, &str)]) -> Windows {
        let window = |&(days, from, to): &(&[Day], &str, &str)| Window {
            days: days.to_vec(),
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        let windows: Vec<Window> = windows.iter().map(window).collect();
        Windows::new(Some("Europe/Berlin"), &windows).unwrap()
    }

    #[test]
    fn a_skipped_time_never_comes() {
        let windows = berlin(&[(&[], "02:15", "03:30")]);
        assert!(!windows.contains(SPRING + 2 * HOUR - 1), "01:59:59");
        assert!(windows.contains(SPRING + 2 * HOUR), "03:00, right after 01:59:59");
        assert_eq!(windows.next_open(SPRING), Some(SPRING + 2 * HOUR));
        assert_eq!(windows.next_close(SPRING + 2 * HOUR), Some(SPRING + 2 * HOUR + 1800));
        let inside = berlin(&[(&[], "02:15", "02:45")]);
        assert_eq!(inside.next_open(SPRING), Some(SPRING + 23 * HOUR + 2 * HOUR + 900), "on the next day");
    }

    #[test]
    fn a_repeated_time_is_in_its_window_both_times() {
        let windows = berlin(&[(&[Day::Sun], "02:15", "02:45")]);
        let first = AUTUMN + 2 * HOUR + 900;
        assert_eq!(windows.next_open(AUTUMN), Some(first));
        assert_eq!(windows.next_close(first), Some(first + 1800));
        assert_eq!(windows.next_open(first + 1800), Some(first + HOUR), "the second time");
        let over = berlin(&[(&[], "01:00", "04:00")]);
        assert_eq!(over.next_close(AUTUMN + HOUR), Some(AUTUMN + 5 * HOUR), "an hour longer");
    }

    #[test]
    fn windows_span_midnight_and_the_week() {
        let night = berlin(&[(&[Day::Sun], "22:00", "06:00")]);
        let monday = AUTUMN + 25 * HOUR;
        assert!(night.contains(monday + 5 * HOUR), "it began on Sunday");
        assert!(!night.contains(monday + 6 * HOUR) && !night.contains(monday + 23 * HOUR));
        assert_eq!(night.next_close(monday), Some(monday + 6 * HOUR));
        assert_eq!(night.next_open(monday + 6 * HOUR), Some(monday + (6 * 24 + 22) * HOUR));
        let joined = berlin(&[(&[], "08:00", "12:00"), (&[], "12:00", "24:00")]);
        assert_eq!(joined.next_close(monday + 9 * HOUR), Some(monday + 24 * HOUR), "the two are one");
        let always = berlin(&[(&[], "00:00", "24:00")]);
        assert_eq!((always.next_close(monday), always.contains(AUTUMN + 2 * HOUR)), (None, true));
        assert_eq!(
            berlin(&[(&[], "07:00", "07:00")]).next_close(monday),
            None,
            "it ends when it begins again"
        );
    }

    #[test]
    fn a_skipped_window_comes_a_week_later() {
        let week = 7 * 24 * HOUR;
        let night = berlin(&[(&[Day::Sun], "02:15", "02:45")]);
        let before = SPRING - week + 3 * HOUR;
        // Clocks are put forward in between.
        let after = SPRING + week - HOUR;
        assert_eq!(night.next_open(before), Some(after + 2 * HOUR + 900));
        let all_but_night = berlin(&[
            (&[Day::Mon, Day::Tue, Day::Wed, Day::Thu, Day::Fri, Day::Sat], "00:00", "24:00"),
            (&[Day::Sun], "00:00", "02:00"),
            (&[Day::Sun], "03:00", "24:00"),
        ]);
        assert_eq!(all_but_night.next_close(before), Some(after + 2 * HOUR));
    }

    #[test]
    fn unknown_zones_are_refused() {
        assert!(Windows::new(Some("Mars/Olympus"), &[]).is_none());
        assert!(Windows::new(None, &[]).unwrap().next_open(0).is_none());
    }

    proptest! {
        /// Checks each minute by itself.
        #[test]
        fn edges_are_where_it_changes(start in SPRING - 90_000..SPRING + 90_000_i64, from in 0..1440_u16, len in 1..1440_u16) {
            let clock = |minutes: u16| format!("{:02}:{:02}", minutes / 60, minutes % 60);
            let windows = berlin(&[(&[Day::Sat, Day::Sun], &clock(from), &clock((from + len) % 1440))]);
            let open = windows.contains(start);
            let found = if open { windows.next_close(start) } else { windows.next_open(start) };
            let slow = (start + 1..start + 8 * 86_400).find(|&moment| (moment % 60 == 0) && windows.contains(moment) != open);
            prop_assert_eq!(found.filter(|&moment| moment < start + 8 * 86_400), slow);
        }
    }
}
