//! Evaluation of a request under the documents: the account that is charged, the rules that apply, what they demand,
//! what the limits leave, how long the allocation may last.

use std::collections::HashMap;

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Create, EndReason};
use xpm_protocol::api::decision::{DocumentVersion, LimitCheck, RuleTrace};
use xpm_protocol::layout::{COLUMNS_MAX, STRIPE_UNIT_DEFAULT};
use xpm_protocol::policy::{
    Account, AtClose, ClientProfile, DocumentName, Kind, LABELS_MAX, LEVELS, Labels, LeaseTerms, LinkDemand,
    PRIORITY_DEFAULT,
};
use xpm_protocol::units::{PAGE_LEN, REGION_LEN_MAX, is_region_len};
use xpm_protocol::{ByteSize, Layout, LinkSpeed, Name, Percent};

use super::HeardClient;
use crate::policy::{CompiledAccount, Facts, Policy};
use crate::store::record::{LeaseRecord, Terms};
use crate::strategy::{Demand, Merged, Pool, merge};
use crate::usage::Usage;

/// Warning time in seconds before the account's hours end, if no lease sets one.
const CLOSE_WARNING: u64 = 600;

/// State that requests are evaluated against.
pub(super) struct World<'a> {
    pub(super) policy: &'a Policy,
    pub(super) usage: &'a Usage,
    pub(super) pool: &'a Pool,
    pub(super) clients: &'a HashMap<Name, HeardClient>,
    pub(super) unix: u64,
    /// Share of the appliances' memory that is in use.
    pub(super) pool_used: &'a dyn Fn() -> Percent,
}

/// A request after evaluation.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) demand: Demand,
    pub(super) layout: Layout,
    pub(super) terms: Terms,
    pub(super) priority: u16,
    pub(super) strategy: Option<Name>,
    pub(super) documents: Vec<DocumentVersion>,
    pub(super) rules: Vec<RuleTrace>,
    pub(super) limits: Vec<LimitCheck>,
    /// Set if the documents refuse the request, whatever appliances there are.
    pub(super) refusal: Option<Refusal>,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) kind: ErrorKind,
    pub(super) why: String,
    pub(super) remedies: Vec<String>,
}

impl Refusal {
    pub(super) fn denied(why: String, remedies: Vec<String>) -> Refusal {
        Refusal { kind: ErrorKind::Denied, why, remedies }
    }

    /// The refusal with its remedies in one line.
    pub(super) fn line(&self) -> String {
        match self.remedies.is_empty() {
            true => self.why.clone(),
            false => format!("{}; {}", self.why, self.remedies.join(", or ")),
        }
    }
}

/// The requester, as far as documents know it.
struct Who<'a> {
    account: Option<&'a CompiledAccount>,
    client: Option<&'a ClientProfile>,
    heard: Option<&'a HeardClient>,
    strategy: Option<Name>,
}

/// Evaluates a request. An error means that the request itself is wrong.
pub(super) fn ask(world: &World<'_>, create: &Create) -> Result<Asked, String> {
    if create.labels.len() > LABELS_MAX {
        return Err(format!("a request has at most {LABELS_MAX} labels"));
    }
    let who = who(world, create)?;
    let none = Labels::new();
    let account = who.account.map(|one| one.account.as_ref());
    let facts = Facts {
        unix: world.unix as i64,
        account: account.map(|one| &one.name),
        account_labels: account.map_or(&none, |one| &one.labels),
        client: create.client.as_ref(),
        client_labels: who.client.map_or(&none, |one| &one.labels),
        labels: &create.labels,
        size: create.size.0,
        access: create.access,
        pool_used: world.pool_used,
        account_used: account.map_or(0, |one| world.usage.of(Kind::Account, &one.name).bytes),
    };
    let mut merged = merge(world.policy, who.strategy.as_ref(), &facts);
    let (mut demand, layout) = demand_of(create, &merged)?;
    merged.needs.position = who.client.map_or_else(Default::default, |one| world.pool.position(&one.labels));
    let mut refusal =
        closed(world, &who).or_else(|| denied(&merged, &demand)).or_else(|| nowhere(&merged, &who, create));
    match link_speed(&merged, &who) {
        Ok(speed) => {
            merged.needs.link_speed = speed;
            name_link_source(&mut merged, &who);
        }
        Err(unknown) => refusal = refusal.or(Some(unknown)),
    }
    let limits = limits(world, &who, create, &merged);
    merged.needs.taken_max =
        limits.iter().filter_map(|one| Some(one.hard?.0.saturating_sub(one.used.0))).min();
    let reclaimable = create.reclaimable
        || merged.reclaimable.unwrap_or_else(|| account.is_some_and(|one| one.reclaimable));
    let terms = Terms {
        account: account.map(|one| one.name.clone()),
        client: create.client.clone(),
        strategies: merged.strategies.iter().map(|(name, _)| name.clone()).collect(),
        labels: create.labels.clone(),
        reclaimable,
        link_speed: merged.needs.link_share(demand.columns),
        lease: lease(world, &who, create, &merged),
    };
    demand.needs = merged.needs;
    Ok(Asked {
        demand,
        layout,
        terms,
        priority: account.map_or(PRIORITY_DEFAULT, |one| one.priority),
        documents: documents(&who, &merged.strategies),
        strategy: who.strategy,
        rules: merged.traces,
        limits,
        refusal,
    })
}

