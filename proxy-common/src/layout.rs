//! The map layout: every key and value that the kernel and the agent share.
//!
//! All structs are `#[repr(C)]` without implicit padding (asserted below), because the kernel
//! hashes and compares keys as bytes. Addresses are bytes in network order, ports and lengths are
//! host-order numbers, so that `bpftool map dump pinned …` reads well. Structs are generic over the
//! address (`[u8; 4]` or `[u8; 16]`); each map exists once per family, with the suffix `4` or `6`.
//!
//! A change of any layout here must raise [`LAYOUT_VERSION`].

/// Asserts that a type is exactly as large as the sum of its fields: the kernel compares keys byte
/// by byte.
macro_rules! no_padding {
    ($($ty:ty = $size:expr),+ $(,)?) => { $(const _: () = assert!(size_of::<$ty>() == $size);)+ };
}

mod trace;

pub use self::trace::*;

/// Version of everything in this module; maps are pinned under `<bpf-root>/v<LAYOUT_VERSION>/`.
pub const LAYOUT_VERSION: u32 = 6;

/// Entries of the map `tail_calls` that one load of the tc programs has.
pub const TAIL_CALLS_OF_LOAD: u32 = 2;
/// The first of them: what may open a flow, and refusals.
pub const TAIL_CALL_UNDECIDED: u32 = 0;
/// The second: what is not plain TCP or UDP.
pub const TAIL_CALL_SLOW_PATH: u32 = 1;
/// So many loads take turns in the map: while one replaces another on the devices, both are there.
pub const LOADS: u32 = 3;
/// Entries of the map: those of the programs for Ethernet devices, then those for devices without a
/// link-layer header.
pub const TAIL_CALLS: usize = (2 * LOADS * TAIL_CALLS_OF_LOAD) as usize;

