//! A document that is written and read again is the same document.

use xpm_protocol::api::appliance::Medium;
use xpm_protocol::policy::{
    Access, Account, Amount, AtClose, Condition, Day, Labels, LayoutRule, LeaseTerms, Level, LimitRule,
    LinkDemand, Locality, Preference, Rule, Selector, Strategy, Weights, Window,
};
use xpm_protocol::{LinkSpeed, Span};

use super::*;

/// Source of pseudo-random choices.
struct Seed(u64);

impl Seed {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    fn maybe<T>(&mut self, of: impl FnOnce(&mut Seed) -> T) -> Option<T> {
        self.coin().then(|| of(self))
    }

    fn some<T>(&mut self, mut of: impl FnMut(&mut Seed) -> T) -> Vec<T> {
        (0..self.below(3)).map(|_| of(self)).collect()
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    fn name(&mut self) -> Name {
        self.one_of(&["a", "b.c", "x_y", "r-1", "0", "42", "true", "name", "A"]).parse().unwrap()
    }

    fn text(&mut self) -> String {
        let odd =
            ["", "plain", "\"quoted\"", "two\nlines", "'''", "\\ back \u{7f}", "\u{1f600} # no", "a = [1]"];
        self.one_of(&odd).to_owned()
    }

    fn labels(&mut self) -> Labels {
        self.some(|seed| (seed.name(), seed.name())).into_iter().collect()
    }

    fn size(&mut self) -> ByteSize {
        ByteSize((i64::MAX as u64) >> self.below(63))
    }

    fn span(&mut self) -> Span {
        Span(std::time::Duration::from_nanos(1_000_000_007 * self.below(1 << 31)))
    }

    fn percent(&mut self) -> Percent {
        Percent::new(self.below(101) as u8).unwrap()
    }

    fn speed(&mut self) -> LinkSpeed {
        LinkSpeed(self.below(1 << 31) * 1000)
    }

    fn demand(&mut self) -> LinkDemand {
        if self.coin() { LinkDemand::Client } else { LinkDemand::Speed(self.speed()) }
    }

    fn window(&mut self) -> Window {
        let clock = |minutes: u64| format!("{:02}:{:02}", minutes / 60, minutes % 60).parse().unwrap();
        let days = [Day::Mon, Day::Tue, Day::Wed, Day::Thu, Day::Fri, Day::Sat, Day::Sun];
        Window {
            days: self.some(|seed| seed.one_of(&days)),
            from: clock(self.below(1441)),
            to: clock(self.below(1441)),
        }
    }

    fn lease(&mut self) -> LeaseTerms {
        LeaseTerms {
            duration: self.span(),
            warning: self.maybe(Seed::span),
            grace: self.maybe(Seed::span),
            total_max: self.maybe(Seed::span),
            renewable: self.coin(),
        }
    }

    fn selector(&mut self) -> Selector {
        Selector {
            appliances: self.some(Seed::name),
            labels: self.labels(),
            medium: self.some(|seed| seed.one_of(&[Medium::Memory, Medium::HugePages, Medium::File])),
            link_speed_min: self.maybe(Seed::speed),
            rdma: self.maybe(Seed::coin),
        }
    }

    /// A condition with inner conditions, nested `deep` levels.
    fn condition(&mut self, deep: u32) -> Condition {
        let inner = |seed: &mut Seed| match deep {
            0 => Vec::new(),
            _ => seed.some(|seed| seed.condition(deep - 1)),
        };
        Condition {
            account: self.some(Seed::name),
            client: self.some(Seed::name),
            labels: self.labels(),
            account_labels: self.labels(),
            client_labels: self.labels(),
            size_min: self.maybe(Seed::size),
            size_max: self.maybe(Seed::size),
            access: self.some(|seed| seed.one_of(&[Access::Block, Access::Mapping, Access::Machine])),
            time: self.some(Seed::window),
            time_zone: self.maybe(Seed::text),
            pool_used_min: self.maybe(Seed::percent),
            pool_used_max: self.maybe(Seed::percent),
            account_used_min: self.maybe(Seed::size),
            account_used_max: self.maybe(Seed::size),
            all: inner(self),
            any: inner(self),
            not: inner(self).pop().map(Box::new),
        }
    }

    fn limit(&mut self) -> LimitRule {
        LimitRule {
            size_max: self.maybe(Seed::size),
            soft: self.maybe(Seed::size),
            hard: self.maybe(Seed::size),
            appliance_share: self.maybe(Seed::percent),
        }
    }

    fn layout(&mut self) -> LayoutRule {
        LayoutRule {
            stripe: self.maybe(|seed| seed.below(1 << 31) as u32),
            stripe_unit: self.maybe(Seed::size),
            region_size: self.maybe(Seed::size),
            spread: self.maybe(Seed::coin),
        }
    }

    fn locality(&mut self) -> Locality {
        let levels = [Level::Host, Level::Rack, Level::Row, Level::Site];
        Locality { within: self.maybe(|seed| seed.one_of(&levels)), round_trip_max: self.maybe(Seed::span) }
    }

    fn rule(&mut self) -> Rule {
        Rule {
            name: self.name(),
            when: self.condition(2),
            refuse: self.maybe(Seed::text),
            require: self.maybe(Seed::selector),
            forbid: self.some(Seed::selector),
            prefer: self.some(|seed| Preference { select: seed.selector(), weight: seed.below(1000) as u16 }),
            limit: self.maybe(Seed::limit),
            layout: self.maybe(Seed::layout),
            link_speed: self.maybe(Seed::demand),
            locality: self.maybe(Seed::locality),
            weights: self.maybe(|seed| Weights { free: seed.below(1000) as u16, ..Weights::default() }),
            lease: self.maybe(Seed::lease),
            reclaimable: self.maybe(Seed::coin),
            use_strategy: self.maybe(Seed::name),
            last: self.coin(),
        }
    }

    fn strategy(&mut self) -> Strategy {
        Strategy {
            name: self.name(),
            description: self.text(),
            version: self.maybe(|seed| seed.below(9)),
            rules: self.some(Seed::rule),
        }
    }

    fn account(&mut self) -> Account {
        Account {
            name: self.name(),
            description: self.text(),
            version: self.maybe(|seed| seed.below(9)),
            labels: self.labels(),
            priority: self.below(2000) as u16,
            soft_limit: self.maybe(Seed::size),
            hard_limit: self.maybe(Seed::size),
            strategy: self.maybe(Seed::name),
            time_zone: self.maybe(Seed::text),
            hours: self.some(Seed::window),
            at_close: self.one_of(&[AtClose::Keep, AtClose::End]),
            lease: self.maybe(Seed::lease),
            link_speed: self.maybe(Seed::demand),
            reclaimable: self.coin(),
            waiting_max: self.maybe(|seed| seed.below(1000) as u32),
        }
    }

    fn client(&mut self) -> ClientProfile {
        ClientProfile {
            name: self.name(),
            description: self.text(),
            version: self.maybe(|seed| seed.below(9)),
            labels: self.labels(),
            account: self.maybe(Seed::name),
            own_link_speed: self.maybe(Seed::speed),
            link_speed: self.maybe(Seed::demand),
            soft_limit: self.maybe(Seed::size),
            hard_limit: self.maybe(Seed::size),
        }
    }

    fn appliance(&mut self) -> ApplianceProfile {
        ApplianceProfile {
            name: self.name(),
            description: self.text(),
            version: self.maybe(|seed| seed.below(9)),
            labels: self.labels(),
            head_room: self.maybe(|seed| match seed.coin() {
                true => Amount::Bytes(seed.size()),
                false => Amount::Share(seed.percent()),
            }),
            capacity: self.maybe(Seed::size),
            link_speed: self.maybe(Seed::speed),
            drain: self.coin(),
            ramp_up: self.maybe(Seed::span),
        }
    }
}

fn back(file: &PolicyFile) -> Vec<Content> {
    let found = read::read(std::slice::from_ref(file));
    assert_eq!(found.problems, [], "{}", file.text);
    found.documents.into_iter().map(|one| one.content).collect()
}

proptest! {
    #[test]
    fn a_written_document_reads_back_the_same(seed: u64) {
        let mut seed = Seed(seed);
        for document in [
            Content::Strategy(seed.strategy()),
            Content::Account(seed.account()),
            Content::Client(seed.client()),
            Content::Appliance(seed.appliance()),
        ] {
            let text = serde_json::to_string_pretty(&Documents::from_iter([document.clone()])).unwrap();
            prop_assert_eq!(back(&json(&text)), std::slice::from_ref(&document));
            prop_assert_eq!(back(&toml(&toml_of(&document))), [document.with_version(None)]);
        }
    }
}
