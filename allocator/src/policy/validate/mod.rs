//! Checks documents, each by itself and all together.
//!
//! The new documents are checked together with the existing ones: accounts and strategies that are named must be
//! among them. Clients and appliances need not exist: they come and go, and conditions and selectors that name them
//! apply once they exist.

mod chain;
mod condition;
mod exclude;
mod strategy;
mod terms;

use std::collections::HashMap;

use xpm_protocol::api::policy::Problem;
use xpm_protocol::policy::{
    Account, Amount, ApplianceProfile, ClientProfile, Content, DocumentName, Kind, LinkDemand, PRIORITY_MAX,
};
use xpm_protocol::{ByteSize, LinkSpeed, Name};

use super::Policy;
use super::read::{Document, PROBLEMS_MAX, Read};
use crate::usage::Usage;

use chain::Chains;

/// All problems of the documents that were read, checked together with existing documents.
pub(super) fn validate(policy: &Policy, read: &Read, usage: &Usage) -> Vec<Problem> {
    let documents = &read.documents;
    let mut problems = Vec::new();
    let mut new = HashMap::new();
    for document in documents {
        let name = document.content.document_name();
        if new.insert(name.clone(), &document.content).is_some() {
            let text = format!("{name} is there twice: give each a name of its own");
            problems.push(document.problem("name", &text));
        }
    }
    let chains = Chains::new(policy, &new);
    let world = World { policy, usage, new, chains, read };
    for document in documents {
        Check { world: &world, document, problems: &mut problems }.all();
        if problems.len() >= PROBLEMS_MAX {
            break;
        }
    }
    problems.truncate(PROBLEMS_MAX);
    problems
}

/// The documents and the usage that a document is checked against.
struct World<'a> {
    policy: &'a Policy,
    usage: &'a Usage,
    new: HashMap<DocumentName, &'a Content>,
    chains: Chains<'a>,
    /// The other contents of the files: documents that could not be read.
    read: &'a Read,
}

/// The check of one document.
struct Check<'a> {
    world: &'a World<'a>,
    document: &'a Document,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_> {
    fn all(&mut self) {
        self.version();
        match &self.document.content {
            Content::Strategy(strategy) => self.strategy(strategy),
            Content::Account(account) => self.account(account),
            Content::Client(client) => self.client(client),
            Content::Appliance(appliance) => self.appliance(appliance),
        }
    }

    /// Reports a problem with a key of the document, such as `rule[0].when`.
    fn say(&mut self, key: impl AsRef<str>, text: impl AsRef<str>) {
        self.problems.push(self.document.problem(key.as_ref(), text.as_ref()));
    }

    /// If two operators change a document at once, the second one has to see the first one's version.
    fn version(&mut self) {
        let name = self.document.content.document_name();
        let has = self.world.policy.documents.get(&name).and_then(Content::version);
        match (self.document.content.version(), has) {
            (Some(asked), Some(has)) if asked != has => self.say(
                "version",
                format!(
                    "it was changed meanwhile and has version {has} now: read it again with `xpm get {} {}`",
                    name.kind, name.name
                ),
            ),
            (Some(_), None) => {
                self.say("version", "it is not there any more: leave the version out to make it anew");
            }
            _ => {}
        }
    }

    /// A named document must exist.
    fn exists(&mut self, key: impl AsRef<str>, kind: Kind, name: &Name) {
        let document = DocumentName { kind, name: name.clone() };
        let World { new, policy, read, .. } = self.world;
        let there = new.contains_key(&document)
            || policy.documents.contains_key(&document)
            || read.unknown
            || read.broken.contains(&document);
        if !there {
            self.say(key, format!("there is no {document}: apply it with this file, or before"));
        }
    }

    fn account(&mut self, account: &Account) {
        if account.priority > PRIORITY_MAX {
            self.say("priority", format!("a priority is 0 to {PRIORITY_MAX}, not {}", account.priority));
        }
        self.own_limits(account.soft_limit, account.hard_limit);
        if let Some(strategy) = &account.strategy {
            self.exists("strategy", Kind::Strategy, strategy);
        }
        self.windows("", "hours", account.time_zone.as_deref(), &account.hours);
        if let Some(lease) = &account.lease {
            self.lease("lease", lease);
        }
        self.link_demand("link-speed", account.link_speed);
    }

    fn client(&mut self, client: &ClientProfile) {
        self.own_limits(client.soft_limit, client.hard_limit);
        if let Some(account) = &client.account {
            self.exists("account", Kind::Account, account);
        }
        self.link_demand("link-speed", client.link_speed);
        self.link_speed("own-link-speed", client.own_link_speed);
    }

    fn appliance(&mut self, appliance: &ApplianceProfile) {
        self.link_speed("link-speed", appliance.link_speed);
        self.size("capacity", appliance.capacity);
        if let Some(Amount::Bytes(head_room)) = appliance.head_room {
            self.size("head-room", Some(head_room));
            if let Some(capacity) = appliance.capacity.filter(|capacity| head_room >= *capacity) {
                let text = format!("nothing is left of the capacity of {capacity}: use `drain` to stop it");
                self.say("head-room", text);
            }
        }
        self.duration("ramp-up", appliance.ramp_up);
    }

    /// Checks the limits of an account or a client.
    fn own_limits(&mut self, soft: Option<ByteSize>, hard: Option<ByteSize>) {
        self.limits(("soft-limit", soft), ("hard-limit", hard));
        self.present_use("hard-limit", hard);
    }

    /// A soft limit must not exceed the hard limit.
    fn limits(&mut self, soft: (&str, Option<ByteSize>), hard: (&str, Option<ByteSize>)) {
        self.size(soft.0, soft.1);
        self.size(hard.0, hard.1);
        if let (Some(soft_limit), Some(hard_limit)) = (soft.1, hard.1)
            && soft_limit > hard_limit
        {
            let text = format!("the soft limit of {soft_limit} is above the hard limit of {hard_limit}");
            self.say(soft.0, text);
        }
    }

    /// A hard limit must not be below the present use.
    fn present_use(&mut self, key: &str, hard: Option<ByteSize>) {
        let name = self.document.content.document_name();
        let used = self.world.usage.of(name.kind, &name.name).bytes;
        if let Some(hard) = hard.filter(|hard| hard.0 < used) {
            let used = exact(used);
            let text = format!(
                "{name} has {used} already: set at least that instead of {hard}, or delete allocations first"
            );
            self.say(key, text);
        }
    }

    fn link_demand(&mut self, key: &str, demand: Option<LinkDemand>) {
        if let Some(LinkDemand::Speed(speed)) = demand {
            self.link_speed(key, Some(speed));
        }
    }

    fn link_speed(&mut self, key: &str, speed: Option<LinkSpeed>) {
        if speed.is_some_and(|speed| speed.0 == 0) {
            self.say(key, "a link has some speed: leave it out where it does not matter or is not known");
        }
    }
}

/// A size in a form that reads back as the same number of bytes.
fn exact(bytes: u64) -> String {
    let shown = ByteSize(bytes).to_string();
    match shown.parse::<ByteSize>() {
        Ok(ByteSize(same)) if same == bytes => shown,
        _ => format!("{bytes} bytes"),
    }
}
