//! Finds allocators on a LAN by DNS-SD over multicast DNS (RFC 6762, RFC 6763): an allocator announces its URL, and
//! an appliance queries the network for it. Nothing here is secret, and an answer is trusted no more than an address
//! that an operator might have typed.

use std::time::{Duration, Instant};

use mdns_sd::{ServiceDaemon, ServiceEvent, ServiceInfo};
use xpm_protocol::Name;

use crate::client::Client;
use crate::urls::Urls;

/// The service's type.
const SERVICE: &str = "_xpm-allocator._tcp.local.";
/// How long to wait for further allocators of the group after the first answer.
const OTHERS: Duration = Duration::from_secs(1);
/// Most URLs that are accepted for one group.
const URLS_MAX: usize = 8;
/// Longest URL that is accepted, in bytes.
const URL_LEN_MAX: usize = 200;

/// Multicast DNS cannot be used here.
#[derive(Debug, thiserror::Error)]
#[error("multicast DNS cannot be used: {0}")]
pub struct DiscoverError(String);

impl From<mdns_sd::Error> for DiscoverError {
    fn from(error: mdns_sd::Error) -> DiscoverError {
        DiscoverError(error.to_string())
    }
}

/// An announcement, until it is dropped.
pub struct Announcement {
    daemon: ServiceDaemon,
}

impl std::fmt::Debug for Announcement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announcement").finish_non_exhaustive()
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // If this fails, the announcement still ends with its time to live.
        let _ = self.daemon.shutdown();
    }
}

/// Announces the URL of a control interface to programs that look for this group. A thread of its own answers their
/// queries.
///
/// # Errors
/// When the machine has no network interface for it.
pub fn announce(url: &str, port: u16, group: &Name, unique: u128) -> Result<Announcement, DiscoverError> {
    let daemon = ServiceDaemon::new()?;
    let instance = format!("{group}-{unique:032x}");
    let host = format!("xpm-{unique:032x}.local.");
    let properties = [("url", url), ("group", group.as_str())];
    let info = ServiceInfo::new(SERVICE, &instance, &host, "", port, &properties[..])?.enable_addr_auto();
    daemon.register(info)?;
    Ok(Announcement { daemon })
}

/// The URLs that are announced for this group; none if there is no answer within `limit`.
///
/// # Errors
/// When the machine has no network interface for it.
pub async fn find(group: &Name, limit: Duration) -> Result<Option<Urls>, DiscoverError> {
    let daemon = ServiceDaemon::new()?;
    let heard = daemon.browse(SERVICE)?;
    let mut until = Instant::now() + limit;
    let mut found: Vec<String> = Vec::new();
    while found.len() < URLS_MAX {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(Ok(event)) = tokio::time::timeout(left, heard.recv_async()).await else { break };
        let Some(url) = url_of(&event, group).filter(|url| !found.contains(url)) else { continue };
        if found.is_empty() {
            until = until.min(Instant::now() + OTHERS);
        }
        found.push(url);
    }
    let _ = daemon.shutdown();
    found.sort();
    Ok(found.join(",").parse().ok())
}

/// The URL of an answer, if it is for this group.
fn url_of(event: &ServiceEvent, group: &Name) -> Option<String> {
    let ServiceEvent::ServiceResolved(service) = event else { return None };
    let of_group = service.get_property_val_str("group") == Some(group.as_str());
    let url = service.get_property_val_str("url").filter(|url| of_group && url.len() <= URL_LEN_MAX)?;
    Client::new(url, None).ok().map(|client| client.base().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn an_announcement_is_found_by_its_group() {
        let unique = crate::random::u128().unwrap();
        let ours = group(&format!("g{:016x}", unique as u64));
        let _first = announce("http://127.0.0.1:7700", 7700, &ours, unique).unwrap();
        let _second = announce("http://127.0.0.1:7701", 7701, &ours, unique ^ 1).unwrap();
        let urls = find(&ours, Duration::from_secs(20)).await.unwrap().expect("it is found");
        assert!(urls.iter().all(|url| url.starts_with("http://127.0.0.1:770")), "{urls:?}");
        let nobody = find(&group("nobody-there"), Duration::from_millis(300)).await.unwrap();
        assert_eq!(nobody, None);
    }
}
