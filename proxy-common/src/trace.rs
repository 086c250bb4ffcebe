//! What tracers are told (`shunt trace`): one record for each decision about a packet or call that
//! was counted ([`crate::event`]), or for a connection that closes.
//!
//! Packets of open flows are not counted and not told of.

use crate::{
    balance::Scratch,
    event::Event,
    family::Family,
    layout::*,
    packet::{SYN, Tuple},
};

macro_rules! bits {
    ($($event:ident)|+) => { 0 $(| Event::$event.bit())+ };
}

/// New flows.
pub const NEW: u64 = bits!(SocketFlow | TcFlow | XdpFlow);
/// Refusals that clients are told of.
pub const REFUSED: u64 =
    bits!(NoBackend | UnknownPort | SnatExhausted | SnatLimited | NoSourceAddress);
/// Why packets are dropped, and calls and packets that got no answer.
pub const DROPPED: u64 = bits!(
    PolicyDrop
        | RewriteFailed
        | SourceDenied
        | UnknownAddress
        | FragmentLost
        | NoFlow
        | AnswerLimited
);
/// What can only be when something is broken.
pub const IMPOSSIBLE: u64 = bits!(RewriteFailed | ProgramMissing);
/// What this node lacks: room in a map, source ports or addresses, a route.
pub const LACKING: u64 = bits!(
    ConntrackFull
        | SocketsFull
        | SnatExhausted
        | SnatLimited
        | NoSourceAddress
        | NoRoute
        | AnswerLimited
);
/// Events of which the frontend is known.
const OF_A_SERVICE: u64 = NEW | OF_A_BACKEND | bits!(NoBackend | PolicyDrop | SourceDenied | Retry);
/// Events of which the backend is known.
const OF_A_BACKEND: u64 = NEW | bits!(SnatExhausted | SnatLimited | NoSourceAddress | RefusalHeld);

/// What a record tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceKind {
    /// A flow opens.
    New,
    /// A socket was given a backend.
    Pick,
    /// An open connection whose entry was pushed out has one again.
    Remade,
    /// A SYN goes to another backend.
    Retry,
    /// A backend's refusal, of which the client hears nothing.
    Held,
    /// The client is told that nobody is there.
    Refused,
    /// The client's connection is reset.
    Reset,
    /// The packet ends here, or the call fails.
    Dropped,
    /// A side closes its connection.
    Closed,
    /// What was counted beside all this: an answered ping, a translated ICMP error.
    Other,
}

impl TraceKind {
    /// Its name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pick => "pick",
            Self::Remade => "remade",
            Self::Retry => "retry",
            Self::Held => "held",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::Dropped => "dropped",
            Self::Closed => "closed",
            Self::Other => "other",
        }
    }
}

impl<A: Copy> TraceRecord<A> {
    /// What it tells of.
    pub const fn kind(&self) -> TraceKind {
        if self.flags & (TRACE_CLIENT_CLOSES | TRACE_BACKEND_CLOSES) != 0 {
            TraceKind::Closed
        } else if self.events & DROPPED != 0 {
            TraceKind::Dropped
        } else if self.events & Event::Retry.bit() != 0 {
            TraceKind::Retry
        } else if self.events & NEW != 0 {
            if self.hook == TRACE_AT_SOCKET {
                TraceKind::Pick
            } else if self.proto == TCP && self.tcp_flags & SYN == 0 {
                TraceKind::Remade
            } else {
                TraceKind::New
            }
        } else if self.events & REFUSED != 0 {
            TraceKind::Refused
        } else if self.events & Event::BackendGone.bit() != 0 {
            TraceKind::Reset
        } else if self.events & Event::RefusalHeld.bit() != 0 {
            TraceKind::Held
        } else {
            TraceKind::Other
        }
    }

    /// Whether a tracer wants to be told of it; `any` is the unspecified address.
    #[inline(always)]
    pub fn fits(&self, filter: &TraceFilter<A>, any: A) -> bool
    where
        A: Eq,
    {
        let is = |wanted: A, addr: A| wanted == any || wanted == addr;
        let at = |wanted: u16, port: u16| wanted == 0 || wanted == port;
        if self.events & filter.events == 0 && self.flags & filter.closes == 0 {
            return false;
        }
        if filter.proto != 0 && filter.proto != self.proto {
            return false;
        }
        if filter.has_service != 0
            && (self.flags & TRACE_HAS_SERVICE == 0 || self.service != filter.service)
        {
            return false;
        }
        if filter.pod != any
            && filter.pod != self.src
            && filter.pod != self.dst
            && filter.pod != self.backend
        {
            return false;
        }
        let there = is(filter.src, self.src)
            && at(filter.src_port, self.src_port)
            && (is(filter.dst, self.dst) && at(filter.dst_port, self.dst_port)
                || is(filter.dst, self.backend) && at(filter.dst_port, self.backend_port));
        let back = is(filter.src, self.dst)
            && at(filter.src_port, self.dst_port)
            && is(filter.dst, self.src)
            && at(filter.dst_port, self.src_port);
        there || back
    }
}

