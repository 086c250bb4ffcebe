//! The map `tail_calls`: where the tc programs on devices find those that they hand packets over to,
//! which were loaded together with them.
//!
//! The map is one for all loads, and every load has entries of its own, which its programs know as a
//! constant: so those that are still on devices keep theirs while others replace them, also when an
//! agent dies meanwhile.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use shunt_common::layout::{
    LOADS, TAIL_CALL_SLOW_PATH, TAIL_CALL_UNDECIDED, TAIL_CALLS_OF_LOAD, names,
};

use super::{
    LAYER3_TAIL_CALLED_PROGRAMS, Paths, TAIL_CALLED_PROGRAMS,
    bpf::{
        self,
        map::{self, BPF_ANY},
        program,
    },
};

/// What the programs read the number of their load's first entry from.
pub(super) const GLOBAL: &str = "TAIL_CALL";

/// For which devices programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// With an Ethernet header.
    Ethernet,
    /// Without a link-layer header.
    Layer3,
}

impl Kind {
    /// The programs that are called, each with its place among its load's entries.
    fn programs(self) -> impl Iterator<Item = (u32, &'static str)> {
        [TAIL_CALL_UNDECIDED, TAIL_CALL_SLOW_PATH]
            .into_iter()
            .zip(match self {
                Self::Ethernet => TAIL_CALLED_PROGRAMS,
                Self::Layer3 => LAYER3_TAIL_CALLED_PROGRAMS,
            })
    }

    /// The first entry of one of the loads.
    fn entry(self, load: u32) -> u32 {
        let before = match self {
            Self::Ethernet => 0,
            Self::Layer3 => LOADS,
        };
        (before + load % LOADS) * TAIL_CALLS_OF_LOAD
    }
}

/// The first entry for a new load: behind those of the pinned programs.
///
/// # Errors
/// The kernel's, when what is pinned does not open.
pub(super) fn next(paths: &Paths, kind: Kind) -> io::Result<u32> {
    let pinned = pinned(paths, kind)?;
    Ok(kind.entry(pinned.map_or(0, |load| load + 1)))
}

/// Whether the pinned programs are where those on the devices look for them.
///
/// # Errors
/// As [`next`].
pub(super) fn are_set(paths: &Paths, kind: Kind) -> io::Result<bool> {
    Ok(pinned(paths, kind)?.is_some())
}

/// Which load the pinned programs are of; `None`: there are none, or they do not stand in the map
/// together.
fn pinned(paths: &Paths, kind: Kind) -> io::Result<Option<u32>> {
    let open = |path: std::path::PathBuf| match bpf::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    };
    let Some(map) = open(paths.map(names::TAIL_CALLS))? else {
        return Ok(None);
    };
    let mut ids = Vec::new();
    for (place, name) in kind.programs() {
        let Some(program) = open(paths.program(name))? else {
            return Ok(None);
        };
        ids.push((place, program::id(&program)?));
    }
    'loads: for load in 0..LOADS {
        for &(place, id) in &ids {
            // The kernel shows programs by their ids.
            let found = map::lookup::<u32, u32>(map.as_fd(), &(kind.entry(load) + place))?;
            if found != Some(id) {
                continue 'loads;
            }
        }
        return Ok(Some(load));
    }
    Ok(None)
}

/// Puts those of `programs` that are called into the entries from `first` on.
///
/// # Errors
/// The kernel's: `EINVAL` for a program of another type than the others there.
pub(super) fn set(
    paths: &Paths,
    kind: Kind,
    first: u32,
    programs: &BTreeMap<&'static str, OwnedFd>,
) -> io::Result<()> {
    // Another build may have none, nor the map.
    let called: Vec<_> = kind
        .programs()
        .filter_map(|(place, name)| Some((first + place, programs.get(name)?)))
        .collect();
    if called.is_empty() {
        return Ok(());
    }
    let map = bpf::open(&paths.map(names::TAIL_CALLS))?;
    for (entry, program) in called {
        map::update(map.as_fd(), &entry, &program.as_raw_fd(), BPF_ANY)?;
    }
    Ok(())
}
