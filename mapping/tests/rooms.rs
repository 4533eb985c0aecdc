//! The rooms of this crate import from rooms below them only.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room, and the rooms that it may import from. `say` and `sync` are below all of them.
const ROOMS: [(&str, &[&str]); 6] = [
    ("page", &[]),
    ("wake", &["page"]),
    ("pager", &["page", "wake"]),
    ("fault", &["page", "wake", "pager"]),
    ("evict", &["page", "wake", "pager"]),
    ("api", &["page", "wake", "pager", "fault", "evict"]),
];

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a room is a folder").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn imports_point_downwards() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (room, below) in ROOMS {
        for file in files(&source.join(room)) {
            let text = fs::read_to_string(&file).expect("a source file");
            for path in text.split("crate::").skip(1) {
                let name: String = path.chars().take_while(char::is_ascii_lowercase).collect();
                let upwards = ROOMS.iter().any(|(other, _)| *other == name) && name != room;
                if upwards && !below.contains(&name.as_str()) {
                    wrong.push(format!("{} imports from `{name}`", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
