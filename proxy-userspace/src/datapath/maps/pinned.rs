//! One pinned map: read and written by key, walked in batches, or mapped into memory.

use std::{
    fmt, fs, io,
    marker::PhantomData,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use aya::Pod;
use shunt_common::layout::{LAYOUT_VERSION, Octets, SnatSlot};

use super::{MapError, Result};
use crate::datapath::bpf::{
    self, MappedArray,
    map::{self, Cursor},
};

/// Entries read by one batch call: enough to make its cost vanish, few enough for the second-level
/// cache.
const BATCH: usize = 2048;

/// Folder of the pinned maps.
pub fn maps_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("maps")
}

/// Folder of the pinned programs.
pub fn progs_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("progs")
}

/// Folder of the pinned links.
pub fn links_dir(bpf_root: &Path) -> PathBuf {
    bpf_root.join(format!("v{LAYOUT_VERSION}")).join("links")
}

/// Why there is no such pin: another layout's are there, or none.
pub(super) fn missing(bpf_root: &Path, path: PathBuf) -> MapError {
    match other_layout(bpf_root) {
        Some(found) => MapError::OtherLayout {
            root: bpf_root.into(),
            found,
        },
        None => MapError::NoAgent {
            root: bpf_root.into(),
            path,
        },
    }
}

/// The newest other layout with maps under `bpf_root`.
fn other_layout(bpf_root: &Path) -> Option<u32> {
    let entries = fs::read_dir(bpf_root).ok()?;
    let versions = entries.flatten().filter_map(|entry| {
        let version = entry
            .file_name()
            .to_str()?
            .strip_prefix('v')?
            .parse()
            .ok()?;
        entry.path().join("maps").exists().then_some(version)
    });
    versions.filter(|&version| version != LAYOUT_VERSION).max()
}

/// A pinned map and its capacity, with keys and values of these sizes.
pub(in crate::datapath) fn open_pin(
    bpf_root: &Path,
    name: &'static str,
    key: usize,
    value: usize,
) -> Result<(OwnedFd, u32)> {
    let path = maps_dir(bpf_root).join(name);
    let fd = bpf::open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => missing(bpf_root, path.clone()),
        io::ErrorKind::PermissionDenied => MapError::Permission {
            path: path.clone(),
            source,
        },
        _ => MapError::Kernel {
            action: "open",
            map: name,
            source,
        },
    })?;
    let info = map::map_info(fd.as_fd()).map_err(|source| MapError::Kernel {
        action: "inspect",
        map: name,
        source,
    })?;
    for (what, found, expected) in [
        ("the key's size", info.key_size, key),
        ("the value's size", info.value_size, value),
    ] {
        if found as usize != expected {
            return Err(MapError::Layout {
                path,
                what,
                found,
                expected,
            });
        }
    }
    Ok((fd, info.max_entries))
}

