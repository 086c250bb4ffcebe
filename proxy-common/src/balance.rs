//! The decision: what becomes of a packet, at whichever hook it is seen.
//!
//! A flow is one entry, keyed by the client's side ([`FlowKey`]). A packet towards a frontend is recognised where it
//! **arrives** at the node, its reply where it **leaves** towards the client, by tuple alone; so replies that are
//! bridged at layer 2 are caught as well.
//!
//! ```text
//!                  arrives ([`arriving`])                     leaves ([`leaving`])
//! client → backend C:cp → F:fp  becomes  C:sp → B:bp          C:sp → B:bp  becomes  N:sp → B:bp   (SNAT only)
//! backend → client B:bp → N:sp  becomes  B:bp → C:sp (SNAT)   B:bp → C:sp  becomes  F:fp → C:cp
//! ```
//!
//! Source translation is split so that the kernel never sees one of its own addresses as the source of an arriving
//! packet (which it would drop as martian), and netfilter in between sees one connection. XDP, which sends packets on
//! itself, does both halves at once ([`Arrival::sends_on`]). Without SNAT `sp` is `cp`, and only the frontend's side
//! changes.

use core::{marker::PhantomData, mem::offset_of, ptr::NonNull};

use crate::{
    address::{self, Stranger},
    affinity,
    event::Event,
    family::Family,
    filter, hash,
    layout::*,
    odd::Odd,
    packet::{ACK, FIN, RST, SYN, Tuple},
    reset, retry, snat,
    timeouts::is_closed,
};

/// Ticks ([`TICK_NS`]) after which a source port may serve another connection, when its own is closed or was never answered
/// and no other port is left; else the node's [`Timeouts`] say when.
const HURRY_TICKS: u32 = 2;

/// Longest step of the search for a source port.
const MAX_STEP: u32 = 1023;
/// Epochs ([`Flow::epoch`]) without an answer after which a backend that is no endpoint any more counts as gone for good.
const SILENT_EPOCHS: u16 = 2;

/// Rounds of the search for a source port: a closer look at one, then a quick look at [`snat::MAX_TRIES`] more.
const ROUNDS: u32 = 4;
/// Most ports of a range that is searched wholly, by all rounds but the last.
const MAX_WHOLE: u32 = (ROUNDS - 1) * snat::MAX_TRIES;
/// No offset into the SNAT range.
const NO_OFFSET: u32 = u32::MAX;

/// An entry in a map: alive while the program runs, and written by other CPUs at any time.
pub struct Entry<'m, T> {
    ptr: NonNull<T>,
    map: PhantomData<&'m T>,
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

impl<T: Copy> Entry<'_, T> {
    /// Wraps what a map look-up returned.
    ///
    /// # Safety
    /// `ptr` must stay readable and writable for the entry's lifetime, and nobody may hold a reference into it.
    #[inline(always)]
    pub unsafe fn new(ptr: NonNull<T>) -> Self {
        Self { ptr, map: PhantomData }
    }

    /// Where the value stands, for atomic access.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut T {
        self.ptr.as_ptr()
    }

    /// A copy of the value; fields that are not looked at are not loaded.
    #[inline(always)]
    pub fn read(self) -> T {
        // SAFETY: valid by `new`'s contract. A value that another CPU changes in between is a mix of two valid ones.
        unsafe { self.ptr.as_ptr().read() }
    }

    /// Replaces the value in place: no map operation, so a full LRU evicts nobody.
    #[inline(always)]
    pub fn write(self, value: &T) {
        // SAFETY: valid by `new`'s contract.
        unsafe { copy(value, self.ptr.as_ptr()) };
    }

    /// Copies the value to memory of the caller's.
    #[inline(always)]
    pub fn copy_to(self, value: &mut T) {
        // SAFETY: valid by `new`'s contract.
        unsafe { copy(self.ptr.as_ptr(), value) };
    }
}

/// Copies word by word: LLVM would call a `memmove` for it that goes byte by byte.
///
/// # Safety
/// `from` must be readable, `to` writable, both aligned; `T` must be made of whole words, without padding.
#[inline(always)]
unsafe fn copy<T>(from: *const T, to: *mut T) {
    const { assert!(align_of::<T>() >= 4 && size_of::<T>().is_multiple_of(4)) };
    // SAFETY: the caller's promise.
    unsafe {
        if align_of::<T>() == 8 {
            let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
            (0..size_of::<T>() / 8).for_each(|i| to.add(i).write_volatile(from.add(i).read()));
        } else {
            let (from, to) = (from.cast::<u32>(), to.cast::<u32>());
            (0..size_of::<T>() / 4).for_each(|i| to.add(i).write_volatile(from.add(i).read()));
        }
    }
}

/// An entry and what it held.
type Read<'m, T> = (Entry<'m, T>, T);

/// A value that carries a flow's state and age.
pub trait Tracked: Copy {
    /// Offset of the `FLOW_*` bits, in bytes.
    const STATE: usize;
    /// Offset of the time stamp, in bytes.
    const LAST_SEEN: usize;
    /// Offset of the cheap clock's time stamp, in bytes.
    const EPOCH: usize;
}

impl<A: Copy> Tracked for Flow<A> {
    const STATE: usize = offset_of!(Self, state);
    const LAST_SEEN: usize = offset_of!(Self, last_seen);
    const EPOCH: usize = offset_of!(Self, epoch);
}

impl<A: Copy> Tracked for SnatSlot<A> {
    const STATE: usize = offset_of!(Self, state);
    const LAST_SEEN: usize = offset_of!(Self, last_seen);
    const EPOCH: usize = offset_of!(Self, epoch);
}

impl<A: Copy> Entry<'_, Flow<A>> {
    /// Notes when a packet went to a backend that may not answer ([`Flow::asked`]).
    #[inline(always)]
    pub(crate) fn ask(self, time: u16) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe { (&raw mut (*self.ptr.as_ptr()).asked).write(time) };
    }
}

impl<T: Tracked> Entry<'_, T> {
    /// Sets state bits, and nothing else.
    #[inline(always)]
    pub(crate) fn set(self, bits: u16) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe {
            let state: *mut u16 = self.ptr.as_ptr().byte_add(T::STATE).cast();
            *state |= bits;
        }
    }

    /// Takes state bits back.
    #[inline(always)]
    pub(crate) fn clear(self, bits: u16) {
        // SAFETY: an aligned field of an entry that is valid by `new`'s contract.
        unsafe {
            let state: *mut u16 = self.ptr.as_ptr().byte_add(T::STATE).cast();
            *state &= !bits;
        }
    }

    /// Address of the time stamp, for an atomic exchange.
    #[inline(always)]
    pub fn last_seen(self) -> *mut u32 {
        // SAFETY: the offset lies within the value.
        unsafe { self.ptr.as_ptr().byte_add(T::LAST_SEEN).cast() }
    }

    /// Notes a packet: state bits when they are new, the time when the cheap clock has moved on. Returns whether it had.
    #[inline(always)]
    fn note<F: Family>(self, maps: &impl Maps<F>, bits: u16) -> bool {
        // SAFETY: aligned fields of an entry that is valid by `new`'s contract.
        unsafe {
            let state: *mut u16 = self.ptr.as_ptr().byte_add(T::STATE).cast();
            let epoch: *mut u16 = self.ptr.as_ptr().byte_add(T::EPOCH).cast();
            let old = *state;
            if old | bits != old {
                *state = old | bits;
            }
            let now = maps.epoch();
            let passed = *epoch != now;
            if passed {
                *epoch = now;
                *self.last_seen() = maps.now();
            }
            passed
        }
    }
}

