//! `xpm apply`, `get`, `edit` and `delete`: documents of the allocator.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use similar::TextDiff;
use xpm_protocol::Name;
use xpm_protocol::api::policy::{
    Applied, Apply, ChangeAction, DocumentChange, EDIT_MARK, Policy, PolicyFile, PolicyFormat, Written,
};
use xpm_protocol::policy::{Content, DocumentName, Documents, Kind};

use crate::cli::{ApplyArgs, DeleteArgs, EditArgs, GetArgs};
use crate::connect::{Daemon, Daemons};
use crate::output::{Output, one_line};

pub(crate) async fn apply(args: &ApplyArgs, daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let files = args.files.iter().map(|path| read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let applied = send(&daemons.allocator()?, files, args.dry_run).await?;
    report(&applied, args.dry_run, output)
}

async fn send(allocator: &Daemon, files: Vec<PolicyFile>, dry_run: bool) -> anyhow::Result<Applied> {
    Ok(allocator.post("/v1/policy", &Apply { files, dry_run }).await?)
}

fn read(path: &Path) -> anyhow::Result<PolicyFile> {
    let format = match path.extension().is_some_and(|extension| extension == "json") {
        true => PolicyFormat::Json,
        false => PolicyFormat::Toml,
    };
    let (name, text) = match path.to_str() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
            ("standard input".to_owned(), text)
        }
        _ => {
            let text = std::fs::read_to_string(path);
            (path.display().to_string(), text.with_context(|| format!("cannot read {}", path.display()))?)
        }
    };
    // JSON begins with a brace, which no TOML does.
    let format = if text.trim_start().starts_with('{') { PolicyFormat::Json } else { format };
    Ok(PolicyFile { name, format, text })
}

/// Prints what was done, or what is wrong.
fn report(applied: &Applied, dry_run: bool, output: Output) -> anyhow::Result<ExitCode> {
    for problem in &applied.problems {
        let line = if problem.line > 0 { format!(":{}", problem.line) } else { String::new() };
        let key = if problem.key.is_empty() { String::new() } else { format!(" {}:", problem.key) };
        eprintln!("{}", one_line(&format!("{}{line}:{key} {}", problem.file, problem.text)));
    }
    output
        .print(applied, |applied| applied.changes.iter().map(|change| changed(change, dry_run)).collect())?;
    match applied.problems.len() {
        0 => Ok(ExitCode::SUCCESS),
        count => {
            eprintln!("xpm: nothing was applied: {count} problem{}", if count == 1 { "" } else { "s" });
            Ok(ExitCode::FAILURE)
        }
    }
}

fn changed(change: &DocumentChange, dry_run: bool) -> String {
    let would = if dry_run && change.action != ChangeAction::Unchanged { "would be " } else { "" };
    let action = match change.action {
        ChangeAction::Created => "created",
        ChangeAction::Changed => "changed",
        ChangeAction::Unchanged => "unchanged",
    };
    let line = format!("{}: {would}{action} (version {})\n", change.document, change.version);
    match dry_run {
        true => line + &diff(change),
        false => line,
    }
}

fn diff(change: &DocumentChange) -> String {
    let text = TextDiff::from_lines(change.before.as_str(), change.after.as_str());
    text.unified_diff().context_radius(3).to_string()
}

pub(crate) async fn get(args: &GetArgs, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let allocator = daemons.allocator()?;
    let found = match (&args.file, args.kind) {
        (Some(file), _) => return get_file(file, &allocator, output).await,
        (None, Some(kind)) => fetch(&allocator, kind, args.name.as_ref()).await?,
        (None, None) => bail!("say which kind of documents, or name a file (`--file`)"),
    };
    let kind = args.kind.map(Kind::as_str).unwrap_or_default();
    output.print_as_written(&found.documents, |documents| {
        if documents.is_empty() {
            return format!("# no {kind}: make one with `xpm apply FILE`\n");
        }
        let each: Vec<String> = documents.clone().into_contents().map(|one| found.text(&one)).collect();
        each.join("\n")
    })
}

