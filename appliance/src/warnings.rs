//! Lines for the operator, shown in the status.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most lines, because an endless list is worse than none.
const LINES_MAX: usize = 64;

/// Lines by topic.
#[derive(Debug, Default)]
pub(crate) struct Warnings(Mutex<Vec<(Topic, String)>>);

/// The topic of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Topic {
    /// The limits of the process's memory; at most one line.
    Limit,
    /// An event whose effect lasts until the process ends.
    Happened,
}

impl Warnings {
    /// The lines, the oldest first.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lock().iter().map(|(_, line)| line.clone()).collect()
    }

    /// Adds a line about an event; returns whether the line is new.
    pub(crate) fn add(&self, line: String) -> bool {
        let mut lines = self.lock();
        let is_new = lines.iter().all(|(_, known)| *known != line);
        if is_new && lines.len() < LINES_MAX {
            lines.push((Topic::Happened, line));
        }
        is_new
    }

    /// Sets the line of a topic; returns whether there was none.
    pub(crate) fn set(&self, topic: Topic, line: String) -> bool {
        let mut lines = self.lock();
        match lines.iter_mut().find(|(of, _)| *of == topic) {
            // The numbers in the line change all the time.
            Some(_) => false,
            None => {
                lines.push((topic, line));
                true
            }
        }
    }

    /// Removes the line of a topic; returns whether there was one.
    pub(crate) fn clear(&self, topic: Topic) -> bool {
        let mut lines = self.lock();
        let before = lines.len();
        lines.retain(|(of, _)| *of != topic);
        lines.len() < before
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Topic, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