/// The maps, as far as decisions need them: the kernel's, or `std` ones in tests.
pub trait Maps<F: Family> {
    /// The node's configuration.
    fn config(&self) -> Option<&Config>;
    /// Whether a bit of `filter` is set.
    fn filter(&self, bit: u32) -> bool;
    /// Whether a bit of `clients` is set.
    fn client(&self, bit: u32) -> bool;
    /// Sets a bit of `clients`.
    fn set_client(&self, bit: u32);
    /// A frontend.
    fn frontend(&self, key: &FrontendKey<F::Words>) -> Option<Frontend>;
    /// A slot.
    fn slot(&self, index: u32) -> Option<Slot<F::Words>>;
    /// Whether node ports answer on this address.
    fn is_node_addr(&self, addr: &F::Words) -> bool;
    /// An entry of `affinity`.
    fn affinity(&self, key: &AffinityKey<F::Words>) -> Option<Entry<'_, Affinity>>;
    /// Adds to `affinity`; `false` when there is an entry by now, or the map refuses.
    fn add_affinity(&self, key: &AffinityKey<F::Words>, value: &Affinity) -> bool;
    /// Replaces the value of an entry of `affinity`, unless another CPU was first.
    fn replace_affinity(&self, entry: Entry<'_, Affinity>, old: &Affinity, new: &Affinity) -> bool;
    /// `CLOCK_MONOTONIC` in [`AFFINITY_TICK_NS`].
    fn affinity_now(&self) -> u32;
    /// The index of a backend's slot, if it is a member of the slots.
    fn member(&self, key: &MemberKey) -> Option<u32>;
    /// Whether a source is in one of a Service's `source_ranges`; the prefix is as long as can be.
    fn in_source_ranges(&self, key: &SourceRangeKey<F::Words>) -> bool;
    /// The `ADDRESS_*` bits of an address; 0 for one that no Service has.
    fn address(&self, addr: &F::Words) -> u32;
    /// The ports of a datagram in fragments.
    fn fragment(&self, key: &FragmentKey<F::Words>) -> Option<FragmentPorts>;
    /// Notes the ports of a datagram in fragments.
    fn add_fragment(&self, key: &FragmentKey<F::Words>, ports: &FragmentPorts);
    /// An entry of `flows`.
    fn flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>>;
    /// Adds to `flows`; `false` when the map refuses.
    fn add_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool;
    /// Removes from `flows`.
    fn remove_flow(&self, key: &FlowKey<F::Words>);
    /// Whether few enough flows wait for an answer in `flows` that one more may.
    fn may_wait(&self) -> bool;
    /// Notes that one more flow waits there, or one less.
    fn add_waiting(&self, more: i64);
    /// An entry of `new_flows`.
    fn new_flow(&self, key: &FlowKey<F::Words>) -> Option<Entry<'_, Flow<F::Words>>>;
    /// Adds to `new_flows`; `false` when the map refuses.
    fn add_new_flow(&self, key: &FlowKey<F::Words>, flow: &Flow<F::Words>) -> bool;
    /// Removes from `new_flows`.
    fn remove_new_flow(&self, key: &FlowKey<F::Words>);
    /// A slot of `snat`.
    fn snat(&self, index: u32) -> Option<Entry<'_, SnatSlot<F::Words>>>;
    /// Sets a SNAT slot's `last_seen` from `seen` to `now`, unless another CPU was first.
    fn claim(&self, slot: Entry<'_, SnatSlot<F::Words>>, seen: u32, now: u32) -> bool;
    /// Whether a socket of this node would get packets of this tuple (a reply's: from the backend to the node).
    fn socket_takes(&self, reply: &Tuple<F::Words>) -> bool;
    /// Memory of this program run's own.
    #[expect(clippy::mut_from_ref, reason = "per-CPU memory, asked for once in a run")]
    fn scratch(&self) -> Option<&mut Scratch<F::Words>>;
    /// Whether a word of `collided` has a bit set.
    fn collided(&self, bit: u32) -> bool;
    /// Sets a bit of `collided`.
    fn set_collided(&self, bit: u32);
    /// `BACKEND_*` bits.
    fn backend_flags(&self, backend: u32) -> u16;
    /// An entry of `backends`.
    fn backend(&self, backend: u32) -> Option<Entry<'_, BackendState>>;
    /// Counts a new flow of a backend, under the hook that runs.
    fn count_flow(&self, backend: u32);
    /// Counts an event.
    fn count(&self, event: Event);
    /// `CLOCK_MONOTONIC` in [`TICK_NS`], at least 1.
    fn now(&self) -> u32;
    /// A clock that costs next to nothing and says no more than whether time has passed: see [`Flow::epoch`].
    fn epoch(&self) -> u16;
}

/// Where packets come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// A device of a pod on this node.
    Pod,
    /// A device of the node: the network.
    Network,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<A> {
    /// Not ours.
    Pass,
    /// Ours, with a new tuple.
    Translate(Translation<A>),
    /// Ours, and there is no backend: answer with port unreachable.
    Refuse,
    /// Ours, and not allowed or not possible.
    Drop,
    /// Of a connection whose backend is no more: answer with a reset ([`crate::reset`]).
    Reset,
}

/// A packet's new tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<A> {
    /// What the packet carries from here on.
    pub tuple: Tuple<A>,
    /// The receiver is on this node: hand the packet to the kernel, do not send it on.
    pub local: bool,
    /// Whose traffic the packet is.
    pub counted: Counted,
}

/// Whose traffic a packet is. Of the two halves of a translation one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Index into `backends`; [`Self::NOBODY`]: the other half counts.
    pub backend: u32,
    /// It comes from the backend.
    pub reply: bool,
}

impl Counted {
    /// No backend: not counted here.
    pub const NOBODY: u32 = u32::MAX;
    /// Counted by the other half, or nobody's.
    pub const ELSEWHERE: Self = Self {
        backend: Self::NOBODY,
        reply: false,
    };

    #[inline(always)]
    const fn reply(backend: u32) -> Self {
        Self { backend, reply: true }
    }
}

/// A packet that arrives, and the circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<A> {
    /// What it carries.
    pub tuple: Tuple<A>,
    /// TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// Where it came in.
    pub from: From,
    /// The hook sends packets for other nodes on by itself, so both halves of the translation are due.
    pub sends_on: bool,
}

/// What becomes of a packet, as far as open flows tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quick<A> {
    /// Not ours.
    Pass,
    /// Of an open flow.
    Translate(Translation<A>),
    /// It may open one, or tells that nobody will: see [`undecided`] and [`refused`].
    Undecided,
}

/// A packet that arrives at the node through a device.
#[inline(always)]
pub fn arriving<F: Family, M: Maps<F>>(maps: &M, arrival: &Arrival<F::Words>) -> Verdict<F::Words> {
    match established(maps, arrival) {
        Quick::Pass => Verdict::Pass,
        Quick::Translate(to) => Verdict::Translate(to),
        Quick::Undecided => {
            let Some(scratch) = maps.scratch() else {
                return Verdict::Pass;
            };
            match undecided(maps, scratch, arrival) {
                Outcome::Pass => Verdict::Pass,
                Outcome::Translate => Verdict::Translate(scratch.translation),
                Outcome::Refuse => Verdict::Refuse,
                Outcome::Drop => Verdict::Drop,
                Outcome::Reset => Verdict::Reset,
            }
        }
    }
}

