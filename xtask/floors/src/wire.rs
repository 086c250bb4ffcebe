//! Headers by fixed offsets: Ethernet, IPv4 or IPv6 without options, TCP.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use shunt_common::{
    family::{Family, V4, V6, Words6},
    hash,
    layout::{Flow, FlowKey, Frontend, FrontendKey, Slot, SnatSlot, TCP},
};

/// Offset of the IP header.
pub(crate) const L3: usize = 14;

type Frontends<A> = HashMap<FrontendKey<A>, Frontend, 65_536>;
type Slots<A> = Array<Slot<A>, 524_288, { BPF_F_MMAPABLE as usize }>;
type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>, 524_288>;
type Snat<A> = Array<SnatSlot<A>, 262_144>;

// The names are shunt's own: loaded onto its pinned maps.
#[btf_map(name = "frontends4")]
static FRONTENDS4: Frontends<[u8; 4]> = Frontends::new();
#[btf_map(name = "frontends6")]
static FRONTENDS6: Frontends<[u8; 16]> = Frontends::new();
#[btf_map(name = "slots4")]
static SLOTS4: Slots<[u8; 4]> = Slots::new();
#[btf_map(name = "slots6")]
static SLOTS6: Slots<[u8; 16]> = Slots::new();
#[btf_map(name = "flows4")]
static FLOWS4: Flows<[u8; 4]> = Flows::new();
#[btf_map(name = "flows6")]
static FLOWS6: Flows<[u8; 16]> = Flows::new();
#[btf_map(name = "snat4")]
static SNAT4: Snat<[u8; 4]> = Snat::new();
#[btf_map(name = "snat6")]
static SNAT6: Snat<[u8; 16]> = Snat::new();
// Where the two entries of a new flow go.
#[btf_map(name = "floor_flows4")]
static FLOOR_FLOWS4: Flows<[u8; 4]> = Flows::new();
#[btf_map(name = "floor_flows6")]
static FLOOR_FLOWS6: Flows<[u8; 16]> = Flows::new();

/// An address family on the wire.
pub(crate) trait Wire: Family {
    const FRONTENDS: &'static Frontends<Self::Addr>;
    const SLOTS: &'static Slots<Self::Addr>;
    const FLOWS: &'static Flows<Self::Addr>;
    const SNAT: &'static Snat<Self::Addr>;
    const FLOOR_FLOWS: &'static Flows<Self::Addr>;
    /// `AF_INET` or `AF_INET6`.
    const AF: u8;
    /// An address of this node, as in the cluster that is measured in.
    const NODE: Self::Addr;
    /// Offset of the TCP header.
    const L4: usize = L3 + Self::HEADER;

    /// Reads an address.
    ///
    /// # Safety
    /// It must lie within the packet.
    unsafe fn addr(at: *const u8) -> Self::Words;

    /// Writes an address.
    ///
    /// # Safety
    /// As [`addr`](Self::addr).
    unsafe fn set_addr(at: *mut u8, addr: Self::Words);

    /// As `struct bpf_fib_lookup` holds it.
    fn fib(addr: Self::Words) -> Words6;
}

impl Wire for V4 {
    const FRONTENDS: &'static Frontends<[u8; 4]> = &FRONTENDS4;
    const SLOTS: &'static Slots<[u8; 4]> = &SLOTS4;
    const FLOWS: &'static Flows<[u8; 4]> = &FLOWS4;
    const SNAT: &'static Snat<[u8; 4]> = &SNAT4;
    const FLOOR_FLOWS: &'static Flows<[u8; 4]> = &FLOOR_FLOWS4;
    const AF: u8 = 2;
    const NODE: [u8; 4] = [192, 168, 50, 11];

    #[inline(always)]
    unsafe fn addr(at: *const u8) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { get(at, 0) }
    }

    #[inline(always)]
    unsafe fn set_addr(at: *mut u8, addr: u32) {
        // SAFETY: the caller's promise.
        unsafe { set(at, 0, addr) }
    }

    #[inline(always)]
    fn fib(addr: u32) -> Words6 {
        Words6 {
            high: u64::from(addr),
            low: 0,
        }
    }
}

impl Wire for V6 {
    const FRONTENDS: &'static Frontends<[u8; 16]> = &FRONTENDS6;
    const SLOTS: &'static Slots<[u8; 16]> = &SLOTS6;
    const FLOWS: &'static Flows<[u8; 16]> = &FLOWS6;
    const SNAT: &'static Snat<[u8; 16]> = &SNAT6;
    const FLOOR_FLOWS: &'static Flows<[u8; 16]> = &FLOOR_FLOWS6;
    const AF: u8 = 10;
    const NODE: [u8; 16] = [0xfd, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11];

    #[inline(always)]
    unsafe fn addr(at: *const u8) -> Words6 {
        // SAFETY: the caller's promise.
        unsafe {
            Words6 {
                high: get(at, 0),
                low: get(at, 8),
            }
        }
    }

    #[inline(always)]
    unsafe fn set_addr(at: *mut u8, addr: Words6) {
        // SAFETY: the caller's promise.
        unsafe {
            set(at, 0, addr.high);
            set(at, 8, addr.low);
        }
    }

    #[inline(always)]
    fn fib(addr: Words6) -> Words6 {
        addr
    }
}

/// Reads from the packet, whatever the alignment.
///
/// # Safety
/// It must lie within the packet.
#[inline(always)]
pub(crate) unsafe fn get<T: Copy>(at: *const u8, offset: usize) -> T {
    // SAFETY: the caller's promise; the kernel allows access without alignment where the CPU does.
    unsafe { core::intrinsics::volatile_load(at.add(offset).cast::<T>()) }
}

