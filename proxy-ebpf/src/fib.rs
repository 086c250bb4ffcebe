//! The node's routing tables, as `bpf_fib_lookup` reads them.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::{bpf_fib_lookup, bpf_redirect_neigh},
};
use shunt_common::{
    family::{Family, V4, V6, Words6},
    packet::Tuple,
};

/// Index of the loopback device, in every network namespace (`LOOPBACK_IFINDEX` of the kernel).
pub(crate) const LOOPBACK: u32 = 1;

/// A family as the kernel's routing knows it.
pub(crate) trait RoutedFamily: Family {
    /// `AF_INET` or `AF_INET6`.
    const AF: u8;
}

impl RoutedFamily for V4 {
    const AF: u8 = 2;
}

impl RoutedFamily for V6 {
    const AF: u8 = 10;
}

/// The kernel's `struct bpf_fib_lookup`, without its unions.
#[repr(C)]
pub(crate) struct FibLookup {
    pub(crate) family: u8,
    pub(crate) l4_protocol: u8,
    pub(crate) sport: u16,
    pub(crate) dport: u16,
    /// In: length of the packet from its IP header. Out: the route's MTU.
    pub(crate) tot_len: u16,
    /// In: the device the packet came in through. Out: the one it leaves through.
    pub(crate) ifindex: u32,
    pub(crate) flowinfo: u32,
    /// With [`SOURCE`], out: the source address that the route gives.
    pub(crate) src: Words6,
    pub(crate) dst: Words6,
    pub(crate) vlan: u32,
    /// Source and destination MAC address.
    pub(crate) macs: [u16; 6],
}

const _: () = assert!(size_of::<FibLookup>() == 64);

impl FibLookup {
    /// A question about the way of a packet that came in through a device.
    #[inline(always)]
    pub(crate) fn new<F: RoutedFamily>(tuple: &Tuple<F::Words>, length: u16, device: u32) -> Self {
        Self {
            family: F::AF,
            l4_protocol: tuple.proto,
            sport: tuple.src_port.to_be(),
            dport: tuple.dst_port.to_be(),
            tot_len: length,
            ifindex: device,
            flowinfo: 0,
            src: words::<F>(tuple.src),
            dst: words::<F>(tuple.dst),
            vlan: 0,
            macs: [0; 6],
        }
    }

    /// At tc: sends the packet to the next hop that the kernel has found; the action that does it.
    #[inline(always)]
    pub(crate) fn send_on(&self) -> i32 {
        let Words6 { high, low } = self.dst;
        // The kernel put the gateway's address, of whichever family, in place of the destination's.
        let mut hop = bpf_redir_neigh {
            nh_family: self.family.into(),
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
                ipv6_nh: [
                    high as u32,
                    (high >> 32) as u32,
                    low as u32,
                    (low >> 32) as u32,
                ],
            },
        };
        let size = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the helper reads `hop` and notes where to send.
        unsafe { bpf_redirect_neigh(self.ifindex, &raw mut hop, size, 0) as i32 }
    }
}

/// Flags with which the kernel tells the source address of a route (`BPF_FIB_LOOKUP_SKIP_NEIGH`,
/// `BPF_FIB_LOOKUP_SRC`, Linux 6.7), set when the programs are loaded; 0 where it does not know
/// them.
#[unsafe(no_mangle)]
static FIB_SOURCE: Global<u32> = Global::new(0);

/// The source address that the node's routes give to a packet that came in through a device.
#[inline(always)]
pub(crate) fn source<F: RoutedFamily>(
    ctx: *mut c_void,
    device: u32,
    tuple: &Tuple<F::Words>,
) -> Option<F::Words> {
    let flags = FIB_SOURCE.load();
    if flags == 0 {
        return None;
    }
    let mut fib = FibLookup::new::<F>(tuple, 0, device);
    // SAFETY: `fib` has the size and layout of the kernel's struct.
    let result = unsafe {
        bpf_fib_lookup(
            ctx,
            (&raw mut fib).cast(),
            size_of::<FibLookup>() as i32,
            flags,
        )
    };
    // Without room for the packet on that way (`BPF_FIB_LKUP_RET_FRAG_NEEDED`), the way is still
    // known.
    if result != 0 && result != FRAG_NEEDED {
        return None;
    }
    let source = address::<F>(&fib.src);
    (source != F::UNSPECIFIED && source != tuple.src && !is_link_local::<F>(&fib.src))
        .then_some(source)
}

/// Whether an IPv6 address is of no use beyond its link: what the kernel gives where there is no
/// other.
#[inline(always)]
fn is_link_local<F: Family>(addr: &Words6) -> bool {
    let [first, second, ..] = addr.high.to_ne_bytes();
    F::HEADER == 40 && first == 0xfe && second & 0xc0 == 0x80
}

/// `BPF_FIB_LKUP_RET_NO_NEIGH` of linux/bpf.h: a route, but the next hop's MAC address is not known
/// yet.
pub(crate) const NO_NEIGH: i64 = 7;
/// `BPF_FIB_LKUP_RET_FRAG_NEEDED` of linux/bpf.h.
pub(crate) const FRAG_NEEDED: i64 = 8;

/// An address as the kernel's union holds it: IPv4 in the first word.
#[inline(always)]
pub(crate) fn words<F: Family>(addr: F::Words) -> Words6 {
    // SAFETY: an address is one or two words.
    unsafe {
        if size_of::<F::Words>() == 4 {
            Words6 {
                high: u64::from(core::mem::transmute_copy::<_, u32>(&addr)),
                low: 0,
            }
        } else {
            core::mem::transmute_copy(&addr)
        }
    }
}

/// The address of [`words`].
#[inline(always)]
fn address<F: Family>(words: &Words6) -> F::Words {
    // SAFETY: an address is one or two words.
    unsafe {
        if size_of::<F::Words>() == 4 {
            core::mem::transmute_copy(&(words.high as u32))
        } else {
            core::mem::transmute_copy(words)
        }
    }
}