/// The first half of [`arriving`]: all there is to do for packets of open flows, and those of no Service.
#[inline(always)]
pub fn established<F: Family, M: Maps<F>>(maps: &M, arrival: &Arrival<F::Words>) -> Quick<F::Words> {
    let tuple = &arrival.tuple;
    // A reply to a translated source comes before any frontend: a SNAT port could be a frontend's too.
    let Some(config) = maps.config() else {
        return Quick::Pass;
    };
    if snat::in_range(config, tuple.dst_port)
        && maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
    {
        match snat_reply_arriving(maps, config, arrival) {
            Quick::Pass => {}
            quick => return quick,
        }
    }

    if maps.filter(filter::service::<F>(tuple.dst)) || maps.filter(filter::node_port(tuple.dst_port)) {
        let key = client_key::<F>(tuple);
        // A port whose connection is over is reused in place: such a flow may wait for its first answer here as well.
        if let Some(flow) = maps.flow(&key)
            && !(arrival.tcp_flags & SYN != 0 && retry::is_open(flow.read().state))
            && let Some(translation) = forward(maps, config, flow, arrival)
        {
            return Quick::Translate(translation);
        }
        if may_be_frontend::<F>(maps, tuple) {
            return Quick::Undecided;
        }
    }
    // The next step judges unknown ports and addresses.
    if address::may_be_service::<F>(config, tuple.dst) {
        Quick::Undecided
    } else {
        Quick::Pass
    }
}

/// Whether a frontend may have the packet's destination.
#[inline(always)]
pub(crate) fn may_be_frontend<F: Family>(maps: &impl Maps<F>, tuple: &Tuple<F::Words>) -> bool {
    maps.filter(filter::node_port(tuple.dst_port))
        || maps.filter(filter::frontend::<F>(tuple.dst, tuple.dst_port, tuple.proto))
}

/// [`Verdict`], with the translation left in [`Scratch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// Not ours.
    Pass,
    /// Ours: [`Scratch::translation`].
    Translate,
    /// Ours, and there is no backend.
    Refuse,
    /// Ours, and not allowed or not possible.
    Drop,
    /// Of a connection whose backend is no more: answer with a reset.
    Reset,
}

/// The second half of [`arriving`]: a packet towards a possible frontend that no established flow of its client's side
/// explains.
#[inline(always)]
pub fn undecided<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    arrival: &Arrival<F::Words>,
) -> Outcome {
    scratch.arrival = *arrival;
    decide(maps, scratch)
}

/// Memory for the path of few packets: the BPF stack holds 512 bytes for a whole chain of calls, and an IPv6 flow with its
/// keys has more.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch<A> {
    pub(crate) arrival: Arrival<A>,
    /// Where the packet goes, after [`Outcome::Translate`].
    pub translation: Translation<A>,
    pub(crate) key: FlowKey<A>,
    own_port: FlowKey<A>,
    pub(crate) frontend_key: FrontendKey<A>,
    pub(crate) frontend: Frontend,
    /// The backend for the flow.
    pub(crate) chosen: Slot<A>,
    pub(crate) flow: Flow<A>,
    pub(crate) reply: Tuple<A>,
    slot: SnatSlot<A>,
    pub(crate) search: Search,
    pub(crate) retry: retry::Progress,
    /// Whether the flow is written over one that is over.
    over: Opaque,
    pub(crate) odd: Odd<A>,
}

/// Where the search for a source port stands.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// Offset into the SNAT range that is looked at.
    offset: Opaque,
    /// Offset found.
    found: Opaque,
    /// Offset of the port that can be taken in a hurry ([`HURRY_TICKS`]), and since when nobody used it.
    oldest: Opaque,
    oldest_seen: Opaque,
    /// [`SnatSlot::owner`] of the flow.
    owner: Opaque,
    /// Ticks after which a slot is free.
    limit: Opaque,
    /// Whether no free port was found.
    hurry: Opaque,
    /// A condition.
    pub(crate) flag: Opaque,
}

/// A number that the verifier knows nothing about, because it stands in memory that it does not follow. It walks a loop
/// once for every combination of what it does know, and would not come to an end.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opaque(u32);

impl Opaque {
    #[inline(always)]
    pub(crate) fn get(&self) -> u32 {
        // SAFETY: a reference is readable; volatile, so that LLVM does not remember what was written.
        unsafe { (&raw const self.0).read_volatile() }
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, value: u32) {
        // SAFETY: a reference is writable.
        unsafe { (&raw mut self.0).write_volatile(value) };
    }

    /// The condition, forgotten and remembered.
    #[inline(always)]
    pub(crate) fn hide(&mut self, condition: bool) -> bool {
        self.set(u32::from(condition));
        self.get() != 0
    }
}

/// [`arriving`] of the packet in `scratch.arrival`, for those that are not in a hurry. A translation is left in `scratch`.
#[inline(never)]
pub(crate) fn arriving_slowly<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let step = established_slowly(maps, scratch) as u32;
    scratch.search.flag.set(step);
    match scratch.search.flag.get() {
        0 => Outcome::Pass,
        1 => Outcome::Translate,
        2 => Outcome::Refuse,
        3 => Outcome::Drop,
        _ => decide(maps, scratch),
    }
}

/// [`established`] in the same way. [`Step::Open`]: undecided.
#[inline(never)]
fn established_slowly<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    let Some(config) = maps.config() else {
        return Step::Pass;
    };
    let tuple = &scratch.arrival.tuple;
    if snat::in_range(config, tuple.dst_port)
        && maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
    {
        match snat_reply_arriving(maps, config, &scratch.arrival) {
            Quick::Pass => {}
            Quick::Translate(translation) => {
                scratch.translation = translation;
                return Step::Translate;
            }
            Quick::Undecided => return Step::Open,
        }
    }
    if !may_be_frontend::<F>(maps, tuple) {
        return match address::unknown_port(maps, tuple.dst) {
            Stranger::Pass => Step::Pass,
            Stranger::Refuse => Step::Refuse,
            Stranger::Drop => Step::Drop,
        };
    }
    scratch.key = client_key::<F>(tuple);
    if let Some(flow) = maps.flow(&scratch.key)
        && !(scratch.arrival.tcp_flags & SYN != 0 && retry::is_open(flow.read().state))
        && explains(maps, flow, scratch)
    {
        return Step::Translate;
    }
    Step::Open
}

/// [`leaving`] in the same way.
#[inline(never)]
pub(crate) fn leaving_slowly<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    match answering::<F, M>(maps, &scratch.arrival.tuple, scratch.arrival.tcp_flags) {
        Quick::Pass => Outcome::Pass,
        Quick::Translate(translation) => {
            scratch.translation = translation;
            Outcome::Translate
        }
        Quick::Undecided => refuse_leaving(maps, scratch),
    }
}

/// [`answering`]'s second half: the refusal of a SYN, on its way out.
#[inline(always)]
pub fn refused<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    tuple: &Tuple<F::Words>,
    tcp_flags: u8,
) -> Outcome {
    scratch.arrival.tuple = *tuple;
    scratch.arrival.tcp_flags = tcp_flags;
    refuse_leaving(maps, scratch)
}

#[inline(never)]
fn refuse_leaving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    if retry::is_held_back(maps, scratch, true) {
        return Outcome::Drop;
    }
    retry::end(maps, scratch);
    tell_leaving(maps, scratch)
}

#[inline(never)]
fn tell_leaving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    match answering::<F, M>(maps, &scratch.arrival.tuple, scratch.arrival.tcp_flags) {
        Quick::Translate(translation) => {
            scratch.translation = translation;
            Outcome::Translate
        }
        _ => Outcome::Pass,
    }
}

/// The refusal of a SYN to a translated source, where it arrives.
#[inline(never)]
fn refuse_arriving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    if retry::is_held_back(maps, scratch, false) {
        return Outcome::Drop;
    }
    retry::end(maps, scratch);
    tell_arriving(maps, scratch)
}

#[inline(never)]
fn tell_arriving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let Some(config) = maps.config() else {
        return Outcome::Pass;
    };
    match snat_reply_arriving(maps, config, &scratch.arrival) {
        Quick::Translate(translation) => {
            scratch.translation = translation;
            Outcome::Translate
        }
        _ => Outcome::Pass,
    }
}