/// Names of the maps (at most 15 bytes: the kernel cuts them). Suffix `4`/`6`: one map per family.
pub mod names {
    /// `HASH` [`FrontendKey`](super::FrontendKey) → [`Frontend`](super::Frontend).
    pub const FRONTENDS: [&str; 2] = ["frontends4", "frontends6"];
    /// `ARRAY`, memory-mappable: index → [`Slot`](super::Slot).
    pub const SLOTS: [&str; 2] = ["slots4", "slots6"];
    /// `LRU_HASH` [`FlowKey`](super::FlowKey) → [`Flow`](super::Flow): flows seen in both
    /// directions.
    pub const FLOWS: [&str; 2] = ["flows4", "flows6"];
    /// `LRU_HASH` [`FlowKey`](super::FlowKey) → [`Flow`](super::Flow): flows not yet confirmed (a
    /// SYN flood fills this).
    pub const UNCONFIRMED: [&str; 2] = ["unconfirmed4", "unconfirmed6"];
    /// `ARRAY`, memory-mappable: one of two [places](crate::snat::places) → [`SnatSlot`](super::SnatSlot).
    pub const SNAT: [&str; 2] = ["snat4", "snat6"];
    /// `LRU_HASH` [`DirectKey`](super::DirectKey) → `u32`: what left the node from a frontend's port
    /// and is no Service's, and when it did last (`CLOCK_MONOTONIC` in [`TICK_NS`](super::TICK_NS)).
    pub const DIRECT: [&str; 2] = ["direct4", "direct6"];
    /// `LRU_HASH` [`DirectKey`](super::DirectKey) → `u32`: what pods send to backends themselves, past
    /// any Service, and when they did last, as in [`DIRECT`]. The backend is the peer.
    pub const BYPASS: [&str; 2] = ["bypass4", "bypass6"];
    /// `HASH` address → `u32` flags: the node addresses that node ports answer on.
    pub const NODE_ADDRS: [&str; 2] = ["node_addrs4", "node_addrs6"];
    /// `LRU_HASH` address → `u64`: when the next answer of the node's own to it is due, in ns of
    /// the coarse monotonic clock: see [`crate::answer_limit`].
    pub const ANSWERS: [&str; 2] = ["answers4", "answers6"];
    /// `ARRAY` of two, per family → `u64`: the same for all addresses together.
    pub const ANSWERS_IN_ALL: &str = "answers";
    /// `HASH` address → `u32` of `ADDRESS_*` bits: every address of a Service, whatever the port.
    pub const SERVICE_ADDRS: [&str; 2] = ["service_addrs4", "service_addrs6"];
    /// `LRU_HASH` [`FragmentKey`](super::FragmentKey) → [`FragmentPorts`](super::FragmentPorts):
    /// see `slow_path::fragment`.
    pub const FRAGMENTS: [&str; 2] = ["fragments4", "fragments6"];
    /// `ARRAY`, memory-mappable, of [`FILTER_WORDS`](super::FILTER_WORDS) words: see
    /// [`crate::filter`].
    pub const FILTER: &str = "filter";
    /// `ARRAY`, memory-mappable, of [`SHARED_PORT_WORDS`](super::SHARED_PORT_WORDS) words: client ports
    /// with more than one frontend at once.
    pub const SHARED_PORTS: &str = "shared_ports";
    /// `ARRAY`, memory-mappable, of [`CLIENT_WORDS`](super::CLIENT_WORDS) words: clients with flows
    /// in the connection tables.
    pub const CLIENTS: &str = "clients";
    /// `ARRAY` of two, per family: flows with [`FLOW_HALF_OPEN`](super::FLOW_HALF_OPEN) in `flows`,
    /// about.
    pub const HALF_OPEN: &str = "half_open";
    /// `ARRAY` backend id → [`BackendState`](super::BackendState).
    pub const BACKENDS: &str = "backends";
    /// `PERCPU_HASH` backend id → [`Traffic`](super::Traffic): with `--count-traffic on` only.
    pub const TRAFFIC: &str = "traffic";
    /// `ARRAY` of one [`Config`](super::Config).
    pub const CONFIG: &str = "config";
    /// `PERCPU_ARRAY` [`Event`](crate::event::Event) → `u64`.
    pub const EVENTS: &str = "events";
    /// `HASH` Service number ([`Frontend::service`](super::Frontend::service)) →
    /// [`ServiceInfo`](super::ServiceInfo).
    pub const SERVICES: &str = "services";
    /// `PROG_ARRAY` of [`TAIL_CALLS`](super::TAIL_CALLS): the programs that tc programs on devices
    /// hand packets over to.
    pub const TAIL_CALLS: &str = "tail_calls";
    /// `PERCPU_ARRAY` of one [`Scratch`](crate::balance::Scratch): the programs' own memory.
    pub const SCRATCH: [&str; 2] = ["scratch4", "scratch6"];
    /// `HASH` device index → `u32`: devices that hand packets over to a pod's namespace; filled for
    /// `--fast-path` only.
    pub const POD_DEVICES: &str = "pod_devices";
    /// `LRU_HASH` address → device, time and MAC addresses: the programs' own memory of ways to
    /// pods.
    pub const POD_ROUTES: [&str; 2] = ["pod_routes4", "pod_routes6"];
    /// `PERCPU_ARRAY` of one: the fast path's own memory.
    pub const HOST_ROUTING: &str = "host_routing";
    /// `LRU_HASH` [`AffinityKey`](super::AffinityKey) → [`Affinity`](super::Affinity): see
    /// [`crate::affinity`].
    pub const AFFINITY: [&str; 2] = ["affinity4", "affinity6"];
    /// `LRU_HASH` [`AffinityKey`](super::AffinityKey) → [`Affinity`](super::Affinity): of clients
    /// that have not spoken after an answer (a SYN flood fills this).
    pub const NEW_AFFINITY: [&str; 2] = ["new_affinity4", "new_affinity6"];
    /// `HASH` [`MemberKey`](super::MemberKey) → `u32` index into `slots`: which backends a frontend
    /// with affinity has.
    pub const SET_MEMBERS: [&str; 2] = ["set_members4", "set_members6"];
    /// `LPM_TRIE` [`SourceRangeKey`](super::SourceRangeKey) → `u32`: who may dial a frontend with
    /// [`FRONTEND_SOURCE_RANGES`](super::FRONTEND_SOURCE_RANGES).
    pub const SOURCE_RANGES: [&str; 2] = ["source_ranges4", "source_ranges6"];
    /// `HASH` socket cookie → [`SocketPeer`](super::SocketPeer): which frontend a connected socket
    /// dialled.
    pub const SOCKETS: &str = "sockets";
    /// `SK_STORAGE` → [`SocketPeers`](super::SocketPeers): which frontends an unconnected UDP
    /// socket sent to.
    pub const UDP_PEERS: &str = "udp_peers";
    /// `HASH` cgroup id → `u32`: pods that the socket hook leaves to packets, looked at with
    /// [`CONFIG_PODS_LEFT_OUT`](super::CONFIG_PODS_LEFT_OUT) only.
    pub const LEFT_OUT: &str = "left_out";
    /// `ARRAY` of one, memory-mappable, of [`Tracers`](super::Tracers): who traces what.
    pub const TRACERS: &str = "tracers";
    /// `ARRAY_OF_MAPS` of [`MAX_TRACERS`](super::MAX_TRACERS) ring buffers of
    /// [`TraceRecord`](super::TraceRecord)s: the tracers' own.
    pub const TRACE_RINGS: &str = "trace_rings";
}

