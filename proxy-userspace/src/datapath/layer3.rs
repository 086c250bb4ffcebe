//! The tc programs for devices without a link-layer header (TUN, WireGuard, IPIP, PPP): the same
//! ones, told by a constant that packets begin with their IP header.
//!
//! Most nodes have no such device, so they are loaded when the first one appears.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::{EbpfLoader, programs::Program};

use super::{
    Capacities, LAYER3_NODE_PROGRAMS, LAYER3_POD_PROGRAMS, LAYER3_TAIL_CALLED_PROGRAMS,
    NODE_PROGRAMS, POD_PROGRAMS, Paths, RUN_MEMORY, TAIL_CALLED_PROGRAMS,
    bpf::{self, link::Hook},
    object::object,
    tail_calls::{self, Kind},
};

/// What the programs are loaded from, over the maps that are pinned by then.
#[derive(Clone, Debug)]
pub(crate) struct Layer3 {
    /// Where maps and programs are pinned.
    pub(crate) paths: Paths,
    /// The sizes of the maps.
    pub(crate) capacities: Capacities,
    /// What the programs read as constants, by the name of the static.
    pub(crate) globals: Vec<(&'static str, u32)>,
}

/// Each with its name for Ethernet, as it stands in the object.
fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    let name =
        |((here, _), (there, _)): ((&'static str, Hook), (&'static str, Hook))| (here, there);
    LAYER3_NODE_PROGRAMS
        .into_iter()
        .zip(NODE_PROGRAMS)
        .chain(LAYER3_POD_PROGRAMS.into_iter().zip(POD_PROGRAMS))
        .map(name)
        .chain(
            LAYER3_TAIL_CALLED_PROGRAMS
                .into_iter()
                .zip(TAIL_CALLED_PROGRAMS),
        )
}

impl Layer3 {
    /// Loads and pins them.
    ///
    /// # Errors
    /// What the verifier or the kernel says of a program: `EPERM` without `CAP_BPF` and
    /// `CAP_NET_ADMIN`. The message ends with the verifier's log; devices without a link-layer
    /// header stay without programs.
    pub(crate) fn load(&self) -> io::Result<BTreeMap<&'static str, OwnedFd>> {
        let mut loader = EbpfLoader::new();
        for (name, value) in &self.globals {
            // The fast path hands frames over, and these devices have none.
            let value = if *name == "FAST_PATH" { &0 } else { value };
            loader.override_global(name, value, true);
        }
        loader.override_global("LINK_HEADER", &0_u32, true);
        let entry = tail_calls::next(&self.paths, Kind::Layer3)?;
        loader.override_global(tail_calls::GLOBAL, &entry, true);
        let object = aya_obj::Object::parse(object()).map_err(io::Error::other)?;
        let pinned =
            |name: &&String| !name.starts_with('.') && !RUN_MEMORY.contains(&name.as_str());
        for name in object.maps.keys().filter(pinned) {
            if let Some((_, entries)) = self.capacities.of_map(name) {
                loader.map_max_entries(name, entries);
            }
            loader.map_pin_path(name, self.paths.map(name));
        }
        let mut ebpf = loader
            .load(super::object::object())
            .map_err(io::Error::other)?;
        let mut programs = BTreeMap::new();
        for (name, in_object) in names() {
            let Some(Program::SchedClassifier(program)) = ebpf.program_mut(in_object) else {
                return Err(io::Error::other(format!("no program {in_object}")));
            };
            program.load().map_err(io::Error::other)?;
            let fd = program
                .fd()
                .map_err(io::Error::other)?
                .as_fd()
                .try_clone_to_owned()?;
            programs.insert(name, fd);
        }
        tail_calls::set(&self.paths, Kind::Layer3, entry, &programs)?;
        for (name, fd) in &programs {
            bpf::pin_over(fd.as_fd(), &self.paths.program(name))?;
        }
        Ok(programs)
    }
}