/// The steps of [`undecided`].
// Each step is a function of its own that leaves what it found in `scratch`: so its locals share the stack with the
// other steps' locals, and the verifier walks it once, not once for every way through the step before.
#[inline(never)]
fn decide<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let orphaned = is_orphaned(maps, scratch);
    if scratch.search.flag.hide(orphaned) {
        maps.count(Event::BackendGone);
        return Outcome::Reset;
    }
    let step = find(maps, scratch) as u32;
    scratch.search.flag.set(step);
    match scratch.search.flag.get() {
        0 => return Outcome::Pass,
        1 => return Outcome::Translate,
        2 => return Outcome::Refuse,
        3 => return Outcome::Drop,
        _ => {}
    }
    open(maps, scratch);
    if scratch.flow.state & FLOW_SNAT != 0 && !translate_source(maps, scratch) {
        maps.count(Event::SnatExhausted);
        return Outcome::Drop;
    }
    remember(maps, scratch);
    Outcome::Translate
}

/// What [`find`] found: an [`Outcome`], or a backend.
#[repr(u32)]
enum Step {
    Pass = Outcome::Pass as u32,
    Translate = Outcome::Translate as u32,
    Refuse = Outcome::Refuse as u32,
    Drop = Outcome::Drop as u32,
    /// A flow to [`Scratch::chosen`] is to be opened.
    Open,
}

/// Looks for the packet's flow, else for a backend.
#[inline(never)]
fn find<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    if scratch.arrival.tcp_flags & RST != 0 {
        let refused = retry::refuses(maps, scratch);
        if scratch.search.flag.hide(refused) {
            let outcome = refuse_arriving(maps, scratch) as u32;
            scratch.search.flag.set(outcome);
            return match scratch.search.flag.get() {
                1 => Step::Translate,
                3 => Step::Drop,
                _ => Step::Pass,
            };
        }
    }
    scratch.retry.begin();
    let again = retry::again(maps, scratch) as u32;
    scratch.search.flag.set(again);
    match scratch.search.flag.get() {
        0 => {
            let recalled = recall(maps, scratch);
            if scratch.search.flag.hide(recalled) {
                return Step::Translate;
            }
        }
        1 => return Step::Translate,
        _ => {}
    }
    let outcome = look_up(maps, scratch) as u32;
    scratch.search.flag.set(outcome);
    match scratch.search.flag.get() {
        0 => return Step::Pass,
        1 => {}
        2 => return Step::Refuse,
        _ => return Step::Drop,
    }
    if scratch.retry.tried() != 0 {
        let moved = retry::move_on(maps, scratch) as u32;
        scratch.search.flag.set(moved);
        match scratch.search.flag.get() {
            0 => return Step::Open,
            1 => return Step::Translate,
            _ => scratch.retry.begin(),
        }
    }
    let outcome = choose(maps, scratch) as u32;
    scratch.search.flag.set(outcome);
    match scratch.search.flag.get() {
        1 => {}
        2 => return Step::Refuse,
        _ => return Step::Drop,
    }
    retry::avoid_silent(maps, scratch);
    Step::Open
}

/// Whether the packet is of an open connection to a backend that is no more. The connection is closed then.
#[inline(never)]
fn is_orphaned<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let tuple = &scratch.arrival.tuple;
    if !reset::is_due(tuple.proto, scratch.arrival.tcp_flags) {
        return false;
    }
    let mut orphaned = false;
    scratch.key = client_key::<F>(tuple);
    if let Some(entry) = maps.flow(&scratch.key) {
        orphaned = orphan(maps, entry, tuple);
    }
    if maps.collided(collided_bit::<F>(tuple)) {
        scratch.key = shared_key::<F>(tuple);
        if let Some(entry) = maps.flow(&scratch.key) {
            orphaned |= orphan(maps, entry, tuple);
        }
    }
    orphaned
}

#[inline(always)]
fn orphan<F: Family, M: Maps<F>>(maps: &M, entry: Entry<'_, Flow<F::Words>>, tuple: &Tuple<F::Words>) -> bool {
    let flow = entry.read();
    let is = flow.frontend == tuple.dst
        && flow.frontend_port == tuple.dst_port
        && maps.backend_flags(flow.backend_id) & BACKEND_GONE != 0
        && is_silent(maps, entry, TCP);
    if is {
        entry.note(maps, FLOW_RESET);
    }
    is
}

/// Looks for the flow among those not yet confirmed, and those whose client's port is shared.
#[inline(never)]
fn recall<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    scratch.key = client_key::<F>(&scratch.arrival.tuple);
    if let Some(flow) = maps.new_flow(&scratch.key)
        && unconfirmed(maps, flow, scratch)
    {
        return true;
    }
    // Another CPU may have moved the flow to `flows` since that was looked at. Chosen anew, a connection would be cut in two.
    if scratch.arrival.tuple.proto == TCP
        && scratch.arrival.tcp_flags & SYN == 0
        && let Some(flow) = maps.flow(&scratch.key)
        && explains(maps, flow, scratch)
    {
        return true;
    }
    if maps.collided(collided_bit::<F>(&scratch.arrival.tuple)) {
        scratch.key = shared_key::<F>(&scratch.arrival.tuple);
        if let Some(flow) = maps.flow(&scratch.key)
            && explains(maps, flow, scratch)
        {
            return true;
        }
        if let Some(flow) = maps.new_flow(&scratch.key)
            && unconfirmed(maps, flow, scratch)
        {
            return true;
        }
    }
    false
}

/// [`forward`], with the translation left in `scratch`.
#[inline(always)]
pub(crate) fn explains<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    let Some(config) = maps.config() else { return false };
    match forward(maps, config, entry, &scratch.arrival) {
        Some(translation) => {
            scratch.translation = translation;
            true
        }
        None => false,
    }
}

/// A packet that leaves the node, or goes to one of its pods, through a device.
#[inline(always)]
pub fn leaving<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>, tcp_flags: u8) -> Verdict<F::Words> {
    match answering(maps, tuple, tcp_flags) {
        Quick::Pass => Verdict::Pass,
        Quick::Translate(to) => Verdict::Translate(to),
        Quick::Undecided => {
            let Some(scratch) = maps.scratch() else {
                return Verdict::Pass;
            };
            match refused(maps, scratch, tuple, tcp_flags) {
                Outcome::Translate => Verdict::Translate(scratch.translation),
                Outcome::Drop => Verdict::Drop,
                _ => Verdict::Pass,
            }
        }
    }
}

/// The first half of [`leaving`]: all there is to do but for refusals of SYNs.
#[inline(always)]
pub fn answering<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>, tcp_flags: u8) -> Quick<F::Words> {
    let Some(config) = maps.config() else {
        return Quick::Pass;
    };
    if maps.filter(filter::backend_port(tuple.src_port)) && maps.client(filter::client::<F>(tuple.dst)) {
        let state = reply_state(tuple.proto, tcp_flags);
        if snat::in_range(config, tuple.dst_port)
            && let Some((entry, slot)) = snat_slot(maps, config, tuple.dst_port, tuple.src, tuple.src_port, tuple.proto)
            && slot.client == tuple.dst
        {
            if tcp_flags & (SYN | RST) != 0 && retry::is_open(slot.state) {
                if tcp_flags & RST != 0 {
                    return Quick::Undecided;
                }
                retry::answered(maps, slot.backend_id);
            }
            entry.note(maps, state);
            if slot.state & FLOW_ASKED != 0 {
                entry.clear(FLOW_ASKED);
            }
            let tuple = Tuple {
                src: slot.frontend,
                src_port: slot.frontend_port,
                dst_port: slot.client_port,
                ..*tuple
            };
            return translate(tuple, Counted::reply(slot.backend_id));
        }
        let key = FlowKey {
            client: tuple.dst,
            client_port: tuple.dst_port,
            ..client_key::<F>(tuple)
        };
        match reply(maps, maps.flow(&key), tuple, state, tcp_flags) {
            Quick::Pass => {}
            quick => return quick,
        }
        match reply(maps, maps.new_flow(&key), tuple, state, tcp_flags) {
            Quick::Pass => {}
            quick => return quick,
        }
    }
    if snat::in_range(config, tuple.src_port)
        && maps.filter(filter::backend::<F>(tuple.dst, tuple.dst_port, tuple.proto))
        && let Some((_, slot)) = snat_slot(maps, config, tuple.src_port, tuple.dst, tuple.dst_port, tuple.proto)
        && slot.client == tuple.src
        && slot.snat != tuple.src
    {
        let tuple = Tuple {
            src: slot.snat,
            ..*tuple
        };
        return translate(tuple, Counted::ELSEWHERE);
    }
    Quick::Pass
}

