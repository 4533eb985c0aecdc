//! Tests of the units and rules that the packages have, by systemd's own programs.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::util;

/// Settings that Debian 12's systemd does not know and later ones do; ignored there.
const LATER: [&str; 3] = ["RestartSteps", "RestartMaxDelaySec", "SurviveFinalKillSignal"];

/// How exposed each service may be, in tenths (`systemd-analyze security`: 0 to 100). It may be made less, never more.
const EXPOSURE_MAX: [(&str, u32); 6] = [
    ("xpm-allocator", 22),
    ("xpm-appliance", 26),
    ("xpm-blk", 56),
    ("xpm-blk@", 15),
    // Its mounts are for everybody, so it can have no mount namespace.
    ("xpm-fs", 58),
    ("xpm-swapd", 39),
];

/// The units, as instances where they are templates, with programs that are there; their names.
fn units(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(util::repository().join("systemd")).unwrap() {
        let file = entry.unwrap().path();
        let name = file.file_name().unwrap().to_string_lossy().replace("@.", "@a.");
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().map(|line| match line.split_once("=/usr/bin/xpm") {
            Some((key, rest)) => {
                format!("{key}=/bin/true {}", rest.split_once(' ').map_or("", |(_, words)| words))
            }
            None => line.to_owned(),
        });
        fs::write(directory.join(&name), lines.collect::<Vec<_>>().join("\n") + "\n").unwrap();
        names.push(name);
    }
    names.sort();
    names
}

fn analyze(directory: &Path, words: &[&str]) -> (bool, String) {
    let mut command = Command::new("systemd-analyze");
    command.current_dir(directory).args(words);
    command.env("SYSTEMD_UNIT_PATH", format!("{}:", directory.display())).env("SYSTEMD_LOG_COLOR", "0");
    let output = command.output().expect("systemd-analyze; `cargo xtask setup` installs it");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn systemd_understands_all_of_the_units() {
    let directory = tempfile::tempdir().unwrap();
    for name in units(directory.path()) {
        let file = directory.path().join(&name);
        let (ok, said) = analyze(directory.path(), &["verify", "--man=no", &file.to_string_lossy()]);
        let unknown = |line: &&str| !LATER.iter().any(|key| line.contains(&format!("Unknown key '{key}'")));
        let complaints: Vec<&str> =
            said.lines().filter(unknown).filter(|line| line.contains("xpm")).collect();
        assert!(ok && complaints.is_empty(), "{name}: {said}");
    }
}

#[test]
fn services_are_no_more_exposed_than_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let names = units(directory.path());
    for name in names.iter().filter_map(|name| name.strip_suffix(".service")) {
        let file = directory.path().join(format!("{name}.service"));
        let (_, said) = analyze(directory.path(), &["security", "--offline=true", &file.to_string_lossy()]);
        let level = said.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_default();
        println!("{level}");
        let template = name.replace("@a", "@");
        let Some((_, max)) = EXPOSURE_MAX.iter().find(|(known, _)| *known == template) else {
            panic!("say in EXPOSURE_MAX how exposed {name} may be; it is: {level}");
        };
        let number = level.split_whitespace().filter_map(|word| word.parse::<f64>().ok()).next_back();
        let found = number.expect("a level") * 10.0;
        assert!(found <= f64::from(*max) + 0.01, "{name} is more exposed than {max} tenths: {level}");
    }
}
