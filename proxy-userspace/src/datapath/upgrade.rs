//! From another map layout to this one, under load (SPEC L4).
//!
//! The other layout's programs run on until this agent attaches, with their own maps:
//!
//! 1. `Upgrade::share`: a map that is the same in both layouts is simply used by the programs of
//!    both.
//! 2. `Upgrade::take_over`: entries of maps that have grown are copied into the new ones, then the
//!    links are moved into this layout's folder. So what follows is a restart: the agent reads the
//!    maps back, and updates links instead of adding others.
//! 3. [`Upgrade::before_switch`], when the agent knows everything and is about to attach: flows
//!    once more, for those that were opened, or opened anew, while it waited; [`Upgrade::catch_up`]
//!    right before devices get their programs one by one.
//! 4. [`Upgrade::finish`], when all programs are this layout's: flows that were opened meanwhile;
//!    then the other layout's folder goes.
//!
//! While flows are in two maps, a connection in the middle of its first packets may be reset when
//! the program that sees its answers is switched; while they are in one, nothing is lost. Source
//! ports that the other layout's programs gave out meanwhile are taken over where this layout's
//! have not given out the same.
//!
//! An agent that is killed on the way leaves the folder, and the next one goes on where it stopped.
//!
//! A layout can be read when its keys are the same and its values are a beginning of this layout's:
//! values grow at their end, and zero means in a new field what was so before there was the field.
//! Other changes of values stand in `converted`, and maps that have changed their name in
//! `RENAMED`. A renamed map that both layouts share keeps the old
//! name inside the kernel, where nobody looks a map up by it. If one map cannot
//! be read none is taken over, for their entries name each other; flows then find their backends
//! anew, as far as the hash tells.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use shunt_common::{
    family::{V4, V6},
    filter,
    layout::{Config, LAYOUT_VERSION, Octets, SnatSlot, TICK_NS, names},
    snat,
};
use tracing::{info, warn};

use super::{
    Capacities, Paths,
    bpf::{
        self, MappedArray,
        map::{
            self, BPF_ANY, BPF_NOEXIST, Cursor, MapInfo,
            types::{ARRAY, HASH, LPM_TRIE, LRU_HASH},
        },
    },
    maps::MapFamily,
};

/// The kernel's monotonic clock in units of so many ns.
fn now_in(unit: u64) -> u32 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    ((time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64) / unit) as u32
}

/// Entries read at once.
const BATCH: usize = 4096;
/// Types of maps. Per-CPU maps are programs' own memory and counters, and socket
/// storage cannot be listed.
const COPIED: [u32; 4] = [HASH, ARRAY, LRU_HASH, LPM_TRIE];
/// What programs write.
const WRITTEN: [&[&str]; 6] = [
    &names::UNCONFIRMED,
    &names::FLOWS,
    &names::AFFINITY,
    &names::NEW_AFFINITY,
    &names::FRAGMENTS,
    &[names::SOCKETS],
];
/// Bits that programs set.
const BITS: [&str; 2] = [names::SHARED_PORTS, names::CLIENTS];

/// Maps that had another name before a version of the layout: that version, the old and the new name.
const RENAMED: [(u32, &str, &str); 11] = [
    (6, "new_flows4", names::UNCONFIRMED[0]),
    (6, "new_flows6", names::UNCONFIRMED[1]),
    (6, "waiting", names::HALF_OPEN),
    (6, "collided", names::SHARED_PORTS),
    (6, "pod_ways4", names::POD_ROUTES[0]),
    (6, "pod_ways6", names::POD_ROUTES[1]),
    (6, "members4", names::SET_MEMBERS[0]),
    (6, "members6", names::SET_MEMBERS[1]),
    (6, "addresses4", names::SERVICE_ADDRS[0]),
    (6, "addresses6", names::SERVICE_ADDRS[1]),
    (6, "senders", names::UDP_PEERS),
];

/// Another layout's folder, whose programs this agent takes the place of.
#[derive(Debug)]
pub struct Upgrade {
    old: PathBuf,
    version: u32,
    /// When source ports were last copied as they were, in ticks.
    copied_at: Cell<u32>,
    maps: PathBuf,
    /// Its links were moved by an agent before this one, so this layout's programs may run already.
    switching: bool,
    /// Its maps can be read.
    readable: bool,
}

