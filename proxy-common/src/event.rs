//! What is counted: one enum for the kernel's counters, the metrics and the command line.

macro_rules! events {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal;)+) => {
        /// Something worth counting. The number is the index into the `events` map.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Event {
            $($(#[doc = $doc])+ $variant = $number,)+
        }

        impl Event {
            /// All events, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Name in tables and metrics: lower case with underscores.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Its bit in a set of events.
            pub const fn bit(self) -> u64 {
                1 << self as u32
            }

            /// One sentence for help texts.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+),)+ }
            }
        }
    };
}

events! {
    /// New flows that the socket hook gave a backend.
    SocketFlow = 0, "socket_flow";
    /// New flows that tc gave a backend.
    TcFlow = 1, "tc_flow";
    /// New flows that XDP gave a backend.
    XdpFlow = 2, "xdp_flow";
    /// Packets or connects refused because the frontend has no backend.
    NoBackend = 3, "no_backend";
    /// Packets dropped because no backend is eligible under the traffic policy.
    PolicyDrop = 4, "policy_drop";
    /// New flows refused because every source port towards the backend belongs to an open flow.
    SnatExhausted = 5, "snat_exhausted";
    /// Flows forwarded by hash without an entry, because the conntrack map refused one.
    ConntrackFull = 6, "conntrack_full";
    /// Packets that XDP left to tc because the kernel knew no neighbour or route yet.
    XdpToTc = 7, "xdp_to_tc";
    /// Flows whose client port was in use to another frontend, so that their source port was
    /// translated.
    PortCollision = 8, "port_collision";
    /// Packets of frontends dropped because their headers could not be rewritten.
    RewriteFailed = 9, "rewrite_failed";
    /// New flows dropped because their source is in none of the Service's loadBalancerSourceRanges.
    SourceDenied = 10, "source_denied";
    /// Packets or connects refused because no Service has that port of its cluster IP.
    UnknownPort = 11, "unknown_port";
    /// Packets dropped because their destination is a cluster IP or in the Service range, and
    /// nobody takes them there.
    UnknownAddress = 12, "unknown_address";
    /// Echo requests to addresses of Services answered.
    EchoAnswered = 13, "echo_answered";
    /// ICMP errors about translated packets that were translated too.
    ErrorTranslated = 14, "error_translated";
    /// Fragments to cluster IPs dropped because they came before the first of their datagram, or
    /// long after it.
    FragmentLost = 15, "fragment_lost";
    /// Connections reset because their backend is gone.
    BackendGone = 16, "backend_gone";
    /// Connections that the socket hook has left to the packet path, because `sockets` is full.
    SocketsFull = 17, "sockets_full";
    /// SYNs sent to another backend because theirs had not answered or had refused.
    Retry = 18, "retry";
    /// Refusals that clients were not told of because another backend was left to try.
    RefusalHeld = 19, "refusal_held";
    /// SYN-ACKs and resets to cluster IPs dropped because they are of no flow, and open none.
    NoFlow = 20, "no_flow";
    /// Packets dropped without the refusal, reset or echo reply that was due, because too many were
    /// sent to that address or in all.
    AnswerLimited = 21, "answer_limited";
    /// New flows refused because their source is to be translated, and this node has no address of
    /// their family.
    NoSourceAddress = 22, "no_source_address";
    /// New flows refused because their client's network, or their Service, has more than its share
    /// of the source ports towards a backend, and those are short.
    SnatLimited = 23, "snat_limited";
    /// Packets of this node's processes to a backend dropped because no route leads there.
    NoRoute = 24, "no_route";
    /// Packets that went on as they were because `tail_calls` has lost the program for them.
    ProgramMissing = 25, "program_missing";
}

/// Number of entries of the `events` map: room for more without a new layout.
pub const MAX_EVENTS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (position, event) in Event::ALL.iter().enumerate() {
            assert_eq!(*event as usize, position);
        }
        assert!(Event::ALL.len() <= MAX_EVENTS);
    }
}
