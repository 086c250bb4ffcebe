//! What can go wrong with a pinned map, and what to do then.

use std::{io, path::PathBuf};

use shunt_common::layout::LAYOUT_VERSION;

/// What can go wrong with a pinned map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Nothing is pinned.
    #[error(
        "no agent has run with --bpf-root {}: there is no {}; start one with `shunt run --bpf-root {}`, or name the \
         folder of the running one",
        root.display(), path.display(), root.display()
    )]
    NoAgent {
        /// The bpf root.
        root: PathBuf,
        /// The pin that is not there.
        path: PathBuf,
    },
    /// Pinned by another release.
    #[error(
        "the maps under {} have layout version {found} and this shunt reads version {}: use the shunt of the agent that \
         runs there (`kubectl exec` into its pod), or start this one's agent, which takes them over",
        root.display(), LAYOUT_VERSION
    )]
    OtherLayout {
        /// The bpf root.
        root: PathBuf,
        /// The version that is there.
        found: u32,
    },
    /// Not allowed.
    #[error("cannot open {}: {source}; run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", path.display())]
    Permission {
        /// The pin.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Pinned by something else.
    #[error(
        "{} is not a map of this shunt: {what} is {found}, expected {expected}; remove it with `shunt cleanup`",
        path.display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
        /// Its value.
        found: u32,
        /// What it should be.
        expected: usize,
    },
    /// No room.
    #[error("map {map} is full ({capacity} entries): start the agent with a larger {setting}")]
    Full {
        /// The map.
        map: &'static str,
        /// Its capacity.
        capacity: u32,
        /// The flag of `shunt run` that sets it.
        setting: &'static str,
    },
    /// Anything else.
    #[error("cannot {action} map {map}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What came of it, or a [`MapError`].
pub type Result<T> = std::result::Result<T, MapError>;
