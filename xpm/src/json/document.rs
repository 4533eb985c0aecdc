//! docs/json.md is what the types say: its tables are made of the sources of the messages, by their fields, comments
//! and types. `XPM_WRITE_JSON_DOCUMENT=1 cargo test -p xpm` writes them anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::documented;

/// Everything below this line is made of the sources.
const MARK: &str = "<!-- made of the types -->\n";

/// The printed types, by the file that defines them.
const TYPES: &[(&str, &[&str])] = &[
    ("xpm/src/status.rs", &["Overview"]),
    ("protocol/src/api/health.rs", &["Problem", "Severity"]),
    ("xpm/src/status/allocators.rs", &["Allocator"]),
    (
        "protocol/src/api/allocator/mod.rs",
        &[
            "Status",
            "Appliance",
            "ApplianceState",
            "Allocation",
            "AllocationState",
            "Owner",
            "RegionPlace",
            "Lease",
            "Ending",
            "EndReason",
            "Waiting",
            "Usage",
            "Client",
            "ClientFacts",
            "Event",
            "Garbage",
        ],
    ),
    (
        "protocol/src/api/allocator/change.rs",
        &["ChangeState", "ChangeKind", "DrainState", "RebalancePlan", "PlannedMove"],
    ),
    ("protocol/src/api/allocator/slabs.rs", &["SlabMap", "SlabPlace"]),
    ("protocol/src/api/allocator/metadata.rs", &["MetadataState", "Behind"]),
    ("protocol/src/layout.rs", &["Layout"]),
    ("protocol/src/api/appliance.rs", &["Info", "Endpoints", "Medium", "Status", "Counters"]),
    (
        "protocol/src/api/blk.rs",
        &[
            "Device",
            "Cache",
            "DeviceState",
            "LinkStatus",
            "LinkState",
            "Status",
            "Standby",
            "StandbyState",
            "SafetyItem",
            "Owed",
        ],
    ),
    (
        "protocol/src/api/decision.rs",
        &[
            "Decision",
            "DocumentVersion",
            "RuleTrace",
            "LimitCheck",
            "ApplianceTrace",
            "Verdict",
            "Rejection",
            "ScorePart",
            "RejectedCount",
            "DecisionOutcome",
        ],
    ),
    ("xpm/src/doctor/mod.rs", &["Report", "Check", "Verdict"]),
    ("xpm/src/fsck.rs", &["Findings"]),
    ("xpm/src/swap.rs", &["Shown"]),
    ("xpm/src/vm/mod.rs", &["Shown", "Migration", "MigrationStep"]),
    ("vm/src/resize.rs", &["Plugged"]),
    (
        "protocol/src/api/swapd.rs",
        &[
            "Status",
            "Policy",
            "Area",
            "AreaState",
            "Origin",
            "Leaving",
            "Other",
            "Fallback",
            "Memory",
            "Pressure",
            "Decision",
            "Rest",
            "Trouble",
            "Setting",
        ],
    ),
];

/// Names that several daemons have, by what they are called in the document.
fn title(file: &str, name: &str) -> String {
    let of = match (file, name) {
        ("protocol/src/api/allocator/mod.rs", "Status") => "allocator",
        ("protocol/src/api/appliance.rs", "Info" | "Status") => "appliance",
        ("protocol/src/api/blk.rs", "Status") => "xpm-blk",
        ("protocol/src/api/swapd.rs", "Status" | "Policy" | "Decision") => "xpm-swapd",
        ("xpm/src/doctor/mod.rs", "Verdict") => "doctor",
        ("xpm/src/vm/mod.rs", "Shown") => "xpm vm",
        _ => return name.to_owned(),
    };
    format!("{name} of {of}")
}

/// A field of a message, or a word of an enumeration.
struct Field {
    name: String,
    /// As Rust has it; empty for a word.
    kind: String,
    about: String,
    /// May be missing.
    optional: bool,
    flat: bool,
}

