//! The bpf(2) calls that aya 0.14 lacks: batches, memory-mapped arrays, lookups by descriptor generic over [`Pod`].
//!
//! Only what the agent needs. Kernels: batches since 5.6, `BPF_F_MMAPABLE` since 5.5.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicU64},
};

use aya::Pod;
use shunt_common::layout::{Octets, SnatSlot};

/// Commands of bpf(2): `enum bpf_cmd` of `linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    ObjGet = 7,
    ObjGetInfoByFd = 15,
    MapLookupBatch = 24,
    MapLookupAndDeleteBatch = 25,
    MapUpdateBatch = 26,
    MapDeleteBatch = 27,
}

/// Flag of [`update`]: create or replace.
pub const BPF_ANY: u64 = 0;
/// Flag of [`update`]: fail with `EEXIST` when the key is there.
pub const BPF_NOEXIST: u64 = 1;

/// `BPF_F_MMAPABLE` of `map_flags`.
pub const BPF_F_MMAPABLE: u32 = 1 << 10;

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

/// The `BPF_OBJ_GET` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The `BPF_OBJ_GET_INFO_BY_FD` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// # Safety
/// Every pointer inside `attr` must be valid for what `command` reads and writes through it.
unsafe fn bpf<A>(command: Command, attr: &mut A) -> io::Result<i64> {
    // SAFETY: `attr` is a live, writable prefix of `union bpf_attr` of the size given; its pointers are the caller's duty.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as i32, ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn address<T: ?Sized>(value: &T) -> u64 {
    ptr::from_ref(value).cast::<u8>() as u64
}

/// Opens a pinned object.
///
/// # Errors
/// The kernel's: `ENOENT` without such a pin, `EPERM` without `CAP_BPF`.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `pathname` points to a zero-terminated string that outlives the call.
    let fd = unsafe { bpf(Command::ObjGet, &mut attr) }?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The value of a key. Does not mark entries of an LRU map as used (`map_lookup_elem_sys_only`).
