//! The system call bpf(2), as far as aya keeps it to itself or lacks it.
//!
//! Here is what maps, programs and links have in common: pins and information.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

mod array;
pub mod link;
pub mod map;
pub mod probe;
pub mod program;

pub use array::MappedArray;

/// Commands: `enum bpf_cmd` of `linux/bpf.h`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapNextKey = 4,
    ProgLoad = 5,
    ObjPin = 6,
    ObjGet = 7,
    ProgTestRun = 10,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    MapFreeze = 22,
    MapLookupBatch = 24,
    MapUpdateBatch = 26,
    MapDeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
    ProgBindMap = 35,
}

/// The `BPF_OBJ_PIN` and `BPF_OBJ_GET` part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The `BPF_OBJ_GET_INFO_BY_FD` part of `union bpf_attr`.
#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// bpf(2).
///
/// # Safety
/// `attr` must be a prefix of the command's part of `union bpf_attr`, and the pointers in it valid
/// for the command.
unsafe fn bpf<T>(command: Command, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the caller's promise; the kernel reads and writes at most `size_of::<T>()` bytes at
    // `attr`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as i32,
            ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for commands that return a file descriptor.
///
/// # Safety
/// As [`bpf`], and the command must return a new file descriptor.
unsafe fn bpf_fd<T>(command: Command, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel made this descriptor for us; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Where a value stands, for the kernel.
fn address<T: ?Sized>(value: &T) -> u64 {
    ptr::from_ref(value).cast::<u8>().expose_provenance() as u64
}

fn path_attr(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// Pins a map, program or link at `path`.
///
/// # Errors
/// `EEXIST` when there is one already, `EINVAL`/`EPERM` when `path` is not on a bpffs or its name
/// has a dot.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_attr(path)?;
    let mut attr = ObjAttr {
        pathname: address(path.as_bytes_with_nul()),
        bpf_fd: raw(object),
        ..Default::default()
    };
    // SAFETY: `pathname` is a string that outlives the call.
    unsafe { bpf(Command::ObjPin, &mut attr) }.map(drop)
}

/// Pins a map, program or link at `path` in the place of what is pinned there, if anything, without
/// a moment of neither.
///
/// # Errors
/// As [`pin`].
pub fn pin_over(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push("+new");
    let fresh = Path::new(&fresh);
    match fs::remove_file(fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    pin(object, fresh)?;
    fs::rename(fresh, path)
}

/// Opens the map, program or link that is pinned at `path`.
///
/// # Errors
/// `ENOENT` without such a pin, `EACCES`/`EPERM` without `CAP_BPF`.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = path_attr(path)?;
    let mut attr = ObjAttr {
        pathname: address(path.as_bytes_with_nul()),
        ..Default::default()
    };
    // SAFETY: `pathname` is a string that outlives the call; the command returns a descriptor.
    unsafe { bpf_fd(Command::ObjGet, &mut attr) }
}

/// Fills in the head of the object's `struct bpf_*_info`.
fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        bpf_fd: raw(object),
        info_len: size_of::<T>() as u32,
        info: ptr::from_mut(info).expose_provenance() as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes at `info`, which is exclusively ours.
    unsafe { bpf(Command::ObjGetInfoByFd, &mut attr) }.map(drop)
}
