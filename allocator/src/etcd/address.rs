//! Address of an etcd cluster, as an operator writes it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

/// Default prefix of keys.
const PREFIX_DEFAULT: &str = "xpm";

/// The members of an etcd cluster and the prefix of keys there, written `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    members: Vec<String>,
    prefix: String,
}

/// The text is no address of etcd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no store ({reason}): write etcd://HOST:PORT[,HOST:PORT...][/PREFIX]")]
pub struct ParseAddressError {
    text: String,
    reason: &'static str,
}

impl Address {
    /// URLs of the members, at least one.
    pub fn urls(&self) -> impl Iterator<Item = String> {
        self.members.iter().map(|member| format!("http://{member}"))
    }

    /// Prefix of keys: begins with a slash, does not end with one.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}

fn parse(text: &str) -> Result<Address, &'static str> {
    let rest = text.strip_prefix("etcd://").ok_or("it does not begin with etcd://")?;
    let (members, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let members: Vec<String> = members.split(',').map(|member| member.trim().to_owned()).collect();
    if !members.iter().all(|member| is_host_port(member)) {
        return Err("a member is not HOST:PORT");
    }
    let prefix = prefix.trim_end_matches('/');
    let good = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    if !prefix.chars().all(good) || prefix.starts_with('/') || prefix.contains("//") {
        return Err("the prefix has other characters than letters, digits, -, _, . and single /");
    }
    let prefix = if prefix.is_empty() { PREFIX_DEFAULT } else { prefix };
    Ok(Address { members, prefix: format!("/{prefix}") })
}

fn is_host_port(member: &str) -> bool {
    let Some((host, port)) = member.rsplit_once(':') else { return false };
    let bracketed = host.starts_with('[') && host.ends_with(']');
    let plain = host.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c));
    !host.is_empty() && (plain || bracketed) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Address, ParseAddressError> {
        parse(text).map_err(|reason| ParseAddressError { text: text.chars().take(200).collect(), reason })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}{}", self.members.join(","), self.prefix)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Address, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_addresses_are_parsed() {
        for (text, shown) in [
            ("etcd://a:2379", "etcd://a:2379/xpm"),
            ("etcd://10.0.0.1:1,[::1]:2/", "etcd://10.0.0.1:1,[::1]:2/xpm"),
            ("etcd://a-b.example:1/rack/7/", "etcd://a-b.example:1/rack/7"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
        let two: Address = "etcd://a:1,b:2/x".parse().unwrap();
        assert_eq!(
            (two.urls().collect::<Vec<_>>(), two.prefix()),
            (vec!["http://a:1".into(), "http://b:2".into()], "/x")
        );
    }

    #[test]
    fn mistakes_are_reported() {
        for text in [
            "",
            "a:1",
            "http://a:1",
            "etcd://",
            "etcd://a",
            "etcd://a:0",
            "etcd://a:1,",
            "etcd://u@a:1",
            "etcd://a:1//x",
            "etcd://a:1/x y",
        ] {
            let line = text.parse::<Address>().unwrap_err().to_string();
            assert!(line.contains("etcd://HOST:PORT"), "{line}");
        }
    }
}
