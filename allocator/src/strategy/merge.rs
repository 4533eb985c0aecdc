//! Merges the rules that apply to a request into its needs.

use xpm_protocol::Name;
use xpm_protocol::api::decision::RuleTrace;
use xpm_protocol::policy::{LayoutRule, LeaseTerms, LimitRule, LinkDemand, Rule};
use xpm_protocol::text::one_line;

use super::{Needs, rule_source};
use crate::policy::{CompiledRule, CompiledStrategy, Facts, Policy};

/// Most strategies in a chain; longer ones are refused when they are applied.
const CHAIN_MAX: usize = 16;

/// The combined rules that apply to a request.
#[derive(Debug, Default)]
pub struct Merged {
    /// Demands on appliances.
    pub needs: Needs,
    /// The strategies that were evaluated, each with its version.
    pub strategies: Vec<(Name, u64)>,
    /// The rules that were evaluated.
    pub traces: Vec<RuleTrace>,
    /// The reason of a refusal, and the rule that refuses.
    pub refuse: Option<(String, String)>,
    /// Limits, each with the strategy whose usage it is compared with.
    pub limits: Vec<(Name, LimitRule)>,
    /// The layout, if the request leaves it open.
    pub layout: LayoutRule,
    /// The demanded link speed.
    pub link: Option<LinkDemand>,
    /// How long the allocation may exist.
    pub lease: Option<LeaseTerms>,
    /// Whether it may be reclaimed.
    pub reclaimable: Option<bool>,
    weighted: bool,
    located: bool,
}

/// Evaluates the rules of the strategy, and of the strategies that it continues with.
pub fn merge(policy: &Policy, strategy: Option<&Name>, facts: &Facts<'_>) -> Merged {
    let mut merged = Merged::default();
    let mut next = strategy.and_then(|name| policy.strategy(name));
    while let Some(strategy) = next.filter(|_| merged.strategies.len() < CHAIN_MAX) {
        merged.strategies.push((strategy.name.clone(), strategy.version));
        next = merged.follow(strategy, facts).and_then(|name| policy.strategy(&name));
    }
    merged
}

impl Merged {
    /// Evaluates one strategy. Returns the strategy that it continues with.
    fn follow(&mut self, strategy: &CompiledStrategy, facts: &Facts<'_>) -> Option<Name> {
        for CompiledRule { rule, when } in &strategy.rules {
            let held = when.evaluate(facts);
            let why = match &held {
                Ok(()) => does(rule),
                Err(miss) => miss.to_string(),
            };
            self.traces.push(RuleTrace {
                strategy: strategy.name.clone(),
                rule: rule.name.clone(),
                applies: held.is_ok(),
                why,
            });
            if held.is_ok() {
                self.take(&strategy.name, rule);
                if rule.last || rule.use_strategy.is_some() || self.refuse.is_some() {
                    return rule.use_strategy.clone();
                }
            }
        }
        None
    }

    fn take(&mut self, strategy: &Name, rule: &Rule) {
        let named = || format!("{strategy}/{}", rule.name);
        if let Some(text) = &rule.refuse {
            self.refuse = Some((named(), one_line(text)));
        }
        let needs = &mut self.needs;
        needs.require.extend(rule.require.iter().map(|selector| (named(), selector.clone())));
        needs.forbid.extend(rule.forbid.iter().map(|selector| (named(), selector.clone())));
        needs.prefer.extend(rule.prefer.iter().map(|preference| (named(), preference.clone())));
        if let Some(limit) = rule.limit {
            self.limits.push((strategy.clone(), limit));
            if limit.appliance_share.is_some_and(|share| needs.share.is_none_or(|least| share < least)) {
                needs.sources.share = rule_source(&named());
            }
            let shares = [needs.share, limit.appliance_share];
            needs.share = shares.into_iter().flatten().min();
        }
        self.settle(rule, &named());
    }

    /// Takes the settings that can be set only once, unless an earlier rule has set them.
    fn settle(&mut self, rule: &Rule, named: &str) {
        let layout = rule.layout.unwrap_or_default();
        if self.layout.stripe.is_none() && layout.stripe.is_some() {
            (self.layout.stripe, self.layout.stripe_unit) = (layout.stripe, layout.stripe_unit);
        }
        self.layout.spread = self.layout.spread.or(layout.spread);
        self.needs.spread = self.layout.spread.unwrap_or(false);
        self.layout.region_size = self.layout.region_size.or(layout.region_size);
        if self.link.is_none() && rule.link_speed.is_some() {
            self.needs.sources.link = rule_source(named);
        }
        self.link = self.link.or(rule.link_speed);
        self.lease = self.lease.or(rule.lease);
        self.reclaimable = self.reclaimable.or(rule.reclaimable);
        if let (Some(locality), false) = (rule.locality, self.located) {
            self.located = true;
            self.needs.sources.locality = rule_source(named);
            self.needs.within = locality.within;
            self.needs.round_trip_max = locality.round_trip_max.map(|span| span.0.as_nanos() as u64);
        }
        if let (Some(weights), false) = (rule.weights, self.weighted) {
            self.weighted = true;
            self.needs.weights = weights;
        }
    }
}

/// The effect of a rule, in a few words.
fn does(rule: &Rule) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let mut part = |there: bool, what: &'static str| {
        if there {
            parts.push(what);
        }
    };
    part(rule.refuse.is_some(), "refuses");
    part(rule.require.is_some(), "requires");
    part(!rule.forbid.is_empty(), "forbids");
    part(!rule.prefer.is_empty(), "prefers");
    part(rule.limit.is_some(), "limits");
    part(rule.layout.is_some(), "sets the layout");
    part(rule.link_speed.is_some(), "asks for a link speed");
    part(rule.locality.is_some(), "asks for nearness");
    part(rule.weights.is_some(), "sets weights");
    part(rule.lease.is_some(), "sets a lease");
    part(rule.reclaimable.is_some(), "says whether it is reclaimable");
    part(rule.last, "ends the rules");
    let mut text = parts.join(", ");
    if let Some(next) = &rule.use_strategy {
        let join = if text.is_empty() { "" } else { ", " };
        text.push_str(&format!("{join}goes on with {next}"));
    }
    text
}
