//! Measures decisions, durable allocations, memory and restart with pools of several sizes; prints one JSON object
//! per line. The service, the store and its writer are the real ones. This process answers the calls to appliances
//! itself, so that only the allocator is measured. Arguments replace the default numbers of appliances: 100, 1,000
//! and 10,000.

use std::collections::HashMap;
use std::error::Error;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::json;
use xpm_allocator::service::{
    Answer, Call, Effect, Event, Moment, Outcome, ReplyTo, Request, Service, Settings, Ticket,
};
use xpm_allocator::store::redb::RedbStore;
use xpm_allocator::store::{MetadataStore as _, Writer};
use xpm_protocol::api::allocator::{Create, Heartbeat};
use xpm_protocol::api::appliance::{Endpoints, Info, Medium, Region, RegionState, Status};
use xpm_protocol::api::policy::{Apply, PolicyFile, PolicyFormat};
use xpm_protocol::{ApplianceId, ByteSize, HostId, LinkSpeed, Name, RegionId};

const REGION: u64 = 16 << 20;
/// Regions of an allocation.
const REGIONS: u64 = 16;
/// Regions on each appliance once the pool is filled.
const FILL: u64 = 100;
const CAPACITY: u64 = 2000 * REGION;
const CLIENTS: u64 = 64;
const DECISIONS: usize = 2000;
const UNIX: u64 = 1_790_000_000;

type Failed = Box<dyn Error>;

fn main() -> Result<(), Failed> {
    let asked: Vec<u64> = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<_, _>>()?;
    let sizes = if asked.is_empty() { vec![100, 1000, 10_000] } else { asked };
    for appliances in sizes {
        measure(appliances)?;
    }
    Ok(())
}

fn measure(appliances: u64) -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let mut pool = Pool::start(appliances, RedbStore::open(directory.path())?)?;
    pool.apply();
    pool.beat_all();
    // An hour later no appliance counts as a newcomer.
    pool.unix += 3600;
    let allocations = appliances * FILL / REGIONS;
    let filled = pool.make(allocations)?;
    let rate = pool.make(if appliances < 1000 { 2000 } else { 10_000 })?;
    let mut times = pool.decide();
    let mut intents = pool.begin()?;
    let full = pool.explain_all();
    let resident = resident_bytes()?;
    drop(pool);
    let restart = Instant::now();
    let mut store = RedbStore::open(directory.path())?;
    let loaded = store.load()?;
    let mut service = new_service();
    service.restore(Moment { at: Duration::from_secs(1), unix: UNIX }, loaded);
    let restart = restart.elapsed();
    times.sort_unstable();
    intents.sort_unstable();
    let at = |share: usize| times[times.len() * share / 1000].as_nanos() as f64 / 1000.0;
    let intent = intents[intents.len() / 2].as_nanos() as f64 / 1000.0;
    let regions = allocations * REGIONS;
    let of = format!("{appliances} appliances, {regions} regions");
    let print = |metric: &str, unit: &str, value: f64| {
        println!(
            "{}",
            json!({ "case": of, "appliances": appliances, "metric": metric, "unit": unit, "value": value })
        );
    };
    print("decision p50", "us", at(500));
    print("decision p99", "us", at(990));
    print("with intent", "us", intent);
    print("all explained", "us", full.as_nanos() as f64 / 1000.0);
    print("filled at", "/s", filled);
    print("durable", "/s", rate);
    print("memory", "MiB", resident as f64 / f64::from(1 << 20));
    print("restart", "ms", restart.as_secs_f64() * 1000.0);
    Ok(())
}

/// The service with its writer, clients and simulated appliances.
struct Pool {
    service: Service,
    writer: Writer,
    done: Sender<Ticket>,
    stored: Receiver<Ticket>,
    appliances: Vec<Heartbeat>,
    index: HashMap<ApplianceId, usize>,
    accounts: u64,
    regions: u128,
    replies: u64,
    names: u64,
    unix: u64,
}

impl Pool {
    fn start(appliances: u64, store: RedbStore) -> Result<Pool, Failed> {
        let (done, stored) = channel();
        let appliances: Vec<Heartbeat> = (1..=appliances).map(appliance).collect();
        let index = appliances.iter().enumerate().map(|(at, one)| (one.info.id, at)).collect();
        let accounts = appliances.len() as u64;
        let writer = Writer::start(store, Box::new(|_| {}))?;
        Ok(Pool {
            service: new_service(),
            writer,
            done,
            stored,
            appliances,
            index,
            accounts,
            regions: 0,
            replies: 0,
            names: 0,
            unix: UNIX,
        })
    }

