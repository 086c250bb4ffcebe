//! Ctrl-C and SIGTERM as a flag, so that what was made is removed before the program ends.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn request(_signal: i32) {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Takes the signals from now on.
pub(crate) fn on_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = request as extern "C" fn(i32);
        // SAFETY: the handler only stores to an atomic, which is safe in a signal handler.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether one came.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
