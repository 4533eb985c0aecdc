//! Checks strategies and their rules.

use std::collections::BTreeSet;

use xpm_protocol::layout::{COLUMNS_MAX, STRIPE_UNIT_MIN};
use xpm_protocol::policy::{
    Condition, Kind, LayoutRule, LimitRule, Locality, Preference, Rule, Selector, Strategy, WEIGHT_MAX,
    Weights,
};
use xpm_protocol::units::is_region_len;
use xpm_protocol::{ByteSize, Name};

use super::{Check, condition};

/// Most rules of a strategy.
const RULES_MAX: usize = 1000;
/// Most conditions of a strategy, inner ones included.
const CONDITIONS_MAX: usize = 10_000;
/// Most selectors in `forbid` and `prefer` of a strategy.
const SELECTORS_MAX: usize = 5000;

impl Check<'_> {
    pub(super) fn strategy(&mut self, strategy: &Strategy) {
        if self.too_large(strategy) {
            return;
        }
        self.order(strategy);
        for (index, rule) in strategy.rules.iter().enumerate() {
            let key = format!("rule[{index}]");
            self.rule(&key, rule);
            if let Some(next) = &rule.use_strategy {
                self.goes_on(&key, &strategy.name, next);
            }
            if rule.when.is_always() {
                self.present_use(&format!("{key}.limit.hard"), rule.limit.and_then(|limit| limit.hard));
            }
        }
        self.contradictions(strategy);
    }

    fn too_large(&mut self, strategy: &Strategy) -> bool {
        let rules = &strategy.rules;
        let conditions: usize = rules.iter().map(|rule| condition::count(&rule.when)).sum();
        let selectors: usize = rules.iter().map(|rule| rule.forbid.len() + rule.prefer.len()).sum();
        let text = if rules.len() > RULES_MAX {
            format!("a strategy has at most {RULES_MAX} rules, not {}", rules.len())
        } else if conditions > CONDITIONS_MAX {
            format!("a strategy has at most {CONDITIONS_MAX} conditions, not {conditions}")
        } else if selectors > SELECTORS_MAX {
            format!(
                "a strategy has at most {SELECTORS_MAX} selectors in `forbid` and `prefer`, not {selectors}"
            )
        } else {
            return false;
        };
        self.say("rule", format!("{text}: go on with another strategy (`use`) for the rest"));
        true
    }

    /// Rule names must be unique, and each rule must be reachable.
    fn order(&mut self, strategy: &Strategy) {
        let mut names = BTreeSet::new();
        let mut end: Option<&Name> = None;
        for (index, rule) in strategy.rules.iter().enumerate() {
            if !names.insert(&rule.name) {
                self.say(format!("rule[{index}].name"), format!("two rules are named `{}`", rule.name));
            }
            if let Some(end) = end {
                let text = format!("it is never reached: rule `{end}` before it always ends the list");
                self.say(format!("rule[{index}]"), text);
            }
            let ends = rule.last || rule.use_strategy.is_some() || rule.refuse.is_some();
            if ends && rule.when.is_always() && end.is_none() {
                end = Some(&rule.name);
            }
        }
    }

    fn goes_on(&mut self, key: &str, from: &Name, to: &Name) {
        self.exists(format!("{key}.use"), Kind::Strategy, to);
        if let Some(text) = self.world.chains.problem(from, to) {
            self.say(format!("{key}.use"), text);
        }
    }

    fn rule(&mut self, key: &str, rule: &Rule) {
        self.condition(&format!("{key}.when"), &rule.when, 1);
        if *rule == nothing(rule) {
            self.say(key, "it does nothing: say what follows, such as `require` or `layout`");
        }
        if rule.refuse.as_ref().is_some_and(|text| text.trim().is_empty()) {
            self.say(format!("{key}.refuse"), "say why, for the one who is refused");
        }
        if rule.use_strategy.is_some() && rule.last {
            self.say(format!("{key}.last"), "a rule with `use` goes on elsewhere: leave `last` out");
        }
        self.selectors(key, rule);
        self.settings(key, rule);
    }

    fn selectors(&mut self, key: &str, rule: &Rule) {
        if let Some(selector) = &rule.require {
            self.selector(&format!("{key}.require"), selector, "it says nothing about appliances");
        }
        for (index, selector) in rule.forbid.iter().enumerate() {
            let text = "it forbids all appliances: use `refuse` to say no";
            self.selector(&format!("{key}.forbid[{index}]"), selector, text);
        }
        for (index, Preference { select, weight }) in rule.prefer.iter().enumerate() {
            let key = format!("{key}.prefer[{index}]");
            if !(1..=WEIGHT_MAX).contains(weight) {
                self.say(format!("{key}.weight"), format!("a weight is 1 to {WEIGHT_MAX}, not {weight}"));
            }
            if *select == Selector::default() {
                self.say(&key, "it prefers all appliances alike: say which in `select`");
            }
            self.link_speed(&format!("{key}.select.link-speed-min"), select.link_speed_min);
        }
    }

    fn selector(&mut self, key: &str, selector: &Selector, empty: &str) {
        if *selector == Selector::default() {
            self.say(key, empty);
        }
        self.link_speed(&format!("{key}.link-speed-min"), selector.link_speed_min);
    }

    fn settings(&mut self, key: &str, rule: &Rule) {
        if let Some(layout) = &rule.layout {
            self.layout(&format!("{key}.layout"), layout);
        }
        if let Some(lease) = &rule.lease {
            self.lease(&format!("{key}.lease"), lease);
        }
        if let Some(locality) = &rule.locality {
            self.locality(&format!("{key}.locality"), locality);
        }
        if let Some(weights) = &rule.weights {
            self.weights(&format!("{key}.weights"), weights);
        }
        if let Some(limit) = &rule.limit {
            self.limit(&format!("{key}.limit"), limit);
        }
        self.link_demand(&format!("{key}.link-speed"), rule.link_speed);
    }

    fn locality(&mut self, key: &str, locality: &Locality) {
        if locality.within.is_none() && locality.round_trip_max.is_none() {
            self.say(key, "say how near: `within` or `round-trip-max`");
        }
        let key = format!("{key}.round-trip-max");
        if locality.round_trip_max.is_some_and(|most| most.0.is_zero()) {
            self.say(&key, "no appliance is so near: a round trip takes some time");
        }
        self.duration(&key, locality.round_trip_max);
    }

    fn weights(&mut self, key: &str, weights: &Weights) {
        for (name, weight) in [
            ("free", weights.free),
            ("load", weights.load),
            ("health", weights.health),
            ("near", weights.near),
        ] {
            if weight > WEIGHT_MAX {
                self.say(format!("{key}.{name}"), format!("a weight is 0 to {WEIGHT_MAX}, not {weight}"));
            }
        }
    }

    fn limit(&mut self, key: &str, limit: &LimitRule) {
        if *limit == LimitRule::default() {
            self.say(key, "it limits nothing");
        }
        self.size(format!("{key}.size-max"), limit.size_max);
        let (soft, hard) = (format!("{key}.soft"), format!("{key}.hard"));
        self.limits((&soft, limit.soft), (&hard, limit.hard));
    }

    fn layout(&mut self, key: &str, layout: &LayoutRule) {
        if *layout == LayoutRule::default() {
            self.say(key, "it sets nothing");
        }
        if let Some(columns) = layout.stripe.filter(|columns| !(1..=COLUMNS_MAX).contains(columns)) {
            let text = format!("a stripe goes over 1 to {COLUMNS_MAX} regions, not {columns}");
            self.say(format!("{key}.stripe"), text);
        }
        if let Some(len) = layout.region_size.filter(|len| !is_region_len(len.0)) {
            let text = format!("a region is a power of two of 16MiB to 64GiB long, not {len}");
            self.say(format!("{key}.region-size"), text);
        }
        if let Some(unit) = layout.stripe_unit {
            self.stripe_unit(&format!("{key}.stripe-unit"), layout, unit);
        }
    }

    fn stripe_unit(&mut self, key: &str, layout: &LayoutRule, unit: ByteSize) {
        let most = layout.region_size.map_or(u64::MAX, |len| len.0);
        if layout.stripe.is_none_or(|columns| columns < 2) {
            self.say(key, "a stripe unit means nothing without a stripe over 2 regions or more");
        } else if !unit.0.is_power_of_two() || unit.0 < STRIPE_UNIT_MIN || unit.0 > most {
            let text = format!("a stripe unit is a power of two from 4KiB to the region size, not {unit}");
            self.say(key, text);
        }
    }
}

/// A rule with the same name and condition and no effect.
fn nothing(rule: &Rule) -> Rule {
    Rule {
        name: rule.name.clone(),
        when: Condition::clone(&rule.when),
        refuse: None,
        require: None,
        forbid: Vec::new(),
        prefer: Vec::new(),
        limit: None,
        layout: None,
        link_speed: None,
        locality: None,
        weights: None,
        lease: None,
        reclaimable: None,
        use_strategy: None,
        last: false,
    }
}
