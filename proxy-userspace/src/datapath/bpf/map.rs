//! Maps by descriptor: lookups and batches generic over [`Pod`], which aya 0.14 lacks.
//!
//! Batches need kernel 5.6.

use std::{
    io, mem,
    os::fd::{BorrowedFd, OwnedFd},
};

use aya::Pod;

use super::{Command, address, bpf, bpf_fd, object_info, raw};

/// Flag of [`update`]: create or replace.
pub const BPF_ANY: u64 = 0;
/// Flag of [`update`]: fail with `EEXIST` when the key is there.
pub const BPF_NOEXIST: u64 = 1;

/// `BPF_OBJ_NAME_LEN` of linux/bpf.h.
const NAME_LEN: usize = 16;
/// `BPF_F_MMAPABLE` of `map_flags`.
pub const BPF_F_MMAPABLE: u32 = 1 << 10;
/// `BPF_F_NO_PREALLOC` of `map_flags`.
#[cfg(test)]
pub(crate) const BPF_F_NO_PREALLOC: u32 = 1;

/// `BPF_MAP_TYPE_*`: `enum bpf_map_type` of `linux/bpf.h`.
pub(crate) mod types {
    pub(crate) const HASH: u32 = 1;
    pub(crate) const ARRAY: u32 = 2;
    /// Programs for tail calls.
    pub(crate) const PROG_ARRAY: u32 = 3;
    #[cfg(test)]
    pub(crate) const PERCPU_HASH: u32 = 5;
    #[cfg(test)]
    pub(crate) const PERCPU_ARRAY: u32 = 6;
    pub(crate) const LRU_HASH: u32 = 9;
    pub(crate) const LPM_TRIE: u32 = 11;
    pub(crate) const RINGBUF: u32 = 27;
}

/// The head of the `BPF_MAP_CREATE` part of `union bpf_attr`.
#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; NAME_LEN],
}

/// The `BPF_MAP_*_ELEM` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The `BPF_MAP_*_BATCH` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MapInfo {
    /// `enum bpf_map_type`.
    pub map_type: u32,
    /// The kernel's number of the map.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Capacity.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub map_flags: u32,
}

/// What the kernel says of a map.
///
/// # Errors
/// The kernel's: `EINVAL` when `fd` is an object of another kind, `EBADF` when it is none. A
/// mistake of the caller's.
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    object_info(fd, &mut info)?;
    Ok(info)
}

/// Makes a map without a name.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`.
pub fn create(
    map_type: u32,
    key: usize,
    value: usize,
    max_entries: u32,
    map_flags: u32,
) -> io::Result<OwnedFd> {
    create_named("", map_type, key, value, max_entries, map_flags)
}

/// Makes a map that tools show as `name`, of which the kernel keeps 15 characters.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`.
pub(crate) fn create_named(
    name: &str,
    map_type: u32,
    key: usize,
    value: usize,
    max_entries: u32,
    map_flags: u32,
) -> io::Result<OwnedFd> {
    let mut map_name = [0; NAME_LEN];
    let length = name.len().min(NAME_LEN - 1);
    map_name[..length].copy_from_slice(&name.as_bytes()[..length]);
    let mut attr = CreateAttr {
        map_type,
        key_size: key as u32,
        value_size: value as u32,
        max_entries,
        map_flags,
        inner_map_fd: 0,
        numa_node: 0,
        map_name,
    };
    // SAFETY: no pointers; the command returns a descriptor.
    unsafe { bpf_fd(Command::MapCreate, &mut attr) }
}

/// Forbids system calls to change the map from here on, whoever makes them (kernel 5.2).
///
/// # Errors
/// The kernel's: `EBUSY` when it is frozen already.
pub(crate) fn freeze(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(fd);
    // SAFETY: `map_fd` is the first field of the command's part, and all that the command reads.
    unsafe { bpf(Command::MapFreeze, &mut attr) }.map(drop)
}