/// Finds the frontend for a socket's destination, and whether to look at it at all. `node_itself`: the destination is
/// an address that means this node (one of `node_addrs`, or loopback in the node's own namespace).
#[inline(always)]
pub fn socket_frontend<F: Family, M: Maps<F>>(
    maps: &M,
    dst: F::Words,
    port: u16,
    proto: u8,
    node_itself: impl FnOnce() -> bool,
) -> Option<Frontend> {
    let key = FrontendKey {
        addr: dst,
        port,
        proto,
        scope: SCOPE_INTERNAL,
        reserved: 0,
    };
    let frontend = if maps.filter(filter::frontend::<F>(dst, port, proto)) {
        maps.frontend(&key)
    } else {
        None
    };
    let frontend = match frontend {
        Some(frontend) => frontend,
        None if maps.filter(filter::node_port(port)) && node_itself() => maps.frontend(&FrontendKey {
            addr: F::UNSPECIFIED,
            ..key
        })?,
        None => return None,
    };
    Some(frontend)
}

/// The key that both directions of a client's flow compute.
#[inline(always)]
pub(crate) fn client_key<F: Family>(tuple: &Tuple<F::Words>) -> FlowKey<F::Words> {
    FlowKey {
        client: tuple.src,
        frontend: F::UNSPECIFIED,
        client_port: tuple.src_port,
        frontend_port: 0,
        proto: tuple.proto,
        reserved: 0,
        reserved2: 0,
    }
}

/// The key of a flow whose client port is in use to another frontend.
#[inline(always)]
pub(crate) fn shared_key<F: Family>(tuple: &Tuple<F::Words>) -> FlowKey<F::Words> {
    FlowKey {
        frontend: tuple.dst,
        frontend_port: tuple.dst_port,
        ..client_key::<F>(tuple)
    }
}

#[inline(always)]
pub(crate) fn collided_bit<F: Family>(tuple: &Tuple<F::Words>) -> u32 {
    hash::side::<F>(tuple.src, tuple.src_port, tuple.proto) as u32 % (COLLIDED_WORDS as u32 * 64)
}

#[inline(always)]
fn translate<A: Copy>(tuple: Tuple<A>, counted: Counted) -> Quick<A> {
    Quick::Translate(Translation {
        tuple,
        local: true,
        counted,
    })
}

#[inline(always)]
fn reply_state(proto: u8, tcp_flags: u8) -> u16 {
    let mut state = FLOW_ANSWERED;
    if proto == TCP {
        if tcp_flags & FIN != 0 {
            state |= FLOW_BACKEND_FIN;
        }
        if tcp_flags & RST != 0 {
            state |= FLOW_RESET;
        }
    }
    state
}

#[inline(always)]
fn client_state(tcp_flags: u8) -> u16 {
    let mut state = 0;
    if tcp_flags & FIN != 0 {
        state |= FLOW_CLIENT_FIN;
    }
    if tcp_flags & RST != 0 {
        state |= FLOW_RESET;
    }
    state
}

/// Whether nobody would miss the flow; `closed_ticks`: how long after both sides' FIN.
#[inline(always)]
fn is_over(timeouts: &Timeouts, state: u16, proto: u8, last_seen: u32, now: u32, closed_ticks: u32) -> bool {
    // Another CPU may have written a later tick than the one this decision began with.
    let idle = now.saturating_sub(last_seen);
    let limit = if state & FLOW_RESET != 0 {
        0
    } else if is_closed(state) {
        closed_ticks
    } else {
        timeouts.of(proto, state)
    };
    idle > limit
}

/// A packet of an established flow on its way to the backend. `None`: the entry belongs to another flow, or to a
/// connection that is over and is being opened anew.
#[inline(always)]
fn forward<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    entry: Entry<'_, Flow<F::Words>>,
    arrival: &Arrival<F::Words>,
) -> Option<Translation<F::Words>> {
    let (tuple, tcp_flags) = (&arrival.tuple, arrival.tcp_flags);
    let flow = entry.read();
    if flow.frontend != tuple.dst || flow.frontend_port != tuple.dst_port {
        return None;
    }
    // Opened anew on a port whose connection is over, or whose backend gets no new ones.
    if tcp_flags & SYN != 0
        && (maps.backend_flags(flow.backend_id) & BACKEND_SERVING == 0
            || is_closed(flow.state | snat_state(maps, config, &flow, tuple.proto)))
    {
        return None;
    }
    let state = client_state(tcp_flags);
    let passed = entry.note(maps, state);
    if tuple.proto == TCP {
        // Connections stay until their backend is gone for good; it is enough to ask for that once in a while.
        if passed && maps.backend_flags(flow.backend_id) & BACKEND_GONE != 0 && is_silent(maps, entry, tuple.proto) {
            return None;
        }
    } else {
        if maps.backend_flags(flow.backend_id) & BACKEND_SERVING == 0 {
            // Datagrams leave a backend that does not serve with the next one.
            return None;
        }
        if passed && flow.state & (FLOW_ANSWERED | FLOW_CONFIRMED) == FLOW_ANSWERED {
            entry.note(maps, FLOW_CONFIRMED);
        }
    }
    if (passed || state != 0)
        && flow.state & FLOW_SNAT != 0
        && let Some((slot, _)) = snat_slot(
            maps,
            config,
            flow.snat_port,
            flow.backend,
            flow.backend_port,
            tuple.proto,
        )
    {
        slot.note(maps, state);
    }
    Some(towards_backend(&flow, arrival))
}

/// What the slot of a translated source has seen of the backend's side: replies to it do not pass by the flow.
#[inline(always)]
fn snat_state<F: Family, M: Maps<F>>(maps: &M, config: &Config, flow: &Flow<F::Words>, proto: u8) -> u16 {
    if flow.state & FLOW_SNAT == 0 {
        return 0;
    }
    match snat_slot(maps, config, flow.snat_port, flow.backend, flow.backend_port, proto) {
        Some((_, slot)) => slot.state & (FLOW_BACKEND_FIN | FLOW_RESET),
        // Another flow has the port by now.
        None => FLOW_RESET,
    }
}

/// Whether a backend that is no endpoint any more leaves the client without an answer. One that was only taken from behind its
/// Service still answers, and its connections go on.
#[inline(never)]
fn is_silent<F: Family, M: Maps<F>>(maps: &M, entry: Entry<'_, Flow<F::Words>>, proto: u8) -> bool {
    let flow = entry.read();
    // Replies to a translated source are seen in its slot only.
    let slot = match maps.config() {
        Some(config) if flow.state & FLOW_SNAT != 0 => {
            snat_slot(maps, config, flow.snat_port, flow.backend, flow.backend_port, proto)
        }
        _ => None,
    };
    let state = match &slot {
        Some((_, slot)) => slot.state,
        None => flow.state,
    };
    if state & FLOW_ASKED != 0 {
        return maps.epoch().wrapping_sub(flow.asked) >= SILENT_EPOCHS;
    }
    entry.ask(maps.epoch());
    entry.note(maps, FLOW_ASKED);
    if let Some((slot, _)) = slot {
        slot.note(maps, FLOW_ASKED);
    }
    false
}

