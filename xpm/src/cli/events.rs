//! `xpm events`.

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Goes on with what happens from now on.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only events with a larger number.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) after: u64,
    /// Only events of this allocation or appliance: NAME, or KIND/NAME as `xpm status` has it.
    #[arg(long, value_name = "NAME", value_parser = object)]
    pub(crate) object: Option<String>,
    /// Only events of these kinds; docs/life.md lists all.
    #[arg(long = "kind", value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    pub(crate) kinds: Vec<String>,
}

/// The name alone: the only part that has to be safe in a URL.
fn object(text: &str) -> Result<String, String> {
    let name = text.rsplit('/').next().unwrap_or_default();
    name.parse::<xpm_protocol::Name>().map(|name| name.to_string()).map_err(|error| error.to_string())
}

/// A word; the allocator says which kinds there are.
fn kind(text: &str) -> Result<String, String> {
    let word = !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
    word.then(|| text.to_owned()).ok_or_else(|| "a kind is a word such as appliance-silent".to_owned())
}
