//! Finds rules that contradict each other, so that no appliance could ever serve.

use xpm_protocol::policy::{Rule, Selector, Strategy};

use super::Check;

impl Check<'_> {
    /// Compares each rule with itself, and with each earlier rule that always applies.
    pub(super) fn contradictions(&mut self, strategy: &Strategy) {
        let mut always: Vec<&Rule> = Vec::new();
        for (index, rule) in strategy.rules.iter().enumerate() {
            self.forbids_what_is_required(index, rule, &always);
            if let Some(own) = &rule.require {
                self.requires_what_cannot_be(index, own, &always);
            }
            if rule.when.is_always() {
                always.push(rule);
            }
        }
    }

    fn forbids_what_is_required(&mut self, index: usize, rule: &Rule, always: &[&Rule]) {
        for (number, forbidden) in rule.forbid.iter().enumerate() {
            let covered = |other: &&Rule| other.require.as_ref().is_some_and(|one| covers(forbidden, one));
            if let Some(other) = always.iter().copied().chain([rule]).find(covered) {
                let text = format!("it forbids all that rule `{}` requires", other.name);
                self.say(format!("rule[{index}].forbid[{number}]"), text);
            }
        }
    }

    fn requires_what_cannot_be(&mut self, index: usize, own: &Selector, always: &[&Rule]) {
        for other in always {
            let text = if other.require.as_ref().is_some_and(|one| excludes(own, one)) {
                format!("no appliance fits both this and what rule `{}` requires", other.name)
            } else if other.forbid.iter().any(|one| covers(one, own)) {
                format!("rule `{}` forbids all that this requires", other.name)
            } else {
                continue;
            };
            return self.say(format!("rule[{index}].require"), text);
        }
    }
}

/// Whether every appliance that fits `inner` also fits `outer`.
fn covers(outer: &Selector, inner: &Selector) -> bool {
    within(&outer.appliances, &inner.appliances)
        && outer.labels.iter().all(|(key, value)| inner.labels.get(key) == Some(value))
        && within(&outer.medium, &inner.medium)
        && outer.link_speed_min.is_none_or(|least| inner.link_speed_min.is_some_and(|speed| speed >= least))
        && outer.rdma.is_none_or(|rdma| inner.rdma == Some(rdma))
}

/// Whether `inner` is a subset of `outer`; an empty list means "any".
fn within<T: PartialEq>(outer: &[T], inner: &[T]) -> bool {
    outer.is_empty() || (!inner.is_empty() && inner.iter().all(|one| outer.contains(one)))
}

/// Whether no appliance can fit both selectors.
fn excludes(a: &Selector, b: &Selector) -> bool {
    apart(&a.appliances, &b.appliances)
        || a.labels.iter().any(|(key, value)| b.labels.get(key).is_some_and(|other| other != value))
        || apart(&a.medium, &b.medium)
        || matches!((a.rdma, b.rdma), (Some(a), Some(b)) if a != b)
}

fn apart<T: PartialEq>(a: &[T], b: &[T]) -> bool {
    !a.is_empty() && !b.is_empty() && !a.iter().any(|one| b.contains(one))
}
