//! ICMP and ICMPv6 errors about translated packets: path-MTU discovery, unreachables, exceeded hop
//! limits.
//!
//! An error quotes the packet that it is about as the sender of the error saw it, and goes to that
//! packet's source. So an error travels the way of a packet that would *answer* the quoted one, and
//! is translated as that answer would be:
//!
//! ```text
//!                    quoted                 answer, as if         becomes               so the quote becomes
//! arrives            N:sp → B:bp            B:bp → N:sp           B:bp → C:sp           C:sp → B:bp       (SNAT only)
//! arrives            F:fp → C:cp            C:cp → F:fp           C:sp → B:bp           B:bp → C:sp
//! leaves             C:sp → B:bp            B:bp → C:sp           F:fp → C:cp           C:cp → F:fp
//! leaves             B:bp → C:sp            C:sp → B:bp           N:sp → B:bp           B:bp → N:sp       (SNAT only)
//! ```
//!
//! (`C` client, `F` frontend, `N` this node, `B` backend, as in [`crate::balance`].) The error's
//! destination follows, its source becomes the answer's where that changed, as with netfilter: a
//! router's private address would not get past the source filters of other networks. An error
//! changes no flow's state: anybody can send one. But an unreachable about a SYN is a refusal, and
//! may be held back ([`crate::failover`]).

use super::Action;
use crate::{
    access::{Access, load_addr, store_addrs},
    balance::{
        Maps, Scratch, Subprograms, client_key, may_be_frontend, returns_here, shared_key,
        shared_port_bit, snat_slot,
    },
    checksum::Difference,
    event::Event,
    extension, failover,
    family::Family,
    filter,
    layout::*,
    packet::{Tuple, checksum_offset, differences},
    snat,
    verdict::Direction,
};

/// Length of an error's own header.
const ICMP: u32 = 8;

/// IANA protocol number of the family's ICMP.
pub(super) const fn proto<F: Family>() -> u8 {
    if F::HEADER == 20 { 1 } else { 58 }
}

/// Whether an ICMP type is an error that quotes a packet.
///
/// [RFC 792](https://www.rfc-editor.org/rfc/rfc792) unreachable, time exceeded, parameter problem
/// (source quench is deprecated, RFC 6633; a redirect is for the router that translated, not for
/// the client); [RFC 4443](https://www.rfc-editor.org/rfc/rfc4443) unreachable, too big, time
/// exceeded, parameter problem.
#[inline(always)]
pub(super) fn is_error<F: Family>(kind: u8) -> bool {
    if F::HEADER == 20 {
        matches!(kind, 3 | 11 | 12)
    } else {
        matches!(kind, 1..=4)
    }
}

/// Whether an error says that nobody is there or nobody may go there: RFC 792 type 3 but for
/// "fragmentation needed", RFC 4443 type 1.
#[inline(always)]
fn is_unreachable<F: Family>(packet: &impl Access, icmp: u32) -> bool {
    const FRAGMENTATION_NEEDED: u8 = 4;
    let Some(word) = packet.load::<u16>(icmp) else {
        return false;
    };
    let [kind, code] = word.to_ne_bytes();
    if F::HEADER == 20 {
        kind == 3 && code != FRAGMENTATION_NEEDED
    } else {
        kind == 1
    }
}

/// An ICMP error whose path and addresses stand in `scratch.slow`: translated if it is about a
/// translated packet.
#[inline(always)]
pub(super) fn translate<F: Family, M: Subprograms<F>>(
    maps: &M,
    packet: &impl Access,
    scratch: &mut Scratch<F::Words>,
    direction: Direction,
) -> Action {
    if !read_quote::<F>(packet, scratch) {
        return Action::Pass;
    }
    if scratch.slow.quoted.proto == u32::from(TCP)
        && is_unreachable::<F>(packet, scratch.slow.path.l4)
    {
        scratch.arrival.tuple = scratch.slow.answer;
        if failover::is_held_back(maps, scratch, direction == Direction::Egress) {
            return Action::Drop;
        }
    }
    scratch.translation.process = false;
    let ours = match direction {
        Direction::Ingress(_) => arriving(maps, scratch),
        Direction::Egress => leaving(maps, scratch),
    };
    if !ours {
        return Action::Pass;
    }
    if write::<F>(packet, scratch) {
        maps.count(Event::ErrorTranslated);
        if scratch.translation.process {
            Action::Deliver
        } else {
            Action::Pass
        }
    } else {
        maps.count(Event::RewriteFailed);
        Action::Drop
    }
}

