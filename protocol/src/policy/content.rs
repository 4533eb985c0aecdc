//! Documents of any kind as one type, and their names and versions.

use super::{Account, ApplianceProfile, ClientProfile, DocumentName, Documents, Kind, Strategy};
use crate::Name;

/// A document of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Content {
    Strategy(Strategy),
    Account(Account),
    Client(ClientProfile),
    Appliance(ApplianceProfile),
}

impl Content {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Content::Strategy(_) => Kind::Strategy,
            Content::Account(_) => Kind::Account,
            Content::Client(_) => Kind::Client,
            Content::Appliance(_) => Kind::Appliance,
        }
    }

    /// Its name.
    pub fn name(&self) -> &Name {
        match self {
            Content::Strategy(one) => &one.name,
            Content::Account(one) => &one.name,
            Content::Client(one) => &one.name,
            Content::Appliance(one) => &one.name,
        }
    }

    /// Its kind and name.
    pub fn document_name(&self) -> DocumentName {
        DocumentName { kind: self.kind(), name: self.name().clone() }
    }

    /// Its version, if it has one.
    pub fn version(&self) -> Option<u64> {
        match self {
            Content::Strategy(one) => one.version,
            Content::Account(one) => one.version,
            Content::Client(one) => one.version,
            Content::Appliance(one) => one.version,
        }
    }

    /// The same document with another version, or without one.
    #[must_use]
    pub fn with_version(mut self, version: Option<u64>) -> Content {
        match &mut self {
            Content::Strategy(one) => one.version = version,
            Content::Account(one) => one.version = version,
            Content::Client(one) => one.version = version,
            Content::Appliance(one) => one.version = version,
        }
        self
    }
}

impl Documents {
    /// The documents one by one.
    pub fn into_contents(self) -> impl Iterator<Item = Content> {
        let strategies = self.strategy.into_iter().map(Content::Strategy);
        let accounts = self.account.into_iter().map(Content::Account);
        let clients = self.client.into_iter().map(Content::Client);
        let appliances = self.appliance.into_iter().map(Content::Appliance);
        strategies.chain(accounts).chain(clients).chain(appliances)
    }
}

impl Extend<Content> for Documents {
    fn extend<T: IntoIterator<Item = Content>>(&mut self, contents: T) {
        for content in contents {
            match content {
                Content::Strategy(one) => self.strategy.push(one),
                Content::Account(one) => self.account.push(one),
                Content::Client(one) => self.client.push(one),
                Content::Appliance(one) => self.appliance.push(one),
            }
        }
    }
}

impl FromIterator<Content> for Documents {
    fn from_iter<T: IntoIterator<Item = Content>>(contents: T) -> Documents {
        let mut documents = Documents::default();
        documents.extend(contents);
        documents
    }
}