/// The value of a key. Does not mark entries of an LRU map as used (`map_lookup_elem_sys_only`).
///
/// # Errors
/// The kernel's, except `ENOENT`, which is `None`.
pub fn lookup<K: Pod, V: Pod>(fd: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = mem::MaybeUninit::<V>::uninit();
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        key: address(key),
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads key_size bytes and writes value_size bytes; `Map::open` has compared
    // both to the types.
    match unsafe { bpf(Command::MapLookup, &mut attr) } {
        // SAFETY: the kernel has filled it, and every bit pattern is a value of a Pod.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The values of a key in a per-CPU map, one per possible CPU. `cpus` is their number
/// ([`aya::util::nr_cpus`]).
///
/// # Errors
/// The kernel's, except `ENOENT`: `EPERM` without `CAP_BPF`, `EINVAL` when the map is not per CPU.
pub fn lookup_per_cpu<V: Pod + Default>(
    fd: BorrowedFd<'_>,
    key: &u32,
    cpus: usize,
) -> io::Result<Vec<V>> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let mut values = vec![V::default(); cpus];
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        key: address(key),
        value: values.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel writes a value, a multiple of 8 bytes, per possible CPU, and there is room
    // for as many.
    unsafe { bpf(Command::MapLookup, &mut attr) }?;
    Ok(values)
}

/// Entries of a per-CPU map that are read at once.
const PER_CPU_BATCH: usize = 512;

/// Calls `visit` with every key of a per-CPU hash map, and its values, one per possible CPU (`cpus`:
/// [`aya::util::nr_cpus`]).
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`, `ENOMEM` without memory for a batch, `EINVAL` when the
/// map is not per CPU.
pub fn for_each_per_cpu<V: Pod>(
    fd: BorrowedFd<'_>,
    cpus: usize,
    mut visit: impl FnMut(u32, &[V]),
) -> io::Result<()> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let mut info = map_info(fd)?;
    // What a key's values are to system calls.
    info.value_size *= cpus as u32;
    assert_eq!(info.value_size as usize, size_of::<V>() * cpus);
    let mut cursor = Cursor::default();
    let mut room = PER_CPU_BATCH;
    let mut values = Vec::with_capacity(cpus);
    loop {
        let batch = match lookup_batch_raw(fd, &info, &mut cursor, room) {
            // One bucket's chain is longer than the room.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOSPC)
                    && room < info.max_entries as usize =>
            {
                room *= 2;
                continue;
            }
            batch => batch?,
        };
        let entries = batch.keys.as_chunks::<4>().0.iter();
        for (key, of_cpus) in entries.zip(batch.values.chunks(info.value_size as usize)) {
            values.clear();
            // SAFETY: as many bytes as a value has, and every bit pattern is a value of a Pod.
            let read = |bytes: &[u8]| unsafe { bytes.as_ptr().cast::<V>().read_unaligned() };
            values.extend(of_cpus.chunks_exact(size_of::<V>()).map(read));
            visit(u32::from_ne_bytes(*key), &values);
        }
        if batch.at_end {
            return Ok(());
        }
    }
}

/// Whether a map has no entry, of whatever types.
///
/// # Errors
/// The kernel's, except `ENOENT`: `EPERM` without `CAP_BPF`.
pub fn is_empty(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // Longer than any key.
    let mut first = [0_u8; 512];
    assert!(map_info(fd)?.key_size as usize <= first.len());
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        // In place of a value: the first key, as none is given.
        value: first.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: there is room for a key.
    match unsafe { bpf(Command::MapNextKey, &mut attr) } {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Writes one entry; `flags` is [`BPF_ANY`] or [`BPF_NOEXIST`].
///
/// # Errors
/// The kernel's: `E2BIG` or `ENOMEM` when the map is full.
pub fn update<K: Pod, V: Pod>(
    fd: BorrowedFd<'_>,
    key: &K,
    value: &V,
    flags: u64,
) -> io::Result<()> {
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        key: address(key),
        value: address(value),
        flags,
        ..Default::default()
    };
    // SAFETY: the kernel reads key_size and value_size bytes; `Map::open` has compared both to the
    // types.
    unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
}

/// Deletes one entry; says whether it was there.
///
/// # Errors
/// The kernel's, except `ENOENT`.
pub fn delete<K: Pod>(fd: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        key: address(key),
        ..Default::default()
    };
    // SAFETY: the kernel reads key_size bytes; `Map::open` has compared it to the type.
    match unsafe { bpf(Command::MapDelete, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Where a walk over a map stands.
#[derive(Default)]
pub struct Cursor {
    /// The kernel's position: a bucket number (hash) or a key (array), opaque to us. At least as
    /// long as any key.
    position: [u64; 8],
    started: bool,
}

/// Appends up to `room` entries to `keys` and `values` and moves the cursor. Returns whether the
/// walk is at its end.
///
/// A hash map is read bucket by bucket: entries that are there during the whole walk are seen
/// exactly once, and LRU entries are not marked as used.
///
/// # Errors
/// The kernel's: `ENOSPC` when `room` is smaller than one hash bucket's chain.
pub fn lookup_batch<K: Pod, V: Pod>(
    fd: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
    room: usize,
) -> io::Result<bool> {
    const { assert!(size_of::<K>() <= size_of::<[u64; 8]>()) };
    keys.reserve(room);
    values.reserve(room);
    let before = cursor.position;
    let mut attr = BatchAttr {
        in_batch: if cursor.started { address(&before) } else { 0 },
        out_batch: cursor.position.as_mut_ptr() as u64,
        keys: keys.spare_capacity_mut().as_mut_ptr() as u64,
        values: values.spare_capacity_mut().as_mut_ptr() as u64,
        count: room as u32,
        map_fd: raw(fd),
        ..Default::default()
    };
    // SAFETY: both vectors have room for `count` more entries of the sizes that `Map::open` has
    // compared to the map's; the cursor is as long as any key.
    let at_end = match unsafe { bpf(Command::MapLookupBatch, &mut attr) } {
        Ok(_) => false,
        // The end: `count` entries were still written.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.started = true;
    let count = attr.count as usize;
    debug_assert!(count <= room);
    // SAFETY: the kernel has written `count` entries behind the old ends, and every bit pattern is
    // a value of a Pod.
    unsafe {
        keys.set_len(keys.len() + count);
        values.set_len(values.len() + count);
    }
    Ok(at_end)
}

/// Entries of a map whose types are not known here: keys and values one behind the other.
#[derive(Default)]
pub struct RawBatch {
    /// `count` keys.
    pub keys: Vec<u8>,
    /// `count` values.
    pub values: Vec<u8>,
    /// How many.
    pub count: usize,
    /// The walk has ended.
    pub at_end: bool,
}

/// As [`lookup_batch`], for keys and values of any size; for a per-CPU map `info.value_size` is that
/// of all CPUs' values together.
///
/// # Errors
/// The kernel's: `ENOSPC` when `room` is smaller than one hash bucket's chain.
pub fn lookup_batch_raw(
    fd: BorrowedFd<'_>,
    info: &MapInfo,
    cursor: &mut Cursor,
    room: usize,
) -> io::Result<RawBatch> {
    assert!(
        info.key_size as usize <= size_of_val(&cursor.position),
        "a key longer than the cursor"
    );
    let (key, value) = (info.key_size as usize, info.value_size as usize);
    let mut batch = RawBatch {
        keys: vec![0; key * room],
        values: vec![0; value * room],
        ..Default::default()
    };
    let before = cursor.position;
    let mut attr = BatchAttr {
        in_batch: if cursor.started { address(&before) } else { 0 },
        out_batch: cursor.position.as_mut_ptr() as u64,
        keys: batch.keys.as_mut_ptr() as u64,
        values: batch.values.as_mut_ptr() as u64,
        count: room as u32,
        map_fd: raw(fd),
        ..Default::default()
    };
    // SAFETY: both vectors have room for `count` entries of the map's own sizes; the cursor is as
    // long as any key.
    batch.at_end = match unsafe { bpf(Command::MapLookupBatch, &mut attr) } {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.started = true;
    batch.count = attr.count as usize;
    batch.keys.truncate(key * batch.count);
    batch.values.truncate(value * batch.count);
    Ok(batch)
}

/// As [`update`], for keys and values of any size.
///
/// # Errors
/// The kernel's: `E2BIG` or `ENOMEM` when the map is full, `EEXIST` under `BPF_NOEXIST`, `EPERM`
/// when it is frozen or without `CAP_BPF`.
pub fn update_raw(
    fd: BorrowedFd<'_>,
    info: &MapInfo,
    key: &[u8],
    value: &[u8],
    flags: u64,
) -> io::Result<()> {
    assert_eq!(
        (key.len(), value.len()),
        (info.key_size as usize, info.value_size as usize)
    );
    let mut attr = ElemAttr {
        map_fd: raw(fd),
        key: address(key),
        value: address(value),
        flags,
        ..Default::default()
    };
    // SAFETY: the kernel reads as many bytes as there are, by the assertion above.
    unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
}

/// Writes many entries. On an error the first `n` were written, where `n` is the error's second
/// part.
///
/// # Errors
/// The kernel's: `E2BIG` or `ENOMEM` when the map is full, `EPERM` without `CAP_BPF`; the rest can
/// be written by another call.
pub fn update_batch<K: Pod, V: Pod>(
    fd: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (io::Error, usize)> {
    assert_eq!(keys.len(), values.len());
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count: keys.len() as u32,
        map_fd: raw(fd),
        ..Default::default()
    };
    // SAFETY: both slices hold `count` entries of the sizes that `Map::open` has compared to the
    // map's.
    match unsafe { bpf(Command::MapUpdateBatch, &mut attr) } {
        Ok(_) => Ok(()),
        Err(error) => Err((error, attr.count as usize)),
    }
}

/// Deletes many entries; returns how many were there.
///
/// # Errors
/// The kernel's, except `ENOENT`: a key that another deleted first is passed over.
pub fn delete_batch<K: Pod>(fd: BorrowedFd<'_>, keys: &[K]) -> io::Result<usize> {
    let mut rest = keys;
    let mut deleted = 0;
    while !rest.is_empty() {
        let mut attr = BatchAttr {
            keys: address(rest),
            count: rest.len() as u32,
            map_fd: raw(fd),
            ..Default::default()
        };
        // SAFETY: `rest` holds `count` keys of the size that `Map::open` has compared to the map's.
        match unsafe { bpf(Command::MapDeleteBatch, &mut attr) } {
            Ok(_) => return Ok(deleted + rest.len()),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                // The kernel stops at the first key that is not there.
                let done = attr.count as usize;
                deleted += done;
                rest = &rest[done + 1..];
            }
            Err(error) => return Err(error),
        }
    }
    Ok(deleted)
}
