//! The header is what the source says.

use std::path::Path;

#[test]
fn the_header_is_up_to_date() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = dir.join("include/xpm.h");
    let config = cbindgen::Config::from_file(dir.join("cbindgen.toml")).expect("cbindgen.toml");
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_src(dir.join("src/error.rs"))
        .with_src(dir.join("src/options.rs"))
        .with_src(dir.join("src/space.rs"))
        .with_src(dir.join("src/mapping.rs"))
        .with_config(config)
        .generate()
        .expect("a header")
        .write(&mut made);
    if std::env::var_os("XPM_WRITE_HEADER").is_some() {
        std::fs::write(&header, &made).expect("it can be written");
    }
    let there = std::fs::read(&header).unwrap_or_default();
    assert!(
        there == made,
        "include/xpm.h is not what src says: run `XPM_WRITE_HEADER=1 cargo test -p xpm-c` and commit it"
    );
}
