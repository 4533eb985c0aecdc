//! What the operator should know of this appliance, for its status.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most lines: one that does not come to an end is worse than none.
const LINES_MAX: usize = 64;

/// Lines by what they are about.
#[derive(Debug, Default)]
pub(crate) struct Warnings(Mutex<Vec<(Topic, String)>>);

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Topic {
    /// The limits of the process's memory; at most one line.
    Limit,
    /// Something that happened, and stays true until the process ends.
    Happened,
}

impl Warnings {
    /// The lines, the oldest first.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lock().iter().map(|(_, line)| line.clone()).collect()
    }

    /// Adds a line about something that happened. Whether it is new.
    pub(crate) fn add(&self, line: String) -> bool {
        let mut lines = self.lock();
        let is_new = lines.iter().all(|(_, known)| *known != line);
        if is_new && lines.len() < LINES_MAX {
            lines.push((Topic::Happened, line));
        }
        is_new
    }

    /// The line about a topic is this one. Whether there was none.
    pub(crate) fn set(&self, topic: Topic, line: String) -> bool {
        let mut lines = self.lock();
        match lines.iter_mut().find(|(of, _)| *of == topic) {
            // The numbers in it change all the time.
            Some(_) => false,
            None => {
                lines.push((topic, line));
                true
            }
        }
    }

    /// There is nothing to say of a topic any more. Whether there was.
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