/// Prints the documents that a file names, in its order and as they were written.
async fn get_file(path: &Path, allocator: &Daemon, output: Output) -> anyhow::Result<()> {
    let file = read(path)?;
    let cannot =
        || format!("{} has no documents that can be read: `xpm apply --dry-run` says why", file.name);
    let named: Documents = match file.format {
        PolicyFormat::Toml => toml::from_str(&file.text).with_context(cannot)?,
        PolicyFormat::Json => serde_json::from_str(&file.text).with_context(cannot)?,
    };
    let names: Vec<DocumentName> = named.into_contents().map(|one| one.document_name()).collect();
    let Policy { documents, written, .. } = allocator.get("/v1/policy").await?;
    let documents: Documents =
        documents.into_contents().filter(|one| names.contains(&one.document_name())).collect();
    let there: Vec<DocumentName> = documents.clone().into_contents().map(|one| one.document_name()).collect();
    if let Some(missing) = names.iter().find(|name| !there.contains(name)) {
        bail!("there is no {missing}: `xpm apply {}` makes it", path.display());
    }
    let mut written: Vec<Written> = written
        .into_iter()
        .filter(|one| names.contains(&one.document) && one.format == file.format)
        .collect();
    written.sort_by_key(|one| one.position);
    let found = Found { documents, written };
    output.print(&found.documents, |documents| match found.written.len() == names.len() {
        true => found.written.iter().map(|one| format!("{}{}{}", one.before, one.text, one.after)).collect(),
        false => documents.clone().into_contents().map(|one| found.text(&one)).collect::<Vec<_>>().join("\n"),
    })
}

/// Documents of the allocator, with their texts as far as it has them.
struct Found {
    documents: Documents,
    written: Vec<Written>,
}

impl Found {
    /// A document in TOML, as it was written where that is known.
    fn text(&self, content: &Content) -> String {
        let name = content.document_name();
        let written =
            self.written.iter().find(|one| one.document == name && one.format == PolicyFormat::Toml);
        match written {
            Some(written) => written.text.clone(),
            // It came as JSON, and is made of what TOML can say.
            None => toml::to_string_pretty(&Documents::from_iter([content.clone()])).unwrap_or_default(),
        }
    }

    /// A changed text of the one document that was found, with what stands around the document in its file, so that the
    /// file comes back whole.
    fn within_its_file(&self, text: String) -> String {
        let names: Vec<DocumentName> =
            self.documents.clone().into_contents().map(|content| content.document_name()).collect();
        let is_it = |one: &&Written| names.contains(&one.document) && one.format == PolicyFormat::Toml;
        match self.written.iter().find(is_it) {
            Some(around) => format!("{}{text}{}", around.before, around.after),
            None => text,
        }
    }

    /// The same for somebody who changes it: with the version that was read.
    fn draft(&self, content: &Content) -> String {
        let text = self.text(content);
        let marked = content.version().map(|version| format!("version = {version} {EDIT_MARK}\n"));
        let written = self.written.iter().any(|one| one.document == content.document_name());
        let header = |line: &str| line.trim_start().starts_with("[[");
        match (marked, written) {
            (Some(mark), true) if text.split_inclusive('\n').any(header) => {
                let mut draft = String::new();
                let mut marked = false;
                for line in text.split_inclusive('\n') {
                    draft.push_str(line);
                    if !marked && header(line) {
                        draft.push_str(&mark);
                        marked = true;
                    }
                }
                draft
            }
            _ => text,
        }
    }
}

async fn fetch(allocator: &Daemon, kind: Kind, name: Option<&Name>) -> anyhow::Result<Found> {
    let Policy { documents, written, .. } = allocator.get("/v1/policy").await?;
    let wanted = |content: &Content| content.kind() == kind && name.is_none_or(|name| name == content.name());
    let documents: Documents = documents.into_contents().filter(wanted).collect();
    if let Some(name) = name.filter(|_| documents.is_empty()) {
        bail!("there is no {kind} `{name}`: `xpm get {kind}` shows those that are there");
    }
    Ok(Found { documents, written })
}