/// Reads the quoted packet; leaves what its answer would carry in `scratch.slow.answer`.
#[inline(never)]
fn read_quote<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> bool {
    let slow = &mut scratch.slow;
    let l3 = slow.path.l4 + ICMP;
    if !extension::find::<F>(packet, l3, &mut slow.quoted) {
        return false;
    }
    let proto = slow.quoted.proto as u8;
    // A fragment but the first has no ports; nobody sends errors about those (RFC 1122 section
    // 3.2.2).
    if slow.quoted.offset != 0 || !matches!(proto, TCP | UDP | SCTP) {
        return false;
    }
    let src = l3 + F::ADDRESSES as u32;
    let (Some(from), Some(to), Some(ports)) = (
        load_addr::<F>(packet, src),
        load_addr::<F>(packet, src + size_of::<F::Words>() as u32),
        packet.load::<u32>(slow.quoted.l4),
    ) else {
        return false;
    };
    // Errors go to the source of what they are about; anything else is forged, or not for us to
    // judge.
    if from != slow.tuple.dst {
        return false;
    }
    slow.answer = Tuple {
        src: to,
        dst: from,
        src_port: u16::from_be((ports >> 16) as u16),
        dst_port: u16::from_be(ports as u16),
        proto,
    };
    true
}

/// [`crate::balance::arriving`] of the answer to the quoted packet, for flows that exist. Leaves
/// what it becomes in `scratch.slow.becomes`.
#[inline(never)]
fn arriving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let slow = &mut scratch.slow;
    let answer = slow.answer;
    if snat::may_be(maps, answer.dst)
        && maps.filter(filter::backend::<F>(
            answer.src,
            answer.src_port,
            answer.proto,
        ))
        && let Some((_, slot)) = snat_slot(
            maps,
            config,
            answer.dst_port,
            answer.src,
            answer.src_port,
            answer.proto,
        )
        && returns_here(&slot, answer.dst)
    {
        slow.becomes = Tuple {
            dst: slot.client,
            ..answer
        };
        if slot.state & FLOW_PROCESS != 0 {
            slow.becomes.src = slot.frontend;
            slow.becomes.src_port = slot.frontend_port;
            slow.becomes.dst_port = slot.client_port;
            scratch.translation.process = true;
        }
        return true;
    }
    if !may_be_frontend::<F>(maps, &answer) {
        return false;
    }
    scratch.key = client_key::<F>(&answer);
    if forward(maps, scratch) {
        return true;
    }
    if !maps.port_is_shared(shared_port_bit::<F>(&answer)) {
        return false;
    }
    scratch.key = shared_key::<F>(&answer);
    forward(maps, scratch)
}

/// The answer as a packet of the client's flow under `scratch.key`.
#[inline(always)]
fn forward<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Scratch { key, slow, .. } = scratch;
    let Some(entry) = maps.flow(key).or_else(|| maps.unconfirmed_flow(key)) else {
        return false;
    };
    let flow = entry.read();
    if flow.frontend != slow.answer.dst || flow.frontend_port != slow.answer.dst_port {
        return false;
    }
    slow.becomes = Tuple {
        dst: flow.backend,
        dst_port: flow.backend_port,
        ..slow.answer
    };
    if flow.state & FLOW_SNAT != 0 {
        slow.becomes.src_port = flow.snat_port;
    }
    true
}