/// IANA protocol number of TCP.
pub const TCP: u8 = 6;
/// IANA protocol number of UDP.
pub const UDP: u8 = 17;
/// IANA protocol number of SCTP.
pub const SCTP: u8 = 132;

/// [`FrontendKey::scope`] of clients inside the cluster: pods and processes on nodes.
pub const SCOPE_INTERNAL: u8 = 0;
/// [`FrontendKey::scope`] of everybody else.
pub const SCOPE_EXTERNAL: u8 = 1;

/// What a client dials. Every frontend has two entries, one per scope, so that traffic policies
/// cost nothing per packet.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey<A> {
    /// The address, or unspecified for a node port: then any address in `node_addrs`.
    pub addr: A,
    /// Destination port, host order.
    pub port: u16,
    /// IANA protocol number: [`TCP`], [`UDP`] or [`SCTP`].
    pub proto: u8,
    /// [`SCOPE_INTERNAL`] or [`SCOPE_EXTERNAL`].
    pub scope: u8,
    /// Always zero.
    pub reserved: u32,
}

/// [`Frontend::flags`]: no eligible backend here but elsewhere (traffic policy `Local`): drop instead of refuse.
pub const FRONTEND_DROP: u16 = 1 << 0;
/// [`Frontend::flags`]: `sessionAffinity: ClientIP`.
pub const FRONTEND_AFFINITY: u16 = 1 << 1;
/// [`Frontend::flags`]: the socket hook leaves it alone for sockets of pods, whose packets are translated. Processes in the
/// node's own namespace have no pod device that would see theirs.
pub const FRONTEND_PACKETS_ONLY: u16 = 1 << 2;
/// [`Frontend::flags`]: only sources in the Service's `loadBalancerSourceRanges` may dial it.
pub const FRONTEND_SOURCE_RANGES: u16 = 1 << 3;
/// [`Frontend::flags`]: never SNAT (`externalTrafficPolicy: Local`, external scope).
pub const FRONTEND_KEEP_SOURCE: u16 = 1 << 4;

/// [`Frontend::flags`]: a SYN that its backend does not answer, or refuses, does not go to another ([`crate::failover`]).
pub const FRONTEND_NO_RETRY: u16 = 1 << 5;
/// [`Frontend::flags`]: always SNAT to the node's address (`masqueradeAll`).
pub const FRONTEND_MASQUERADE: u16 = 1 << 6;

/// Where a frontend's backends stand: `slot_count` consecutive entries of `slots` from `slot_base`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// The Service's number, stable while the agent knows the Service; key of `services`.
    pub service: u32,
    /// First slot.
    pub slot_base: u32,
    /// Number of slots: of backends, or the size of a Maglev table. 0: refuse (or drop, see
    /// [`FRONTEND_DROP`]).
    pub slot_count: u32,
    /// Seconds of `sessionAffinityConfig.clientIP.timeoutSeconds`; 0 without affinity.
    pub affinity_secs: u32,
    /// `FRONTEND_*` bits.
    pub flags: u16,
    /// One of `KIND_*`: for people and tools, no program looks at it.
    pub kind: u16,
    /// Number of the backend set within the Service: frontends with one number choose from the same
    /// backends, and a client's affinity counts for all of them ([`AffinityKey::set`]).
    pub set: u32,
}

/// [`Frontend::kind`]: one of `spec.clusterIPs`.
pub const KIND_CLUSTER_IP: u16 = 0;
/// [`Frontend::kind`]: a `spec.ports[].nodePort`.
pub const KIND_NODE_PORT: u16 = 1;
/// [`Frontend::kind`]: one of `status.loadBalancer.ingress[].ip`.
pub const KIND_LOAD_BALANCER: u16 = 2;
/// [`Frontend::kind`]: one of `spec.externalIPs`.
pub const KIND_EXTERNAL_IP: u16 = 3;

/// Bytes of a name in [`ServiceInfo`]: a DNS label has at most 63 (RFC 1123), so the last is always
/// zero.
pub const NAME_LEN: usize = 64;

/// Whose frontends these are: lets tools print names when no agent runs. No program looks at it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceInfo {
    /// `metadata.namespace`, padded with zeros.
    pub namespace: [u8; NAME_LEN],
    /// `metadata.name`, padded with zeros.
    pub name: [u8; NAME_LEN],
}

/// [`Slot::flags`]: the backend runs on this node.
pub const BACKEND_LOCAL: u16 = 1 << 0;

/// One choice of a frontend: a backend's address and port.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot<A> {
    /// The backend's address.
    pub addr: A,
    /// The backend's port, host order.
    pub port: u16,
    /// `BACKEND_*` bits.
    pub flags: u16,
    /// Index into `backends`; not used again while a flow may remember it.
    pub backend: u32,
}

