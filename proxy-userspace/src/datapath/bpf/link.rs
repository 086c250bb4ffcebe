//! The few commands about links that aya keeps to itself.
//!
//! aya hands a link out only together with the program object that made it. The agent needs links
//! on their own: it finds them pinned, moves them to a new program, asks where they are attached
//! and lets them go.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use super::{Command, bpf, bpf_fd, object_info, open, raw};

const BPF_LINK_TYPE_CGROUP: u32 = 3;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

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

/// Attaches `program` to a cgroup (`target` = its directory) or a device (`target` = its index in
/// this namespace).
///
/// # Errors
/// The kernel's: `EEXIST`/`EBUSY` when another program has the hook for itself, `ENODEV` when the
/// device is gone, `EOPNOTSUPP` when the driver has no native XDP, `EINVAL` when the kernel does
/// not know the hook.
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
    // SAFETY: `struct { … } link_create` without pointers; the command returns a descriptor.
    unsafe { bpf_fd(Command::LinkCreate, &mut attr) }
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
    unsafe { bpf(Command::LinkUpdate, &mut attr) }.map(drop)
}

/// Detaches `link` at once, whoever else holds it (a pin, another process).
///
/// # Errors
/// The kernel's; a link that is detached already is none.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(link);
    // SAFETY: `struct { __u32 link_fd; } link_detach`.
    match unsafe { bpf(Command::LinkDetach, &mut attr) } {
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
        BPF_LINK_TYPE_XDP | BPF_LINK_TYPE_TCX => Target::Device {
            index: info.target[0],
        },
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
    unsafe { bpf(Command::ProgQuery, &mut attr) }?;
    Ok(links[..(attr.count as usize).min(QUERY_MAX)].to_vec())
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
