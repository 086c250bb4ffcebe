//! The maps, and the decision's view of them.
//!
//! Sizes here are defaults; the agent sets each map's capacity when it loads the programs.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd},
    marker::PhantomData,
    ptr::NonNull,
};

use aya_ebpf::{
    Global,
    bindings::{
        __sk_buff, BPF_ANY, BPF_F_CURRENT_NETNS, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST,
        bpf_sock_tuple, xdp_md,
    },
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage},
    helpers::{
        bpf_get_socket_cookie, bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_sk_lookup_udp,
        bpf_sk_release, bpf_skc_lookup_tcp,
    },
    macros::btf_map,
};
use shunt_common::{
    balance::{Clock, Entry, Hooked, Maps, Scratch},
    event::{Event, MAX_EVENTS},
    family::{Family, V4, V6, Words6},
    filter,
    layout::*,
    packet::Tuple,
    trace::record,
};

use crate::{
    answers,
    fib::{self, LOOPBACK},
    sender, trace,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// Of linux/tcp_states.h.
const TCP_LISTEN: u32 = 10;

type Frontends<A> = HashMap<FrontendKey<A>, Frontend, 65_536>;
type Slots<A> = Array<Slot<A>, 524_288, MMAPABLE>;
type Flows<A> = LruHashMap<FlowKey<A>, Flow<A>, 524_288>;
type Unconfirmed<A> = LruHashMap<FlowKey<A>, Flow<A>, 65_536>;
type Direct<A> = LruHashMap<DirectKey<A>, u32, 16_384>;
type Snat<A> = Array<SnatSlot<A>, 262_144, MMAPABLE>;
type NodeAddrs<A> = HashMap<A, u32, 1024>;
type AffinityMap<A> = LruHashMap<AffinityKey<A>, Affinity, 65_536>;
// Most clusters have few Services with affinity or source ranges: no memory for entries that are
// not there.
type Members = HashMap<MemberKey, u32, 131_072, { BPF_F_NO_PREALLOC as usize }>;
type SourceRanges<A> = LpmTrie<Source<A>, u32, 65_536>;

/// What a source range is of; [`SourceRangeKey`] without its length, which the map's type adds.
#[repr(C, align(4))]
pub(crate) struct Source<A> {
    service: u32,
    addr: A,
}
type Fragments<A> = LruHashMap<FragmentKey<A>, FragmentPorts, 8192>;
type Addresses<A> = HashMap<A, u32, 65_536>;

#[btf_map(name = "scratch4")]
static SCRATCH4: PerCpuArray<Scratch<u32>, 1> = PerCpuArray::new();
#[btf_map(name = "scratch6")]
static SCRATCH6: PerCpuArray<Scratch<Words6>, 1> = PerCpuArray::new();

/// The maps of one family.
pub(crate) trait KernelFamily: fib::RoutedFamily + answers::AnsweringFamily {
    const FRONTENDS: &'static Frontends<Self::Addr>;
    const SLOTS: &'static Slots<Self::Addr>;
    const FLOWS: &'static Flows<Self::Addr>;
    const UNCONFIRMED: &'static Unconfirmed<Self::Addr>;
    const DIRECT: &'static Direct<Self::Addr>;
    const BYPASS: &'static Direct<Self::Addr>;
    const SNAT: &'static Snat<Self::Addr>;
    const NODE_ADDRS: &'static NodeAddrs<Self::Addr>;
    const AFFINITY: &'static AffinityMap<Self::Addr>;
    const NEW_AFFINITY: &'static AffinityMap<Self::Addr>;
    const SET_MEMBERS: &'static Members;
    const SOURCE_RANGES: &'static SourceRanges<Self::Addr>;
    const SERVICE_ADDRS: &'static Addresses<Self::Addr>;
    const FRAGMENTS: &'static Fragments<Self::Addr>;
    const SCRATCH: &'static PerCpuArray<Scratch<Self::Words>, 1>;
    /// Index into [`HALF_OPEN`].
    const INDEX: u32;
}

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
#[btf_map(name = "unconfirmed4")]
static UNCONFIRMED4: Unconfirmed<[u8; 4]> = Unconfirmed::new();
#[btf_map(name = "unconfirmed6")]
static UNCONFIRMED6: Unconfirmed<[u8; 16]> = Unconfirmed::new();
#[btf_map(name = "direct4")]
static DIRECT4: Direct<[u8; 4]> = Direct::new();
#[btf_map(name = "bypass4")]
static BYPASS4: Direct<[u8; 4]> = Direct::new();
#[btf_map(name = "bypass6")]
static BYPASS6: Direct<[u8; 16]> = Direct::new();
#[btf_map(name = "snat4")]
static SNAT4: Snat<[u8; 4]> = Snat::new();
#[btf_map(name = "direct6")]
static DIRECT6: Direct<[u8; 16]> = Direct::new();
#[btf_map(name = "snat6")]
static SNAT6: Snat<[u8; 16]> = Snat::new();
#[btf_map(name = "node_addrs4")]
static NODE_ADDRS4: NodeAddrs<[u8; 4]> = NodeAddrs::new();
#[btf_map(name = "node_addrs6")]
static NODE_ADDRS6: NodeAddrs<[u8; 16]> = NodeAddrs::new();
#[btf_map(name = "affinity4")]
static AFFINITY4: AffinityMap<[u8; 4]> = AffinityMap::new();
#[btf_map(name = "affinity6")]
static AFFINITY6: AffinityMap<[u8; 16]> = AffinityMap::new();
#[btf_map(name = "new_affinity4")]
static NEW_AFFINITY4: AffinityMap<[u8; 4]> = AffinityMap::new();
#[btf_map(name = "new_affinity6")]
static NEW_AFFINITY6: AffinityMap<[u8; 16]> = AffinityMap::new();
#[btf_map(name = "set_members4")]
static SET_MEMBERS4: Members = Members::new();
#[btf_map(name = "set_members6")]
static SET_MEMBERS6: Members = Members::new();
#[btf_map(name = "source_ranges4")]
static SOURCE_RANGES4: SourceRanges<[u8; 4]> = SourceRanges::new();
#[btf_map(name = "source_ranges6")]
static SOURCE_RANGES6: SourceRanges<[u8; 16]> = SourceRanges::new();
#[btf_map(name = "fragments4")]
static FRAGMENTS4: Fragments<[u8; 4]> = Fragments::new();
#[btf_map(name = "fragments6")]
static FRAGMENTS6: Fragments<[u8; 16]> = Fragments::new();
#[btf_map(name = "service_addrs4")]
static SERVICE_ADDRS4: Addresses<[u8; 4]> = Addresses::new();
#[btf_map(name = "service_addrs6")]
static SERVICE_ADDRS6: Addresses<[u8; 16]> = Addresses::new();
#[btf_map(name = "filter")]
static FILTER: Array<u64, FILTER_WORDS, MMAPABLE> = Array::new();
#[btf_map(name = "clients")]
static CLIENTS: Array<u64, CLIENT_WORDS, MMAPABLE> = Array::new();
#[btf_map(name = "half_open")]
static HALF_OPEN: Array<u64, 2> = Array::new();
#[btf_map(name = "shared_ports")]
static SHARED_PORTS: Array<u64, SHARED_PORT_WORDS, MMAPABLE> = Array::new();
#[btf_map(name = "backends")]
pub(crate) static BACKENDS: Array<BackendState, 131_072, MMAPABLE> = Array::new();
#[btf_map(name = "config")]
static CONFIG: Array<Config, 1> = Array::new();
#[btf_map(name = "events")]
static EVENTS: PerCpuArray<u64, MAX_EVENTS> = PerCpuArray::new();
/// Read by tools only: names for the numbers in `frontends`.
#[btf_map(name = "services")]
static SERVICES: HashMap<u32, ServiceInfo, 65_536> = HashMap::new();
// Not socket storage, which costs two allocations when a connection opens and two RCU callbacks
// when it closes.
#[btf_map(name = "sockets")]
pub(crate) static SOCKETS: HashMap<u64, SocketPeer, 131_072> = HashMap::new();
#[btf_map(name = "udp_peers")]
pub(crate) static UDP_PEERS: SkStorage<SocketPeers> = SkStorage::new();

#[btf_map(name = "left_out")]
pub(crate) static LEFT_OUT: HashMap<
    u64,
    u32,
    { MAX_PODS_LEFT_OUT as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// Most flows of a family that may wait in `flows` for both sides to speak: set when the programs
/// are loaded.
#[unsafe(no_mangle)]
static MAX_HALF_OPEN: Global<u32> = Global::new(0);

impl KernelFamily for V4 {
    const FRONTENDS: &'static Frontends<[u8; 4]> = &FRONTENDS4;
    const SLOTS: &'static Slots<[u8; 4]> = &SLOTS4;
    const FLOWS: &'static Flows<[u8; 4]> = &FLOWS4;
    const UNCONFIRMED: &'static Unconfirmed<[u8; 4]> = &UNCONFIRMED4;
    const DIRECT: &'static Direct<[u8; 4]> = &DIRECT4;
    const BYPASS: &'static Direct<[u8; 4]> = &BYPASS4;
    const SNAT: &'static Snat<[u8; 4]> = &SNAT4;
    const NODE_ADDRS: &'static NodeAddrs<[u8; 4]> = &NODE_ADDRS4;
    const AFFINITY: &'static AffinityMap<[u8; 4]> = &AFFINITY4;
    const NEW_AFFINITY: &'static AffinityMap<[u8; 4]> = &NEW_AFFINITY4;
    const SET_MEMBERS: &'static Members = &SET_MEMBERS4;
    const SOURCE_RANGES: &'static SourceRanges<[u8; 4]> = &SOURCE_RANGES4;
    const SERVICE_ADDRS: &'static Addresses<[u8; 4]> = &SERVICE_ADDRS4;
    const FRAGMENTS: &'static Fragments<[u8; 4]> = &FRAGMENTS4;
    const SCRATCH: &'static PerCpuArray<Scratch<u32>, 1> = &SCRATCH4;
    const INDEX: u32 = 0;
}

impl KernelFamily for V6 {
    const FRONTENDS: &'static Frontends<[u8; 16]> = &FRONTENDS6;
    const SLOTS: &'static Slots<[u8; 16]> = &SLOTS6;
    const FLOWS: &'static Flows<[u8; 16]> = &FLOWS6;
    const UNCONFIRMED: &'static Unconfirmed<[u8; 16]> = &UNCONFIRMED6;
    const DIRECT: &'static Direct<[u8; 16]> = &DIRECT6;
    const BYPASS: &'static Direct<[u8; 16]> = &BYPASS6;
    const SNAT: &'static Snat<[u8; 16]> = &SNAT6;
    const NODE_ADDRS: &'static NodeAddrs<[u8; 16]> = &NODE_ADDRS6;
    const AFFINITY: &'static AffinityMap<[u8; 16]> = &AFFINITY6;
    const NEW_AFFINITY: &'static AffinityMap<[u8; 16]> = &NEW_AFFINITY6;
    const SET_MEMBERS: &'static Members = &SET_MEMBERS6;
    const SOURCE_RANGES: &'static SourceRanges<[u8; 16]> = &SOURCE_RANGES6;
    const SERVICE_ADDRS: &'static Addresses<[u8; 16]> = &SERVICE_ADDRS6;
    const FRAGMENTS: &'static Fragments<[u8; 16]> = &FRAGMENTS6;
    const SCRATCH: &'static PerCpuArray<Scratch<Words6>, 1> = &SCRATCH6;
    const INDEX: u32 = 1;
}

/// Which hook runs: a type, because a step for one cannot be called with another's context.
pub(crate) trait Hook {
    /// The event that counts its new flows.
    const NEW_FLOW: Event;
    /// One of `TRACE_AT_*`.
    const TRACED_AS: u8;
    /// A backend's counter of its new flows.
    ///
    /// # Safety
    /// `state` must lie within a live map value; nothing is read or written.
    unsafe fn counter(state: *mut BackendState) -> *mut u64;
    /// Index of the device by which the packet came in; 0 for sockets.
    ///
    /// # Safety
    /// `ctx` must be the running program's context.
    unsafe fn device(ctx: *mut c_void) -> u32;
    /// The cookie of the packet's sender; 0 where it is not known.
    ///
    /// # Safety
    /// `ctx` must be the running program's context.
    unsafe fn sender(ctx: *mut c_void) -> u64;
    /// Whether the packet that is sent has the addresses and ports of its sender's socket.
    ///
    /// # Safety
    /// `ctx` must be the running program's context.
    unsafe fn is_senders_own<F: Family>(ctx: *mut c_void, packet: &Tuple<F::Words>) -> bool;
}

macro_rules! hooks {
    ($($(#[$doc:meta])* $hook:ident: $event:ident, $counter:ident, $traced:ident,
    |$ctx:ident| $device:expr, $sender:expr, |$packet:ident| $own:expr;)+) => {
        $(
            $(#[$doc])*
            pub(crate) struct $hook;

            impl Hook for $hook {
                const NEW_FLOW: Event = Event::$event;
                const TRACED_AS: u8 = $traced;

                #[inline(always)]
                unsafe fn counter(state: *mut BackendState) -> *mut u64 {
                    // SAFETY: the caller's promise.
                    unsafe { &raw mut (*state).$counter }
                }

                #[inline(always)]
                unsafe fn device($ctx: *mut c_void) -> u32 {
                    $device
                }

                #[inline(always)]
                unsafe fn sender($ctx: *mut c_void) -> u64 {
                    let _of_no_use = $ctx;
                    $sender
                }

                #[inline(always)]
                unsafe fn is_senders_own<F: Family>(
                    $ctx: *mut c_void,
                    $packet: &Tuple<F::Words>,
                ) -> bool {
                    let _of_no_use = ($ctx, $packet);
                    $own
                }
            }
        )+
    };
}

hooks! {
    /// The cgroup hooks.
    Socket: SocketFlow, socket_flows, TRACE_AT_SOCKET, |_ctx| 0, 0, |_packet| false;
    /// tc.
    Tc: TcFlow, tc_flows, TRACE_AT_TC, |ctx| {
        // SAFETY: the caller's promise.
        unsafe {
            let skb = ctx.cast::<__sk_buff>();
            // What a process of this node sends has come in by none: the kernel's rules know that
            // as the loopback device.
            if (*skb).ingress_ifindex == 0 {
                LOOPBACK
            } else {
                (*skb).ifindex
            }
        }
    }, {
        // SAFETY: the caller's promise. A pod's packet keeps its socket on the way out of the
        // pod's network namespace.
        unsafe { bpf_get_socket_cookie(ctx) }
    }, |packet| {
        // SAFETY: the caller's promise.
        unsafe { sender::sends::<F>(ctx.cast(), packet) }
    };
    /// XDP.
    Xdp: XdpFlow, xdp_flows, TRACE_AT_XDP, |ctx| {
        // SAFETY: the caller's promise.
        unsafe { (*ctx.cast::<xdp_md>()).ingress_ifindex }
    }, 0, |_packet| false;
}

/// The kernel's maps, as the decision wants them.
pub(crate) struct KernelMaps<H> {
    ctx: *mut c_void,
    hook: PhantomData<H>,
}

impl<H: Hook> KernelMaps<H> {
    /// `ctx` is the program's own context.
    #[inline(always)]
    pub(crate) fn new(ctx: *mut c_void) -> Self {
        Self {
            ctx,
            hook: PhantomData,
        }
    }

    /// The program's own context.
    #[inline(always)]
    pub(crate) fn context(&self) -> *mut c_void {
        self.ctx
    }
}

impl<H: Hook> KernelMaps<H> {
    /// Tells the tracer at a place what became of the packet, when something was counted for it.
    #[inline(always)]
    pub(crate) fn tell<F: KernelFamily>(&self, place: u32) -> u32 {
        let Some(scratch) = F::SCRATCH.get_ptr(0) else {
            return 0;
        };
        // SAFETY: this CPU's own, and programs of the packet path do not interrupt each other.
        let mut record = record::<F>(unsafe { &*scratch });
        if record.events == 0 {
            return 0;
        }
        record.hook = H::TRACED_AS;
        // SAFETY: it is the running program's.
        record.device = unsafe { H::device(self.ctx) };
        trace::send_to(&mut record, place);
        0
    }

    /// Whether the node's socket that would get a packet is connected, or about to be; `None`: there
    /// is none.
    #[inline(always)]
    fn socket<F: KernelFamily>(&self, packet: &Tuple<F::Words>) -> Option<bool> {
        let mut words = [0u64; 5];
        let ports = u64::from(packet.src_port.to_be()) | u64::from(packet.dst_port.to_be()) << 16;
        let addr = size_of::<F::Words>();
        // SAFETY: an address is one or two words.
        unsafe {
            if addr == 4 {
                let (src, dst): (u32, u32) = (
                    core::mem::transmute_copy(&packet.src),
                    core::mem::transmute_copy(&packet.dst),
                );
                words[0] = u64::from(src) | u64::from(dst) << 32;
                words[1] = ports;
            } else {
                let (src, dst): (Words6, Words6) = (
                    core::mem::transmute_copy(&packet.src),
                    core::mem::transmute_copy(&packet.dst),
                );
                words = [src.high, src.low, dst.high, dst.low, ports];
            }
        }
        let (tuple, size) = (
            words.as_mut_ptr().cast::<bpf_sock_tuple>(),
            2 * addr as u32 + 4,
        );
        let netns = BPF_F_CURRENT_NETNS as i64 as u64;
        // SAFETY: the helpers read `size` bytes of `tuple`; `ctx` is the running program's; what
        // they return is read before it is released. Fields of two sizes, because the verifier
        // wants a load of its own for each kind of socket.
        unsafe {
            match packet.proto {
                TCP => {
                    let socket = bpf_skc_lookup_tcp(self.ctx, tuple, size, netns, 0);
                    if socket.is_null() {
                        return None;
                    }
                    let state = (&raw const (*socket).state).read_volatile();
                    bpf_sk_release(socket.cast());
                    Some(state != TCP_LISTEN)
                }
                UDP => {
                    let socket = bpf_sk_lookup_udp(self.ctx, tuple, size, netns, 0);
                    if socket.is_null() {
                        return None;
                    }
                    let peer = (&raw const (*socket).dst_port).read_volatile();
                    bpf_sk_release(socket.cast());
                    Some(peer != 0)
                }
                _ => None,
            }
        }
    }
}

/// What a look-up returned, as an entry; addresses as words instead of bytes.
#[inline(always)]
fn entry<'m, B, W: Copy>(ptr: Option<*mut B>) -> Option<Entry<'m, W>> {
    const { assert!(size_of::<B>() == size_of::<W>() && align_of::<W>() <= 8) };
    // SAFETY: the same layout, map values are aligned to eight bytes; they stay readable and
    // writable while the program runs, and nobody makes references into them.
    ptr.and_then(|ptr| NonNull::new(ptr.cast()))
        .map(|ptr| unsafe { Entry::new(ptr) })
}

/// A key or value with addresses as words, as the map is declared: with bytes.
#[inline(always)]
pub(crate) fn bytes<W, B>(words: &W) -> &B {
    const { assert!(size_of::<B>() == size_of::<W>() && align_of::<B>() <= align_of::<W>()) };
    // SAFETY: the same layout but for the addresses, of which any bytes are one.
    unsafe { &*core::ptr::from_ref(words).cast() }
}

/// A remembered address; words, not bytes, for LLVM's sake
/// ([`shunt_common::family::Family::Words`]).
#[inline(always)]
pub(crate) fn words(addr: &[u8; 16]) -> Words6 {
    let ptr = core::ptr::from_ref(addr).cast::<u32>();
    // SAFETY: sixteen bytes are four words, and [`SocketPeer`] aligns them so.
    let word = |i| unsafe { u64::from(ptr.add(i).read()) };
    Words6 {
        high: word(0) | word(1) << 32,
        low: word(2) | word(3) << 32,
    }
}

/// Adds to a counter that other CPUs add to as well.
#[inline(always)]
fn add(counter: *mut u64) {
    // SAFETY: callers pass the address of an aligned map value's field.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

/// Sets a bit of a bitmap that other CPUs write to as well.
#[inline(always)]
fn set_bit<const N: usize>(map: &Array<u64, N, MMAPABLE>, bit: u32) {
    let (word, mask) = filter::word_and_mask(bit);
    if let Some(word) = map.get_ptr_mut(word) {
        // SAFETY: an aligned live map value.
        unsafe { atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(word, mask) };
    }
}

/// Counts an event.
#[inline(always)]
pub(crate) fn count(event: Event) {
    if let Some(counter) = EVENTS.get_ptr_mut(event as u32) {
        // SAFETY: a per-CPU value: only this CPU writes it.
        unsafe { *counter += 1 };
    }
}

/// Counts an event of a packet, and notes it for whoever traces, also while nobody does: the verifier
/// would follow the rest of the decision twice. Not at sockets, whose programs a packet may
/// interrupt: what is noted is the packet's.
// A function of its own, for the kernel rewrites each look-up in a map when it loads a program, and
// moves all behind it.
#[inline(never)]
fn count_packet<F: KernelFamily>(event: u32) {
    if let Some(counter) = EVENTS.get_ptr_mut(event) {
        // SAFETY: a per-CPU value: only this CPU writes it.
        unsafe { *counter += 1 };
    }
    if let Some(scratch) = F::SCRATCH.get_ptr_mut(0) {
        // SAFETY: this CPU's own, and programs of the packet path do not interrupt each other.
        unsafe { (*scratch).counted |= 1 << (event & 63) };
    }
}

impl<H: Hook> Clock for KernelMaps<H> {
    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: the helper has no preconditions. Coarse time costs a tenth of `bpf_ktime_get_ns`.
        let ns = unsafe { bpf_ktime_get_coarse_ns() };
        ((ns / TICK_NS) as u32).max(1)
    }

    #[inline(always)]
    fn affinity_now(&self) -> u32 {
        // SAFETY: the helper has no preconditions.
        let ns = unsafe { bpf_ktime_get_coarse_ns() };
        (ns / AFFINITY_TICK_NS) as u32
    }

    #[inline(always)]
    fn epoch(&self) -> u16 {
        // SAFETY: the helper has no preconditions. The kernel puts a load in its place. 256 jiffies
        // are 0.256 s at 1000 Hz, 2.56 s at 100 Hz.
        (unsafe { bpf_jiffies64() } >> 8) as u16
    }
}

impl<F: KernelFamily, H: Hook> Maps<F> for KernelMaps<H> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn filter(&self, bit: u32) -> bool {
        let (word, mask) = filter::word_and_mask(bit);
        FILTER.get(word).is_some_and(|word| word & mask != 0)
    }

    #[inline(always)]
    fn client(&self, bit: u32) -> bool {
        let (word, mask) = filter::word_and_mask(bit);
        CLIENTS.get(word).is_some_and(|word| word & mask != 0)
    }

    #[inline(always)]
    fn set_client(&self, bit: u32) {
        set_bit(&CLIENTS, bit);
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<F::Words>) -> Option<Frontend> {
        // SAFETY: the copy is taken at once; an entry replaced meanwhile is freed after this
        // program only.
        unsafe { F::FRONTENDS.get(bytes(key)).copied() }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<Slot<F::Words>> {
        entry::<_, Slot<F::Words>>(F::SLOTS.get_ptr_mut(index)).map(Entry::read)
    }

    #[inline(always)]
    fn is_node_addr(&self, addr: &F::Words) -> bool {
        F::NODE_ADDRS.get_ptr(bytes::<_, F::Addr>(addr)).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        entry(F::AFFINITY.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        F::AFFINITY
            .insert(bytes(key), value, BPF_NOEXIST.into())
            .is_ok()
    }

    #[inline(always)]
    fn new_affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>> {
        entry(F::NEW_AFFINITY.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_new_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool {
        F::NEW_AFFINITY
            .insert(bytes(key), value, BPF_NOEXIST.into())
            .is_ok()
    }

    #[inline(always)]
    fn remove_new_affinity(&self, key: &AffinityKey<F::Words>) {
        let _gone_already = F::NEW_AFFINITY.remove(bytes(key));
    }

    #[inline(always)]
    fn replace_affinity(&self, entry: Entry<'_, Affinity>, old: &Affinity, new: &Affinity) -> bool {
        let word = |value: &Affinity| u64::from(value.last_used) | u64::from(value.backend) << 32;
        const { assert!(cfg!(target_endian = "little")) };
        let (old, new) = (word(old), word(new));
        // SAFETY: a live map value of eight bytes, aligned to eight.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                entry.as_ptr().cast(),
                old,
                new,
            )
            .1
        }
    }

    #[inline(always)]
    fn address(&self, addr: &F::Words) -> u32 {
        match F::SERVICE_ADDRS.get_ptr(bytes::<_, F::Addr>(addr)) {
            // SAFETY: an aligned word of a live map value.
            Some(flags) => unsafe { flags.read() },
            None => 0,
        }
    }

    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<u32> {
        // SAFETY: one aligned word.
        F::SET_MEMBERS
            .get_ptr(key)
            .map(|index| unsafe { index.read() })
    }

    #[inline(always)]
    fn in_source_ranges(&self, key: &SourceRangeKey<F::Words>) -> bool {
        F::SOURCE_RANGES.get(bytes(key)).is_some()
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey<F::Words>) -> Option<FragmentPorts> {
        entry::<_, FragmentPorts>(F::FRAGMENTS.get_ptr_mut(bytes(key))).map(Entry::read)
    }

    #[inline(always)]
    fn add_fragment(&self, key: &FragmentKey<F::Words>, ports: &FragmentPorts) {
        // An LRU refuses nobody but for lack of memory; then the later fragments are lost.
        let _done = F::FRAGMENTS.insert(bytes(key), ports, BPF_ANY.into());
    }

    #[inline(always)]
    fn remove_fragment(&self, key: &FragmentKey<F::Words>) {
        let _not_noted = F::FRAGMENTS.remove(bytes(key));
    }

    #[inline(always)]
    fn route_source(&self, tuple: &Tuple<F::Words>) -> Option<F::Words> {
        // SAFETY: it is the running program's.
        fib::source::<F>(self.ctx, unsafe { H::device(self.ctx) }, tuple)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        entry(F::FLOWS.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        F::FLOWS
            .insert(bytes(key), bytes(flow), BPF_ANY.into())
            .is_ok()
    }

    #[inline(always)]
    fn may_wait(&self) -> bool {
        // Below zero, after a recount, is few.
        HALF_OPEN
            .get(F::INDEX)
            .is_some_and(|count| count.cast_signed() < i64::from(MAX_HALF_OPEN.load()))
    }

    #[inline(always)]
    fn add_half_open(&self, more: i64) {
        if let Some(count) = HALF_OPEN.get_ptr_mut(F::INDEX) {
            // SAFETY: an aligned live map value.
            unsafe {
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, more.cast_unsigned())
            };
        }
    }

    #[inline(always)]
    fn unconfirmed_flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>> {
        entry(F::UNCONFIRMED.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_unconfirmed(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool {
        F::UNCONFIRMED
            .insert(bytes(key), bytes(flow), BPF_ANY.into())
            .is_ok()
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey<F::Words>) {
        let _gone_already = F::FLOWS.remove(bytes(key));
    }

    #[inline(always)]
    fn remove_unconfirmed(&self, key: &FlowKey<F::Words>) {
        let _gone_already = F::UNCONFIRMED.remove(bytes(key));
    }

    #[inline(always)]
    fn direct(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        entry(F::DIRECT.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_direct(&self, key: &DirectKey<F::Words>, now: u32) {
        // An LRU refuses nobody but for lack of memory; the next packet is noted again.
        let _done = F::DIRECT.insert(bytes(key), now, BPF_ANY.into());
    }

    #[inline(always)]
    fn bypass(&self, key: &DirectKey<F::Words>) -> Option<Entry<'_, u32>> {
        entry(F::BYPASS.get_ptr_mut(bytes(key)))
    }

    #[inline(always)]
    fn add_bypass(&self, key: &DirectKey<F::Words>, now: u32) {
        // As above.
        let _done = F::BYPASS.insert(bytes(key), now, BPF_ANY.into());
    }

    #[inline(always)]
    fn snat(&self, index: u32) -> Option<Entry<'_, SnatSlot<F::Words>>> {
        entry(F::SNAT.get_ptr_mut(index))
    }

    #[inline(always)]
    fn claim(&self, slot: Entry<'_, SnatSlot<F::Words>>, old: (u32, u32), new: (u32, u32)) -> bool {
        let word = |(seen, owner): (u32, u32)| {
            if cfg!(target_endian = "little") {
                u64::from(seen) | u64::from(owner) << 32
            } else {
                u64::from(seen) << 32 | u64::from(owner)
            }
        };
        let (old, new) = (word(old), word(new));
        // SAFETY: two fields side by side of a live map value, aligned to eight.
        unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                slot.last_seen().cast(),
                old,
                new,
            )
            .1
        }
    }

    #[inline(always)]
    fn socket_takes(&self, reply: &Tuple<F::Words>) -> bool {
        self.socket::<F>(reply).is_some()
    }

    #[inline(always)]
    fn socket_owns(&self, packet: &Tuple<F::Words>) -> bool {
        self.socket::<F>(packet) == Some(true)
    }

    #[inline(always)]
    fn is_senders_own(&self, packet: &Tuple<F::Words>) -> bool {
        // SAFETY: it is the running program's.
        unsafe { H::is_senders_own::<F>(self.ctx, packet) }
    }

    #[inline(always)]
    fn hooked(&self, packet: &Tuple<F::Words>) -> Option<Hooked<F::Words>> {
        // SAFETY: it is the running program's; what it says is copied at once.
        let peer = unsafe { SOCKETS.get(H::sender(self.ctx)) }?;
        (words(&peer.backend) == F::mapped(packet.dst) && peer.backend_port == packet.dst_port)
            .then(|| Hooked {
                frontend: F::unmapped(words(&peer.frontend)),
                frontend_port: peer.frontend_port,
                backend: peer.backend(),
            })
    }

    #[inline(always)]
    fn scratch(&self) -> Option<&mut Scratch<F::Words>> {
        // SAFETY: this CPU's own, and programs of the packet path do not interrupt each other.
        F::SCRATCH.get_ptr_mut(0).map(|ptr| unsafe { &mut *ptr })
    }

    #[inline(always)]
    fn port_is_shared(&self, bit: u32) -> bool {
        let (word, mask) = filter::word_and_mask(bit);
        SHARED_PORTS.get(word).is_some_and(|word| word & mask != 0)
    }

    #[inline(always)]
    fn set_port_shared(&self, bit: u32) {
        set_bit(&SHARED_PORTS, bit);
    }

    #[inline(always)]
    fn backend_flags(&self, backend: u32) -> u16 {
        BACKENDS.get(backend).map_or(0, |state| state.flags)
    }

    #[inline(always)]
    fn backend(&self, backend: u32) -> Option<Entry<'_, BackendState>> {
        entry(BACKENDS.get_ptr_mut(backend))
    }

    #[inline(always)]
    fn may_answer(&self, answered: &Tuple<F::Words>) -> bool {
        // Nobody can be answered there.
        if F::is_group(answered.src) || F::is_group(answered.dst) {
            return false;
        }
        let may = answers::may_answer::<F>(bytes(&answered.src));
        if !may {
            Maps::<F>::count(self, Event::AnswerLimited);
        }
        may
    }

    #[inline(always)]
    fn count_flow(&self, backend: u32) {
        if let Some(state) = BACKENDS.get_ptr_mut(backend) {
            // SAFETY: a live map value.
            add(unsafe { H::counter(state) });
        }
        Maps::<F>::count(self, H::NEW_FLOW);
    }

    #[inline(always)]
    fn count_snat_refused(&self, backend: u32) {
        if let Some(state) = BACKENDS.get_ptr_mut(backend) {
            // SAFETY: a live map value.
            add(unsafe { &raw mut (*state).snat_refused });
        }
    }

    #[inline(always)]
    fn count(&self, event: Event) {
        if H::TRACED_AS == TRACE_AT_SOCKET {
            count(event);
        } else {
            count_packet::<F>(event as u32);
        }
    }
}