/// The client's side of a flow.
///
/// Both directions carry it, as source on the way to the frontend and as destination on the way
/// back, so one entry serves both. Only when a client's port is in use to two frontends at once
/// does the later flow's key name its frontend too; that flow's source port is then translated, and
/// its replies are found by that port ([`SnatSlot`]).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// The client's address as it dialled.
    pub client: A,
    /// Unspecified, or the frontend's address for a flow whose client port is shared.
    pub frontend: A,
    /// The client's port as it dialled, host order.
    pub client_port: u16,
    /// 0, or the frontend's port for a flow whose client port is shared.
    pub frontend_port: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// Always zero.
    pub reserved: u8,
    /// Always zero.
    pub reserved2: u16,
}

/// Unit of `last_seen`: 2^30 ns, so that the kernel gets it by a shift (1.07 s).
pub const TICK_NS: u64 = 1 << 30;

/// [`Flow::state`]: the backend has answered.
pub const FLOW_SEEN_REPLY: u32 = 1 << 0;
/// [`Flow::state`]: the client sent FIN.
pub const FLOW_CLIENT_FIN: u32 = 1 << 1;
/// [`Flow::state`]: the backend sent FIN.
pub const FLOW_BACKEND_FIN: u32 = 1 << 2;
/// [`Flow::state`]: the client sent RST, or somebody in its name: taken back when it sends anything else.
pub const FLOW_CLIENT_RESET: u32 = 1 << 3;
/// [`Flow::state`]: the backend is on this node.
pub const FLOW_LOCAL_BACKEND: u32 = 1 << 4;
/// [`Flow::state`]: the source (address, port, or the port alone) is translated; `snat` and `snat_port` say to what.
pub const FLOW_SNAT: u32 = 1 << 5;
/// [`Flow::state`]: the client is on this node: its packets came in through a pod device.
pub const FLOW_LOCAL_CLIENT: u32 = 1 << 6;
/// [`Flow::state`]: the connection is over, and the client's port serves a direct one to the same backend.
pub const FLOW_SUPERSEDED: u32 = 1 << 7;

/// [`Flow::state`]: the backend is no endpoint any more ([`BACKEND_GONE`]), and has not answered since the client sent last.
pub const FLOW_UNANSWERED: u32 = 1 << 8;
/// [`Flow::state`]: the backend has answered and the client has sent again: datagrams are a stream. Of TCP it is not always
/// noted.
pub const FLOW_CONFIRMED: u32 = 1 << 9;
/// [`Flow::state`]: until it is answered, its SYN may go to another backend ([`crate::failover`]).
pub const FLOW_RETRY: u32 = 1 << 10;
/// [`Flow::state`]: the backend refused the SYN, and the client was not told.
pub const FLOW_REFUSED: u32 = 1 << 11;
/// [`Flow::state`]: the backend has been sent the SYN twice, or gets no second one.
pub const FLOW_RETRANSMITTED: u32 = 1 << 12;
/// [`Flow::state`]: the SYN finds out whether a backend in quarantine answers again.
pub const FLOW_PROBE: u32 = 1 << 13;

/// [`Flow::state`]: the backend sent RST, or somebody in its name: taken back when it sends anything else.
pub const FLOW_BACKEND_RESET: u32 = 1 << 14;
/// [`Flow::state`]: either side sent RST.
pub const FLOW_RESET: u32 = FLOW_CLIENT_RESET | FLOW_BACKEND_RESET;
/// [`Flow::state`]: in `flows` from the first packet on, and counted in `half_open` until the client has spoken after an answer.
pub const FLOW_HALF_OPEN: u32 = 1 << 15;
/// [`Flow::state`]: the client is a process of this node. Its source is always translated, so that nothing it gets from
/// the backend itself can be taken for an answer of the Service's.
pub const FLOW_PROCESS: u32 = 1 << 20;