    /// Applies accounts with limits, and a strategy whose rules use every kind of condition.
    fn apply(&mut self) {
        let mut text = STRATEGY.to_owned();
        for number in 0..self.accounts {
            let tier = number % 10;
            text.push_str(&format!(
                "[[account]]\nname='acct{number}'\npriority={}\nhard-limit='4TiB'\nsoft-limit='2TiB'\nlabels={{tier='t{tier}'}}\n",
                number % 1000
            ));
        }
        // Files are limited in size, so the text is applied in parts.
        for (number, part) in split(&text, 900_000).into_iter().enumerate() {
            let files =
                vec![PolicyFile { name: format!("part{number}"), format: PolicyFormat::Toml, text: part }];
            for outcome in self.ask(Request::Apply(Apply { files, dry_run: false })) {
                if let Outcome::Applied(applied) = outcome {
                    assert!(applied.problems.is_empty(), "{:?}", applied.problems.first());
                }
            }
        }
    }

    fn beat_all(&mut self) {
        for at in 0..self.appliances.len() {
            let beat = self.appliances[at].clone();
            self.ask(Request::Heartbeat(Box::new(beat)));
        }
    }

    fn moment(&self) -> Moment {
        Moment { at: Duration::from_secs(1), unix: self.unix }
    }

    /// Asks, and carries out all effects that follow.
    fn ask(&mut self, request: Request) -> Vec<Outcome> {
        let effects = self.event(request);
        let mut answers = Vec::new();
        let mut open = self.carry_out(effects, &mut answers);
        while open > 0 {
            let Ok(ticket) = self.stored.recv() else { break };
            open -= 1;
            let effects = self.service.handle(self.moment(), Event::Stored(ticket));
            open += self.carry_out(effects, &mut answers);
        }
        answers
    }

    fn event(&mut self, request: Request) -> Vec<Effect> {
        self.replies += 1;
        self.service.handle(self.moment(), Event::Request(ReplyTo(self.replies), request))
    }

    /// Hands stores over and answers calls at once. Returns how many stores are under way.
    fn carry_out(&mut self, effects: Vec<Effect>, answers: &mut Vec<Outcome>) -> usize {
        let mut open = 0;
        let mut queue = effects;
        while !queue.is_empty() {
            for effect in std::mem::take(&mut queue) {
                match effect {
                    Effect::Reply(_, result) => {
                        answers.push(result.unwrap_or_else(|error| panic!("{}", error.1)));
                    }
                    Effect::Store(ticket, batch) => {
                        let done = self.done.clone();
                        self.writer.write(
                            batch,
                            Box::new(move |result| {
                                result.expect("the disk works");
                                let _ = done.send(ticket);
                            }),
                        );
                        open += 1;
                    }
                    Effect::Call(ticket, target, call) => {
                        let answer = self.answer(target.appliance, call);
                        queue.extend(self.service.handle(self.moment(), Event::Called(ticket, Ok(answer))));
                    }
                }
            }
        }
        open
    }

    fn answer(&mut self, id: ApplianceId, call: Call) -> Answer {
        let status = &mut self.appliances[self.index[&id]].status;
        match call {
            Call::Status => Answer::Status(Box::new(status.clone())),
            Call::Reserve(reserve) => {
                let bytes = u64::from(reserve.count) * reserve.region_len.0;
                status.free.0 -= bytes;
                status.granted.0 += bytes;
                let first = self.regions;
                self.regions += u128::from(reserve.count);
                let region = |number| Region {
                    id: RegionId::from_u128(number),
                    len: reserve.region_len,
                    state: RegionState::Reserved,
                    allocation: None,
                    grant: None,
                    resident: ByteSize(0),
                };
                Answer::Regions((first + 1..=self.regions).map(region).collect())
            }
            _ => Answer::Done,
        }
    }

    fn create(&mut self) -> Create {
        self.names += 1;
        let account = format!("acct{}", self.names % self.accounts).parse().ok();
        Create {
            account,
            region_len: Some(ByteSize(REGION)),
            ..Create::new(name(self.names), ByteSize(REGIONS * REGION))
        }
    }

    /// Makes allocations, as many at once as there are clients. Returns how many per second became durable.
    fn make(&mut self, count: u64) -> Result<f64, Failed> {
        let began = Instant::now();
        let (mut begun, mut open, mut answers) = (0, 0, Vec::new());
        while (answers.len() as u64) < count {
            while begun < count && begun - (answers.len() as u64) < CLIENTS {
                begun += 1;
                let create = self.create();
                let effects = self.event(Request::Create(create));
                open += self.carry_out(effects, &mut answers);
            }
            if begun % 4096 == 0 {
                // At least as often as in operation.
                self.beat_all_now();
            }
            let ticket = self.stored.recv()?;
            open -= 1;
            let effects = self.service.handle(self.moment(), Event::Stored(ticket));
            open += self.carry_out(effects, &mut answers);
        }
        while open > 0 {
            let ticket = self.stored.recv()?;
            open -= 1;
            let effects = self.service.handle(self.moment(), Event::Stored(ticket));
            open += self.carry_out(effects, &mut answers);
        }
        Ok(count as f64 / began.elapsed().as_secs_f64())
    }

    /// Heartbeats without a change are answered without the store.
    fn beat_all_now(&mut self) {
        let mut answers = Vec::new();
        for at in 0..self.appliances.len() {
            let beat = self.appliances[at].clone();
            let effects = self.event(Request::Heartbeat(Box::new(beat)));
            self.carry_out(effects, &mut answers);
        }
    }