/// Finds the documents of a request: those that it names, else the account of its client, the strategy of its account,
/// and at last the strategy named `default`.
fn who<'a>(world: &World<'a>, create: &Create) -> Result<Who<'a>, String> {
    let client = create.client.as_ref().and_then(|name| world.policy.client(name));
    let account = create.account.as_ref().or(client.and_then(|one| one.account.as_ref()));
    let account = match account {
        Some(name) => Some(world.policy.account(name).ok_or_else(|| {
            format!("there is no account `{name}`: `xpm get account` shows those that are there, `xpm apply` makes one")
        })?),
        None => None,
    };
    let strategy = match &create.strategy {
        Some(name) if world.policy.strategy(name).is_none() => {
            return Err(format!(
                "there is no strategy `{name}`: `xpm get strategy` shows those that are there"
            ));
        }
        Some(name) => Some(name.clone()),
        None => account
            .and_then(|one| one.account.strategy.clone())
            .or_else(|| "default".parse().ok().filter(|name| world.policy.strategy(name).is_some())),
    };
    let heard = create.client.as_ref().and_then(|name| world.clients.get(name));
    Ok(Who { account, client, heard, strategy })
}

fn closed(world: &World<'_>, who: &Who<'_>) -> Option<Refusal> {
    let account = who.account?;
    closed_line(account, world.unix).map(|(why, remedy)| Refusal::denied(why, vec![remedy]))
}

/// Why an account gets no memory at this time of day, and the remedy.
pub(super) fn closed_line(account: &CompiledAccount, unix: u64) -> Option<(String, String)> {
    let hours = account.hours.as_ref().filter(|hours| !hours.contains(unix as i64))?;
    let why = format!("account `{}` gets no memory at this time of day", account.account.name);
    let remedy = match hours.next_open(unix as i64) {
        Some(open) => format!("ask again from {}", hours.shown(open)),
        None => "change its hours, which never come".to_owned(),
    };
    Some((why, remedy))
}

fn denied(merged: &Merged, demand: &Demand) -> Option<Refusal> {
    if let Some((rule, text)) = &merged.refuse {
        return Some(Refusal::denied(format!("rule {rule} refuses it: {text}"), Vec::new()));
    }
    let most =
        merged.limits.iter().filter_map(|(strategy, limit)| Some((limit.size_max?, strategy))).min()?;
    let (size_max, strategy) = most;
    (demand.size > size_max.0).then(|| {
        let why = format!(
            "strategy `{strategy}` allows at most {size_max} at once, and {} is asked",
            ByteSize(demand.size)
        );
        Refusal::denied(why, vec![format!("ask for at most {size_max}")])
    })
}

/// A demand for nearness (`locality.within`) cannot be met if no document says where the client is.
fn nowhere(merged: &Merged, who: &Who<'_>, create: &Create) -> Option<Refusal> {
    let within = merged.needs.within?;
    let says = |labels: &Labels| {
        labels.keys().any(|key| LEVELS.iter().any(|level| *level <= within && level.as_str() == key.as_str()))
    };
    if who.client.is_some_and(|client| says(&client.labels)) {
        return None;
    }
    let (why, remedy) = match (&create.client, who.client.is_some()) {
        (None, _) => ("no client is named".to_owned(), "name the client (`--client NAME`)".to_owned()),
        (Some(name), true) => (
            format!("client `{name}` has no label `{within}`"),
            format!("give it one (`xpm edit client {name}`)"),
        ),
        (Some(name), false) => (
            format!("client `{name}` has no document that says where it is"),
            format!("apply one with the label `{within}` (`xpm apply`)"),
        ),
    };
    let why = format!("appliances in the same {within} as the client are asked, and {why}");
    let other = format!("take locality.within out of {}", merged.needs.sources.locality);
    Some(Refusal::denied(why, vec![remedy, other]))
}

