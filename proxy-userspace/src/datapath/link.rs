//! The few commands of bpf(2) about links and pins that aya keeps to itself.
//!
//! aya hands a link out only together with the program object that made it. The agent needs links on their own: it
//! finds them pinned, moves them to a new program, asks where they are attached and lets them go.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// Flag of `bpf_l4_csum_replace` (kernel 6.16): the packet is an IPv6 one.
pub const BPF_F_IPV6: u32 = 1 << 7;

/// Most programs that [`query`] lists for one hook; the kernel admits 64 (`BPF_MPROG_MAX`).
const QUERY_MAX: usize = 64;

/// `enum bpf_attach_type`, the hooks that shunt uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Hook {
    /// connect(2), IPv4.
    Connect4 = 10,
    /// connect(2), IPv6.
    Connect6 = 11,
    /// sendmsg(2) on unconnected UDP, IPv4.
    Sendmsg4 = 14,
    /// sendmsg(2) on unconnected UDP, IPv6.
    Sendmsg6 = 15,
    /// recvmsg(2) on unconnected UDP, IPv4.
    Recvmsg4 = 19,
    /// recvmsg(2) on unconnected UDP, IPv6.
    Recvmsg6 = 20,
    /// getpeername(2), IPv4.
    Getpeername4 = 29,
    /// getpeername(2), IPv6.
    Getpeername6 = 30,
    /// close(2) of an IP socket.
    SockRelease = 34,
    /// XDP.
    Xdp = 37,
    /// What a device receives (kernel 6.6).
    TcxIngress = 46,
    /// What a device sends (kernel 6.6).
    TcxEgress = 47,
}

/// Where a link is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A network device; index 0: it is gone.
    Device {
        /// Interface index in the namespace of the device.
        index: u32,
    },
    /// A cgroup; id 0: it is gone.
    Cgroup {
        /// The inode number of the cgroup's directory.
        id: u64,
    },
    /// A type of link that shunt does not make.
    Other,
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug)]
pub struct LinkInfo {
    /// The link's id (`bpftool link show`).
    pub id: u32,
    /// The id of the program that it runs.
    pub program: u32,
    /// Where it is attached.
    pub target: Target,
}

/// bpf(2).
///
/// # Safety
/// `attr` must be a prefix of the command's part of `union bpf_attr`, and the pointers in it valid for the command.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the caller's promise; the kernel reads and writes at most `size_of::<T>()` bytes at `attr`.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
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
unsafe fn bpf_fd<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel made this descriptor for us; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Attaches `program` to a cgroup (`target` = its directory) or a device (`target` = its index in this namespace).
///
/// # Errors
/// The kernel's: `EEXIST`/`EBUSY` when another program has the hook for itself, `ENODEV` when the device is gone,
/// `EOPNOTSUPP` when the driver has no native XDP, `EINVAL` when the kernel does not know the hook.
pub fn create(program: BorrowedFd<'_>, target: u32, hook: Hook, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
        // The hook's own part: zero everywhere here.
        rest: [u64; 4],
    }
    let mut attr = Attr {
        prog_fd: raw(program),
        target,
        attach_type: hook as u32,
        flags,
        rest: [0; 4],
    };
    // SAFETY: `struct { … } link_create` without pointers; BPF_LINK_CREATE returns a descriptor.
    unsafe { bpf_fd(BPF_LINK_CREATE, &mut attr) }
}

/// Makes `link` run `program` from the next packet or call on, without a gap.
///
/// # Errors
/// `ENOLINK` when the device or cgroup is gone, `EINVAL` when the program is of another type.
pub fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        new_prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    let mut attr = Attr {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: `struct { … } link_update` without pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches `link` at once, whoever else holds it (a pin, another process).
///
/// # Errors
/// The kernel's; a link that is detached already is none.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(link);
    // SAFETY: `struct { __u32 link_fd; } link_detach`.
    match unsafe { bpf(BPF_LINK_DETACH, &mut attr) } {
        // XDP says so of a device that is gone, TCX of a link without device.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV)) => Ok(()),
        result => result.map(drop),
    }
}