/// The record of the packet that was decided in `scratch`, without its time, hook and device.
#[inline(always)]
pub fn record<F: Family>(scratch: &Scratch<F::Words>) -> TraceRecord<crate::family::Words6> {
    let (events, flow) = (scratch.counted, &scratch.flow);
    let Tuple {
        src,
        dst,
        src_port,
        dst_port,
        proto,
    } = scratch.arrival.tuple;
    let mut record = TraceRecord {
        events,
        src: F::mapped(src),
        dst: F::mapped(dst),
        src_port,
        dst_port,
        proto,
        tcp_flags: scratch.arrival.tcp_flags,
        ..TraceRecord::default()
    };
    if events & OF_A_SERVICE != 0 {
        record.flags |= TRACE_HAS_SERVICE;
        record.service = scratch.frontend.service;
    }
    if events & OF_A_BACKEND != 0 {
        record.flags |= TRACE_HAS_BACKEND;
        record.backend = F::mapped(flow.backend);
        record.backend_port = flow.backend_port;
        if flow.state & FLOW_SNAT != 0 {
            record.flags |= TRACE_HAS_SOURCE;
            record.snat = F::mapped(flow.snat);
            record.snat_port = flow.snat_port;
        }
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::MAX_EVENTS;

    const CLIENT: u32 = 1;
    const FRONTEND: u32 = 2;
    const BACKEND: u32 = 3;
    const ANY: u32 = 0;

    fn told(event: Event) -> TraceRecord<u32> {
        TraceRecord {
            events: event.bit(),
            src: CLIENT,
            src_port: 4000,
            dst: FRONTEND,
            dst_port: 80,
            backend: BACKEND,
            backend_port: 8080,
            proto: TCP,
            tcp_flags: SYN,
            hook: TRACE_AT_TC,
            flags: TRACE_HAS_BACKEND | TRACE_HAS_SERVICE,
            service: 7,
            ..TraceRecord::default()
        }
    }

    #[test]
    fn every_filter_lets_through_what_it_names_and_nothing_else() {
        const { assert!(MAX_EVENTS <= 64) };
        let record = told(Event::TcFlow);
        let all = TraceFilter::<u32> {
            events: u64::MAX,
            ..TraceFilter::default()
        };
        assert!(record.fits(&all, ANY));
        let cases: [(&str, TraceFilter<u32>, TraceFilter<u32>); 7] = [
            (
                "events",
                TraceFilter { events: NEW, ..all },
                TraceFilter {
                    events: DROPPED,
                    ..all
                },
            ),
            (
                "protocol",
                TraceFilter { proto: TCP, ..all },
                TraceFilter { proto: UDP, ..all },
            ),
            (
                "service",
                TraceFilter {
                    has_service: 1,
                    service: 7,
                    ..all
                },
                TraceFilter {
                    has_service: 1,
                    service: 0,
                    ..all
                },
            ),
            (
                "pod",
                TraceFilter {
                    pod: BACKEND,
                    ..all
                },
                TraceFilter { pod: 9, ..all },
            ),
            (
                "from whom",
                TraceFilter {
                    src: CLIENT,
                    src_port: 4000,
                    ..all
                },
                TraceFilter {
                    src: CLIENT,
                    src_port: 4001,
                    ..all
                },
            ),
            (
                "for whom",
                TraceFilter {
                    src: CLIENT,
                    dst: BACKEND,
                    dst_port: 8080,
                    ..all
                },
                TraceFilter {
                    src: CLIENT,
                    dst: BACKEND,
                    dst_port: 80,
                    ..all
                },
            ),
            (
                "the other way round",
                TraceFilter {
                    src: FRONTEND,
                    dst: CLIENT,
                    ..all
                },
                TraceFilter {
                    src: FRONTEND,
                    dst: BACKEND,
                    ..all
                },
            ),
        ];
        for (name, fits, other) in cases {
            assert!(record.fits(&fits, ANY), "{name}");
            assert!(!record.fits(&other, ANY), "{name}");
        }
        let close = TraceRecord {
            events: 0,
            flags: TRACE_CLIENT_CLOSES,
            ..record
        };
        assert!(!close.fits(&all, ANY));
        assert!(close.fits(
            &TraceFilter {
                events: 0,
                closes: TRACE_CLIENT_CLOSES,
                ..all
            },
            ANY
        ));
    }

    #[test]
    fn a_record_says_what_became_of_the_packet() {
        let plain = told(Event::TcFlow);
        assert_eq!(plain.kind(), TraceKind::New);
        let ack = TraceRecord {
            tcp_flags: 0x10,
            ..plain
        };
        assert_eq!(ack.kind(), TraceKind::Remade);
        let datagram = TraceRecord { proto: UDP, ..ack };
        assert_eq!(datagram.kind(), TraceKind::New);
        let socket = TraceRecord {
            hook: TRACE_AT_SOCKET,
            ..ack
        };
        assert_eq!(socket.kind(), TraceKind::Pick);
        let retry = TraceRecord {
            events: plain.events | Event::Retry.bit(),
            ..plain
        };
        assert_eq!(retry.kind(), TraceKind::Retry);
        assert_eq!(told(Event::NoBackend).kind(), TraceKind::Refused);
        let limited = TraceRecord {
            events: bits!(NoBackend | AnswerLimited),
            ..plain
        };
        assert_eq!(limited.kind(), TraceKind::Dropped);
        assert_eq!(told(Event::EchoAnswered).kind(), TraceKind::Other);
    }
}
