//! What `shunt trace` and the programs share: who traces, and what a tracer is told.

/// Tracers that may be at work at once. Each has a ring buffer of its own, so that none takes
/// another's records away.
pub const MAX_TRACERS: usize = 4;

/// One decision, as a tracer is told of it. Addresses of IPv4 are IPv4-mapped
/// (`::ffff:a.b.c.d`), ports in host order.
///
/// `A` is the address: bytes, or words in the programs.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceRecord<A> {
    /// When: `CLOCK_MONOTONIC` in ns, as coarse as the kernel's tick.
    pub time: u64,
    /// What was counted: one bit for each [`Event`](crate::event::Event).
    pub events: u64,
    /// The packet's source; unspecified for a socket's call.
    pub src: A,
    /// What the packet or the call was for.
    pub dst: A,
    /// The backend, with [`TRACE_HAS_BACKEND`].
    pub backend: A,
    /// The source that the backend sees, with [`TRACE_HAS_SOURCE`].
    pub snat: A,
    /// The packet's source port.
    pub src_port: u16,
    /// The port that it was for.
    pub dst_port: u16,
    /// The backend's port.
    pub backend_port: u16,
    /// The source port that the backend sees.
    pub snat_port: u16,
    /// [`Frontend::service`](super::Frontend::service), with [`TRACE_HAS_SERVICE`].
    pub service: u32,
    /// Index of the device at which the packet was seen; 0 at sockets.
    pub device: u32,
    /// IANA protocol number.
    pub proto: u8,
    /// TCP flags; for SCTP those that mean what its first chunk does.
    pub tcp_flags: u8,
    /// One of `TRACE_AT_*`.
    pub hook: u8,
    /// `TRACE_*` bits.
    pub flags: u8,
    /// Always zero.
    pub reserved: u32,
}

/// [`TraceRecord::flags`]: `backend` and `backend_port` say something.
pub const TRACE_HAS_BACKEND: u8 = 1 << 0;
/// [`TraceRecord::flags`]: `snat` and `snat_port` say something.
pub const TRACE_HAS_SOURCE: u8 = 1 << 1;
/// [`TraceRecord::flags`]: `service` says something.
pub const TRACE_HAS_SERVICE: u8 = 1 << 2;
/// [`TraceRecord::flags`]: the client's side closes the connection, or the socket that dialled.
pub const TRACE_CLIENT_CLOSES: u8 = 1 << 3;
/// [`TraceRecord::flags`]: the backend's side closes the connection.
pub const TRACE_BACKEND_CLOSES: u8 = 1 << 4;

/// [`TraceRecord::hook`]: a socket's call.
pub const TRACE_AT_SOCKET: u8 = 0;
/// [`TraceRecord::hook`]: tc.
pub const TRACE_AT_TC: u8 = 1;
/// [`TraceRecord::hook`]: XDP.
pub const TRACE_AT_XDP: u8 = 2;

/// What a tracer wants to be told: all that is not zero must fit.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceFilter<A> {
    /// [`TraceRecord::events`], of which one must be there; or a close, see `closes`.
    pub events: u64,
    /// With `dst`: whom the packet is from, and whom it is for or whose backend it reaches; the
    /// other way round fits too.
    pub src: A,
    /// See `src`.
    pub dst: A,
    /// An address that is the packet's source or destination, or the backend.
    pub pod: A,
    /// Port of `src`.
    pub src_port: u16,
    /// Port of `dst`.
    pub dst_port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// `TRACE_CLIENT_CLOSES` and `TRACE_BACKEND_CLOSES`: closes are told too.
    pub closes: u8,
    /// Not 0: only [`Self::service`].
    pub has_service: u16,
    /// [`Frontend::service`](super::Frontend::service).
    pub service: u32,
    /// Always zero.
    pub reserved: u32,
}

/// A place for a tracer: a filter, and a lease.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TracePlace<A> {
    /// Records are sent until then (`CLOCK_MONOTONIC` in ns); 0: none are. The tracer puts it off
    /// while it lives; a program that finds it over sets it to zero.
    pub until: u64,
    /// Until then the place is taken, and its filter and ring buffer may not be ready yet.
    pub taken_until: u64,
    /// Records that found no room in the ring buffer. Programs add to it.
    pub lost: u64,
    /// What the tracer wants to be told.
    pub filter: TraceFilter<A>,
}

/// All tracers: one look-up says that there are none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tracers<A> {
    /// Index: that of the ring buffer.
    pub places: [TracePlace<A>; MAX_TRACERS],
}

/// Bytes of a ring buffer, of which every page size that Linux has is a divisor: what the map of
/// ring buffers is declared with. A tracer makes its own of its own size.
pub const TRACE_RING_BYTES: usize = 64 * 1024;

no_padding!(
    TraceRecord<[u8; 16]> = 8 + 8 + 4 * 16 + 4 * 2 + 2 * 4 + 4 + 4,
    TraceFilter<[u8; 16]> = 8 + 3 * 16 + 2 * 2 + 1 + 1 + 2 + 4 + 4,
    TracePlace<[u8; 16]> = 3 * 8 + 72,
    Tracers<[u8; 16]> = MAX_TRACERS * 96,
);
