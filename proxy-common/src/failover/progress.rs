//! What a connection has tried, from one step of the decision to the next.

use crate::balance::Opaque;

/// What is known of a SYN that was sent before; part of [`Scratch`](crate::balance::Scratch).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// [`Flow::tried`](crate::layout::Flow::tried).
    pub(super) tried: Opaque,
    /// Offset among the frontend's slots that is looked at.
    pub(super) offset: Opaque,
    /// Offset of a backend that may answer.
    pub(super) found: Opaque,
    /// Offset of one that was not tried.
    pub(super) second: Opaque,
    /// Where the search begins, and how many slots were looked at.
    pub(super) seed: Opaque,
    pub(super) looked_at: Opaque,
    /// Who asks: [`source`](super::quarantine::source).
    pub(super) source: Opaque,
    /// `FLOW_*` bits of a flow that probes a backend.
    pub(super) probe: Opaque<u32>,
    /// Whether a backend in quarantine will do.
    pub(super) any: Opaque<bool>,
    /// Whether the refusal at hand is on its way out.
    pub(super) leaving: Opaque<bool>,
}

impl Progress {
    /// Nothing was tried yet.
    #[inline(always)]
    pub(crate) fn begin(&mut self) {
        self.tried.set(0);
        self.probe.set(0);
    }

    /// [`Flow::tried`](crate::layout::Flow::tried).
    #[inline(always)]
    pub(crate) fn tried(&self) -> u32 {
        self.tried.get()
    }

    /// `FLOW_*` bits of the flow that is opened, beside [`FLOW_RETRY`](crate::layout::FLOW_RETRY).
    #[inline(always)]
    pub(crate) fn probe_bits(&self) -> u32 {
        self.probe.get()
    }
}
