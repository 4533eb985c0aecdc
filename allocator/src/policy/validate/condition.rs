//! Checks conditions: whether they can hold at all.

use xpm_protocol::policy::{Condition, Kind};

use super::Check;

impl Check<'_> {
    /// Checks a condition and its inner conditions. `depth` is 1 for the outermost condition. The recursion itself is
    /// safe: the reader limits how deep conditions nest.
    pub(super) fn condition(&mut self, key: &str, condition: &Condition, depth: usize) {
        if depth > Condition::DEPTH_MAX {
            let text = format!("conditions lie more than {} deep in each other", Condition::DEPTH_MAX);
            return self.say(key, text);
        }
        for (index, account) in condition.account.iter().enumerate() {
            self.exists(format!("{key}.account[{index}]"), Kind::Account, account);
        }
        self.bounds(key, condition);
        self.windows(key, "time", condition.time_zone.as_deref(), &condition.time);
        for (name, inner) in [("all", &condition.all), ("any", &condition.any)] {
            for (index, one) in inner.iter().enumerate() {
                let key = format!("{key}.{name}[{index}]");
                if one.is_always() {
                    self.say(&key, "this always holds: say when, or leave it out");
                }
                self.condition(&key, one, depth + 1);
            }
        }
        if let Some(not) = &condition.not {
            let key = format!("{key}.not");
            if not.is_always() {
                self.say(&key, "this can never hold: what it excludes is everything");
            }
            self.condition(&key, not, depth + 1);
        }
    }

    /// Each minimum must not exceed its maximum.
    fn bounds(&mut self, key: &str, condition: &Condition) {
        let apart = [
            ("size-min", above(condition.size_min, condition.size_max)),
            ("pool-used-min", above(condition.pool_used_min, condition.pool_used_max)),
            ("account-used-min", above(condition.account_used_min, condition.account_used_max)),
        ];
        for (name, _) in apart.into_iter().filter(|(_, above)| *above) {
            self.say(format!("{key}.{name}"), "this can never hold: the least is above the most");
        }
        for (name, size) in [
            ("size-min", condition.size_min),
            ("size-max", condition.size_max),
            ("account-used-min", condition.account_used_min),
            ("account-used-max", condition.account_used_max),
        ] {
            self.size(format!("{key}.{name}"), size);
        }
    }
}

fn above<T: PartialOrd>(least: Option<T>, most: Option<T>) -> bool {
    least.zip(most).is_some_and(|(least, most)| least > most)
}

/// Number of conditions: this one and all inner ones.
pub(super) fn count(condition: &Condition) -> usize {
    let inner = condition.all.iter().chain(&condition.any).chain(condition.not.as_deref());
    1 + inner.map(count).sum::<usize>()
}