/// One pinned map. All methods work beside the programs that use it.
pub struct Map<K, V> {
    name: &'static str,
    setting: &'static str,
    fd: OwnedFd,
    capacity: u32,
    writes: AtomicU64,
    _types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> fmt::Debug for Map<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} entries at most)", self.name, self.capacity)
    }
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Opens the pinned map `name`; `setting` is the flag that sizes it.
    ///
    /// # Errors
    /// Not there, not allowed, or other sizes of key or value than `K` and `V` have.
    pub fn open(bpf_root: &Path, name: &'static str, setting: &'static str) -> Result<Self> {
        let (fd, capacity) = open_pin(bpf_root, name, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            name,
            setting,
            fd,
            capacity,
            writes: AtomicU64::new(0),
            _types: PhantomData,
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Most entries.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The flag of `shunt run` that sets the capacity.
    pub fn setting(&self) -> &'static str {
        self.setting
    }

    /// Writes by this process so far.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn error(&self, action: &'static str, source: io::Error) -> MapError {
        match source.raw_os_error() {
            // A hash map says E2BIG when its entries are used up, and ENOMEM when the kernel cannot
            // allocate one. And an LPM trie ENOSPC.
            Some(libc::E2BIG | libc::ENOMEM | libc::ENOSPC) if action == "write" => {
                MapError::Full {
                    map: self.name,
                    capacity: self.capacity,
                    setting: self.setting,
                }
            }
            _ => MapError::Kernel {
                action,
                map: self.name,
                source,
            },
        }
    }

    /// The value of a key; LRU entries are not marked as used.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be read: `EPERM` without `CAP_BPF`. Nothing has
    /// changed; run it as root.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        map::lookup(self.fd.as_fd(), key).map_err(|error| self.error("read", error))
    }

    /// Creates or replaces an entry.
    ///
    /// # Errors
    /// [`MapError::Full`], or the kernel's.
    pub fn set(&self, key: &K, value: &V) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        map::update(self.fd.as_fd(), key, value, map::BPF_ANY)
            .map_err(|error| self.error("write", error))
    }

    /// Deletes an entry; says whether it was there.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    pub fn delete(&self, key: &K) -> Result<bool> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        map::delete(self.fd.as_fd(), key).map_err(|error| self.error("delete from", error))
    }

    /// Deletes many entries; returns how many were there.
    ///
    /// # Errors
    /// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was
    /// deleted before stays so: call it again.
    pub fn delete_all(&self, keys: &[K]) -> Result<usize> {
        self.writes.fetch_add(keys.len() as u64, Ordering::Relaxed);
        map::delete_batch(self.fd.as_fd(), keys).map_err(|error| self.error("delete from", error))
    }

    /// Calls `visit` with every entry, a batch at a time, without marking LRU entries as used. An
    /// error of `visit` ends the walk.
    ///
    /// # Errors
    /// The kernel's, or that of `visit`.
    pub fn for_each_batch(&self, mut visit: impl FnMut(&[K], &[V]) -> Result<()>) -> Result<()> {
        let mut cursor = Cursor::default();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut room = BATCH;
        loop {
            keys.clear();
            values.clear();
            match map::lookup_batch(self.fd.as_fd(), &mut cursor, &mut keys, &mut values, room) {
                Ok(at_end) => {
                    visit(&keys, &values)?;
                    if at_end {
                        return Ok(());
                    }
                }
                // One bucket's chain is longer than the room.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOSPC)
                        && room < self.capacity as usize =>
                {
                    room *= 2
                }
                Err(error) => return Err(self.error("walk", error)),
            }
        }
    }

    /// An array's elements in this process's memory; `None`: it is not made for that.
    pub(super) fn mapped(&self) -> Option<MappedArray<V>> {
        MappedArray::new(self.fd.as_fd(), self.capacity).ok()
    }

    /// All entries.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        self.for_each_batch(|keys, values| {
            entries.extend(keys.iter().copied().zip(values.iter().copied()));
            Ok(())
        })?;
        Ok(entries)
    }

    /// How many entries `counts` says yes to.
    ///
    /// # Errors
    /// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
    /// memory for a batch. Nothing has changed: try again.
    pub fn count(&self, mut counts: impl FnMut(&V) -> bool) -> Result<u64> {
        let mut n = 0;
        self.for_each_batch(|_, values| {
            n += values.iter().filter(|value| counts(value)).count() as u64;
            Ok(())
        })?;
        Ok(n)
    }
}

/// A memory-mapped array map.
pub struct Array<T> {
    name: &'static str,
    setting: &'static str,
    memory: MappedArray<T>,
    writes: AtomicU64,
}

impl<T: Pod> Array<T> {
    /// Opens and maps the pinned array `name`; `setting` is the flag that sizes it.
    ///
    /// # Errors
    /// Not there, not allowed, not memory-mappable, or another size of value than `T` has.
    pub fn open(bpf_root: &Path, name: &'static str, setting: &'static str) -> Result<Self> {
        let (fd, capacity) = open_pin(bpf_root, name, size_of::<u32>(), size_of::<T>())?;
        let memory = MappedArray::new(fd.as_fd(), capacity).map_err(|source| MapError::Kernel {
            action: "memory-map",
            map: name,
            source,
        })?;
        Ok(Self {
            name,
            setting,
            memory,
            writes: AtomicU64::new(0),
        })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Number of elements.
    pub fn capacity(&self) -> u32 {
        self.memory.len()
    }

    /// The flag of `shunt run` that sets the capacity.
    pub fn setting(&self) -> &'static str {
        self.setting
    }

    /// Writes by this process so far.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// One element; `None` beyond the end.
    pub fn get(&self, index: u32) -> Option<T> {
        (index < self.memory.len()).then(|| self.memory.get(index))
    }

    /// Writes an element that nobody reads yet. The system call that publishes it orders it before.
    pub fn set(&self, index: u32, value: T) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.memory.set(index, value);
    }
}

impl Array<u64> {
    /// One word, for atomic access.
    pub(super) fn word(&self, index: u32) -> &AtomicU64 {
        self.memory.atomic(index)
    }

    /// Counts a write by [`word`](Self::word).
    pub(super) fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::Relaxed);
    }
}

impl<A: Octets> Array<SnatSlot<A>> {
    /// Gives a translated source port back that was last used at `seen`, unless a program was first
    /// to claim it.
    pub fn release(&self, index: u32, seen: u32) -> bool {
        // 0 is "never used", which every new flow may claim.
        let released = self
            .memory
            .last_seen(index)
            .compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        self.writes.fetch_add(released.into(), Ordering::Relaxed);
        released
    }
}
