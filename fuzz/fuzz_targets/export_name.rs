//! Names of exports: whatever is one comes back the same, and nothing tells the key.

#![no_main]

use libfuzzer_sys::fuzz_target;
use xpm_protocol::nbd::ExportName;

fuzz_target!(|text: &str| {
    let Ok(name) = text.parse::<ExportName>() else { return };
    let again = name.to_string();
    assert_eq!(again.parse::<ExportName>(), Ok(name.clone()));
    assert!(again.len() <= text.len() && again.len() <= 114);
    assert!(!format!("{name:?}").contains(&name.key.reveal()));
});