/// Names the document that the link speed comes from, if no rule sets it.
fn name_link_source(merged: &mut Merged, who: &Who<'_>) {
    let link = &mut merged.needs.sources.link;
    match (who.client.filter(|client| client.link_speed.is_some()), who.account) {
        _ if !link.is_empty() => {}
        (Some(client), _) => *link = format!("client `{0}` (`xpm edit client {0}`)", client.name),
        (None, Some(account)) => {
            *link = format!("account `{0}` (`xpm edit account {0}`)", account.account.name);
        }
        (None, None) => {}
    }
}

fn link_speed(merged: &Merged, who: &Who<'_>) -> Result<Option<LinkSpeed>, Refusal> {
    let profile = who.client.and_then(|one| one.link_speed);
    let account = who.account.and_then(|one| one.account.link_speed);
    match merged.link.or(profile).or(account) {
        None => Ok(None),
        Some(LinkDemand::Speed(speed)) => Ok(Some(speed)),
        Some(LinkDemand::Client) => {
            let own = who.client.and_then(|one| one.own_link_speed);
            own.or(who.heard.and_then(|one| one.client.facts.link_speed)).map(Some).ok_or_else(|| {
                Refusal::denied(
                    "as much link speed is asked as the client's own, and that is not known".to_owned(),
                    vec!["name the client (`--client`) and run `xpm client report` on it, or set own-link-speed in its profile".to_owned()],
                )
            })
        }
    }
}

/// The limits that the request is measured against. For a strategy this is the lowest limit among its rules.
fn limits(world: &World<'_>, who: &Who<'_>, create: &Create, merged: &Merged) -> Vec<LimitCheck> {
    let check = |kind: Kind, name: &Name, soft: Option<ByteSize>, hard: Option<ByteSize>| LimitCheck {
        of: format!("{kind} {name}"),
        used: ByteSize(world.usage.of(kind, name).bytes),
        asked: create.size,
        soft,
        hard,
    };
    let account = who.account.map(|one| one.account.as_ref());
    let account = account.map(|one| check(Kind::Account, &one.name, one.soft_limit, one.hard_limit));
    let client = who.client.map(|one| check(Kind::Client, &one.name, one.soft_limit, one.hard_limit));
    let mut checks: Vec<LimitCheck> = account.into_iter().chain(client).collect();
    for (strategy, _) in &merged.strategies {
        let of_it = || merged.limits.iter().filter(|(of, _)| of == strategy).map(|(_, limit)| limit);
        let soft = of_it().filter_map(|limit| limit.soft).min();
        let hard = of_it().filter_map(|limit| limit.hard).min();
        checks.push(check(Kind::Strategy, strategy, soft, hard));
    }
    checks.retain(|check| check.soft.is_some() || check.hard.is_some());
    checks
}

fn lease(world: &World<'_>, who: &Who<'_>, create: &Create, merged: &Merged) -> Option<LeaseRecord> {
    let terms = merged.lease.or_else(|| who.account.and_then(|one| one.account.lease));
    let lease = match (terms, create.lease) {
        (None, None) => None,
        (None, Some(duration)) => {
            Some(LeaseTerms { duration, warning: None, grace: None, total_max: None, renewable: true })
        }
        (Some(terms), asked) => {
            let duration = asked.map_or(terms.duration, |asked| asked.min(terms.duration));
            Some(LeaseTerms { duration, ..terms })
        }
    };
    let lease = lease.map(|terms| lease_record(world.unix, &terms));
    who.account.map_or(lease, |account| until_close(account, world.unix, lease))
}

fn lease_record(unix: u64, terms: &LeaseTerms) -> LeaseRecord {
    let duration = terms.duration.0.as_secs().max(1);
    let total_ends = terms.total_max.map(|most| unix.saturating_add(most.0.as_secs()));
    LeaseRecord {
        reason: EndReason::Lease,
        ends: unix.saturating_add(duration).min(total_ends.unwrap_or(u64::MAX)),
        warning: terms.warning_secs(),
        grace: terms.grace_secs(),
        duration,
        total_ends,
        renewable: terms.renewable,
    }
}