///
/// # Errors
/// The kernel's, except `ENOENT`, which is `None`.
pub fn lookup<K: Pod, V: Pod>(fd: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = mem::MaybeUninit::<V>::uninit();
    let mut attr = ElemAttr {
        map_fd: fd.as_raw_fd() as u32,
        key: address(key),
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel reads key_size bytes and writes value_size bytes; `Map::open` has compared both to the types.
    match unsafe { bpf(Command::MapLookup, &mut attr) } {
        // SAFETY: the kernel has filled it, and every bit pattern is a value of a Pod.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The values of a key in a per-CPU map, one per possible CPU. `cpus` is their number ([`aya::util::nr_cpus`]).
///
/// # Errors
/// The kernel's.
pub fn lookup_per_cpu<V: Pod + Default>(fd: BorrowedFd<'_>, key: &u32, cpus: usize) -> io::Result<Vec<V>> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let mut values = vec![V::default(); cpus];
    let mut attr = ElemAttr {
        map_fd: fd.as_raw_fd() as u32,
        key: address(key),
        value: values.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel writes a value, a multiple of 8 bytes, per possible CPU, and there is room for as many.
    unsafe { bpf(Command::MapLookup, &mut attr) }?;
    Ok(values)
}

/// Writes one entry; `flags` is [`BPF_ANY`] or [`BPF_NOEXIST`].
///
/// # Errors
/// The kernel's: `E2BIG` or `ENOMEM` when the map is full.
pub fn update<K: Pod, V: Pod>(fd: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    let mut attr = ElemAttr {
        map_fd: fd.as_raw_fd() as u32,
        key: address(key),
        value: address(value),
        flags,
        ..Default::default()
    };
    // SAFETY: the kernel reads key_size and value_size bytes; `Map::open` has compared both to the types.
    unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
}

/// Deletes one entry; says whether it was there.
///
/// # Errors
/// The kernel's, except `ENOENT`.
pub fn delete<K: Pod>(fd: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map_fd: fd.as_raw_fd() as u32,
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
    /// The kernel's position: a bucket number (hash) or a key (array), opaque to us. At least as long as any key.
    position: [u64; 8],
    started: bool,
}

/// Appends up to `room` entries to `keys` and `values` and moves the cursor. Returns whether the walk is at its end.
///
/// A hash map is read bucket by bucket: entries that are there during the whole walk are seen exactly once, and LRU
/// entries are not marked as used.
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
    walk(Command::MapLookupBatch, fd, cursor, keys, values, room)
}

/// As [`lookup_batch`], and deletes what it returns. Not for arrays.
///
/// # Errors
/// The kernel's.
pub fn lookup_and_delete_batch<K: Pod, V: Pod>(
    fd: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
    room: usize,
) -> io::Result<bool> {
    walk(Command::MapLookupAndDeleteBatch, fd, cursor, keys, values, room)
}

fn walk<K: Pod, V: Pod>(
    command: Command,
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
        map_fd: fd.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: both vectors have room for `count` more entries of the sizes that `Map::open` has compared to the map's;
    // the cursor is as long as any key.
    let at_end = match unsafe { bpf(command, &mut attr) } {
        Ok(_) => false,
        // The end: `count` entries were still written.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.started = true;
    let count = attr.count as usize;
    debug_assert!(count <= room);
    // SAFETY: the kernel has written `count` entries behind the old ends, and every bit pattern is a value of a Pod.
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

/// As [`lookup_batch`], for keys and values of any size. Not for per-CPU maps.
///
/// # Errors
/// The kernel's: `ENOSPC` when `room` is smaller than one hash bucket's chain.
pub fn lookup_batch_raw(fd: BorrowedFd<'_>, info: &MapInfo, cursor: &mut Cursor, room: usize) -> io::Result<RawBatch> {
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
        map_fd: fd.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: both vectors have room for `count` entries of the map's own sizes; the cursor is as long as any key.
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
/// The kernel's.
pub fn update_raw(fd: BorrowedFd<'_>, info: &MapInfo, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    assert_eq!(
        (key.len(), value.len()),
        (info.key_size as usize, info.value_size as usize)
    );
    let mut attr = ElemAttr {
        map_fd: fd.as_raw_fd() as u32,
        key: address(key),
        value: address(value),
        flags,
        ..Default::default()
    };
    // SAFETY: the kernel reads as many bytes as there are, by the assertion above.
    unsafe { bpf(Command::MapUpdate, &mut attr) }.map(drop)
}

/// Writes many entries. On an error the first `n` were written, where `n` is the error's second part.
///
/// # Errors
/// The kernel's.
pub fn update_batch<K: Pod, V: Pod>(fd: BorrowedFd<'_>, keys: &[K], values: &[V]) -> Result<(), (io::Error, usize)> {
    assert_eq!(keys.len(), values.len());
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count: keys.len() as u32,
        map_fd: fd.as_raw_fd() as u32,
        ..Default::default()
    };
    // SAFETY: both slices hold `count` entries of the sizes that `Map::open` has compared to the map's.
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
            map_fd: fd.as_raw_fd() as u32,
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

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
/// The kernel's.
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    object_info(fd, &mut info)?;
    Ok(info)
}

/// The head of `struct bpf_link_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    /// `enum bpf_link_type`.
    pub link_type: u32,
    /// The kernel's number of the link.
    pub id: u32,
    /// The kernel's number of the attached program.
    pub prog_id: u32,
    /// Padding before the union (its first members are 64 bits wide).
    pub pad: u32,
    /// First words of the union: for TCX and XDP links the first is the interface's index, 0 once that is gone; for
    /// cgroup links the first two are the cgroup's number.
    pub target: [u32; 4],
}

/// `BPF_LINK_TYPE_CGROUP`.
pub const LINK_CGROUP: u32 = 3;
/// `BPF_LINK_TYPE_XDP`.
pub const LINK_XDP: u32 = 6;
/// `BPF_LINK_TYPE_TCX`.
pub const LINK_TCX: u32 = 11;

/// What the kernel says of a link.
///
/// # Errors
/// The kernel's.
pub fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    object_info(fd, &mut info)?;
    Ok(info)
}

fn object_info<T: Copy>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        bpf_fd: fd.as_raw_fd() as u32,
        info_len: size_of::<T>() as u32,
        info: ptr::from_mut(info) as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes of plain numbers.
    unsafe { bpf(Command::ObjGetInfoByFd, &mut attr) }.map(drop)
}

/// An array map with `BPF_F_MMAPABLE`, mapped into this process: reads and writes without a system call.
pub struct MappedArray<T> {
    base: NonNull<u8>,
    bytes: usize,
    len: u32,
    _element: std::marker::PhantomData<T>,
}

// SAFETY: the memory is shared with the kernel anyway; elements are plain bytes, read and written whole without
// references to them, and words that several write at once are atomics.
unsafe impl<T: Pod + Send> Send for MappedArray<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// The kernel places elements at multiples of eight bytes.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps an array of `len` elements.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` or `ENOTSUPP` without `BPF_F_MMAPABLE`.
    pub fn new(fd: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 8) };
        // SAFETY: asks for a constant of the kernel.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = (len as usize * Self::STRIDE).next_multiple_of(page);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(io::Error::last_os_error)?,
            bytes,
            len,
            _element: std::marker::PhantomData,
        })
    }

    /// Number of elements.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, index: u32) -> *mut T {
        assert!(index < self.len, "index {index} of an array of {}", self.len);
        // SAFETY: in the mapping, by the assertion above; aligned, because the base is a page and the stride a multiple of 8.
        unsafe { self.base.as_ptr().add(index as usize * Self::STRIDE).cast() }
    }

    /// One element. Whoever writes it at the same time may be seen half done.
    pub fn get(&self, index: u32) -> T {
        // SAFETY: valid and aligned (see `at`); volatile, because others write it; any bytes are a Pod.
        unsafe { self.at(index).read_volatile() }
    }

    /// Writes one element, which nobody may be reading yet: publish it afterwards with a release operation or a system call.
    pub fn set(&self, index: u32, value: T) {
        // SAFETY: valid and aligned (see `at`).
        unsafe { self.at(index).write_volatile(value) }
    }
}

