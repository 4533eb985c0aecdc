//! Options of commands that list things.

use clap::Args;

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ListArgs {
    /// Sorts by this column, as it is headed; with a `-` in front, backwards. `-o wide` shows all columns.
    #[arg(long, value_name = "COLUMN")]
    pub(crate) sort_by: Option<String>,
    /// Leaves the headings out.
    #[arg(long)]
    pub(crate) no_headers: bool,
}