/// A packet of a flow in `new_flows` on its way to the backend: moved to `flows` once both sides have spoken.
#[inline(always)]
fn unconfirmed<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Entry<'_, Flow<F::Words>>,
    scratch: &mut Scratch<F::Words>,
) -> bool {
    if !explains(maps, entry, scratch) {
        return false;
    }
    let Arrival {
        tuple: Tuple { proto, .. },
        tcp_flags,
        ..
    } = scratch.arrival;
    let confirms = proto != TCP || tcp_flags & (SYN | ACK) == ACK;
    let flow = &mut scratch.flow;
    entry.copy_to(flow);
    if flow.state & FLOW_SNAT != 0
        && let Some(config) = maps.config()
        && let Some((entry, slot)) = snat_slot(maps, config, flow.snat_port, flow.backend, flow.backend_port, proto)
    {
        // Replies of a translated source are seen in its slot only.
        flow.state |= slot.state & FLOW_ANSWERED;
        if flow.state & FLOW_ANSWERED != 0 && confirms {
            entry.note(maps, FLOW_CONFIRMED);
        }
    }
    if flow.state & FLOW_ANSWERED != 0 && confirms {
        flow.state |= FLOW_CONFIRMED;
        if maps.add_flow(&scratch.key, flow) {
            maps.remove_new_flow(&scratch.key);
        }
    }
    true
}

#[inline(always)]
fn towards_backend<A: Copy>(flow: &Flow<A>, arrival: &Arrival<A>) -> Translation<A> {
    let mut tuple = Tuple {
        dst: flow.backend,
        dst_port: flow.backend_port,
        ..arrival.tuple
    };
    let local = flow.state & FLOW_LOCAL_BACKEND != 0;
    if flow.state & FLOW_SNAT != 0 {
        tuple.src_port = flow.snat_port;
        if arrival.sends_on && !local {
            tuple.src = flow.snat;
        }
    }
    let counted = Counted {
        backend: flow.backend_id,
        reply: false,
    };
    Translation { tuple, local, counted }
}

/// A reply, if the entry is the flow that it answers.
#[inline(always)]
fn reply<F: Family, M: Maps<F>>(
    maps: &M,
    entry: Option<Entry<'_, Flow<F::Words>>>,
    tuple: &Tuple<F::Words>,
    state: u16,
    tcp_flags: u8,
) -> Quick<F::Words> {
    let Some(entry) = entry else { return Quick::Pass };
    let flow = entry.read();
    if flow.backend != tuple.src
        || flow.backend_port != tuple.src_port
        || flow.state & (FLOW_SNAT | FLOW_SUPERSEDED) != 0
    {
        return Quick::Pass;
    }
    if tcp_flags & SYN != 0 && is_closed(flow.state) {
        // The client took its port anew, to dial the backend itself.
        entry.note(maps, FLOW_SUPERSEDED);
        return Quick::Pass;
    }
    if tcp_flags & (SYN | RST) != 0 && retry::is_open(flow.state) {
        if tcp_flags & RST != 0 {
            return Quick::Undecided;
        }
        retry::answered(maps, flow.backend_id);
    }
    entry.note(maps, state);
    if flow.state & (FLOW_ASKED | FLOW_WAITING) != 0 {
        entry.clear(FLOW_ASKED | FLOW_WAITING);
        if flow.state & FLOW_WAITING != 0 {
            maps.add_waiting(-1);
        }
    }
    let tuple = Tuple {
        src: flow.frontend,
        src_port: flow.frontend_port,
        ..*tuple
    };
    translate(tuple, Counted::reply(flow.backend_id))
}

/// The slot of a port in the SNAT range towards a backend, if it is in use for that backend and protocol.
#[inline(always)]
pub(crate) fn snat_slot<'m, F: Family, M: Maps<F>>(
    maps: &'m M,
    config: &Config,
    port: u16,
    backend: F::Words,
    backend_port: u16,
    proto: u8,
) -> Option<Read<'m, SnatSlot<F::Words>>> {
    let entry = maps.snat(snat::index::<F>(config, port, backend, backend_port, proto))?;
    let slot = entry.read();
    (slot.backend == backend && slot.backend_port == backend_port && slot.proto == proto && slot.last_seen != 0)
        .then_some((entry, slot))
}

/// A reply that comes back to the address that this node put in place of the client's.
#[inline(always)]
fn snat_reply_arriving<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    arrival: &Arrival<F::Words>,
) -> Quick<F::Words> {
    let tuple = &arrival.tuple;
    let Some((entry, slot)) = snat_slot(maps, config, tuple.dst_port, tuple.src, tuple.src_port, tuple.proto) else {
        return Quick::Pass;
    };
    // A port translated under the client's own address comes back through the client's device: `leaving` does it.
    if slot.snat != tuple.dst || slot.snat == slot.client {
        return Quick::Pass;
    }
    if arrival.tcp_flags & (SYN | RST) != 0 && retry::is_open(slot.state) {
        if arrival.tcp_flags & RST != 0 {
            return Quick::Undecided;
        }
        retry::answered(maps, slot.backend_id);
    }
    entry.note(maps, reply_state(tuple.proto, arrival.tcp_flags));
    if slot.state & FLOW_ASKED != 0 {
        entry.clear(FLOW_ASKED);
    }
    let local = slot.state & FLOW_LOCAL_CLIENT != 0;
    let mut tuple = Tuple {
        dst: slot.client,
        ..*tuple
    };
    let mut counted = Counted::ELSEWHERE;
    if arrival.sends_on && !local {
        tuple.src = slot.frontend;
        tuple.src_port = slot.frontend_port;
        tuple.dst_port = slot.client_port;
        counted = Counted::reply(slot.backend_id);
    }
    Quick::Translate(Translation { tuple, local, counted })
}

/// Finds the frontend that a packet is for, and whether its source may dial it; left in `scratch`.
#[inline(never)]
pub(crate) fn look_up<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let Some(config) = maps.config() else {
        return Outcome::Pass;
    };
    let Scratch {
        arrival, frontend_key, ..
    } = scratch;
    let tuple = &arrival.tuple;
    let scope = match arrival.from {
        From::Pod => SCOPE_INTERNAL,
        From::Network => scope_of::<F>(config, tuple.src),
    };
    *frontend_key = FrontendKey {
        addr: tuple.dst,
        port: tuple.dst_port,
        proto: tuple.proto,
        scope,
        reserved: 0,
    };
    let mut frontend = None;
    if maps.filter(filter::frontend::<F>(tuple.dst, tuple.dst_port, tuple.proto)) {
        frontend = maps.frontend(frontend_key);
    }
    if frontend.is_none() && maps.is_node_addr(&tuple.dst) {
        frontend_key.addr = F::UNSPECIFIED;
        frontend = maps.frontend(frontend_key);
    }
    let Some(frontend) = frontend else {
        return match address::unknown_port(maps, tuple.dst) {
            Stranger::Pass => Outcome::Pass,
            Stranger::Refuse => Outcome::Refuse,
            Stranger::Drop => Outcome::Drop,
        };
    };

    if frontend.flags & FRONTEND_SOURCE_RANGES != 0 && !is_allowed(maps, tuple, &frontend) {
        maps.count(Event::SourceDenied);
        return Outcome::Drop;
    }
    scratch.frontend = frontend;
    Outcome::Translate
}