impl<A: Octets> MappedArray<SnatSlot<A>> {
    /// When a slot's flow was last seen, as an atomic: programs claim slots by it.
    pub fn last_seen(&self, index: u32) -> &AtomicU32 {
        // SAFETY: valid and alive as long as the mapping (see `at`), an aligned field; all writers use atomics to claim it.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.at(index)).last_seen) }
    }
}

impl MappedArray<u64> {
    /// One word as an atomic, for words that several write at once.
    pub fn atomic(&self, index: u32) -> &AtomicU64 {
        // SAFETY: valid, aligned to eight bytes and alive as long as the mapping; all writers use atomics.
        unsafe { AtomicU64::from_ptr(self.at(index)) }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Creating maps as the BPF object declares them, for tests.
#[cfg(test)]
pub(crate) mod create {
    use super::*;

    /// `BPF_MAP_TYPE_HASH`.
    pub(crate) const HASH: u32 = 1;
    /// `BPF_MAP_TYPE_ARRAY`.
    pub(crate) const ARRAY: u32 = 2;
    /// `BPF_MAP_TYPE_PERCPU_HASH`.
    pub(crate) const PERCPU_HASH: u32 = 5;
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    pub(crate) const PERCPU_ARRAY: u32 = 6;
    /// `BPF_MAP_TYPE_LRU_HASH`.
    pub(crate) const LRU_HASH: u32 = 9;
    /// `BPF_MAP_TYPE_LPM_TRIE`.
    pub(crate) const LPM_TRIE: u32 = 11;
    /// `BPF_F_NO_PREALLOC` of `map_flags`.
    pub(crate) const BPF_F_NO_PREALLOC: u32 = 1;

    #[repr(C)]
    #[derive(Default)]
    struct CreateAttr {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
        inner_map_fd: u32,
        numa_node: u32,
        map_name: [u8; 16],
    }

    /// Creates a map.
    pub(crate) fn map(
        map_type: u32,
        key: usize,
        value: usize,
        max_entries: u32,
        map_flags: u32,
    ) -> io::Result<OwnedFd> {
        let mut attr = CreateAttr {
            map_type,
            key_size: key as u32,
            value_size: value as u32,
            max_entries,
            map_flags,
            ..Default::default()
        };
        const BPF_MAP_CREATE: i32 = 0;
        // SAFETY: `attr` holds no pointers.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_CREATE,
                ptr::from_mut(&mut attr),
                size_of::<CreateAttr>(),
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Pins an object.
    pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attr = ObjAttr {
            pathname: path.as_ptr() as u64,
            bpf_fd: fd.as_raw_fd() as u32,
            ..Default::default()
        };
        const BPF_OBJ_PIN: i32 = 6;
        // SAFETY: `pathname` points to a zero-terminated string that outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_OBJ_PIN,
                ptr::from_mut(&mut attr),
                size_of::<ObjAttr>(),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
