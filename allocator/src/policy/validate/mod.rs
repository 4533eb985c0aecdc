//! Whether documents make sense, each by itself and all together.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use xpm_protocol::api::policy::Problem;
use xpm_protocol::layout::{COLUMNS_MAX, STRIPE_UNIT_MIN};
use xpm_protocol::policy::{
    Account, ApplianceProfile, ClientProfile, Condition, Content, DocumentName, Kind, LayoutRule, LeaseTerms,
    LimitRule, PRIORITY_MAX, Rule, Selector, Strategy, WEIGHT_MAX, Window,
};
use xpm_protocol::units::is_region_len;
use xpm_protocol::{ByteSize, Name};

use super::read::{Document, PROBLEMS_MAX};
use super::{Policy, Windows};
use crate::usage::Usage;

/// Most rules of a strategy.
const RULES_MAX: usize = 1000;
/// Most strategies that go on with each other.
const CHAIN_MAX: usize = 8;

/// All problems of documents that were read, with those that are there already.
pub(super) fn validate(policy: &Policy, documents: &[Document], usage: &Usage) -> Vec<Problem> {
    let mut check = Check { policy, usage, new: HashMap::new(), problems: Vec::new() };
    for document in documents {
        let name = document.content.document_name();
        if check.new.insert(name.clone(), &document.content).is_some() {
            check.problems.push(
                document.problem("name", format!("{name} is there twice: give each a name of its own")),
            );
        }
    }
    for document in documents {
        check.version(document);
        match &document.content {
            Content::Strategy(strategy) => check.strategy(document, strategy),
            Content::Account(account) => check.account(document, account),
            Content::Client(client) => check.client(document, client),
            Content::Appliance(appliance) => check.appliance(document, appliance),
        }
    }
    check.problems.truncate(PROBLEMS_MAX);
    check.problems
}

