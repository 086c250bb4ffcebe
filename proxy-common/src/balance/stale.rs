//! Sockets that the socket hook connected, and whose backend does not serve any more.
//!
//! Their packets bear the backend's own address, so no flow is needed for them. The agent has them
//! come here by the bits of [`filter::stale`]; the sender's socket tells whether it is one. One that
//! dialled the backend itself is left alone.
//!
//! Datagrams go to another backend from here on, as if the packet had been to the frontend: a flow is
//! opened whose frontend is the old backend, so that answers bear the address that the socket is
//! connected to.
//!
//! A connection goes on: a pod that was only taken from behind its Service goes on answering. But when
//! nobody answers any more, the client shall be told, as it is where packets are translated. So, once
//! its backend is gone, it becomes a flow to a frontend that is its own backend, and is judged as all
//! others are.

use super::{
    Maps, Scratch, Subprograms, choose::may_be_stale, flow::client_key, forward::find_unconfirmed,
};
use crate::{
    event::Event,
    family::Family,
    filter,
    layout::*,
    packet::{ACK, RST, SYN},
    timeouts::is_closed,
    verdict::{InScratch, Step, Verdict},
};

/// Judges the packet in `scratch.arrival`, if it is of such a socket. It goes on if not, and so does
/// a datagram that is to find another backend: then its destination is the frontend until it is
/// [restored](restore).
#[inline(never)]
pub(super) fn take_over<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Step {
    scratch.redirected.set(false);
    if !may_be_stale(maps, &scratch.arrival) {
        return Step::Continue(());
    }
    let Some(hooked) = maps.hooked(&scratch.arrival.tuple) else {
        return Step::Continue(());
    };
    let flags = maps.backend_flags(hooked.backend);
    if scratch.arrival.tuple.proto != UDP {
        return if flags & BACKEND_GONE == 0 {
            Step::Continue(())
        } else {
            Step::Break(take_over_connection(maps, scratch, hooked.backend))
        };
    }
    if flags & BACKEND_SERVING != 0 {
        return Step::Break(Verdict::Pass);
    }
    if find_unconfirmed(maps, scratch) {
        return Step::Break(Verdict::Translate(InScratch));
    }
    let tuple = &mut scratch.arrival.tuple;
    scratch.sent_to = (tuple.dst, tuple.dst_port);
    scratch.redirected.set(true);
    tuple.dst = hooked.frontend;
    tuple.dst_port = hooked.frontend_port;
    Step::Continue(())
}

/// Gives the packet in `scratch.arrival` its destination back.
#[inline(always)]
pub(super) fn restore<A: Copy>(scratch: &mut Scratch<A>) {
    if scratch.redirected.get() {
        let tuple = &mut scratch.arrival.tuple;
        (tuple.dst, tuple.dst_port) = scratch.sent_to;
    }
}

/// Makes a flow of a connection whose backend is gone.
#[inline(always)]
fn take_over_connection<F: Family, M: Maps<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
    backend: u32,
) -> Verdict {
    let Scratch {
        arrival, key, flow, ..
    } = scratch;
    match arrival.tcp_flags & (SYN | ACK | RST) {
        ACK => {}
        SYN => {
            // Not the first: that was sent when the backend was one, and the bits come later.
            maps.count(Event::BackendGone);
            return Verdict::Reset;
        }
        _ => return Verdict::Pass,
    }
    let tuple = &arrival.tuple;
    *key = client_key::<F>(tuple);
    *flow = Flow {
        frontend: tuple.dst,
        backend: tuple.dst,
        snat: tuple.src,
        frontend_port: tuple.dst_port,
        backend_port: tuple.dst_port,
        snat_port: tuple.src_port,
        epoch: maps.epoch(),
        // This packet is the first that is not answered.
        state: FLOW_SEEN_REPLY | FLOW_CONFIRMED | FLOW_LOCAL_CLIENT | FLOW_UNANSWERED,
        backend_id: backend,
        last_seen: maps.now(),
        unanswered_since: maps.epoch(),
        reserved: 0,
        tried: 0,
        reserved2: 0,
    };
    let client = filter::client::<F>(tuple.src);
    if !maps.client(client) {
        maps.set_client(client);
    }
    match maps.flow(key) {
        // Where another flow has the client's port, answers would not be seen.
        Some(entry) => {
            let state = entry.read().state;
            if is_closed(state) && state & FLOW_HALF_OPEN == 0 {
                entry.write(flow);
            }
        }
        None if maps.unconfirmed_flow(key).is_some() => {}
        None => {
            if !maps.add_flow(key, flow) {
                maps.count(Event::ConntrackFull);
            }
        }
    }
    Verdict::Pass
}