    /// Times of decisions with their explanations, as they would be recorded; nothing is made.
    fn decide(&mut self) -> Vec<Duration> {
        let mut times = Vec::with_capacity(DECISIONS);
        for _ in 0..DECISIONS {
            let create = self.create();
            self.replies += 1;
            let event = Event::Request(ReplyTo(self.replies), Request::Decide { create, all: false });
            let moment = self.moment();
            let began = Instant::now();
            let effects = self.service.handle(moment, event);
            times.push(began.elapsed());
            assert_eq!(effects.len(), 1);
        }
        times
    }

    /// Times from a request to its intent, with decision and explanation, ready to be made durable.
    fn begin(&mut self) -> Result<Vec<Duration>, Failed> {
        let mut times = Vec::with_capacity(DECISIONS);
        for _ in 0..DECISIONS {
            let create = self.create();
            self.replies += 1;
            let event = Event::Request(ReplyTo(self.replies), Request::Create(create));
            let began = Instant::now();
            let effects = self.service.handle(self.moment(), event);
            times.push(began.elapsed());
            let mut answers = Vec::new();
            let mut open = self.carry_out(effects, &mut answers);
            while open > 0 {
                let ticket = self.stored.recv()?;
                let effects = self.service.handle(self.moment(), Event::Stored(ticket));
                open = open - 1 + self.carry_out(effects, &mut answers);
            }
        }
        Ok(times)
    }

    /// Time of a dry run that explains the verdict on every appliance.
    fn explain_all(&mut self) -> Duration {
        let create = self.create();
        let began = Instant::now();
        let effects = self.event(Request::Decide { create, all: true });
        assert_eq!(effects.len(), 1);
        began.elapsed()
    }
}

const STRATEGY: &str = "
[[strategy]]
name = 'default'
[[strategy.rule]]
name = 'huge'
when = { size-min = '100TiB' }
refuse = 'too much at once'
[[strategy.rule]]
name = 'night'
when = { time = [{ from = '22:00', to = '06:00' }], time-zone = 'Europe/Berlin', account-labels = { tier = 't1' } }
prefer = [{ select = { labels = { rack = 'r1' } }, weight = 100 }]
[[strategy.rule]]
name = 'sound'
require = { labels = { tier = 'ram' } }
[[strategy.rule]]
name = 'not-the-odd-row'
forbid = [{ labels = { row = 'w3' } }]
[[strategy.rule]]
name = 'fast'
link-speed = '100Mbps'
[[strategy.rule]]
name = 'fair'
limit = { appliance-share = '90%' }
[[strategy.rule]]
name = 'lease'
lease = { duration = '30days' }
";

/// Splits the text between documents into parts of at most `most` bytes.
fn split(text: &str, most: usize) -> Vec<String> {
    let mut parts = vec![String::new()];
    for document in text.split_inclusive("}\n") {
        if parts.last().is_some_and(|part| part.len() + document.len() > most) {
            parts.push(String::new());
        }
        if let Some(part) = parts.last_mut() {
            part.push_str(document);
        }
    }
    parts
}

fn appliance(number: u64) -> Heartbeat {
    let label = |key: &str, value: String| (key.parse::<Name>(), value.parse::<Name>());
    let labels = [
        label("site", "s1".to_owned()),
        label("row", format!("w{}", number % 20)),
        label("rack", format!("r{}", number % 200)),
        label("tier", if number.is_multiple_of(10) { "disk".to_owned() } else { "ram".to_owned() }),
    ];
    let endpoints = Endpoints {
        host: HostId::from_u128(1),
        nbd: Vec::new(),
        names: Vec::new(),
        rdma: Vec::new(),
        nbd_unix: None,
        shm: None,
    };
    let info = Info {
        id: ApplianceId::from_u128(u128::from(number) << 64 | u128::from(number)),
        name: name(number),
        version: "0".to_owned(),
        control: format!("http://10.0.0.1:{}", number % 60_000 + 1),
        endpoints,
        medium: Medium::Memory,
        region_len: ByteSize(REGION),
        labels: labels.into_iter().filter_map(|(key, value)| Some((key.ok()?, value.ok()?))).collect(),
        link_speed: Some(LinkSpeed(100_000_000_000)),
        life: None,
    };
    let status = Status { capacity: ByteSize(CAPACITY), free: ByteSize(CAPACITY), ..Status::default() };
    Heartbeat { info, status }
}

fn name(number: u64) -> Name {
    format!("n{number}").parse().expect("a letter and digits are a name")
}

fn new_service() -> Service {
    let settings = Settings {
        interval: Duration::from_secs(5),
        reserve_ttl: Duration::from_secs(60),
        reclaim_grace: Duration::from_secs(300),
        keep_decisions: Duration::from_secs(86_400),
        reconcile: Duration::from_secs(60),
        garbage_grace: Duration::from_secs(3600),
    };
    Service::new(settings, Box::new(xpm_control::random::fill))
}

fn resident_bytes() -> Result<u64, Failed> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}