pub(crate) async fn edit(args: &EditArgs, daemons: &Daemons, output: Output) -> anyhow::Result<ExitCode> {
    let allocator = daemons.allocator()?;
    let found = fetch(&allocator, args.kind, Some(&args.name)).await?;
    let before: String = found.documents.clone().into_contents().map(|one| found.draft(&one)).collect();
    let path = draft(args, &before)?;
    edit_file(&path)?;
    let after = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if after == before {
        remove(&path);
        output.hint("Nothing was changed.");
        return Ok(ExitCode::SUCCESS);
    }
    let text = found.within_its_file(after);
    let file = PolicyFile { name: path.display().to_string(), format: PolicyFormat::Toml, text };
    let kept = || format!("what you wrote is in {}", path.display());
    let applied = send(&allocator, vec![file], false).await.with_context(kept)?;
    if applied.problems.is_empty() {
        remove(&path);
    }
    report(&applied, false, output)
}

/// A file of this user's own, with the document in it.
fn draft(args: &EditArgs, text: &str) -> anyhow::Result<PathBuf> {
    let prefix = format!("xpm-{}-{}-", args.kind, args.name);
    let mut file = tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".toml")
        .tempfile()
        .context("cannot make a file to edit")?;
    file.write_all(text.as_bytes()).context("cannot write a file to edit")?;
    let (_, path) = file.keep().context("cannot keep a file to edit")?;
    Ok(path)
}

fn remove(path: &Path) {
    // It is only left over.
    let _ = std::fs::remove_file(path);
}

fn edit_file(path: &Path) -> anyhow::Result<()> {
    let editor = ["VISUAL", "EDITOR"]
        .into_iter()
        .filter_map(|name| std::env::var(name).ok())
        .find(|text| !text.trim().is_empty());
    let editor = editor.unwrap_or_else(|| "vi".to_owned());
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or("vi");
    let status = Command::new(program).args(words).arg(path).status();
    let status = status
        .with_context(|| format!("cannot run the editor `{program}`: set VISUAL or EDITOR to another"))?;
    ensure!(
        status.success(),
        "the editor ended with {status}; nothing was applied; what you wrote is in {}",
        path.display()
    );
    Ok(())
}

/// What `delete --json` prints.
#[derive(Debug, Serialize)]
struct Deleted {
    deleted: DocumentName,
}

pub(crate) async fn delete(args: &DeleteArgs, daemons: &Daemons, output: Output) -> anyhow::Result<()> {
    let query = args.version.map(|version| format!("?version={version}")).unwrap_or_default();
    daemons.allocator()?.delete(&format!("/v1/policy/{}/{}{query}", args.kind, args.name)).await?;
    let deleted = DocumentName { kind: args.kind, name: args.name.clone() };
    output.print(&Deleted { deleted }, |_| String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_shows_the_difference() {
        let document = DocumentName { kind: Kind::Account, name: "batch".parse().unwrap() };
        let (before, after) = ("a = 1\nb = 2\n".to_owned(), "a = 1\nb = 3\n".to_owned());
        let change = DocumentChange { document, action: ChangeAction::Changed, version: 7, before, after };
        let text = changed(&change, true);
        assert!(text.starts_with("account `batch`: would be changed (version 7)\n"), "{text}");
        assert!(text.contains("-b = 2\n+b = 3\n"), "{text}");
        assert_eq!(changed(&change, false), "account `batch`: changed (version 7)\n");
    }

    #[test]
    fn json_is_known_by_its_name_or_its_brace() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text, format) in [
            ("a.toml", "x = 1", PolicyFormat::Toml),
            ("a.json", "{}", PolicyFormat::Json),
            ("a", " {}", PolicyFormat::Json),
        ] {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path).unwrap().format, format, "{name}");
        }
        assert!(read(&directory.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