/// The first packet of a flow, or of one that was forgotten: chooses a backend.
#[inline(never)]
fn choose<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Outcome {
    let (tuple, frontend) = (&scratch.arrival.tuple, &scratch.frontend);
    let slot = if frontend.slot_count == 0 {
        None
    } else if frontend.flags & FRONTEND_AFFINITY != 0 {
        maps.slot(kept_slot(maps, tuple, frontend, scratch.frontend_key.scope))
    } else {
        let choice = hash::flow::<F>(tuple.src, tuple.src_port, tuple.dst, tuple.dst_port, tuple.proto);
        maps.slot(frontend.slot_base.wrapping_add(hash::pick(choice, frontend.slot_count)))
    };
    let Some(slot) = slot else {
        if frontend.flags & FRONTEND_DROP != 0 {
            maps.count(Event::PolicyDrop);
            return Outcome::Drop;
        }
        maps.count(Event::NoBackend);
        return Outcome::Refuse;
    };
    scratch.chosen = slot;
    Outcome::Translate
}

/// Makes the flow to the chosen backend.
#[inline(never)]
fn open<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let Scratch {
        arrival,
        key,
        frontend,
        chosen: slot,
        flow,
        retry,
        over,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let now = maps.now();
    *flow = Flow {
        frontend: tuple.dst,
        backend: slot.addr,
        snat: tuple.src,
        frontend_port: tuple.dst_port,
        backend_port: slot.port,
        snat_port: tuple.src_port,
        state: 0,
        backend_id: slot.backend,
        last_seen: now,
        epoch: maps.epoch(),
        asked: 0,
        tried: 0,
    };
    if retry::is_for(tuple.proto, arrival.tcp_flags, frontend.flags) {
        flow.state = FLOW_RETRY | retry.trial_bits();
        flow.asked = maps.affinity_now() as u16;
        flow.tried = retry.tried();
    }
    let local = slot.flags & BACKEND_LOCAL != 0;
    if local {
        flow.state |= FLOW_LOCAL_BACKEND;
    }
    if arrival.from == From::Pod {
        flow.state |= FLOW_LOCAL_CLIENT;
    }
    // A pod that is its own backend would take its own address as a source for a forgery.
    let hairpin = slot.addr == tuple.src;
    let elsewhere = arrival.from == From::Network && !local && frontend.flags & FRONTEND_KEEP_SOURCE == 0;
    if hairpin || elsewhere {
        flow.snat = F::words(F::config(config).node);
        flow.state |= FLOW_SNAT;
    }

    *key = client_key::<F>(tuple);
    let mut held = holder(maps, &config.timeouts, key, tuple, slot, now);
    if port_is_lent(maps, config, tuple, slot) {
        held = Holder::Other;
    }
    if let Holder::Other = held {
        *key = shared_key::<F>(tuple);
        flow.state |= FLOW_SNAT;
        maps.set_collided(collided_bit::<F>(tuple));
        maps.count(Event::PortCollision);
    }
    over.set(u32::from(matches!(held, Holder::Over)));
}

/// [`affinity::slot_index`] for a packet.
#[inline(never)]
fn kept_slot<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>, frontend: &Frontend, scope: u8) -> u32 {
    let key = AffinityKey {
        client: tuple.src,
        service: frontend.service,
        set: frontend.set,
        netns: [0; 2],
    };
    // A client from outside may come in through several nodes, which choose alike if they look at what its flows have in
    // common. Only one node chooses for a client inside, and it may choose anew when the time-out is over.
    let choice = if scope == SCOPE_EXTERNAL {
        hash::flow::<F>(tuple.src, 0, F::UNSPECIFIED, tuple.dst_port, tuple.proto)
    } else {
        hash::flow::<F>(tuple.src, tuple.src_port, tuple.dst, tuple.dst_port, tuple.proto)
    };
    affinity::slot_index(maps, &key, frontend, choice)
}

/// Whether the packet's source may dial a frontend with `loadBalancerSourceRanges`.
#[inline(never)]
fn is_allowed<F: Family, M: Maps<F>>(maps: &M, tuple: &Tuple<F::Words>, frontend: &Frontend) -> bool {
    maps.in_source_ranges(&SourceRangeKey {
        prefix_len: 32 + 8 * size_of::<F::Words>() as u32,
        service: frontend.service,
        addr: tuple.src,
    })
}

/// Stores the chosen flow, and says where its packet goes.
#[inline(never)]
fn remember<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Scratch {
        arrival,
        key,
        flow,
        translation,
        over,
        ..
    } = scratch;
    *translation = towards_backend(flow, arrival);
    maps.count_flow(flow.backend_id);
    let client = filter::client::<F>(arrival.tuple.src);
    if !maps.client(client) {
        maps.set_client(client);
    }
    if over.get() != 0 {
        if let Some(entry) = maps.flow(key) {
            let waiting = entry.read().state & FLOW_WAITING;
            if flow.state & FLOW_SNAT == 0 {
                flow.state |= waiting;
                entry.write(flow);
                return;
            }
            maps.remove_flow(key);
            if waiting != 0 {
                maps.add_waiting(-1);
            }
        } else if let Some(entry) = maps.new_flow(key) {
            entry.write(flow);
            return;
        }
    }
    // Into `flows` at once, which spares the common flow one insertion and one deletion; but only so many that a flood of
    // first packets cannot push open flows out. Replies to a translated source are not seen here.
    if flow.state & FLOW_SNAT == 0 && maps.may_wait() {
        flow.state |= FLOW_WAITING;
        if maps.add_flow(key, flow) {
            maps.add_waiting(1);
            return;
        }
        flow.state &= !FLOW_WAITING;
    }
    if !maps.add_new_flow(key, flow) {
        // Never drop for lack of an entry: the hash finds the same backend again.
        maps.count(Event::ConntrackFull);
    }
}

/// Who holds the entry of a client's side.
enum Holder {
    Nobody,
    /// A flow that is over, of this frontend or another: the entry can be written over.
    Over,
    /// A live flow to another frontend.
    Other,
}

#[inline(always)]
fn holder<F: Family, M: Maps<F>>(
    maps: &M,
    timeouts: &Timeouts,
    key: &FlowKey<F::Words>,
    tuple: &Tuple<F::Words>,
    backend: &Slot<F::Words>,
    now: u32,
) -> Holder {
    let entry = match maps.flow(key) {
        Some(entry) => Some(entry),
        None => maps.new_flow(key),
    };
    let Some(entry) = entry else { return Holder::Nobody };
    let flow = entry.read();
    let same = flow.frontend == tuple.dst && flow.frontend_port == tuple.dst_port;
    // The same frontend: only a connection that is opened anew comes here, and the client knows what it does. Another:
    // the backend must not take its first packet for one of the connection that was.
    let remembered = flow.backend == backend.addr && flow.backend_port == backend.port;
    let closed_ticks = if remembered { timeouts.time_wait } else { 0 };
    if same || is_over(timeouts, flow.state, tuple.proto, flow.last_seen, now, closed_ticks) {
        Holder::Over
    } else {
        Holder::Other
    }
}

/// Whether the backend already sees this client's address and port: lent to another flow of the client by
/// [`translate_source`].
#[inline(always)]
fn port_is_lent<F: Family, M: Maps<F>>(
    maps: &M,
    config: &Config,
    tuple: &Tuple<F::Words>,
    backend: &Slot<F::Words>,
) -> bool {
    snat::in_range(config, tuple.src_port)
        && match snat_slot(maps, config, tuple.src_port, backend.addr, backend.port, tuple.proto) {
            Some((_, slot)) => {
                slot.snat == tuple.src
                    && (slot.client_port != tuple.src_port
                        || slot.frontend != tuple.dst
                        || slot.frontend_port != tuple.dst_port)
            }
            None => false,
        }
}

/// Whether a client that comes in from the network belongs to the cluster.
#[inline(always)]
fn scope_of<F: Family>(config: &Config, client: F::Words) -> u8 {
    let config = F::config(config);
    let mut scope = SCOPE_EXTERNAL;
    for (i, cidr) in config.cluster_cidrs.iter().enumerate() {
        if (i as u32) < config.cluster_cidr_count && F::mask(client, F::words(cidr.mask)) == F::words(cidr.addr) {
            scope = SCOPE_INTERNAL;
        }
    }
    scope
}