/// Writes to the packet, whatever the alignment.
///
/// # Safety
/// As [`get`].
#[inline(always)]
pub(crate) unsafe fn set<T: Copy>(at: *mut u8, offset: usize, value: T) {
    // SAFETY: the caller's promise.
    unsafe { core::intrinsics::volatile_store(at.add(offset).cast::<T>(), value) }
}

/// What is read of a packet. Ports as they stand in it.
#[derive(Clone, Copy)]
pub(crate) struct Seen<A> {
    pub(crate) packet: *mut u8,
    pub(crate) src: A,
    pub(crate) dst: A,
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
}

/// Reads the packet, if it is what a floor program is for.
#[inline(always)]
pub(crate) fn parse<F: Wire>(start: usize, end: usize) -> Option<Seen<F::Words>> {
    if start + F::L4 + 20 > end {
        return None;
    }
    let packet = start as *mut u8;
    // SAFETY: all within the length that was just checked.
    unsafe {
        if u16::from_be(get(packet, 12)) != F::ETHERTYPE {
            return None;
        }
        let proto: u8 = if F::HEADER == 20 {
            if get::<u8>(packet, L3) != 0x45 || get::<u16>(packet, L3 + 6) & 0xff3f != 0 {
                return None;
            }
            get(packet, L3 + 9)
        } else {
            get(packet, L3 + 6)
        };
        if proto != TCP {
            return None;
        }
        let addresses = packet.add(L3 + F::ADDRESSES);
        Some(Seen {
            packet,
            src: F::addr(addresses),
            dst: F::addr(addresses.add(size_of::<F::Words>())),
            src_port: get(packet, F::L4),
            dst_port: get(packet, F::L4 + 2),
        })
    }
}

impl<A: Copy> Seen<A> {
    /// The key of the packet's flow.
    #[inline(always)]
    pub(crate) fn key<F: Wire<Words = A>>(&self) -> FlowKey<A> {
        FlowKey {
            client: self.src,
            frontend: F::UNSPECIFIED,
            client_port: u16::from_be(self.src_port),
            frontend_port: 0,
            proto: TCP,
            reserved: 0,
            reserved2: 0,
        }
    }
}

/// The entry of a translated source port, at the first of its places among as many as there are by
/// default.
#[inline(always)]
pub(crate) fn snat_slot<F: Wire>(
    port: u16,
    backend: F::Words,
    backend_port: u16,
) -> Option<&'static SnatSlot<F::Words>> {
    const ENTRIES: u32 = 262_144;
    let side = hash::side::<F>(backend, u16::from_be(backend_port), TCP) as u32;
    let index = (side & !31).wrapping_add(u16::from_be(port).into()) & (ENTRIES - 1);
    let slot = value::<_, SnatSlot<F::Words>>(F::SNAT.get_ptr_mut(index))?;
    (slot.snat_port == u16::from_be(port) && slot.backend == backend).then_some(slot)
}

/// The one's complement difference of the pseudo-header.
#[inline(always)]
pub(crate) fn addresses<F: Wire>(old: &Seen<F::Words>, new: &Seen<F::Words>) -> u64 {
    let base = u64::from(u32::MAX) << 8;
    base - F::sum(old.src) + F::sum(new.src) - F::sum(old.dst) + F::sum(new.dst)
}

/// The one's complement difference of the ports.
#[inline(always)]
pub(crate) fn ports<A>(old: &Seen<A>, new: &Seen<A>) -> u64 {
    u64::from(!old.src_port)
        + u64::from(new.src_port)
        + u64::from(!old.dst_port)
        + u64::from(new.dst_port)
}

/// Folds a sum to 32 bits.
#[inline(always)]
pub(crate) fn fold32(sum: u64) -> u64 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    (sum & 0xffff_ffff) + (sum >> 32)
}

/// A checksum field brought up to date.
#[inline(always)]
fn updated(field: u16, difference: u64) -> u16 {
    let sum = fold32(u64::from(!field) + difference);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// Writes addresses, ports and the IPv4 checksum; with `transport` the TCP checksum too.
#[inline(always)]
pub(crate) fn rewrite<F: Wire>(old: &Seen<F::Words>, new: &Seen<F::Words>, transport: bool) {
    let packet = old.packet;
    let difference = addresses::<F>(old, new);
    // SAFETY: `parse` checked the length of both headers.
    unsafe {
        if F::HEADER == 20 {
            set(packet, L3 + 10, updated(get(packet, L3 + 10), difference));
        }
        let at = packet.add(L3 + F::ADDRESSES);
        F::set_addr(at, new.src);
        F::set_addr(at.add(size_of::<F::Words>()), new.dst);
        set(packet, F::L4, new.src_port);
        set(packet, F::L4 + 2, new.dst_port);
        if transport {
            let field = F::L4 + 16;
            set(
                packet,
                field,
                updated(get(packet, field), difference + ports(old, new)),
            );
        }
    }
}

/// A map's key or value with addresses as words, as the map is declared: with bytes.
#[inline(always)]
pub(crate) fn bytes<W, B>(words: &W) -> &B {
    const { assert!(size_of::<B>() == size_of::<W>() && align_of::<B>() <= align_of::<W>()) };
    // SAFETY: the same layout but for the addresses, of which any bytes are one.
    unsafe { &*core::ptr::from_ref(words).cast() }
}

/// A map's value with addresses as words.
#[inline(always)]
pub(crate) fn value<'m, B, W>(ptr: Option<*mut B>) -> Option<&'m W> {
    const { assert!(size_of::<B>() == size_of::<W>()) };
    // SAFETY: the same layout; map values are aligned to eight bytes and stay while the program
    // runs.
    ptr.and_then(|ptr| unsafe { ptr.cast::<W>().as_ref() })
}
