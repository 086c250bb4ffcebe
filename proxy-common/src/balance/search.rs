//! Where the search for a source port stands, from one of its steps to the next.

use super::opaque::Opaque;

/// Where the search for a source port stands.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// Offset into the SNAT range that is looked at.
    pub(super) offset: Opaque,
    /// Offset found.
    pub(super) found: Opaque,
    /// Offset of the port that can be taken in a hurry, and since when nobody used it.
    pub(super) oldest: Opaque,
    pub(super) oldest_seen: Opaque,
    /// [`SnatSlot::owner`](crate::layout::SnatSlot::owner) of the flow.
    pub(super) owner: Opaque,
    /// Ticks after which a slot is free.
    pub(super) limit: Opaque,
    /// Whether no free port was found.
    pub(super) hurry: Opaque<bool>,
}
