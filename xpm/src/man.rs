//! Manual pages, made from the command's own definition.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use serde::Serialize;

use crate::cli::Cli;
use crate::output::Output;

/// The pages that were written.
#[derive(Debug, Serialize)]
struct Pages {
    pages: Vec<String>,
}

/// Writes one page for each command into `directory`, and prints their paths.
pub(crate) fn man_pages(directory: &Path, output: Output) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let mut pages = Vec::new();
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    write_pages(&command, directory, &mut pages)?;
    output.print(&Pages { pages }, |written| written.pages.join("\n"))
}

fn write_pages(command: &clap::Command, directory: &Path, pages: &mut Vec<String>) -> anyhow::Result<()> {
    let man = clap_mangen::Man::new(command.clone())
        .source(concat!("xpm ", env!("CARGO_PKG_VERSION")))
        .manual("External primary memory");
    let path = directory.join(man.get_filename());
    let mut page = Vec::new();
    man.render(&mut page)?;
    std::fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    pages.push(path.display().to_string());
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| write_pages(sub, directory, pages))
}
