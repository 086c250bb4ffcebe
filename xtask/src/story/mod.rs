//! The story of a Service, told by doing it: `cargo xtask run --story`.
//!
//! Chapters as the books on Kubernetes have them, over the manifests of `deploy/story` as they are.
//! Each step says what is done, does it with commands that a reader could type, and shows which
//! hook on which node led new flows where. A step that does not come out as told is marked, and the
//! story fails at its end.

mod cast;
mod chapters;
mod ingress;
mod telling;

use std::{
    io::{IsTerminal, stdin},
    time::Instant,
};

use anyhow::{Result, bail};

use self::{cast::Cast, telling::Story};
use crate::shell::say;

/// Without a person who waits, probes are so many times as often as the manifests say: 10 s become
/// 0.5 s.
const PACE_ONCE: u32 = 20;

/// Plays all chapters; `once`: without waiting for anybody.
///
/// # Errors
///
/// When the stage cannot be set, or a step did not come out as told.
pub(crate) fn story(once: bool) -> Result<()> {
    let waits = !once && stdin().is_terminal();
    let began = Instant::now();
    let mut story = Story::new(Cast::assemble(if waits { 1 } else { PACE_ONCE })?, waits);
    chapters::play(&mut story);
    println!("\n{}", story.table());
    let (failed, steps) = story.failed();
    say(
        "story",
        format_args!("{steps} steps in {:.1?}", began.elapsed()),
    );
    if failed > 0 {
        bail!("{failed} of {steps} steps did not come out as told");
    }
    Ok(())
}