/// The lease, or the close of the account's hours if that is earlier.
pub(super) fn until_close(
    account: &CompiledAccount,
    unix: u64,
    lease: Option<LeaseRecord>,
) -> Option<LeaseRecord> {
    let ends = account.account.at_close == AtClose::End;
    let close = account.hours.as_ref().filter(|_| ends).and_then(|hours| hours.next_close(unix as i64));
    let Some(close) = close.map(|close| close as u64) else { return lease };
    match lease {
        Some(lease) if lease.ends <= close => Some(lease),
        Some(lease) => Some(LeaseRecord { reason: EndReason::Hours, ends: close, ..lease }),
        None => Some(LeaseRecord {
            reason: EndReason::Hours,
            ends: close,
            warning: CLOSE_WARNING,
            grace: CLOSE_WARNING,
            duration: close.saturating_sub(unix),
            total_ends: None,
            renewable: true,
        }),
    }
}

fn documents(who: &Who<'_>, strategies: &[(Name, u64)]) -> Vec<DocumentVersion> {
    let of = |kind: Kind, name: &Name, version: Option<u64>| DocumentVersion {
        document: DocumentName { kind, name: name.clone() },
        version: version.unwrap_or(0),
    };
    let account = who.account.map(|one| -> &Account { &one.account });
    let account = account.map(|one| of(Kind::Account, &one.name, one.version));
    let client = who.client.map(|one| of(Kind::Client, &one.name, one.version));
    let strategies = strategies.iter().map(|(name, version)| of(Kind::Strategy, name, Some(*version)));
    account.into_iter().chain(client).chain(strategies).collect()
}

/// Checks a request and turns it into a demand. The rules set the layout where the request leaves it open.
fn demand_of(create: &Create, merged: &Merged) -> Result<(Demand, Layout), String> {
    let size = create.size.0.checked_next_multiple_of(PAGE_LEN).filter(|&size| size > 0);
    let size =
        size.ok_or("a size is 1 byte to 16 EiB less a page: say how much memory is wanted, such as 1GiB")?;
    let region_len = create.region_len.or(merged.layout.region_size).map(|len| len.0);
    if let Some(len) = region_len.filter(|&len| !is_region_len(len)) {
        return Err(format!("a region is a power of two of 16MiB to 64GiB long, not {len} bytes"));
    }
    let asked_unit = create.stripe_unit;
    let (stripe, stripe_unit) = match create.stripe {
        None if asked_unit.is_none() => (merged.layout.stripe, merged.layout.stripe_unit),
        stripe => (stripe, asked_unit),
    };
    let columns = stripe.unwrap_or(1);
    if !(1..=COLUMNS_MAX).contains(&columns) {
        return Err(format!("a stripe goes over 1 to {COLUMNS_MAX} regions, not {columns}"));
    }
    let unit = stripe_unit.map_or(STRIPE_UNIT_DEFAULT, |unit| unit.0);
    let layout = match columns {
        1 if asked_unit.is_some() => {
            return Err("a stripe unit means nothing without a stripe over 2 regions or more".to_owned());
        }
        1 => Layout::Linear,
        _ => Layout::Striped { columns, unit },
    };
    layout.check(region_len.unwrap_or(REGION_LEN_MAX)).map_err(|error| error.to_string())?;
    let unit = if columns == 1 { 0 } else { unit };
    let demand =
        Demand { size, columns, unit, region_len, seed: 0, home: Vec::new(), needs: Default::default() };
    Ok((demand, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(size: u64) -> Create {
        Create::new("a".parse().unwrap(), ByteSize(size))
    }

    #[test]
    fn invalid_sizes_and_layouts_are_refused() {
        let demand_of = |create: &Create| demand_of(create, &Merged::default());
        assert_eq!(demand_of(&create(1)).unwrap().0.size, PAGE_LEN);
        let odd = |change: fn(&mut Create)| {
            let mut create = create(1 << 30);
            change(&mut create);
            demand_of(&create).unwrap_err()
        };
        assert!(demand_of(&create(0)).unwrap_err().contains("1GiB"));
        assert!(demand_of(&create(u64::MAX)).is_err());
        assert!(odd(|create| create.stripe = Some(0)).contains("not 0"));
        assert!(odd(|create| create.stripe = Some(1025)).contains("1024"));
        assert!(odd(|create| create.stripe_unit = Some(ByteSize(65536))).contains("without a stripe"));
        assert!(odd(|create| create.region_len = Some(ByteSize(1 << 20))).contains("16MiB"));
        assert!(odd(|create| create.region_len = Some(ByteSize(3 << 24))).contains("power of two"));
        let unit_too_long = |create: &mut Create| {
            create.stripe = Some(2);
            create.stripe_unit = Some(ByteSize(1 << 25));
            create.region_len = Some(ByteSize(1 << 24));
        };
        assert!(odd(unit_too_long).contains("stripe unit"));
    }
}