/// One flow: what its packets carry on either side of this node.
///
/// Written in place by several CPUs at once; every field is one aligned word or set before the
/// entry is published.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<A> {
    /// The address the client dialled.
    pub frontend: A,
    /// The backend's address.
    pub backend: A,
    /// The source address that the backend sees, when [`FLOW_SNAT`].
    pub snat: A,
    /// The port the client dialled, host order.
    pub frontend_port: u16,
    /// The backend's port, host order.
    pub backend_port: u16,
    /// The source port that the backend sees, when [`FLOW_SNAT`].
    pub snat_port: u16,
    /// The programs' cheap clock as it stood when `last_seen` was written: at most 2.6 s, at least
    /// 0.25 s long.
    pub epoch: u16,
    /// `FLOW_*` bits, changed by atomic OR and AND alone.
    pub state: u32,
    /// Index into `backends`.
    pub backend_id: u32,
    /// When the last packet was seen: `CLOCK_MONOTONIC` in [`TICK_NS`], written when `epoch` has
    /// changed.
    pub last_seen: u32,
    /// With [`FLOW_UNANSWERED`]: `epoch` of the first packet that was not answered. Else with
    /// [`FLOW_RETRY`]: when the SYN was sent last, low half of a time in [`AFFINITY_TICK_NS`].
    pub unanswered_since: u16,
    /// Always zero.
    pub reserved: u16,
    /// With [`FLOW_RETRY`]: the backends that were given up, one bit for each id modulo 31.
    /// [`TRIED_KEEP`].
    pub tried: u32,
    /// Always zero: room for what a flow needs next.
    pub reserved2: u32,
}

/// [`Flow::tried`]: when the flow is confirmed, its client is known to keep the backend ([`crate::affinity`]).
pub const TRIED_KEEP: u32 = 1 << 31;

/// A translated source port towards one backend, and the flow that owns it: how replies find their
/// way.
///
/// Found without hashing into a map: see [`crate::snat::places`]. Not an LRU: a flow takes a free,
/// closed or idle slot, or one whose flow was never confirmed, and never one of an open flow.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnatSlot<A> {
    /// The client's address.
    pub client: A,
    /// The address the client dialled.
    pub frontend: A,
    /// The backend's address.
    pub backend: A,
    /// The source address that the backend sees: this node's, or the client's own when only the
    /// port is translated.
    pub snat: A,
    /// The client's port, host order.
    pub client_port: u16,
    /// The port the client dialled, host order.
    pub frontend_port: u16,
    /// The backend's port, host order.
    pub backend_port: u16,
    /// The source port that the backend sees, host order.
    pub snat_port: u16,
    /// When the last packet was seen, as [`Flow::last_seen`]; 0: never used. Claimed by
    /// compare-and-swap, together with `owner`.
    pub last_seen: u32,
    /// Flow hash of the client's side and the frontend ([`crate::hash::flow`]): whose slot it is,
    /// at a glance, and before the rest is written.
    pub owner: u32,
    /// `FLOW_*` bits, as [`Flow::state`].
    pub state: u32,
    /// Index into `backends`.
    pub backend_id: u32,
    /// As [`Flow::epoch`].
    pub epoch: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// Always zero.
    pub reserved: u8,
    /// Always zero: room for what a source port needs next.
    pub reserved2: u32,
}

/// What is no Service's, though it could be taken for that: a connection of the node whose own port
/// is a frontend's, or one of a pod to a backend itself. As those packets carry it that answer.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirectKey<A> {
    /// The other side's address.
    pub peer: A,
    /// The node's address, or the pod's.
    pub local: A,
    /// The other side's port, host order.
    pub peer_port: u16,
    /// The node's port, or the pod's, host order.
    pub local_port: u16,
    /// IANA protocol number.
    pub proto: u32,
}

/// Who a backend is kept for (`sessionAffinity: ClientIP`).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AffinityKey<A> {
    /// The client's address; unspecified for a socket, whose address is not chosen yet when it
    /// dials.
    pub client: A,
    /// [`Frontend::service`].
    pub service: u32,
    /// [`Frontend::set`].
    pub set: u32,
    /// For a socket `SO_NETNS_COOKIE` of its network namespace, low word first; else zero.
    pub netns: [u32; 2],
}

/// The backend that is kept for a client.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// When the client last opened a flow: `CLOCK_MONOTONIC` in [`AFFINITY_TICK_NS`].
    pub last_used: u32,
    /// Index into `backends`.
    pub backend: u32,
}

/// Unit of [`Affinity::last_used`]: 2^24 ns (17 ms). It wraps after two years; affinity lasts a day
/// at most.
pub const AFFINITY_TICK_NS: u64 = 1 << 24;

/// A backend among a frontend's slots.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemberKey {
    /// [`Frontend::slot_base`].
    pub slot_base: u32,
    /// Index into `backends`.
    pub backend: u32,
}

/// Sources that may dial a Service's load balancer addresses (`loadBalancerSourceRanges`).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRangeKey<A> {
    /// Bits that count: 32 of `service`, then those of the network.
    pub prefix_len: u32,
    /// [`Frontend::service`].
    pub service: u32,
    /// Network address; host bits zero.
    pub addr: A,
}

/// [`BackendState::flags`]: the endpoint serves: it is ready, or serves while it terminates. Without it, datagrams of open
/// flows look for another backend; connections go on.
pub const BACKEND_SERVING: u16 = 1 << 0;
/// [`BackendState::flags`]: there is no such endpoint any more: connections that it does not answer are reset.
pub const BACKEND_GONE: u16 = 1 << 1;

