//! Memory of a program run's own, and numbers in it that the verifier does not follow.

use super::{Arrival, Translation, source_port::Search};
use crate::{
    layout::{Flow, FlowKey, Frontend, FrontendKey, Slot, SnatSlot},
    odd::Odd,
    packet::Tuple,
    retry,
};

/// Memory for the path of few packets: the BPF stack holds 512 bytes for a whole chain of calls, and an IPv6 flow with its
/// keys has more.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scratch<A> {
    pub(crate) arrival: Arrival<A>,
    /// Where the packet goes, after [`Outcome::Translate`](super::Outcome::Translate).
    pub translation: Translation<A>,
    pub(crate) key: FlowKey<A>,
    pub(super) own_port: FlowKey<A>,
    pub(crate) frontend_key: FrontendKey<A>,
    pub(crate) frontend: Frontend,
    /// The backend for the flow.
    pub(crate) chosen: Slot<A>,
    pub(crate) flow: Flow<A>,
    pub(crate) reply: Tuple<A>,
    pub(super) slot: SnatSlot<A>,
    pub(crate) search: Search,
    pub(crate) retry: retry::Progress,
    /// [`Held`](super::decide::Held): what is known of the client's port.
    pub(super) held: Opaque,
    /// Whether the flow is written over one that is over.
    pub(super) over: Opaque,
    pub(crate) odd: Odd<A>,
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