/// A map of either layout.
struct Map {
    fd: OwnedFd,
    info: MapInfo,
    /// How its values become those of this layout, if not by zeros at their end.
    convert: Option<Convert>,
}

impl Map {
    /// A map of this layout.
    fn open(folder: &Path, name: &str) -> io::Result<Self> {
        let fd = bpf::open(&folder.join(name))?;
        let info = map::map_info(fd.as_fd())?;
        Ok(Self {
            fd,
            info,
            convert: None,
        })
    }

    /// A map of layout `version`, which is called `name` in this one.
    fn open_old(folder: &Path, version: u32, name: &str) -> io::Result<Self> {
        let map = Self::open(folder, old_name(version, name))?;
        Ok(Self {
            convert: converted(version, name),
            ..map
        })
    }

    /// Calls `each` with key and value of every entry, the value as it is in this layout; an
    /// array's zeros are left out.
    fn for_each(
        &self,
        value_size: u32,
        mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut cursor, mut room) = (Cursor::default(), BATCH);
        loop {
            let batch = match map::lookup_batch_raw(self.fd.as_fd(), &self.info, &mut cursor, room)
            {
                // One bucket's chain is longer than the room.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOSPC)
                        && room < self.info.max_entries as usize =>
                {
                    room *= 2;
                    continue;
                }
                batch => batch?,
            };
            let keys = batch.keys.chunks_exact(self.info.key_size as usize);
            let values = batch.values.chunks_exact(self.info.value_size as usize);
            for (key, old_value) in keys.zip(values) {
                if self.info.map_type == ARRAY && old_value.iter().all(|&byte| byte == 0) {
                    continue;
                }
                let mut value = match &self.convert {
                    Some(convert) => (convert.value)(old_value),
                    None => old_value.to_vec(),
                };
                value.resize(value_size as usize, 0);
                each(key, &value)?;
            }
            if batch.at_end {
                return Ok(());
            }
        }
    }

    /// Copies what `old` has; arrays' zeros are left out, for that is what a new array holds.
    fn copy_from(&self, old: &Self, flags: u64) -> io::Result<usize> {
        let mut copied = 0;
        old.for_each(self.info.value_size, |key, value| {
            match map::update_raw(self.fd.as_fd(), &self.info, key, value, flags) {
                Ok(()) => copied += 1,
                Err(error)
                    if flags == BPF_NOEXIST && error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(error),
            }
            Ok(())
        })?;
        Ok(copied)
    }

    /// Takes source ports over that the programs of `old` have given out since `since`, or have
    /// seen packets of: beside programs that give out ports of this map. Each goes to one of its
    /// places in this layout; `range` says which port a place of layout 5 is of.
    fn copy_ports<F: MapFamily>(
        &self,
        old: &Self,
        range: Option<v5::Range>,
        clients: &MappedArray<u64>,
        since: u32,
    ) -> io::Result<usize> {
        let slots = MappedArray::<SnatSlot<F::Addr>>::new(self.fd.as_fd(), self.info.max_entries)?;
        let config = Config {
            snat_entries: snat::entries(self.info.max_entries),
            ..Config::default()
        };
        let mut copied = 0;
        old.for_each(self.info.value_size, |key, value| {
            // SAFETY: as long as a slot, by `value_size`; any bytes are a Pod.
            let mut theirs = unsafe { value.as_ptr().cast::<SnatSlot<F::Addr>>().read_unaligned() };
            if let Some(range) = range {
                let index = u32::from_ne_bytes(key.try_into().unwrap_or_default());
                theirs.snat_port = range.port(index);
            }
            if theirs.last_seen == 0 || theirs.last_seen < since {
                return Ok(());
            }
            for addr in [theirs.client, theirs.snat] {
                let bit = filter::translated::<F>(F::words(addr));
                let (word, mask) = filter::word_and_mask(bit);
                clients.atomic(word).fetch_or(mask, Ordering::Relaxed);
            }
            let places = snat::places::<F>(
                &config,
                theirs.snat_port,
                F::words(theirs.backend),
                theirs.backend_port,
                theirs.proto,
            );
            copied += usize::from(place(&slots, places, theirs, since));
            Ok(())
        })?;
        Ok(copied)
    }
}

