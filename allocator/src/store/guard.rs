//! Turns a panic of the database into an error.
//!
//! redb trusts its file: a flipped bit in the file can make any call panic. The call is over then, and the store is
//! not used any more.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Once;

use super::StoreError;

thread_local! {
    /// Set while a panic of this thread becomes an error, and is not printed.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Does some work with the database.
///
/// # Errors
/// The errors of `work`, or that it panicked.
pub(super) fn guarded<T>(
    path: &Path,
    doing: &str,
    work: impl FnOnce() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    be_quiet();
    let before = GUARDED.replace(true);
    // After an error the caller does not use the database any more.
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(before);
    done.unwrap_or_else(|panic| {
        let what = format!("to {doing} it broke off ({})", text_of(panic.as_ref()));
        Err(StoreError::Damaged { path: path.to_owned(), what })
    })
}

/// Drops a database, ignoring any panic.
pub(super) fn let_go<T>(database: T) {
    be_quiet();
    let before = GUARDED.replace(true);
    drop(panic::catch_unwind(AssertUnwindSafe(|| drop(database))));
    GUARDED.set(before);
}

fn be_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                print(panic);
            }
        }));
    });
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("without a reason").lines().next().unwrap_or_default().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_in_one_line() {
        let done: Result<(), StoreError> =
            guarded(Path::new("/x"), "read", || panic!("index {} of\nnothing", 7));
        let line = done.unwrap_err().to_string();
        assert!(line.contains("/x") && line.contains("index 7 of") && line.contains("recover"), "{line}");
        assert!(!line.contains('\n') && guarded(Path::new("/x"), "read", || Ok(5)).is_ok());
        let_go(Explosive);
    }

    struct Explosive;

    impl Drop for Explosive {
        fn drop(&mut self) {
            panic!("at its end");
        }
    }
}
