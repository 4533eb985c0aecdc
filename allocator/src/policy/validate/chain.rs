//! Checks chains of strategies that continue with each other: they must end, after a limited number of links.

use std::collections::HashMap;

use xpm_protocol::Name;
use xpm_protocol::policy::{Content, DocumentName, Strategy};

use crate::policy::Policy;

/// Most links of a chain of strategies.
const LINKS_MAX: usize = 8;

/// How all strategies, new and existing, continue with each other.
///
/// Each strategy is visited once, backwards from those that do not continue: the number of paths through them can be
/// the number of rules to the power of [`LINKS_MAX`].
pub(super) struct Chains<'a> {
    places: HashMap<&'a Name, Place>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Links of the longest path from here; none if a path leads into a cycle.
    on: Option<usize>,
    /// Links of the longest path to here; none if a cycle leads here.
    before: Option<usize>,
}

type Links<'a> = HashMap<&'a Name, Vec<&'a Name>>;

impl<'a> Chains<'a> {
    pub(super) fn new(policy: &'a Policy, new: &HashMap<DocumentName, &'a Content>) -> Chains<'a> {
        let there = policy.documents.values().chain(new.values().copied());
        let mut links = Links::new();
        for content in there {
            if let Content::Strategy(strategy) = content {
                // A strategy of the files replaces an existing one of the same name.
                links.insert(&strategy.name, nexts(strategy));
            }
        }
        for nexts in links.clone().into_values().flatten() {
            links.entry(nexts).or_default();
        }
        let mut back = Links::new();
        for (&name, nexts) in &links {
            back.entry(name).or_default();
            nexts.iter().for_each(|next| back.entry(next).or_default().push(name));
        }
        let (on, before) = (longest(&links, &back), longest(&back, &links));
        let place = |name| Place { on: on.get(name).copied(), before: before.get(name).copied() };
        Chains { places: links.keys().map(|&name| (name, place(name))).collect() }
    }

    /// The problem of a strategy that continues with another, if there is one.
    pub(super) fn problem(&self, from: &Name, to: &Name) -> Option<String> {
        let place = |name| self.places.get(name).copied().unwrap_or_default();
        match (place(from).before, place(to).on) {
            (_, None) => {
                Some(format!("it leads round in a circle by `{to}`: strategies must come to an end"))
            }
            (Some(before), Some(on)) if before + 1 + on > LINKS_MAX => Some(format!(
                "strategies go on with each other {} times by this: at most {LINKS_MAX} are allowed",
                before + 1 + on
            )),
            _ => None,
        }
    }
}

fn nexts(strategy: &Strategy) -> Vec<&Name> {
    let mut nexts: Vec<&Name> = strategy.rules.iter().filter_map(|rule| rule.use_strategy.as_ref()).collect();
    nexts.sort_unstable();
    nexts.dedup();
    nexts
}

/// The longest path along `links` from each strategy whose paths all end; `back` are the same links, reversed.
fn longest<'a>(links: &Links<'a>, back: &Links<'a>) -> HashMap<&'a Name, usize> {
    let mut open: HashMap<&Name, usize> = links.iter().map(|(&name, nexts)| (name, nexts.len())).collect();
    let mut ready: Vec<&'a Name> =
        links.iter().filter(|(_, nexts)| nexts.is_empty()).map(|(&name, _)| name).collect();
    let mut ways: HashMap<&'a Name, usize> = ready.iter().map(|&name| (name, 0)).collect();
    let mut done = 0;
    while done < ready.len() {
        let name = ready[done];
        done += 1;
        let way = ways.get(name).copied().unwrap_or(0);
        for &before in back.get(name).into_iter().flatten() {
            let longest = ways.entry(before).or_default();
            *longest = (*longest).max(way + 1);
            let left = open.entry(before).or_default();
            *left -= 1;
            if *left == 0 {
                ready.push(before);
            }
        }
    }
    ways.retain(|name, _| open.get(name) == Some(&0));
    ways
}