/// [`crate::balance::leaving`] of the answer to the quoted packet.
#[inline(never)]
fn leaving<F: Family, M: Maps<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> bool {
    let Some(config) = maps.config() else {
        return false;
    };
    let Scratch { key, slow, .. } = scratch;
    let answer = slow.answer;
    slow.becomes = answer;
    if maps.filter(filter::backend::<F>(
        answer.src,
        answer.src_port,
        answer.proto,
    )) {
        if snat::may_be(maps, answer.dst)
            && let Some((_, slot)) = snat_slot(
                maps,
                config,
                answer.dst_port,
                answer.src,
                answer.src_port,
                answer.proto,
            )
            && slot.client == answer.dst
        {
            slow.becomes.src = slot.frontend;
            slow.becomes.src_port = slot.frontend_port;
            slow.becomes.dst_port = slot.client_port;
            return true;
        }
        *key = client_key::<F>(&answer);
        key.client = answer.dst;
        key.client_port = answer.dst_port;
        if let Some(entry) = maps.flow(key).or_else(|| maps.unconfirmed_flow(key)) {
            let flow = entry.read();
            if flow.backend == answer.src
                && flow.backend_port == answer.src_port
                && flow.state & (FLOW_SNAT | FLOW_SUPERSEDED) == 0
            {
                slow.becomes.src = flow.frontend;
                slow.becomes.src_port = flow.frontend_port;
                return true;
            }
        }
    }
    if maps.filter(filter::backend::<F>(
        answer.dst,
        answer.dst_port,
        answer.proto,
    )) && snat::may_be(maps, answer.src)
        && let Some((_, slot)) = snat_slot(
            maps,
            config,
            answer.src_port,
            answer.dst,
            answer.dst_port,
            answer.proto,
        )
        && slot.client == answer.src
        && slot.snat != answer.src
    {
        slow.becomes.src = slot.snat;
        return true;
    }
    false
}

/// Writes the error about what the quoted packet was before it was translated. Only the sender of
/// the error can make it fail in the middle, by a packet that ends within a field, and that was
/// looked at before.
#[inline(never)]
fn write<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> bool {
    write_fields::<F>(packet, scratch).is_some()
}

#[inline(always)]
fn write_fields<F: Family>(packet: &impl Access, scratch: &mut Scratch<F::Words>) -> Option<()> {
    let slow = &scratch.slow;
    let (answer, becomes) = (&slow.answer, &slow.becomes);
    let (l3, icmp) = (packet.link_length(), slow.path.l4);
    let (quote, transport) = (icmp + ICMP, slow.quoted.l4);
    let proto = slow.quoted.proto as u8;
    let (addresses, ports) = differences::<F>(answer, becomes);

    // Everything that is needed is read before anything is written. How the quote changes is what
    // the error's own checksum, which covers it, must take up.
    let old: u16 = packet.load(icmp + 2)?;
    let mut change = addresses.and(ports);
    let header: u16 = if F::HEADER == 20 {
        packet.load(quote + 10)?
    } else {
        0
    };
    // 0: none. Not an `Option`: LLVM would save what is not there to the stack, which the verifier
    // does not allow.
    let (mut field_at, mut field_new) = (0, 0);
    if let Some(offset) = checksum_offset(proto) {
        // Quotes of eight bytes of TCP end before its checksum.
        if let Some(field) = packet.load::<u16>(transport + offset as u32)
            && !(proto == UDP && field == 0)
        {
            let mut new = addresses.and(ports).apply(field);
            if proto == UDP && new == 0 {
                new = 0xffff;
            }
            change = change.and(Difference::word(field, new));
            (field_at, field_new) = (transport + offset as u32, new);
        }
    }
    if F::HEADER == 20 {
        change = change.and(Difference::word(header, addresses.apply(header)));
    }
    let src = if becomes.src == answer.src {
        slow.tuple.src
    } else {
        becomes.src
    };
    if F::HEADER == 40 {
        // The pseudo-header of ICMPv6 holds the error's own addresses.
        change = change
            .and(Difference::address::<F>(slow.tuple.src, src))
            .and(Difference::address::<F>(slow.tuple.dst, becomes.dst));
    }

    let port_words =
        u32::from(becomes.dst_port.to_be()) | u32::from(becomes.src_port.to_be()) << 16;
    let written = packet.store(icmp + 2, change.apply(old))
        && packet.store(transport, port_words)
        && store_addrs::<F>(
            packet,
            quote,
            (answer.dst, answer.src),
            (becomes.dst, becomes.src),
        )
        && store_addrs::<F>(
            packet,
            l3,
            (slow.tuple.src, slow.tuple.dst),
            (src, becomes.dst),
        )
        && (field_at == 0 || packet.store(field_at, field_new));
    written.then_some(())
}