/// What the kernel says about `link`.
///
/// # Errors
/// The kernel's, for example when `link` is no link.
pub fn info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        // Where the union begins; it holds pointers and is 8-byte aligned.
        padding: u32,
        // xdp, tcx: ifindex; cgroup: the low and high half of the id.
        target: [u32; 2],
        rest: [u32; 10],
    }
    let mut info = Info::default();
    object_info(link, &mut info)?;
    let target = match info.kind {
        BPF_LINK_TYPE_XDP | BPF_LINK_TYPE_TCX => Target::Device { index: info.target[0] },
        BPF_LINK_TYPE_CGROUP => {
            // One __u64 in the machine's byte order.
            let [a, b] = info.target.map(u32::to_ne_bytes);
            Target::Cgroup {
                id: u64::from_ne_bytes([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]]),
            }
        }
        _ => Target::Other,
    };
    Ok(LinkInfo {
        id: info.id,
        program: info.program,
        target,
    })
}

/// The id of a program.
///
/// # Errors
/// The kernel's, for example when `program` is no BPF object.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
    }
    let mut info = Info::default();
    object_info(program, &mut info)?;
    Ok(info.id)
}

fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut attr = Attr {
        bpf_fd: raw(object),
        info_len: size_of::<T>() as u32,
        info: std::ptr::from_mut(info).expose_provenance() as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes at `info`, which is exclusively ours.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.map(drop)
}