struct Check<'a> {
    policy: &'a Policy,
    usage: &'a Usage,
    new: HashMap<DocumentName, &'a Content>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn say(&mut self, document: &Document, key: &str, text: impl Into<String>) {
        self.problems.push(document.problem(key, text.into()));
    }

    fn content(&self, kind: Kind, name: &Name) -> Option<&Content> {
        let name = DocumentName { kind, name: name.clone() };
        self.new.get(&name).copied().or_else(|| self.policy.documents.get(&name))
    }

    fn version(&mut self, document: &Document) {
        let name = document.content.document_name();
        let has = self.policy.documents.get(&name).and_then(Content::version);
        match (document.content.version(), has) {
            (Some(asked), Some(has)) if asked != has => self.say(
                document,
                "version",
                format!(
                    "it was changed meanwhile and has version {has} now: read it again with `xpm get {} {}`",
                    name.kind, name.name
                ),
            ),
            (Some(_), None) => self.say(
                document,
                "version",
                "it is not there any more: leave the version out to make it anew",
            ),
            _ => {}
        }
    }

    /// A name must lead somewhere.
    fn exists(&mut self, document: &Document, key: &str, kind: Kind, name: &Name) {
        if self.content(kind, name).is_none() {
            self.say(
                document,
                key,
                format!("there is no {kind} `{name}`: apply it with this file, or before"),
            );
        }
    }

    fn limits(&mut self, document: &Document, soft: Option<ByteSize>, hard: Option<ByteSize>) {
        if let (Some(soft), Some(hard)) = (soft, hard)
            && soft > hard
        {
            self.say(
                document,
                "soft-limit",
                format!("the soft limit of {soft} is above the hard limit of {hard}"),
            );
        }
        let name = document.content.document_name();
        let used = ByteSize(self.usage.of(name.kind, &name.name).bytes);
        if let Some(hard) = hard.filter(|hard| *hard < used) {
            let text = format!(
                "{name} has {used} already: set at least that instead of {hard}, or delete allocations first"
            );
            self.say(document, "hard-limit", text);
        }
    }

    fn account(&mut self, document: &Document, account: &Account) {
        if account.priority > PRIORITY_MAX {
            self.say(
                document,
                "priority",
                format!("a priority is 0 to {PRIORITY_MAX}, not {}", account.priority),
            );
        }
        self.limits(document, account.soft_limit, account.hard_limit);
        if let Some(strategy) = &account.strategy {
            self.exists(document, "strategy", Kind::Strategy, strategy);
        }
        self.windows(document, "", "hours", account.time_zone.as_deref(), &account.hours);
        if let Some(lease) = &account.lease {
            self.lease(document, "lease", lease);
        }
    }

    fn client(&mut self, document: &Document, client: &ClientProfile) {
        self.limits(document, client.soft_limit, client.hard_limit);
        if let Some(account) = &client.account {
            self.exists(document, "account", Kind::Account, account);
        }
    }

    fn appliance(&mut self, document: &Document, appliance: &ApplianceProfile) {
        if appliance.link_speed.is_some_and(|speed| speed.0 == 0) {
            self.say(document, "link-speed", "a link has some speed: leave it out where it is not known");
        }
    }

    fn windows(
        &mut self,
        document: &Document,
        base: &str,
        key: &str,
        zone: Option<&str>,
        windows: &[Window],
    ) {
        let at = |key: &str| if base.is_empty() { key.to_owned() } else { format!("{base}.{key}") };
        match zone {
            Some(name) if Windows::new(Some(name), &[]).is_none() => {
                self.say(
                    document,
                    &at("time-zone"),
                    format!("the time zone `{name}` is unknown: write it like Europe/Berlin or UTC"),
                );
            }
            Some(_) if windows.is_empty() => {
                self.say(document, &at("time-zone"), format!("a time zone means nothing without `{key}`"));
            }
            _ => {}
        }
    }

    fn lease(&mut self, document: &Document, key: &str, lease: &LeaseTerms) {
        let duration = lease.duration.0;
        if duration.as_secs() == 0 {
            self.say(document, &format!("{key}.duration"), "a lease lasts a second at least");
        }
        if lease.warning.is_some_and(|warning| warning.0 > duration) {
            self.say(
                document,
                &format!("{key}.warning"),
                format!("it would be announced before it begins: it lasts {}", lease.duration),
            );
        }
        if lease.total_max.is_some_and(|most| most.0 < duration) {
            self.say(
                document,
                &format!("{key}.total-max"),
                format!("it is shorter than one lease of {}", lease.duration),
            );
        }
    }

    fn strategy(&mut self, document: &Document, strategy: &Strategy) {
        if strategy.rules.len() > RULES_MAX {
            return self.say(
                document,
                "rule",
                format!("a strategy has at most {RULES_MAX} rules: use another one for the rest"),
            );
        }
        let mut names = BTreeSet::new();
        let mut end: Option<&Name> = None;
        for (index, rule) in strategy.rules.iter().enumerate() {
            let key = format!("rule[{index}]");
            if !names.insert(&rule.name) {
                self.say(document, &format!("{key}.name"), format!("two rules are named `{}`", rule.name));
            }
            if let Some(end) = end {
                self.say(
                    document,
                    &key,
                    format!("it is never reached: rule `{end}` before it always ends the list"),
                );
            }
            self.rule(document, &key, rule);
            let ends = rule.last || rule.use_strategy.is_some() || rule.refuse.is_some();
            if ends && rule.when.is_always() && end.is_none() {
                end = Some(&rule.name);
            }
        }
        self.contradictions(document, strategy);
        self.strategy_limits(document, strategy);
        self.chain(document, strategy);
    }

    fn rule(&mut self, document: &Document, key: &str, rule: &Rule) {
        self.condition(document, &format!("{key}.when"), &rule.when, 1);
        let nothing = Rule { name: rule.name.clone(), when: rule.when.clone(), ..empty_rule(&rule.name) };
        if *rule == nothing {
            self.say(document, key, "it does nothing: say what follows, such as `require` or `layout`");
        }
        if rule.refuse.as_ref().is_some_and(|text| text.trim().is_empty()) {
            self.say(document, &format!("{key}.refuse"), "say why, for the one who is refused");
        }
        if rule.use_strategy.is_some() && rule.last {
            self.say(
                document,
                &format!("{key}.last"),
                "a rule with `use` goes on elsewhere: leave `last` out",
            );
        }
        if let Some(name) = &rule.use_strategy {
            self.exists(document, &format!("{key}.use"), Kind::Strategy, name);
        }
        if rule.require.as_ref().is_some_and(|selector| *selector == Selector::default()) {
            self.say(document, &format!("{key}.require"), "it says nothing about appliances");
        }
        if let Some(index) = rule.forbid.iter().position(|selector| *selector == Selector::default()) {
            self.say(
                document,
                &format!("{key}.forbid[{index}]"),
                "it forbids all appliances: use `refuse` to say no",
            );
        }
        for (index, preference) in rule.prefer.iter().enumerate() {
            if !(1..=WEIGHT_MAX).contains(&preference.weight) {
                self.say(
                    document,
                    &format!("{key}.prefer[{index}].weight"),
                    format!("a weight is 1 to {WEIGHT_MAX}"),
                );
            }
            if preference.select == Selector::default() {
                self.say(
                    document,
                    &format!("{key}.prefer[{index}]"),
                    "it prefers all appliances alike: say which in `select`",
                );
            }
        }
        self.rule_values(document, key, rule);
    }

    fn rule_values(&mut self, document: &Document, key: &str, rule: &Rule) {
        if let Some(layout) = &rule.layout {
            self.layout(document, &format!("{key}.layout"), layout);
        }
        if let Some(lease) = &rule.lease {
            self.lease(document, &format!("{key}.lease"), lease);
        }
        if rule.locality.is_some_and(|one| one.within.is_none() && one.round_trip_max.is_none()) {
            self.say(document, &format!("{key}.locality"), "say how near: `within` or `round-trip-max`");
        }
        if let Some(weights) = &rule.weights {
            for (name, weight) in [
                ("free", weights.free),
                ("load", weights.load),
                ("health", weights.health),
                ("near", weights.near),
            ] {
                if weight > WEIGHT_MAX {
                    self.say(
                        document,
                        &format!("{key}.weights.{name}"),
                        format!("a weight is 0 to {WEIGHT_MAX}, not {weight}"),
                    );
                }
            }
        }
        if let Some(limit) = &rule.limit {
            if *limit == LimitRule::default() {
                self.say(document, &format!("{key}.limit"), "it limits nothing");
            }
            if let (Some(soft), Some(hard)) = (limit.soft, limit.hard)
                && soft > hard
            {
                self.say(
                    document,
                    &format!("{key}.limit.soft"),
                    format!("the soft limit of {soft} is above the hard limit of {hard}"),
                );
            }
        }
    }

    fn layout(&mut self, document: &Document, key: &str, layout: &LayoutRule) {
        let striped = layout.stripe.is_some_and(|columns| columns > 1);
        if let Some(columns) = layout.stripe.filter(|columns| !(1..=COLUMNS_MAX).contains(columns)) {
            self.say(
                document,
                &format!("{key}.stripe"),
                format!("a stripe goes over 1 to {COLUMNS_MAX} regions, not {columns}"),
            );
        }
        if let Some(len) = layout.region_size.filter(|len| !is_region_len(len.0)) {
            self.say(
                document,
                &format!("{key}.region-size"),
                format!("a region is a power of two of 16MiB to 64GiB long, not {len}"),
            );
        }
        let Some(unit) = layout.stripe_unit else { return };
        let most = layout.region_size.map_or(u64::MAX, |len| len.0);
        if !striped {
            self.say(
                document,
                &format!("{key}.stripe-unit"),
                "a stripe unit means nothing without a stripe over 2 regions or more",
            );
        } else if !unit.0.is_power_of_two() || unit.0 < STRIPE_UNIT_MIN || unit.0 > most {
            self.say(
                document,
                &format!("{key}.stripe-unit"),
                format!("a stripe unit is a power of two from 4KiB to the region size, not {unit}"),
            );
        }
    }

    fn condition(&mut self, document: &Document, key: &str, condition: &Condition, depth: usize) {
        if depth > Condition::DEPTH_MAX {
            return self.say(
                document,
                key,
                format!("conditions lie more than {} deep in each other", Condition::DEPTH_MAX),
            );
        }
        for (index, account) in condition.account.iter().enumerate() {
            self.exists(document, &format!("{key}.account[{index}]"), Kind::Account, account);
        }
        let never = "this can never hold: the least is above the most";
        if condition.size_min.zip(condition.size_max).is_some_and(|(least, most)| least > most) {
            self.say(document, &format!("{key}.size-min"), never);
        }
        if condition.pool_used_min.zip(condition.pool_used_max).is_some_and(|(least, most)| least > most) {
            self.say(document, &format!("{key}.pool-used-min"), never);
        }
        if condition
            .account_used_min
            .zip(condition.account_used_max)
            .is_some_and(|(least, most)| least > most)
        {
            self.say(document, &format!("{key}.account-used-min"), never);
        }
        self.windows(document, key, "time", condition.time_zone.as_deref(), &condition.time);
        if condition.not.as_ref().is_some_and(|not| not.is_always()) {
            self.say(document, &format!("{key}.not"), "this can never hold: what it excludes is everything");
        }
        for (name, inner) in [("all", &condition.all), ("any", &condition.any)] {
            for (index, one) in inner.iter().enumerate() {
                self.condition(document, &format!("{key}.{name}[{index}]"), one, depth + 1);
            }
        }
        if let Some(not) = &condition.not {
            self.condition(document, &format!("{key}.not"), not, depth + 1);
        }
    }

    /// What no appliance can fit: rules that always apply, and those of one rule, exclude each other.
    fn contradictions(&mut self, document: &Document, strategy: &Strategy) {
        let mut required: Vec<(usize, &Selector)> = Vec::new();
        for (index, rule) in strategy.rules.iter().enumerate() {
            let own = rule.require.as_ref().map(|selector| (index, selector));
            let before = required.iter().copied().chain(own);
            for (number, forbidden) in rule.forbid.iter().enumerate() {
                if let Some((of, _)) = before.clone().find(|(_, selector)| covers(forbidden, selector)) {
                    let text = format!("it forbids all that rule `{}` requires", strategy.rules[of].name);
                    self.say(document, &format!("rule[{index}].forbid[{number}]"), text);
                }
            }
            if let Some((_, selector)) = own
                && let Some((of, _)) = required.iter().find(|(_, other)| exclude(selector, other))
            {
                let text = format!(
                    "no appliance fits both this and what rule `{}` requires",
                    strategy.rules[*of].name
                );
                self.say(document, &format!("rule[{index}].require"), text);
            }
            required.extend(own.filter(|_| rule.when.is_always()));
        }
    }

    fn strategy_limits(&mut self, document: &Document, strategy: &Strategy) {
        let used = ByteSize(self.usage.of(Kind::Strategy, &strategy.name).bytes);
        for (index, rule) in strategy.rules.iter().enumerate().filter(|(_, rule)| rule.when.is_always()) {
            if let Some(hard) = rule.limit.and_then(|limit| limit.hard).filter(|hard| *hard < used) {
                let text = format!(
                    "strategy `{}` has {used} already: set at least that instead of {hard}, or delete allocations first",
                    strategy.name
                );
                self.say(document, &format!("rule[{index}].limit.hard"), text);
            }
        }
    }

    /// Strategies that go on with each other must come to an end.
    fn chain(&mut self, document: &Document, strategy: &Strategy) {
        for (index, rule) in strategy.rules.iter().enumerate() {
            let Some(next) = &rule.use_strategy else { continue };
            let mut seen = BTreeMap::from([(&strategy.name, 0_usize)]);
            if let Err(text) = self.follow(next, 1, &mut seen) {
                self.say(document, &format!("rule[{index}].use"), text);
            }
        }
    }

    /// Walks depth first; `path` holds the names that lead here.
    fn follow<'s>(
        &'s self,
        name: &'s Name,
        depth: usize,
        path: &mut BTreeMap<&'s Name, usize>,
    ) -> Result<(), String> {
        if path.contains_key(name) {
            return Err(format!("it leads back to `{name}`: strategies cannot go round in a circle"));
        }
        if depth > CHAIN_MAX {
            return Err(format!("more than {CHAIN_MAX} strategies go on with each other"));
        }
        let Some(Content::Strategy(strategy)) = self.content(Kind::Strategy, name) else { return Ok(()) };
        path.insert(name, depth);
        let nexts: BTreeSet<&Name> =
            strategy.rules.iter().filter_map(|rule| rule.use_strategy.as_ref()).collect();
        for next in nexts {
            self.follow(next, depth + 1, path)?;
        }
        path.remove(name);
        Ok(())
    }
}