/// Most clients that are kept in mind for each backend that has failed.
pub const MAX_WITNESSES: usize = 4;

/// A client whose connection a backend has failed: it alone goes elsewhere next time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// Hash of a pod's address, or of the network of a client elsewhere; 0: none.
    pub source: u32,
    /// The end of the backend's quarantine for it, in [`AFFINITY_TICK_NS`].
    pub until: u32,
}

/// What is known of a backend beside its address. One per Service port and endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendState {
    /// Flows that the socket hook sent here.
    pub socket_flows: u64,
    /// Flows that tc sent here.
    pub tc_flows: u64,
    /// Flows that XDP sent here.
    pub xdp_flows: u64,
    /// [`BACKEND_SERVING`], [`BACKEND_GONE`].
    pub flags: u16,
    /// How often in a row it left a SYN unanswered or refused it; the next answer sets it to zero.
    /// Written by programs.
    pub failures: u16,
    /// With `failures`: the end of its last quarantine, in [`AFFINITY_TICK_NS`]. Written by programs.
    pub quarantined_until: u32,
    /// Flows that were refused because no source port towards it was left for them.
    pub snat_refused: u64,
    /// With `failures`: whom it has failed, each at the place that `source` says. Written by
    /// programs.
    pub witnesses: [Witness; MAX_WITNESSES],
    /// With `failures`: the end of its quarantine for sockets of this node and its pods.
    pub sockets_until: u32,
    /// [`crate::hash::backend`] of the backend that has the id now. 0: not known, for an agent of a
    /// layout before has given it.
    pub identity: u32,
}

/// What the packet path carried to and from a backend. Bytes are those of IP packets; segments that
/// are cut later, or were joined before, count as so many packets and one header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets to the backend.
    pub to_packets: u64,
    /// Bytes to the backend.
    pub to_bytes: u64,
    /// Packets from the backend.
    pub from_packets: u64,
    /// Bytes from the backend.
    pub from_bytes: u64,
}

/// A datagram that comes in fragments, as they name it.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Identification, as it stands in the packet.
    pub id: u32,
    /// IANA protocol number for IPv4 (RFC 791: part of the name); 0 for IPv6 (RFC 8200: not part of
    /// it).
    pub proto: u32,
}

/// What only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Source port, host order.
    pub src_port: u16,
    /// Destination port, host order.
    pub dst_port: u16,
    /// IANA protocol number.
    pub proto: u32,
}

/// Value in `addresses`: one of a Service's cluster IPs, so nothing else answers there.
pub const ADDRESS_CLUSTER_IP: u32 = 1 << 0;
/// Value in `addresses`: a frontend there has a backend, so echo requests are answered.
pub const ADDRESS_READY: u32 = 1 << 1;

/// Words of the `filter` map that bits are found in by hash: 2^24 bits, two MiB; 100,000 Services
/// with ten endpoints each set one in fourteen.
pub const FILTER_HASHED_WORDS: usize = 1 << 18;
/// Words of the `filter` map: behind those two bits for every port.
pub const FILTER_WORDS: usize = FILTER_HASHED_WORDS + 2 * (1 << 10);
/// Words of the `clients` map: 2^20 bits, 128 KiB.
pub const CLIENT_WORDS: usize = 1 << 14;
/// Words of the `shared_ports` map: 2^16 bits.
pub const SHARED_PORT_WORDS: usize = 1 << 10;

/// A CIDR prefix in [`Config`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix<A> {
    /// Network address; host bits zero.
    pub addr: A,
    /// Bits that count are one.
    pub mask: A,
}

/// Most CIDRs per family in [`FamilyConfig::cluster_cidrs`].
pub const MAX_CLUSTER_CIDRS: usize = 4;

/// [`Config::flags`]: the `node_addrs` check also admits IPv4's loopback addresses, from the node's own namespace.
pub const CONFIG_NODEPORT_LOOPBACK4: u32 = 1 << 0;

/// [`Config::flags`]: the same for IPv6's.
pub const CONFIG_NODEPORT_LOOPBACK6: u32 = 1 << 2;

/// [`Config::flags`]: echo requests to addresses with [`ADDRESS_READY`] are answered.
pub const CONFIG_ANSWER_PING: u32 = 1 << 1;

/// [`Config::flags`]: the socket hook serves only sockets in the node's own network namespace
/// (`--socket-lb host`).
pub const CONFIG_SOCKETS_OF_NODE: u32 = 1 << 3;

