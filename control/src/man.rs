//! Manual pages of daemons, made from their command lines.

use std::io::{self, Write as _};

/// If the first argument of the process is `--man`, prints the manual page of a daemon's command (section 8) and
/// returns whether that succeeded. It is for package builds; `--help` does not show it.
pub(crate) fn print_if_asked(command: impl FnOnce() -> clap::Command) -> Option<bool> {
    (std::env::args_os().nth(1)? == "--man").then(|| print(command()).is_ok())
}

fn print(command: clap::Command) -> io::Result<()> {
    let version = command.get_version().unwrap_or_default().to_owned();
    let man = clap_mangen::Man::new(command)
        .section("8")
        .source(format!("xpm {version}"))
        .manual("External primary memory");
    let mut page = Vec::new();
    man.render(&mut page)?;
    io::stdout().write_all(&page)
}