/// Puts a source port of another layout to one of its places, unless it has been given out here.
fn place<A: Octets + Eq>(
    slots: &MappedArray<SnatSlot<A>>,
    places: [u32; 2],
    theirs: SnatSlot<A>,
    since: u32,
) -> bool {
    let is_it = |&index: &u32| {
        snat::is_of(
            &slots.get(index),
            theirs.snat_port,
            theirs.backend,
            theirs.backend_port,
            theirs.proto,
        )
    };
    let index = places
        .into_iter()
        .find(is_it)
        .or_else(|| (places.into_iter()).find(|&index| slots.get(index).last_seen == 0));
    let Some(index) = index else { return false };
    let ours = slots.get(index);
    let same_flow = ours.last_seen != 0
        && (ours.client, ours.client_port, ours.frontend)
            == (theirs.client, theirs.client_port, theirs.frontend);
    if same_flow {
        slots.state(index).fetch_or(theirs.state, Ordering::Relaxed);
        slots
            .last_seen(index)
            .fetch_max(theirs.last_seen, Ordering::Relaxed);
        return false;
    }
    let claimed = (ours.last_seen == 0 || ours.last_seen < since)
        && slots
            .last_seen(index)
            .compare_exchange(
                ours.last_seen,
                theirs.last_seen,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok();
    if claimed {
        slots.set(index, theirs);
    }
    claimed
}

impl Upgrade {
    /// The newest other layout that is pinned under the same root; `None` if there is none.
    ///
    /// # Errors
    /// When the root does not list.
    pub(crate) fn find(paths: &Paths) -> io::Result<Option<Self>> {
        let mut newest = None;
        for entry in fs::read_dir(paths.root())? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let version = name.and_then(|name| name.strip_prefix('v')?.parse::<u32>().ok());
            if let Some(version) = version.filter(|&version| version != LAYOUT_VERSION)
                && path.join("maps").exists()
            {
                newest = newest.max(Some((version, path)));
            }
        }
        Ok(newest.map(|(version, old)| Self {
            version,
            copied_at: Cell::new(0),
            switching: !old.join("links").exists(),
            readable: true,
            maps: paths.maps(),
            old,
        }))
    }

    /// Makes the new maps as large as the old ones: entries name each other by their places.
    pub(crate) fn keep_sizes(&self, capacities: &mut Capacities) -> io::Result<()> {
        for (_, name) in self.names()? {
            let map = Map::open_old(&self.old.join("maps"), self.version, &name)?;
            if COPIED.contains(&map.info.map_type) {
                capacities.set(&name, map.info.max_entries);
            }
        }
        Ok(())
    }

    /// Pins maps that are the same in both layouts here too, before this layout's are made: what
    /// `wanted` says, by name.
    ///
    /// # Errors
    /// When a map of either layout cannot be opened, read or written (`EPERM` without `CAP_BPF`,
    /// `ENOMEM`). The other layout's programs go on as they are: start the agent again.
    pub(crate) fn share(&mut self, wanted: &BTreeMap<String, MapInfo>) -> io::Result<()> {
        if self.switching {
            return Ok(());
        }
        let mut same = Vec::new();
        for (old_name, name) in self.names()? {
            let Some(new) = wanted.get(&name) else {
                continue;
            };
            let old = Map::open_old(&self.old.join("maps"), self.version, &name)?;
            if COPIED.contains(&old.info.map_type) && !old.can_become(new) {
                self.readable = false;
                warn!(
                    "{}: map {old_name} cannot be read{}: this layout's maps start empty, open flows find their backends anew",
                    self.old.display(),
                    if self.version > LAYOUT_VERSION {
                        ", since a newer release has written it (to keep flows whose source is translated, run that release, \
                         or drain the node first)"
                    } else {
                        ""
                    }
                );
                return Ok(());
            }
            if old.convert.is_none()
                && *new == (MapInfo { id: 0, ..old.info })
                && !self.maps.join(&name).exists()
            {
                same.push((name, old.fd));
            }
        }
        for (name, fd) in &same {
            bpf::pin_over(fd.as_fd(), &self.maps.join(name))?;
        }
        Ok(())
    }

    /// Copies the entries of maps that are not shared, and moves the links.
    ///
    /// # Errors
    /// When a map of either layout cannot be opened, read or written (`EPERM` without `CAP_BPF`,
    /// `ENOMEM`). The other layout's programs go on as they are: start the agent again.
    pub(crate) fn take_over(&self, paths: &Paths) -> io::Result<()> {
        if self.switching {
            return Ok(());
        }
        let mut entries = 0;
        for (_, name) in self.names()? {
            // The configuration is the new agent's to write.
            if name == names::CONFIG || !self.readable {
                continue;
            }
            if names::SNAT.contains(&name.as_str()) {
                entries += self.copy_ports(&name, 0)?;
            } else if let Some((old, new)) = self.pair(&name)? {
                entries += new.copy_from(&old, BPF_ANY)?;
            }
        }
        info!(
            "taking over from {}: {entries} entries copied",
            self.old.display()
        );
        for (from, to) in [("links", paths.links()), ("clsact", paths.clsact())] {
            let from = self.old.join(from);
            for entry in fs::read_dir(&from).into_iter().flatten() {
                let entry = entry?;
                fs::rename(entry.path(), to.join(entry.file_name()))?;
            }
        }
        // Says that the move is complete.
        fs::remove_dir(self.old.join("links"))
    }

    /// Copies flows once more; this layout's programs must not run yet.
    ///
    /// # Errors
    /// When a map of either layout cannot be opened, read or written (`EPERM` without `CAP_BPF`,
    /// `ENOMEM`). The other layout's programs go on as they are: start the agent again.
    pub fn before_switch(&self) -> io::Result<()> {
        if self.switching {
            return Ok(());
        }
        // A port that is given out from here on is found by `catch_up`.
        self.copied_at.set(now_in(TICK_NS));
        for name in names::SNAT {
            self.copy_ports(name, 0)?;
        }
        self.copy_flows(WRITTEN.iter(), BPF_ANY)
    }

    /// Copies flows that were opened since the last copy; programs of both layouts may run.
    ///
    /// # Errors
    /// When a map of either layout cannot be opened, read or written (`EPERM` without `CAP_BPF`,
    /// `ENOMEM`). The other layout's programs go on as they are: start the agent again.
    pub fn catch_up(&self) -> io::Result<()> {
        // First, for the answers to a flow are found by its port.
        for name in names::SNAT {
            self.copy_ports(name, self.copied_at.get())?;
        }
        self.copy_flows(WRITTEN.iter(), BPF_NOEXIST)
    }

    /// Copies flows that were opened during the switch, and removes the other layout's folder.
    ///
    /// # Errors
    /// When entries cannot be copied, or the folder of the other layout cannot be removed; an agent
    /// that starts again goes on where this one stopped.
    pub fn finish(self) -> io::Result<()> {
        self.catch_up()?;
        for folder in ["maps", "progs", "clsact"] {
            let folder = self.old.join(folder);
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                fs::remove_file(entry?.path())?;
            }
            if folder.exists() {
                fs::remove_dir(folder)?;
            }
        }
        fs::remove_dir(&self.old)?;
        info!("{} is not used any more: removed", self.old.display());
        Ok(())
    }

    /// Takes source ports over, and sets the bits that programs look for them by.
    fn copy_ports(&self, name: &str, since: u32) -> io::Result<usize> {
        let Some((old, new)) = self.pair(name)? else {
            return Ok(0);
        };
        let range = if self.version < 6 {
            Some(v5::Range::read(&self.old.join("maps"))?)
        } else {
            None
        };
        let map = Map::open(&self.maps, names::CLIENTS)?;
        let clients = MappedArray::<u64>::new(map.fd.as_fd(), map.info.max_entries)?;
        if name == names::SNAT[0] {
            new.copy_ports::<V4>(&old, range, &clients, since)
        } else {
            new.copy_ports::<V6>(&old, range, &clients, since)
        }
    }

    fn copy_flows<'a>(
        &self,
        groups: impl Iterator<Item = &'a &'a [&'a str]>,
        flags: u64,
    ) -> io::Result<()> {
        // First, for programs look for those flows only whose bits are set.
        for name in BITS {
            self.copy_bits(name)?;
        }
        for name in groups.flat_map(|group| group.iter()) {
            if let Some((old, new)) = self.pair(name)? {
                new.copy_from(&old, flags)?;
            }
        }
        Ok(())
    }

    /// Sets the bits that are set in the other layout's map, beside programs that do the same.
    fn copy_bits(&self, name: &str) -> io::Result<()> {
        let Some((old, new)) = self.pair(name)? else {
            return Ok(());
        };
        if (new.info.value_size, old.info.value_size) != (8, 8) {
            return Ok(());
        }
        let bits = MappedArray::<u64>::new(new.fd.as_fd(), new.info.max_entries)?;
        for index in 0..new.info.max_entries.min(old.info.max_entries) {
            let word = map::lookup::<u32, u64>(old.fd.as_fd(), &index)?.unwrap_or_default();
            if word != 0 {
                bits.atomic(index).fetch_or(word, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Names of the other layout's maps, there and here.
    fn names(&self) -> io::Result<Vec<(String, String)>> {
        let entries = fs::read_dir(self.old.join("maps"))?;
        entries
            .map(|entry| {
                let old = entry?.file_name().to_string_lossy().into_owned();
                let new = new_name(self.version, &old).to_owned();
                Ok((old, new))
            })
            .collect()
    }

    /// A map of both layouts by its name here, if entries have to be copied from one to the other.
    fn pair(&self, name: &str) -> io::Result<Option<(Map, Map)>> {
        let folder = self.old.join("maps");
        let old_name = old_name(self.version, name);
        if !self.readable || !folder.join(old_name).exists() || !self.maps.join(name).exists() {
            return Ok(None);
        }
        let old = Map::open_old(&folder, self.version, name)?;
        let new = Map::open(&self.maps, name)?;
        let both = old.info.id != new.info.id
            && COPIED.contains(&old.info.map_type)
            && old.can_become(&new.info);
        Ok(both.then_some((old, new)))
    }
}

/// What a map of layout `version` is called in this one.
fn new_name(version: u32, old: &str) -> &str {
    RENAMED
        .into_iter()
        .filter(|&(since, ..)| version < since)
        .fold(
            old,
            |name, (_, before, after)| {
                if name == before { after } else { name }
            },
        )
}

/// What a map of this layout was called in layout `version`.
fn old_name(version: u32, new: &str) -> &str {
    RENAMED
        .into_iter()
        .rev()
        .filter(|&(since, ..)| version < since)
        .fold(
            new,
            |name, (_, before, after)| {
                if name == after { before } else { name }
            },
        )
}

impl Map {
    /// Whether entries of this map of another layout can become those of a map that is `new`.
    fn can_become(&self, new: &MapInfo) -> bool {
        let values = match &self.convert {
            Some(convert) => (self.info.value_size, new.value_size) == convert.sizes,
            None => new.value_size >= self.info.value_size,
        };
        new.map_type == self.info.map_type && new.key_size == self.info.key_size && values
    }
}

/// How values of another layout's map become this one's.
struct Convert {
    /// Their size there and here.
    sizes: (u32, u32),
    value: fn(&[u8]) -> Vec<u8>,
}

/// How the values of the map that is called `name` here are converted from layout `version`.
fn converted(version: u32, name: &str) -> Option<Convert> {
    let is = |maps: [&str; 2]| maps.iter().position(|&map| map == name);
    // Six: the state has 32 bits, and stands behind the clock; a source port says which it is.
    if version < 6 {
        for maps in [names::FLOWS, names::UNCONFIRMED] {
            match is(maps) {
                Some(0) => return Some(v5::flow::<4>()),
                Some(_) => return Some(v5::flow::<16>()),
                None => {}
            }
        }
        return match is(names::SNAT)? {
            0 => Some(v5::snat_slot::<4>()),
            _ => Some(v5::snat_slot::<16>()),
        };
    }
    None
}

/// Values as they were in layout 5.
mod v5 {
    use std::{io, os::fd::AsFd, path::Path};

    use shunt_common::layout::names;

    use super::{Convert, bpf, map};

    /// Which port stands where: the first, and how many places each has, side by side.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Range {
        pub(super) first: u16,
        pub(super) ways: u32,
    }

    impl Range {
        /// As the configuration of that layout says.
        pub(super) fn read(folder: &Path) -> io::Result<Self> {
            let fd = bpf::open(&folder.join(names::CONFIG))?;
            let info = map::map_info(fd.as_fd())?;
            let mut cursor = map::Cursor::default();
            let batch = map::lookup_batch_raw(fd.as_fd(), &info, &mut cursor, 1)?;
            let field = |at: usize, size: usize| -> Option<u32> {
                let mut bytes = [0; 4];
                bytes[..size].copy_from_slice(batch.values.get(at..at + size)?);
                Some(u32::from_le_bytes(bytes))
            };
            let (first, ways) = (field(8, 2), field(12, 4));
            Ok(Self {
                first: first.unwrap_or_default() as u16,
                ways: ways.unwrap_or_default().max(1),
            })
        }

        pub(super) fn port(self, index: u32) -> u16 {
            self.first.wrapping_add((index / self.ways) as u16)
        }
    }

    /// Bytes in the order of this layout's fields.
    fn join(fields: &[&[u8]]) -> Vec<u8> {
        fields.concat()
    }

    fn state(bits: &[u8]) -> [u8; 4] {
        let bits = u16::from_ne_bytes(bits.try_into().unwrap_or_default());
        u32::from(bits).to_ne_bytes()
    }

    /// Three addresses, three ports, state, backend, last seen, epoch, unanswered since, tried.
    pub(super) fn flow<const A: usize>() -> Convert {
        Convert {
            sizes: (3 * A as u32 + 24, 3 * A as u32 + 32),
            value: |old| {
                let (addresses, rest) = old.split_at(3 * A);
                join(&[
                    addresses,
                    &rest[..6],
                    &rest[16..18],
                    &state(&rest[6..8]),
                    &rest[8..16],
                    &rest[18..20],
                    &[0; 2],
                    &rest[20..24],
                    &[0; 4],
                ])
            },
        }
    }

    /// Four addresses, three ports, state, last seen, backend, protocol, zero, epoch, owner. The
    /// port itself is in the entry's index.
    pub(super) fn snat_slot<const A: usize>() -> Convert {
        Convert {
            sizes: (4 * A as u32 + 24, 4 * A as u32 + 32),
            value: |old| {
                let (addresses, rest) = old.split_at(4 * A);
                join(&[
                    addresses,
                    &rest[..6],
                    &[0; 2],
                    &rest[8..12],
                    &rest[20..24],
                    &state(&rest[6..8]),
                    &rest[12..16],
                    &rest[18..20],
                    &rest[16..18],
                    &[0; 4],
                ])
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_common::layout::Flow;

    use super::*;

    fn map(map_type: u32, key: usize, value: usize) -> Map {
        let fd = map::create(map_type, key, value, 64, 0).unwrap();
        let info = map::map_info(fd.as_fd()).unwrap();
        Map {
            fd,
            info,
            convert: None,
        }
    }

    #[test]
    fn renamed_maps_are_found_under_either_name() {
        assert_eq!(new_name(5, "new_flows4"), names::UNCONFIRMED[0]);
        assert_eq!(old_name(5, names::UNCONFIRMED[1]), "new_flows6");
        for name in [names::FLOWS[0], names::SOCKETS] {
            assert_eq!((new_name(5, name), old_name(5, name)), (name, name));
        }
        assert_eq!(new_name(LAYOUT_VERSION, "new_flows4"), "new_flows4");
        for (version, before, after) in RENAMED {
            assert_eq!(new_name(version - 1, before), after);
            assert_eq!(old_name(version - 1, after), before);
            assert!(after.len() <= 15);
        }
    }

    #[test]
    fn flows_and_source_ports_of_version_5_are_read() {
        // Little-endian, as written by an agent of version 5 on such a machine.
        let old: Vec<u8> = [
            &[10, 0, 0, 1, 10, 0, 0, 2, 10, 0, 0, 3][..],
            &80u16.to_ne_bytes(),
            &8080u16.to_ne_bytes(),
            &40000u16.to_ne_bytes(),
            &0x8001u16.to_ne_bytes(),
            &7u32.to_ne_bytes(),
            &99u32.to_ne_bytes(),
            &5u16.to_ne_bytes(),
            &6u16.to_ne_bytes(),
            &11u32.to_ne_bytes(),
        ]
        .concat();
        let convert = converted(5, names::UNCONFIRMED[0]).unwrap();
        assert_eq!(convert.sizes, (36, size_of::<Flow<[u8; 4]>>() as u32));
        let new = (convert.value)(&old);
        assert_eq!(new.len(), size_of::<Flow<[u8; 4]>>());
        // SAFETY: as long as a flow; any bytes are one.
        let flow = unsafe { new.as_ptr().cast::<Flow<[u8; 4]>>().read_unaligned() };
        let expected = Flow {
            frontend: [10, 0, 0, 1],
            backend: [10, 0, 0, 2],
            snat: [10, 0, 0, 3],
            frontend_port: 80,
            backend_port: 8080,
            snat_port: 40000,
            epoch: 5,
            state: 0x8001,
            backend_id: 7,
            last_seen: 99,
            unanswered_since: 6,
            reserved: 0,
            tried: 11,
            reserved2: 0,
        };
        assert_eq!(flow, expected);

        let old: Vec<u8> = [
            &[1; 64][..],
            &1u16.to_ne_bytes(),
            &2u16.to_ne_bytes(),
            &3u16.to_ne_bytes(),
            &0x4021u16.to_ne_bytes(),
            &99u32.to_ne_bytes(),
            &7u32.to_ne_bytes(),
            &[6, 0],
            &5u16.to_ne_bytes(),
            &12u32.to_ne_bytes(),
        ]
        .concat();
        let convert = converted(5, names::SNAT[1]).unwrap();
        assert_eq!(convert.sizes, (88, size_of::<SnatSlot<[u8; 16]>>() as u32));
        // SAFETY: as long as a slot; any bytes are one.
        let slot = unsafe {
            let new = (convert.value)(&old);
            new.as_ptr().cast::<SnatSlot<[u8; 16]>>().read_unaligned()
        };
        let expected = SnatSlot {
            client: [1; 16],
            frontend: [1; 16],
            backend: [1; 16],
            snat: [1; 16],
            client_port: 1,
            frontend_port: 2,
            backend_port: 3,
            snat_port: 0,
            last_seen: 99,
            owner: 12,
            state: 0x4021,
            backend_id: 7,
            epoch: 5,
            proto: 6,
            reserved: 0,
            reserved2: 0,
        };
        assert_eq!(slot, expected);
        let range = v5::Range {
            first: 10_240,
            ways: 13,
        };
        assert_eq!((range.port(12), range.port(13)), (10_240, 10_241));
        assert!(converted(5, names::AFFINITY[0]).is_none());
        assert!(converted(LAYOUT_VERSION, names::FLOWS[0]).is_none());
    }

    #[test]
    fn values_grow_at_their_end() {
        let (old, new) = (map(HASH, 4, 8), map(HASH, 4, 16));
        let can = |new: &Map, old: &Map| old.can_become(&new.info);
        assert!(can(&new, &old) && can(&new, &new) && !can(&old, &new));
        assert!(!can(&map(HASH, 8, 8), &old) && !can(&map(ARRAY, 4, 8), &old));
        let converted = Map {
            convert: converted(5, names::FLOWS[0]),
            ..map(HASH, 16, 36)
        };
        assert!(can(&map(HASH, 16, 44), &converted) && !can(&map(HASH, 16, 40), &converted));
        for key in 0..50u32 {
            map::update(old.fd.as_fd(), &key, &u64::from(key), BPF_ANY).unwrap();
        }
        map::update(new.fd.as_fd(), &7u32, &[1u64, 2], BPF_ANY).unwrap();
        assert_eq!(
            new.copy_from(&old, BPF_NOEXIST).unwrap(),
            49,
            "what is there stays"
        );
        let value = |key: u32| map::lookup::<u32, [u64; 2]>(new.fd.as_fd(), &key).unwrap();
        assert_eq!(
            (value(7), value(8), value(50)),
            (Some([1, 2]), Some([8, 0]), None)
        );
        assert_eq!(new.copy_from(&old, BPF_ANY).unwrap(), 50);
        assert_eq!(value(7), Some([7, 0]));
    }

    #[test]
    fn zeros_of_an_array_are_left_out() {
        let (old, new) = (map(ARRAY, 4, 12), map(ARRAY, 4, 20));
        map::update(old.fd.as_fd(), &5u32, &[1u32, 0, 3], BPF_ANY).unwrap();
        assert_eq!(new.copy_from(&old, BPF_ANY).unwrap(), 1);
        let value = |key: u32| map::lookup::<u32, [u32; 5]>(new.fd.as_fd(), &key).unwrap();
        assert_eq!((value(5), value(6)), (Some([1, 0, 3, 0, 0]), Some([0; 5])));
    }
}