/// The ids of the links at a TCX hook of the device with this index in this namespace.
///
/// # Errors
/// `ENODEV` when there is no such device, `EINVAL` before kernel 6.6.
pub fn query(index: u32, hook: Hook) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attr {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        padding: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let mut programs = [0_u32; QUERY_MAX];
    let mut links = [0_u32; QUERY_MAX];
    let mut attr = Attr {
        target: index,
        attach_type: hook as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr().expose_provenance() as u64,
        count: QUERY_MAX as u32,
        padding: 0,
        prog_attach_flags: 0,
        link_ids: links.as_mut_ptr().expose_provenance() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: the kernel writes at most `count` ids to either array.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    Ok(links[..(attr.count as usize).min(QUERY_MAX)].to_vec())
}

fn path_attr(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// Pins a map, program or link at `path`.
///
/// # Errors
/// `EEXIST` when there is one already, `EINVAL`/`EPERM` when `path` is not on a bpffs or its name has a dot.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = path_attr(path)?;
    let mut attr = Attr {
        pathname: path.as_ptr().expose_provenance() as u64,
        bpf_fd: raw(object),
        file_flags: 0,
    };
    // SAFETY: `pathname` is a string that outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Pins a map, program or link at `path` in the place of what is pinned there, if anything, without a moment of neither.
///
/// # Errors
/// As [`pin`].
pub fn pin_over(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push("+new");
    let fresh = Path::new(&fresh);
    match std::fs::remove_file(fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    pin(object, fresh)?;
    std::fs::rename(fresh, path)
}

/// Opens the map, program or link that is pinned at `path`.
///
/// # Errors
/// `ENOENT`, or `EACCES`/`EPERM` without `CAP_BPF`.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = path_attr(path)?;
    let mut attr = Attr {
        pathname: path.as_ptr().expose_provenance() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: `pathname` is a string that outlives the call; BPF_OBJ_GET returns a descriptor.
    unsafe { bpf_fd(BPF_OBJ_GET, &mut attr) }
}

/// Loads the smallest program there is, `return verdict`, to probe what the kernel lets one do with it.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`, `EINVAL` when it does not know the type.
pub fn load_trivial(program_type: u32, hook: Option<Hook>, verdict: i32) -> io::Result<OwnedFd> {
    // r0 = verdict; exit
    load_code(program_type, hook, [0xb7 | (u64::from(verdict as u32) << 32), 0x95])
}

/// Loads a program of so many instructions, as they stand in memory on a little-endian machine.
fn load_code<const N: usize>(program_type: u32, hook: Option<Hook>, code: [u64; N]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    // An instruction is bytes (code, registers), a __s16 and a __s32: on big-endian machines not the same as one number.
    let code = code.map(|word| {
        let [op, regs, o0, o1, i0, i1, i2, i3] = word.to_le_bytes();
        let (offset, immediate) = (i16::from_le_bytes([o0, o1]), i32::from_le_bytes([i0, i1, i2, i3]));
        let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
        [op, regs, o0, o1, i0, i1, i2, i3]
    });
    let mut attr = Attr {
        prog_type: program_type,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name: *b"shunt_check\0\0\0\0\0",
        prog_ifindex: 0,
        expected_attach_type: hook.map_or(0, |h| h as u32),
    };
    // SAFETY: `insns` and `license` outlive the call; BPF_PROG_LOAD returns a descriptor.
    unsafe { bpf_fd(BPF_PROG_LOAD, &mut attr) }
}

/// Whether `bpf_l4_csum_replace` knows [`BPF_F_IPV6`]. Before, it spoiled the sum that a device had computed over an IPv6
/// packet (`CHECKSUM_COMPLETE`): an IPv4 header's own checksum makes up for new addresses, and IPv6 has none.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`.
pub fn probe_csum_ipv6() -> io::Result<bool> {
    const BPF_PROG_TEST_RUN: libc::c_int = 10;
    const SCHED_CLS: u32 = 3;
    const BPF_F_PSEUDO_HDR: u32 = 1 << 4;
    let set = |register: u64, value: u32| 0xb7 | register << 8 | u64::from(value) << 32;
    // return bpf_l4_csum_replace(ctx, 24, 0, 0, BPF_F_PSEUDO_HDR | BPF_F_IPV6)
    let program = load_code(
        SCHED_CLS,
        None,
        [
            set(2, 24),
            set(3, 0),
            set(4, 0),
            set(5, BPF_F_PSEUDO_HDR | BPF_F_IPV6),
            0x85 | 11 << 32,
            0x95,
        ],
    )?;
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        rest: [u64; 6],
    }
    let packet = [0_u8; 64];
    let mut attr = Attr {
        prog_fd: raw(program.as_fd()),
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: 0,
        data_in: packet.as_ptr().expose_provenance() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
        rest: [0; 6],
    };
    // SAFETY: `data_in` outlives the call and is as long as said; nothing is written but the attribute.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(attr.retval == 0)
}

/// Tries a batch operation on a small map of its own.
///
/// # Errors
/// `EINVAL` or `ENOTSUPP` before kernel 5.6.
pub fn probe_batch() -> io::Result<()> {
    const BPF_MAP_TYPE_HASH: u32 = 1;
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    let mut create = Create {
        map_type: BPF_MAP_TYPE_HASH,
        key_size: 4,
        value_size: 4,
        max_entries: 2,
        map_flags: 0,
    };
    // SAFETY: no pointers; BPF_MAP_CREATE returns a descriptor.
    let map = unsafe { bpf_fd(BPF_MAP_CREATE, &mut create) }?;
    let (keys, values) = ([1_u32, 2], [3_u32, 4]);
    let mut batch = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr().expose_provenance() as u64,
        values: values.as_ptr().expose_provenance() as u64,
        count: 2,
        map_fd: raw(map.as_fd()),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both arrays hold `count` elements and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_BATCH, &mut batch) }.map(drop)
}

/// A link opened from its pin, with what the kernel said of it then.
#[derive(Debug)]
pub struct OpenLink {
    /// The link.
    pub fd: OwnedFd,
    /// What the kernel says about it.
    pub info: LinkInfo,
}

impl OpenLink {
    /// Opens the link pinned at `path`.
    ///
    /// # Errors
    /// As [`open`] and [`info`].
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::new(open(path)?)
    }

    /// Takes over `fd`, a link.
    ///
    /// # Errors
    /// As [`info`].
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = info(fd.as_fd())?;
        Ok(Self { fd, info })
    }
}
