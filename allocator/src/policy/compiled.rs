//! Documents in the form in which decisions use them.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use xpm_protocol::policy::{Access, Account, Condition, Labels, Rule, Strategy, Window};
use xpm_protocol::{ByteSize, Name, Percent};

use super::Windows;

/// A strategy, prepared for evaluation.
#[derive(Debug, Clone)]
pub struct CompiledStrategy {
    /// Its name.
    pub name: Name,
    /// Its version.
    pub version: u64,
    /// Its rules in order.
    pub rules: Vec<CompiledRule>,
}

/// A rule, prepared for evaluation.
#[derive(Debug, Clone)]
pub struct CompiledRule {
    /// The effects of the rule.
    pub rule: Arc<Rule>,
    /// The condition of the rule.
    pub when: CompiledCondition,
}

/// An account, with its hours in their time zone.
#[derive(Debug, Clone)]
pub struct CompiledAccount {
    /// The document.
    pub account: Arc<Account>,
    /// When it gets memory; none means always.
    pub hours: Option<Windows>,
}

/// A condition, with its times in their time zone.
#[derive(Debug, Clone)]
pub struct CompiledCondition {
    /// The condition without its inner conditions, with its names sorted.
    condition: Condition,
    time: Option<Windows>,
    all: Vec<CompiledCondition>,
    any: Vec<CompiledCondition>,
    not: Option<Box<CompiledCondition>>,
}

/// The facts that conditions are evaluated against.
#[derive(Clone)]
#[allow(missing_debug_implementations)]
pub struct Facts<'a> {
    /// Now, seconds since 1970.
    pub unix: i64,
    /// The account that is charged.
    pub account: Option<&'a Name>,
    /// The labels of the account.
    pub account_labels: &'a Labels,
    /// The client that is going to use the allocation.
    pub client: Option<&'a Name>,
    /// The labels of the client.
    pub client_labels: &'a Labels,
    /// The labels of the request.
    pub labels: &'a Labels,
    /// Requested size in bytes.
    pub size: u64,
    /// How the allocation is going to be used.
    pub access: Access,
    /// Share of the pool in use; computed only if a condition needs it.
    pub pool_used: &'a dyn Fn() -> Percent,
    /// Memory that the account has, in bytes.
    pub account_used: u64,
}

/// The part of a condition that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Miss(&'static str);

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "does not apply: {}", self.0)
    }
}

impl CompiledStrategy {
    pub(super) fn new(strategy: &Strategy) -> CompiledStrategy {
        let rule = |rule: &Rule| CompiledRule {
            rule: Arc::new(rule.clone()),
            when: CompiledCondition::new(&rule.when),
        };
        CompiledStrategy {
            name: strategy.name.clone(),
            version: strategy.version.unwrap_or(0),
            rules: strategy.rules.iter().map(rule).collect(),
        }
    }
}

impl CompiledAccount {
    pub(super) fn new(account: &Account) -> CompiledAccount {
        let hours = windows(account.time_zone.as_deref(), &account.hours);
        CompiledAccount { account: Arc::new(account.clone()), hours }
    }
}

/// The windows, if any. The time zone was known when the document was applied. If a newer time zone table lacks it, a
/// warning is logged and UTC is used.
fn windows(zone: Option<&str>, windows: &[Window]) -> Option<Windows> {
    if windows.is_empty() {
        return None;
    }
    Windows::new(zone, windows).or_else(|| {
        tracing::warn!(
            "the time zone `{}` is not known any more: UTC is used instead",
            zone.unwrap_or_default()
        );
        Windows::new(None, windows)
    })
}

impl CompiledCondition {
    pub(super) fn new(condition: &Condition) -> CompiledCondition {
        let each = |conditions: &[Condition]| conditions.iter().map(CompiledCondition::new).collect();
        CompiledCondition {
            time: windows(condition.time_zone.as_deref(), &condition.time),
            all: each(&condition.all),
            any: each(&condition.any),
            not: condition.not.as_deref().map(|one| Box::new(CompiledCondition::new(one))),
            condition: own_part(condition),
        }
    }

    /// Whether the condition holds; if not, the first part that does not.
    pub fn evaluate(&self, facts: &Facts<'_>) -> Result<(), Miss> {
        let condition = &self.condition;
        let missed = Cell::new(None);
        let check = |holds: bool, what: &'static str| {
            if !holds && missed.get().is_none() {
                missed.set(Some(what));
            }
        };
        let one_of = |names: &[Name], name: Option<&Name>| {
            names.is_empty() || name.is_some_and(|name| names.binary_search(name).is_ok())
        };
        let size = ByteSize(facts.size);
        let used = ByteSize(facts.account_used);
        check(one_of(&condition.account, facts.account), "another account");
        check(one_of(&condition.client, facts.client), "another client");
        check(has(facts.labels, &condition.labels), "the request has other labels");
        check(has(facts.account_labels, &condition.account_labels), "the account has other labels");
        check(has(facts.client_labels, &condition.client_labels), "the client has other labels");
        check(condition.size_min.is_none_or(|least| size >= least), "less is asked for");
        check(condition.size_max.is_none_or(|most| size <= most), "more is asked for");
        check(
            condition.access.is_empty() || condition.access.contains(&facts.access),
            "it is used in another way",
        );
        check(
            condition.pool_used_min.is_none_or(|least| (facts.pool_used)() >= least),
            "less of the pool is in use",
        );
        check(
            condition.pool_used_max.is_none_or(|most| (facts.pool_used)() <= most),
            "more of the pool is in use",
        );
        check(condition.account_used_min.is_none_or(|least| used >= least), "the account has less");
        check(condition.account_used_max.is_none_or(|most| used <= most), "the account has more");
        match missed.get() {
            Some(what) => Err(Miss(what)),
            None => self.evaluate_more(facts),
        }
    }

    /// Evaluates the slower parts.
    fn evaluate_more(&self, facts: &Facts<'_>) -> Result<(), Miss> {
        if self.time.as_ref().is_some_and(|time| !time.contains(facts.unix)) {
            return Err(Miss("another time of day or week"));
        }
        for one in &self.all {
            one.evaluate(facts)?;
        }
        if !self.any.is_empty() && self.any.iter().all(|one| one.evaluate(facts).is_err()) {
            return Err(Miss("none of several conditions holds"));
        }
        match &self.not {
            Some(one) if one.evaluate(facts).is_ok() => Err(Miss("what must not be is so")),
            _ => Ok(()),
        }
    }
}

/// The condition without its inner conditions.
fn own_part(condition: &Condition) -> Condition {
    let sorted = |names: &[Name]| {
        let mut names = names.to_vec();
        names.sort_unstable();
        names
    };
    Condition {
        account: sorted(&condition.account),
        client: sorted(&condition.client),
        labels: condition.labels.clone(),
        account_labels: condition.account_labels.clone(),
        client_labels: condition.client_labels.clone(),
        size_min: condition.size_min,
        size_max: condition.size_max,
        access: condition.access.clone(),
        pool_used_min: condition.pool_used_min,
        pool_used_max: condition.pool_used_max,
        account_used_min: condition.account_used_min,
        account_used_max: condition.account_used_max,
        time: Vec::new(),
        time_zone: None,
        all: Vec::new(),
        any: Vec::new(),
        not: None,
    }
}

fn has(labels: &Labels, wanted: &Labels) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}
