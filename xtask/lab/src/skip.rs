//! Tests that cannot do their work on this machine say so, and programs that tests ask for.

use std::{env, path::PathBuf};

/// What the line begins with by which a test says that it was skipped; the reason follows.
pub const SKIPPED: &str = "skipped:";

/// Ends a test that cannot do its work on this machine, with the reason: `cargo xtask test` counts
/// it as skipped, not as passed. (`cargo test` knows no such outcome: there it says `ok`, and with
/// `--nocapture` also the reason.)
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {{
        // The line before is the test program's own.
        println!("\n{} {}", $crate::SKIPPED, format!($($reason)+));
        return;
    }};
}

/// The variable that says where another program is that tests run beside shunt, or after a `!` why
/// there is none.
#[must_use]
pub fn peer_variable(name: &str) -> String {
    format!("SHUNT_PEER_{}", name.to_uppercase().replace('-', "_"))
}

/// Where such a program is.
///
/// # Errors
///
/// The reason why there is none, for [`skip!`].
pub fn peer(name: &str) -> Result<PathBuf, String> {
    match env::var(peer_variable(name)) {
        Ok(text) => match text.strip_prefix('!') {
            Some(reason) => Err(format!("{name}: {reason}")),
            None => Ok(text.into()),
        },
        Err(_) => Err(format!("{name}: `cargo xtask test --peers` provides it")),
    }
}
