//! [`arriving`](crate::balance::arriving) and [`leaving`](crate::balance::leaving) of packets on
//! the slow path: the same decisions, in less of the stack. A translation is left in `scratch`.

use crate::{
    address::{self, Unmatched},
    balance::{
        Scratch, Subprograms, answering_slowly, client_key, decide, explains, may_be_frontend,
        note_leaving, refuse_leaving, snat_reply_arriving,
    },
    failover,
    family::Family,
    filter,
    packet::SYN,
    snat,
    verdict::{InScratch, Lookup, Step, Verdict},
};

/// The packet in `scratch.arrival` arrives.
#[inline(always)]
pub(super) fn arriving<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    match established(maps, scratch) {
        Step::Break(verdict) => verdict,
        Step::Continue(()) => decide(maps, scratch),
    }
}

/// [`established`](crate::balance::established) in the same way.
#[inline(never)]
fn established<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Step {
    match replies(maps, scratch) {
        Reply::No => {}
        Reply::Translated => return Step::Break(Verdict::Translate(InScratch)),
        Reply::Undecided => return Step::Continue(()),
    }
    let tuple = &scratch.arrival.tuple;
    if !may_be_frontend::<F>(maps, tuple) {
        return Step::Break(match address::unknown_port(maps, tuple.dst) {
            Unmatched::Pass => Verdict::Pass,
            Unmatched::Refuse => Verdict::Refuse,
            Unmatched::Drop => Verdict::Drop,
        });
    }
    scratch.key = client_key::<F>(tuple);
    let is_syn = scratch.arrival.tcp_flags & SYN != 0;
    if let Some(flow) = maps.flow(&scratch.key)
        && !(is_syn && failover::is_open(flow.read().state))
        && explains(maps, scratch)
    {
        return Step::Break(Verdict::Translate(InScratch));
    }
    Step::Continue(())
}

/// What a packet is to a flow whose source was translated.
enum Reply {
    No,
    /// Of it, with the translation left in `scratch`.
    Translated,
    Undecided,
}

/// Whether the packet in `scratch.arrival` replies to a translated source.
// Its locals have left the stack when a flow is looked at.
#[inline(never)]
fn replies<F: Family, M: Subprograms<F>>(maps: &M, scratch: &mut Scratch<F::Words>) -> Reply {
    let tuple = &scratch.arrival.tuple;
    let Some(config) = maps.config() else {
        return Reply::No;
    };
    if !snat::may_be(maps, tuple.dst)
        || !maps.filter(filter::backend::<F>(tuple.src, tuple.src_port, tuple.proto))
    {
        return Reply::No;
    }
    match snat_reply_arriving(maps, config, &scratch.arrival) {
        Lookup::Unmatched => Reply::No,
        Lookup::Translate(translation) => {
            scratch.translation = translation;
            Reply::Translated
        }
        Lookup::Undecided => Reply::Undecided,
    }
}

/// The packet in `scratch.arrival` leaves.
#[inline(always)]
pub(super) fn leaving<F: Family, M: Subprograms<F>>(
    maps: &M,
    scratch: &mut Scratch<F::Words>,
) -> Verdict {
    match answering_slowly(maps, scratch) {
        Step::Break(Verdict::Pass) => {
            note_leaving(maps, scratch);
            Verdict::Pass
        }
        Step::Break(verdict) => verdict,
        Step::Continue(()) => refuse_leaving(maps, scratch),
    }
}