/// [`Config::flags`]: the socket hook leaves out sockets of processes below the cgroups in
/// [`names::LEFT_OUT`] (`--socket-lb-labels`).
pub const CONFIG_PODS_LEFT_OUT: u32 = 1 << 4;
/// Entries of [`names::LEFT_OUT`]: several times what a node can run.
pub const MAX_PODS_LEFT_OUT: u32 = 8192;

/// Most networks per family in [`FamilyConfig::service_cidrs`].
pub const MAX_SERVICE_CIDRS: usize = 4;

/// The part of [`Config`] that exists once per family.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilyConfig<A> {
    /// This node's address of the family, the source of translated packets; unspecified if it has
    /// none.
    pub node: A,
    /// Sources in these are internal clients wherever their packets come in; `mask` all zero:
    /// unused.
    pub cluster_cidrs: [Prefix<A>; MAX_CLUSTER_CIDRS],
    /// Number of `cluster_cidrs` in use.
    pub cluster_cidr_count: u32,
    /// Number of `service_cidrs` in use.
    pub service_cidr_count: u32,
    /// The smallest network with all cluster IPs and `service_cidrs` in it: destinations outside
    /// need no look at `addresses`. All ones with an empty mask, which no address matches: there
    /// are none.
    pub service_hull: Prefix<A>,
    /// Addresses in these belong to Services or to nobody.
    pub service_cidrs: [Prefix<A>; MAX_SERVICE_CIDRS],
}

/// How long a flow may be silent before nobody misses it, in ticks ([`TICK_NS`]); see
/// [`crate::timeouts`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, both sides have spoken.
    pub tcp_established: u32,
    /// TCP, one side has sent FIN.
    pub tcp_close_wait: u32,
    /// TCP and SCTP, not answered.
    pub tcp_unanswered: u32,
    /// TCP, both sides have sent FIN or one RST: long enough for retransmissions of the last
    /// segments.
    pub closed: u32,
    /// TCP, both sides have sent FIN: how long the backend may keep the client's port in TIME_WAIT,
    /// where it could take a new connection's SYN for an old packet.
    pub time_wait: u32,
    /// UDP, until the client has sent again after an answer.
    pub udp: u32,
    /// UDP, from then on.
    pub udp_stream: u32,
    /// SCTP, answered.
    pub sctp_established: u32,
}

/// What the programs must know of this node. One entry, replaced as a whole by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `SO_NETNS_COOKIE` of the node's own network namespace: loopback means the node only there.
    pub host_netns: u64,
    /// First port of the SNAT range, host order.
    pub snat_first: u16,
    /// Number of ports in the SNAT range, at least 1.
    pub snat_ports: u16,
    /// `snat` slots in use, a power of two: see [`crate::snat::places`].
    pub snat_entries: u32,
    /// First port of the SNAT range that the kernel gives to sockets of this node
    /// (`net.ipv4.ip_local_port_range`), host order: those are only taken when others are short.
    pub local_first: u16,
    /// How many those are, up to the last of them.
    pub local_ports: u16,
    /// `CONFIG_*` bits.
    pub flags: u32,
    /// When flows are over.
    pub timeouts: Timeouts,
    /// For how long a backend that did not answer gets no new connections, in [`AFFINITY_TICK_NS`];
    /// doubled each time it does not answer again. 0: no quarantine.
    pub quarantine: u32,
    /// Longest quarantine, in [`AFFINITY_TICK_NS`].
    pub quarantine_max: u32,
    /// Always zero.
    pub reserved: u32,
    /// IPv4.
    pub v4: FamilyConfig<[u8; 4]>,
    /// IPv6.
    pub v6: FamilyConfig<[u8; 16]>,
}

/// Frontends that an unconnected UDP socket keeps in mind at once.
pub const SOCKET_PEERS: usize = 4;

/// One frontend that a socket dialled, and the backend it was given. IPv4 addresses are IPv4-mapped
/// (`::ffff:a.b.c.d`).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketPeer {
    /// The address the process dialled.
    pub frontend: [u8; 16],
    /// The backend's address.
    pub backend: [u8; 16],
    /// The port the process dialled, host order; 0: unused.
    pub frontend_port: u16,
    /// The backend's port, host order.
    pub backend_port: u16,
    /// Index into `backends`; with [`SOCKET_OF_NODE`] in `sockets`.
    pub backend_id: u32,
}

/// [`SocketPeer::backend_id`]: the socket is in the node's own network namespace, where the agent can
/// see whether it still is there.
pub const SOCKET_OF_NODE: u32 = 1 << 31;

impl SocketPeer {
    /// Index into `backends`.
    #[inline(always)]
    pub fn backend(&self) -> u32 {
        self.backend_id & !SOCKET_OF_NODE
    }
}

