//! Applies, reads and removes documents.
//!
//! A change of the documents takes effect at once and is answered once it is durable. Batches become durable in
//! order, so a decision is never durable without the documents that it is based on.

use xpm_protocol::api::ErrorKind;
use xpm_protocol::api::allocator::{Client, ClientFacts, Usage};
use xpm_protocol::api::policy::{Applied, Apply, Policy as Shown};
use xpm_protocol::policy::{Content, DocumentName, Documents, Kind};
use xpm_protocol::{ByteSize, Name};

use super::{Awaited, Outcome, ReplyTo, Service};
use crate::policy::{Plan, Policy};
use crate::store::{Change, PolicyChange};

/// Most clients whose reported facts are kept.
const CLIENTS_MAX: usize = 10_000;

impl Service {
    pub(super) fn apply(&mut self, reply: ReplyTo, apply: &Apply) {
        let Plan { problems, changes, next, documents, written } =
            self.policy.plan(&apply.files, &self.usage);
        let revision = next.as_ref().map_or(self.policy.revision(), Policy::revision);
        let applied = Applied { revision, problems, changes };
        match next.filter(|_| !apply.dry_run) {
            Some(next) => {
                let changed: Documents = documents.into_iter().collect();
                let change = PolicyChange { revision, changed, gone: Vec::new(), written };
                self.take_policy(next);
                self.store(
                    vec![Change::Policy(Box::new(change))],
                    Awaited::Answer(reply, Outcome::Applied(applied)),
                );
            }
            None => self.reply(reply, Ok(Outcome::Applied(applied))),
        }
    }

    pub(super) fn remove_document(&mut self, reply: ReplyTo, name: &DocumentName, version: Option<u64>) {
        let next = match self.policy.remove(name, version, self.in_use(name)) {
            Ok(next) => next,
            Err(error) => return self.reply(reply, Err(error)),
        };
        let change = PolicyChange {
            revision: next.revision(),
            changed: Documents::default(),
            gone: vec![name.clone()],
            written: Vec::new(),
        };
        self.take_policy(next);
        self.store(vec![Change::Policy(Box::new(change))], Awaited::Answer(reply, Outcome::Done));
    }

    /// The allocations or waiting requests that keep a document from being removed.
    fn in_use(&self, name: &DocumentName) -> Option<String> {
        let count = self.usage.of(name.kind, &name.name);
        let waits = self.waits_for(name);
        match (count.allocations, waits) {
            (0, false) => None,
            (0, true) => Some("a request that waits names it".to_owned()),
            (number, _) => Some(format!("{number} allocations of {} count for it", ByteSize(count.bytes))),
        }
    }

    fn take_policy(&mut self, next: Policy) {
        self.policy = next;
        let policy = &self.policy;
        self.inventory.profile(|name| policy.appliance(name));
        tracing::info!("documents are at revision {}", self.policy.revision());
    }

    pub(super) fn shown_policy(&self) -> Shown {
        Shown {
            revision: self.policy.revision(),
            documents: self.policy.documents(),
            written: self.policy.written(),
        }
    }

    /// Usage of every account, client and strategy that has memory or a limit.
    pub(super) fn list_usage(&self) -> Vec<Usage> {
        let documents = self.policy.documents();
        let limited = documents.into_contents().filter(|one| one.kind() != Kind::Appliance);
        let mut names: Vec<DocumentName> = limited.map(|one| Content::document_name(&one)).collect();
        names.extend(self.usage.all().map(|(name, _)| name.clone()));
        names.sort();
        names.dedup();
        names.into_iter().map(|name| self.usage_of(name)).collect()
    }

    fn usage_of(&self, of: DocumentName) -> Usage {
        let count = self.usage.of(of.kind, &of.name);
        let (soft_limit, hard_limit) = self.policy.limits(&of);
        Usage { of, used: ByteSize(count.bytes), allocations: count.allocations, soft_limit, hard_limit }
    }

    /// Keeps the facts that a client reported about itself. They are not durable: the client reports them again.
    pub(super) fn hear_client(&mut self, reply: ReplyTo, name: Name, facts: ClientFacts) {
        if self.clients.len() >= CLIENTS_MAX && !self.clients.contains_key(&name) {
            let line = format!("{CLIENTS_MAX} clients are known already");
            return self.refuse(reply, ErrorKind::Unavailable, line);
        }
        let mut facts = facts;
        // A client that only measures sends no id.
        facts.client = facts.client.or(self.clients.get(&name).and_then(|known| known.client.facts.client));
        facts.round_trips.retain(|id, _| self.inventory.info(*id).is_some());
        let round_trips = facts.round_trips.iter().map(|(id, time)| (*id, *time)).collect();
        let client = Client { name: name.clone(), facts, heard: self.now.unix };
        self.clients.insert(name, super::HeardClient { client: client.clone(), round_trips });
        self.reply(reply, Ok(Outcome::Client(client)));
    }

    pub(super) fn list_clients(&self) -> Vec<Client> {
        let mut clients: Vec<Client> = self.clients.values().map(|one| one.client.clone()).collect();
        clients.sort_by(|a, b| a.name.cmp(&b.name));
        clients
    }
}
