//! From a request to a place for it.

use std::time::Duration;

use xpm_control::server::ApiError;
use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::Create;
use xpm_protocol::layout::{COLUMNS_MAX, STRIPE_UNIT_DEFAULT};
use xpm_protocol::units::{PAGE_LEN, REGION_LEN_MAX, is_region_len};
use xpm_protocol::{ApplianceId, Layout};

use super::{Answer, Awaited, Call, CallError, ReplyTo, Service};
use crate::strategy::{self, Candidate, Demand, NoPlace};

/// How long a request waits for memory that is being cleared; with two attempts it is still
/// answered before a client with the usual time limit gives up.
const PATIENCE: Duration = Duration::from_secs(5);

/// A request on its way to an allocation.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    pub(super) reply: ReplyTo,
    pub(super) create: Create,
    pub(super) demand: Demand,
    pub(super) layout: Layout,
    pub(super) attempt: u8,
    /// Appliances that failed an earlier attempt.
    pub(super) failed: Vec<ApplianceId>,
    /// What went wrong then: it says more than that nobody else has room.
    pub(super) earlier: Option<String>,
    /// Whether the appliances were asked what they have because there seemed to be no room.
    pub(super) refreshed: bool,
    /// When it no longer waits for memory that is being cleared.
    patience: Option<Duration>,
}

/// A wish that waits for fresh samples of the appliances.
#[derive(Debug)]
pub(super) struct Refresh {
    wish: Wish,
    open: usize,
}

impl Service {
    pub(super) fn create(&mut self, reply: ReplyTo, create: Create) {
        let (demand, layout) = match demand_of(&create) {
            Ok(valid) => valid,
            Err(line) => return self.refuse(reply, ErrorKind::Invalid, line),
        };
        self.place(Wish {
            reply,
            create,
            demand,
            layout,
            attempt: 1,
            failed: Vec::new(),
            earlier: None,
            refreshed: false,
            patience: None,
        });
    }

    /// Finds a place and begins. Where there seems to be no room, the appliances are asked first
    /// what they have, for memory given back a moment ago is in no heartbeat yet; and where what
    /// they are clearing would do, that is waited for.
    pub(super) fn place(&mut self, mut wish: Wish) {
        if let Err(error) = self.check_name(&wish) {
            return self.reply(wish.reply, Err(error));
        }
        wish.demand.seed = self.count;
        let snapshot = self.inventory.snapshot(self.now.at, &wish.failed);
        match strategy::place(&snapshot, &wish.demand) {
            Ok(placement) => self.begin(wish, &placement),
            Err(NoPlace::NoSpace { .. }) if !wish.refreshed && snapshot.iter().any(|one| one.up) => {
                self.refresh(wish);
            }
            Err(NoPlace::NoSpace { .. }) if self.may_wait(&mut wish, snapshot) => self.parked.push(wish),
            Err(error @ NoPlace::NoSpace { .. }) => {
                let line = match wish.earlier {
                    Some(earlier) => format!("{earlier}; without those that failed, {error}"),
                    None => error.to_string(),
                };
                self.refuse(wish.reply, ErrorKind::NoSpace, line);
            }
            Err(error @ NoPlace::TooManyRegions) => {
                self.refuse(wish.reply, ErrorKind::Invalid, error.to_string());
            }
        }
    }

    /// Whether there is room once everything that is being cleared is free, and time to wait.
    fn may_wait(&self, wish: &mut Wish, mut snapshot: Vec<Candidate>) -> bool {
        let until = *wish.patience.get_or_insert(self.now.at + PATIENCE);
        for candidate in &mut snapshot {
            candidate.free = candidate.free.saturating_add(candidate.clearing);
        }
        self.now.at < until && strategy::place(&snapshot, &wish.demand).is_ok()
    }

    /// Looks again for those that wait.
    pub(super) fn unpark(&mut self) {
        for wish in std::mem::take(&mut self.parked) {
            self.refresh(wish);
        }
    }

    fn check_name(&self, wish: &Wish) -> Result<(), ApiError> {
        let name = &wish.create.name;
        match self.names.contains_key(name) {
            false => Ok(()),
            true => {
                let line = format!(
                    "an allocation named `{name}` is there already: choose another name, or delete that one"
                );
                Err(ApiError(ErrorKind::Conflict, line))
            }
        }
    }

    fn refresh(&mut self, mut wish: Wish) {
        wish.refreshed = true;
        let up = self.inventory.up(self.now.at);
        if up.is_empty() {
            return self.place(wish);
        }
        self.count += 1;
        let asked = self.count;
        self.refreshes.insert(asked, Refresh { wish, open: up.len() });
        for appliance in up {
            let control = self.control_of(appliance);
            self.call(appliance, control, Call::Status, Awaited::Sampled { asked, appliance });
        }
    }

    pub(super) fn sampled(&mut self, asked: u64, appliance: ApplianceId, result: Result<Answer, CallError>) {
        if let Ok(Answer::Status(status)) = result {
            self.inventory.sample(appliance, asked, *status);
        }
        let refresh =
            self.refreshes.get_mut(&asked).expect("a refresh stays until all its calls are answered");
        refresh.open -= 1;
        if refresh.open == 0
            && let Some(done) = self.refreshes.remove(&asked)
        {
            self.place(done.wish);
        }
    }
}

/// Checks a request and says what it means.
fn demand_of(create: &Create) -> Result<(Demand, Layout), String> {
    let size = create.size.0.checked_next_multiple_of(PAGE_LEN).filter(|&size| size > 0);
    let size =
        size.ok_or("a size is 1 byte to 16 EiB less a page: say how much memory is wanted, such as 1GiB")?;
    let region_len = create.region_len.map(|len| len.0);
    if let Some(len) = region_len.filter(|&len| !is_region_len(len)) {
        return Err(format!("a region is a power of two of 16MiB to 64GiB long, not {len} bytes"));
    }
    let columns = create.stripe.unwrap_or(1);
    if !(1..=COLUMNS_MAX).contains(&columns) {
        return Err(format!("a stripe goes over 1 to {COLUMNS_MAX} regions, not {columns}"));
    }
    let unit = create.stripe_unit.map_or(STRIPE_UNIT_DEFAULT, |unit| unit.0);
    let layout = match columns {
        1 if create.stripe_unit.is_some() => {
            return Err("a stripe unit means nothing without a stripe over 2 regions or more".to_owned());
        }
        1 => Layout::Linear,
        _ => Layout::Striped { columns, unit },
    };
    layout.check(region_len.unwrap_or(REGION_LEN_MAX)).map_err(|error| error.to_string())?;
    let unit = if columns == 1 { 0 } else { unit };
    Ok((Demand { size, columns, unit, region_len, seed: 0 }, layout))
}

#[cfg(test)]
mod tests {
    use xpm_protocol::ByteSize;

    use super::*;

    fn create(size: u64) -> Create {
        Create::new("a".parse().unwrap(), ByteSize(size))
    }

    #[test]
    fn what_is_asked_for_is_checked() {
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