fn empty_rule(name: &Name) -> Rule {
    Rule {
        name: name.clone(),
        when: Condition::default(),
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

/// Whether everything that fits `inner` fits `outer` too.
fn covers(outer: &Selector, inner: &Selector) -> bool {
    let within = |outer: &[Name], inner: &[Name]| {
        outer.is_empty() || (!inner.is_empty() && inner.iter().all(|name| outer.contains(name)))
    };
    within(&outer.appliances, &inner.appliances)
        && outer.labels.iter().all(|(key, value)| inner.labels.get(key) == Some(value))
        && (outer.medium.is_empty()
            || (!inner.medium.is_empty() && inner.medium.iter().all(|one| outer.medium.contains(one))))
        && outer.link_speed_min.is_none_or(|least| inner.link_speed_min.is_some_and(|speed| speed >= least))
        && outer.rdma.is_none_or(|rdma| inner.rdma == Some(rdma))
}

/// Whether nothing can fit both.
fn exclude(a: &Selector, b: &Selector) -> bool {
    let apart =
        |a: &[Name], b: &[Name]| !a.is_empty() && !b.is_empty() && !a.iter().any(|name| b.contains(name));
    apart(&a.appliances, &b.appliances)
        || a.labels.iter().any(|(key, value)| b.labels.get(key).is_some_and(|other| other != value))
        || (!a.medium.is_empty()
            && !b.medium.is_empty()
            && !a.medium.iter().any(|one| b.medium.contains(one)))
        || matches!((a.rdma, b.rdma), (Some(a), Some(b)) if a != b)
}