struct Type {
    about: String,
    fields: Vec<Field>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Reads a type out of a source that rustfmt has formatted.
fn parse(source: &str, name: &str) -> Type {
    let heads = ["struct", "enum"].map(|word| format!("{word} {name} {{"));
    let is_head = |line: &str| heads.iter().any(|head| line == head || line.ends_with(&format!(" {head}")));
    let lines: Vec<&str> = source.lines().collect();
    let start = lines.iter().position(|line| is_head(line)).unwrap_or_else(|| panic!("there is no {name}"));
    let before =
        lines[..start].iter().rev().take_while(|line| line.starts_with("///") || line.starts_with("#["));
    let mut about: Vec<&str> = before.filter_map(|line| line.strip_prefix("///")).map(str::trim).collect();
    about.reverse();
    let body = lines[start + 1..].iter().take_while(|line| **line != "}");
    Type { about: about.join(" "), fields: fields(&body.map(|line| line.trim()).collect::<Vec<_>>()) }
}

fn fields(lines: &[&str]) -> Vec<Field> {
    let mut fields = Vec::new();
    let (mut about, mut attributes, mut variant) = (Vec::new(), String::new(), String::new());
    for line in lines {
        if let Some(text) = line.strip_prefix("///") {
            about.push(text.trim());
        } else if line.starts_with("#[") {
            attributes.push_str(line);
        } else if !line.is_empty() && *line != "}," {
            let line =
                line.trim_end_matches(',').trim_start_matches("pub(super) ").trim_start_matches("pub ");
            let mut field = Field {
                name: String::new(),
                kind: String::new(),
                about: about.join(" "),
                optional: attributes.contains("skip_serializing_if") || line.contains(": Option<"),
                flat: attributes.contains("flatten"),
            };
            let renamed = attributes.split_once("rename = \"").and_then(|(_, rest)| rest.split('"').next());
            match line.split_once(": ") {
                Some((name, kind)) => {
                    field.name = renamed.unwrap_or(name).to_owned();
                    field.kind = kind.to_owned();
                    if !variant.is_empty() {
                        field.about = format!("{variant}: {}", field.about);
                    }
                }
                None => {
                    let word = line.trim_end_matches(" {");
                    let (word, kind) = word.split_once('(').unwrap_or((word, ""));
                    variant = format!("`{}`", kebab(word));
                    field.name = kebab(word);
                    field.kind = kind.trim_end_matches(')').to_owned();
                    field.flat = !kind.is_empty();
                }
            }
            if !attributes.contains("serde(skip)") {
                fields.push(field);
            }
            about.clear();
            attributes.clear();
        }
    }
    fields
}

fn kebab(word: &str) -> String {
    let mut kebab = String::new();
    for c in word.chars() {
        if c.is_ascii_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.push(c.to_ascii_lowercase());
    }
    kebab
}

/// The properties of a field by its type: a value, and the required end of its key.
fn unit(field: &Field, moments: bool) -> (Value, &'static str) {
    let kind = field.kind.as_str();
    let whole = |word: &str| kind == word || kind == format!("Option<{word}>");
    if whole("ByteSize") {
        (json!(1), "bytes")
    } else if whole("Span") {
        (json!("1s"), "_seconds")
    } else if whole("LinkSpeed") {
        (json!("1Gbps"), "_bps")
    } else if whole("u64")
        && (moments || field.about.contains("since 1970"))
        && !field.about.contains("umber")
    {
        (json!(0), "moment")
    } else if ["u8", "u16", "u32", "u64", "i32", "usize"].iter().any(|word| whole(word)) {
        (json!(1), "")
    } else {
        (json!("text"), "")
    }
}

/// The key that is printed, and what its value is.
fn printed(of: &str, field: &Field, moments: bool) -> (String, String) {
    let (sample, end) = unit(field, moments);
    let mut object = json!({ field.name.clone(): sample });
    if of == "Rejection" && end.is_empty() {
        // One name has two units here, and the reason says which.
        object["reason"] = json!("too-slow");
    }
    let Value::Object(object) = documented(object) else { unreachable!() };
    let (key, value) = object.into_iter().find(|(key, _)| field.name == "reason" || key != "reason").unwrap();
    let place = format!("`{}` of {of}", field.name);
    match end {
        "bytes" => assert!(key.contains("bytes"), "{place} is a size: list it in BYTES"),
        "moment" => assert!(value.is_string(), "{place} is a moment: list it in MOMENTS"),
        "" => assert!(
            key == field.name
                || key.ends_with("_percent")
                || key.ends_with("_permille")
                || key.ends_with("_ns")
                || key == "unit_bytes",
            "{place} is `{}`, and printed as `{key}`",
            field.kind
        ),
        end => assert!(key.ends_with(end), "{place} is a `{}`: list it", field.kind),
    }
    let kind = match end {
        "moment" => "time".to_owned(),
        "" => word(&field.kind),
        _ => "number".to_owned(),
    };
    (key, kind)
}

/// The JSON name of a type.
fn word(kind: &str) -> String {
    let inner = |outer: &str| kind.strip_prefix(outer).and_then(|rest| rest.strip_suffix('>'));
    if let Some(kind) = inner("Option<") {
        return word(kind);
    }
    if let Some(kind) = inner("Vec<") {
        return format!("list: {}", word(kind));
    }
    if kind.starts_with("BTreeMap<") || kind == "Labels" || kind == "SlabMap" {
        return "object by names".to_owned();
    }
    match kind {
        "bool" => "true or false".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "i32" | "usize" | "Epoch" => "number".to_owned(),
        "Layout" | "Owner" | "Lease" | "Ending" | "Waiting" | "ChangeState" | "DrainState" => kind.to_owned(),
        _ if kind.contains("::") || kind.chars().next().is_some_and(char::is_lowercase) => {
            kind.rsplit("::").next().unwrap_or(kind).to_owned()
        }
        "String" | "Name" | "Life" | "PathBuf" | "SocketAddr" | "Form" | "TransportKind" | "LinkSpeed"
        | "HostId" => "text".to_owned(),
        _ if kind.ends_with("Id") => "text".to_owned(),
        _ => kind.trim_start_matches("&'static ").replace("str", "text"),
    }
}

fn table(of: &str, parsed: &Type) -> String {
    let moments = parsed.about.contains("since 1970");
    let mut text = String::from("| key | value | meaning |\n|---|---|---|\n");
    for field in &parsed.fields {
        let about = field
            .about
            .replace(", seconds since 1970", "")
            .replace(" in seconds since 1970", "")
            .replace(", in bytes", "")
            .replace('|', "\\|");
        let about = crate::output::one_line(&about).replace("[`", "`").replace("`]", "`");
        let about = match about.find("](") {
            // A link of rustdoc leads nowhere here.
            Some(_) => strip_links(&about),
            None => about,
        };
        let row = if field.kind.is_empty() {
            format!("| `\"{}\"` | word | {about} |\n", field.name)
        } else if field.flat {
            format!("| all of {} | | {about} |\n", word(&field.kind))
        } else {
            let (key, kind) = printed(of, field, moments);
            let missing = if field.optional { ", may be missing" } else { "" };
            format!("| `{key}` | {kind}{missing} | {about} |\n")
        };
        text.push_str(&row);
    }
    text
}

/// `[text](place)` as its text.
fn strip_links(text: &str) -> String {
    let mut plain = text.to_owned();
    while let Some(middle) = plain.find("](") {
        let Some(end) = plain[middle..].find(')') else { break };
        plain.replace_range(middle..=middle + end, "");
        if let Some(start) = plain[..middle].rfind('[') {
            plain.replace_range(start..=start, "");
        }
    }
    plain
}

fn document() -> String {
    let mut text = String::new();
    for (file, names) in TYPES {
        let source = std::fs::read_to_string(root().join(file)).unwrap();
        for name in *names {
            let parsed = parse(&source, name);
            let title = title(file, name);
            let about = strip_links(
                &parsed
                    .about
                    .replace("[`", "`")
                    .replace("`]", "`")
                    .replace(" Moments are seconds since 1970.", ""),
            );
            write!(text, "\n### {title}\n\n{about}\n\n{}", table(&title, &parsed)).unwrap();
        }
    }
    text
}

#[test]
fn the_document_is_what_the_types_say() {
    let file = root().join("docs/json.md");
    let there = std::fs::read_to_string(&file).unwrap();
    let (head, tables) = there.split_once(MARK).expect("the mark");
    let made = document();
    if std::env::var_os("XPM_WRITE_JSON_DOCUMENT").is_some() {
        std::fs::write(&file, format!("{head}{MARK}{made}")).unwrap();
        return;
    }
    assert!(
        tables == made,
        "docs/json.md is not what the types say: run `XPM_WRITE_JSON_DOCUMENT=1 cargo test -p xpm` and commit it"
    );
}