/// What the socket hook remembers with an unconnected UDP socket; the kernel frees it with the
/// socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketPeers {
    /// The oldest is overwritten.
    pub peers: [SocketPeer; SOCKET_PEERS],
    /// The entry of `peers` to overwrite next.
    pub next: u32,
}

no_padding!(
    FrontendKey<[u8; 4]> = 4 + 2 + 1 + 1 + 4,
    FrontendKey<[u8; 16]> = 16 + 2 + 1 + 1 + 4,
    Frontend = 4 * 4 + 2 + 2 + 4,
    Slot<[u8; 4]> = 4 + 2 + 2 + 4,
    Slot<[u8; 16]> = 16 + 2 + 2 + 4,
    FlowKey<[u8; 4]> = 2 * 4 + 2 + 2 + 1 + 1 + 2,
    FlowKey<[u8; 16]> = 2 * 16 + 2 + 2 + 1 + 1 + 2,
    Flow<[u8; 4]> = 3 * 4 + 4 * 2 + 4 * 6,
    Flow<[u8; 16]> = 3 * 16 + 4 * 2 + 4 * 6,
    SnatSlot<[u8; 4]> = 4 * 4 + 4 * 2 + 4 * 4 + 2 + 1 + 1 + 4,
    SnatSlot<[u8; 16]> = 4 * 16 + 4 * 2 + 4 * 4 + 2 + 1 + 1 + 4,
    DirectKey<[u8; 4]> = 2 * 4 + 2 + 2 + 4,
    DirectKey<[u8; 16]> = 2 * 16 + 2 + 2 + 4,
    AffinityKey<[u8; 4]> = 4 + 4 + 4 + 2 * 4,
    AffinityKey<[u8; 16]> = 16 + 4 + 4 + 2 * 4,
    Affinity = 4 + 4,
    MemberKey = 4 + 4,
    SourceRangeKey<[u8; 4]> = 4 + 4 + 4,
    SourceRangeKey<[u8; 16]> = 4 + 4 + 16,
    ServiceInfo = 2 * NAME_LEN,
    Traffic = 4 * 8,
    BackendState = 4 * 8 + 2 + 2 + 4 + MAX_WITNESSES * 8 + 2 * 4,
    FragmentKey<[u8; 4]> = 2 * 4 + 4 + 4,
    FragmentKey<[u8; 16]> = 2 * 16 + 4 + 4,
    FragmentPorts = 2 + 2 + 4,
    SocketPeer = 2 * 16 + 2 + 2 + 4,
    SocketPeers = SOCKET_PEERS * 40 + 4,
    FamilyConfig<[u8; 4]> = 4 + MAX_CLUSTER_CIDRS * 8 + 2 * 4 + 8 + MAX_SERVICE_CIDRS * 8,
    FamilyConfig<[u8; 16]> = 16 + MAX_CLUSTER_CIDRS * 32 + 2 * 4 + 32 + MAX_SERVICE_CIDRS * 32,
    Timeouts = 8 * 4,
    Config = 8 + 4 * 2 + 4 * 4 + 8 * 4 + 84 + 312 + 4,
);

#[cfg(feature = "user")]
pub use pod::Octets;

#[cfg(feature = "user")]
mod pod {
    use super::*;

    mod sealed {
        pub trait Sealed {}
        impl Sealed for [u8; 4] {}
        impl Sealed for [u8; 16] {}
    }

    /// The two address types for which the absence of padding is asserted above, and no other.
    pub trait Octets: aya::Pod + sealed::Sealed {}
    impl Octets for [u8; 4] {}
    impl Octets for [u8; 16] {}

    macro_rules! pod {
        ($($ty:ty),+ $(,)?) => { $(
            // SAFETY: `repr(C)`, `Copy`, no padding (asserted above), every bit pattern is a value.
            unsafe impl aya::Pod for $ty {}
        )+ };
    }
    macro_rules! pod_per_family {
        ($($ty:ident),+ $(,)?) => { $(
            // SAFETY: `repr(C)`, `Copy`, no padding (asserted above for both address types), every
            // bit pattern is a value.
            unsafe impl<A: Octets> aya::Pod for $ty<A> {}
        )+ };
    }
    pod_per_family!(
        FrontendKey,
        Slot,
        FlowKey,
        Flow,
        SnatSlot,
        DirectKey,
        AffinityKey,
        SourceRangeKey
    );
    pod!(
        Frontend,
        Affinity,
        MemberKey,
        ServiceInfo,
        BackendState,
        Traffic,
        Config,
        SocketPeer,
        SocketPeers,
        TraceRecord<[u8; 16]>,
        Tracers<[u8; 16]>
    );
}