/// Finds a source port towards the flow's backend: the client's own if it is in the range and free, else one from a
/// place that depends on the flow alone, so that a flow whose entry was evicted finds its port again.
///
/// Among the ports looked at (all of a range of up to [`MAX_WHOLE`], else as many, and some more that depend on the time, so
/// that a client's retransmission looks at others), the first is taken that is free: never used, or whose flow is over by the
/// node's [`Timeouts`]. When there is none, that which has been closed, or has waited for a first answer, for the longest
/// time, of [`HURRY_TICKS`] at least. Never the port of an open flow.
#[inline(always)]
fn translate_source<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    first_port(maps, scratch);
    for round in 1..=ROUNDS {
        let taken = take_port(maps, scratch);
        if scratch.search.flag.hide(taken) {
            return true;
        }
        if round == ROUNDS {
            scatter(maps, scratch);
        }
        next_port(maps, scratch);
    }
    let taken = take_port(maps, scratch);
    if scratch.search.flag.hide(taken) {
        return true;
    }
    let Search {
        offset, oldest, hurry, ..
    } = &mut scratch.search;
    if oldest.get() == NO_OFFSET {
        return false;
    }
    hurry.set(1);
    offset.set(oldest.get());
    take_port(maps, scratch)
}

/// Sets where the search for a source port begins.
#[inline(never)]
fn first_port<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let tuple = &scratch.arrival.tuple;
    let owner = hash::flow::<F>(tuple.src, tuple.src_port, tuple.dst, tuple.dst_port, tuple.proto);
    let search = &mut scratch.search;
    search.owner.set(owner);
    search.hurry.set(0);
    search.oldest.set(NO_OFFSET);
    search.offset.set(if snat::in_range(config, tuple.src_port) {
        u32::from(tuple.src_port.wrapping_sub(config.snat_first))
    } else {
        hash::pick(owner.rotate_left(16), u32::from(config.snat_ports))
    });
}

/// Moves the search to a place that changes with every tick, in a range that it cannot look at wholly.
#[inline(never)]
fn scatter<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let ports = u32::from(config.snat_ports);
    if ports > MAX_WHOLE {
        let place = (scratch.search.owner.get() ^ scratch.flow.last_seen).wrapping_mul(0x9e37_79b1);
        scratch.search.offset.set(hash::pick(place, ports));
    }
}

/// Takes the port that the search stands at, if it is the flow's own or free.
#[inline(never)]
fn take_port<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else { return false };
    let Scratch {
        arrival,
        own_port,
        flow,
        reply,
        slot: mine,
        search,
        ..
    } = scratch;
    let tuple = &arrival.tuple;
    let now = flow.last_seen;
    let port = config.snat_first.wrapping_add(search.offset.get() as u16);
    let index = snat::index::<F>(config, port, flow.backend, flow.backend_port, tuple.proto);
    let Some(entry) = maps.snat(index) else { return false };
    let slot = entry.read();
    if !search
        .flag
        .hide(slot.owner == search.owner.get() && is_own(&slot, flow, tuple.src, tuple.src_port))
    {
        let hurry = search.hurry.get() != 0;
        if !is_free(config, &slot, now, hurry, &mut search.limit) {
            return false;
        }
        *reply = Tuple {
            src: flow.backend,
            dst: flow.snat,
            src_port: flow.backend_port,
            dst_port: port,
            proto: tuple.proto,
        };
        if maps.socket_takes(reply) {
            return false;
        }
        // A client that keeps its address must not be given a port that it uses itself.
        if search.flag.hide(flow.snat == tuple.src) {
            *own_port = FlowKey {
                client_port: port,
                ..client_key::<F>(tuple)
            };
            if maps.flow(own_port).is_some() || maps.new_flow(own_port).is_some() {
                return false;
            }
        }
    }
    if !maps.claim(entry, slot.last_seen, now) {
        return false;
    }
    flow.snat_port = port;
    *mine = SnatSlot {
        client: tuple.src,
        frontend: flow.frontend,
        backend: flow.backend,
        snat: flow.snat,
        client_port: tuple.src_port,
        frontend_port: flow.frontend_port,
        backend_port: flow.backend_port,
        state: flow.state,
        last_seen: now,
        backend_id: flow.backend_id,
        proto: tuple.proto,
        reserved: 0,
        epoch: flow.epoch,
        owner: search.owner.get(),
    };
    entry.write(mine);
    true
}

/// Moves the search to the next port whose slot is the flow's own or free, among [`snat::MAX_TRIES`], or to the last of them.
#[inline(never)]
fn next_port<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    scratch.search.found.set(NO_OFFSET);
    for _ in 0..snat::MAX_TRIES {
        look(maps, scratch);
    }
    let search = &mut scratch.search;
    let found = search.found.get();
    if found != NO_OFFSET {
        search.offset.set(found);
    }
}

/// One step of the search, and a look at the slot there. Every flow takes steps of its own length: neighbours in turn would all
/// search the runs of taken ports that arise long before a large range is full.
#[inline(never)]
fn look<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) {
    let Some(config) = maps.config() else { return };
    let Scratch {
        arrival, flow, search, ..
    } = scratch;
    let tuple = &arrival.tuple;
    let ports = u32::from(config.snat_ports);
    // Short ones: a long one could come back to where it began after a few.
    let mut step = 1;
    if ports > MAX_WHOLE {
        step += hash::pick(search.owner.get(), (ports - 1).min(MAX_STEP));
    }
    let next = search.offset.get().wrapping_add(step);
    search
        .offset
        .set(if next >= ports { next.wrapping_sub(ports) } else { next });
    let port = config.snat_first.wrapping_add(search.offset.get() as u16);
    let index = snat::index::<F>(config, port, flow.backend, flow.backend_port, tuple.proto);
    let Some(entry) = maps.snat(index) else { return };
    let slot = entry.read();
    let own = slot.owner == search.owner.get();
    let own = search.flag.hide(own) && is_own(&slot, flow, tuple.src, tuple.src_port);
    let own = search.flag.hide(own);
    if own || is_free(config, &slot, flow.last_seen, false, &mut search.limit) {
        if search.found.get() == NO_OFFSET {
            search.found.set(search.offset.get());
        }
    } else if is_free(config, &slot, flow.last_seen, true, &mut search.limit)
        && (search.oldest.get() == NO_OFFSET || slot.last_seen < search.oldest_seen.get())
    {
        search.oldest.set(search.offset.get());
        search.oldest_seen.set(slot.last_seen);
    }
}

/// Whether nobody would miss what a slot holds; in a hurry, nobody but a client that was never answered, or a backend that has
/// the port in TIME_WAIT. `limit` is lent.
#[inline(always)]
fn is_free<A: Copy>(config: &Config, slot: &SnatSlot<A>, now: u32, hurry: bool, limit: &mut Opaque) -> bool {
    let timeouts = &config.timeouts;
    limit.set(if slot.last_seen == 0 {
        return true;
    } else if slot.state & FLOW_RESET != 0 {
        0
    } else if is_closed(slot.state) {
        if hurry { HURRY_TICKS } else { timeouts.time_wait }
    } else if hurry && slot.state & FLOW_ANSWERED == 0 {
        // A SYN flood must not use the range up.
        HURRY_TICKS
    } else {
        timeouts.of(slot.proto, slot.state)
    });
    now.saturating_sub(slot.last_seen) > limit.get()
}

/// Whether a slot with the flow's [`SnatSlot::owner`] is what an evicted entry of this very flow left behind.
#[inline(always)]
fn is_own<A: Copy + Eq>(slot: &SnatSlot<A>, flow: &Flow<A>, client: A, client_port: u16) -> bool {
    slot.client == client
        && slot.client_port == client_port
        && slot.backend == flow.backend
        && slot.backend_port == flow.backend_port
        && slot.last_seen != 0
}
