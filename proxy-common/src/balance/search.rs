//! Where the search for a source port stands, from one of its steps to the next.

use super::opaque::Opaque;

/// Where the search for a source port stands.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// The part of the search, an index of [`PHASES`](super::source_port).
    pub(super) phase: Opaque,
    /// Where in its ports it stands, and how many of them are left to look at.
    pub(super) position: Opaque,
    pub(super) left: Opaque,
    /// The port that is looked at, or was found.
    pub(super) port: Opaque,
    /// Where its owner stands, or would.
    pub(super) place: Opaque,
    /// What a flow may take: one of `Take`.
    pub(super) take: Opaque,
    /// The first free port, when the flow's own is looked for.
    pub(super) free_port: Opaque,
    /// The port that was given up the longest ago, and when.
    pub(super) oldest: Opaque,
    pub(super) oldest_seen: Opaque,
    /// A port of another Service's that may be given up, and was used just now.
    pub(super) fresh: Opaque,
    /// Ports in use that were looked at; of the same Service's backend; of the same network of
    /// clients too; and ports that were free.
    pub(super) used: Opaque,
    pub(super) of_service: Opaque,
    pub(super) of_network: Opaque,
    pub(super) free: Opaque,
    /// [`SnatSlot::owner`](crate::layout::SnatSlot::owner) of the flow.
    pub(super) owner: Opaque,
}
