//! From the programs on devices to [`tc_undecided`](super::undecided) and
//! [`tc_slow_path`](super::slow_path).

use aya_ebpf::{
    EbpfContext, Global, bindings::TC_ACT_UNSPEC, btf_maps::ProgramArray, macros::btf_map,
    programs::TcContext,
};
use shunt_common::{
    event::Event,
    layout::{TAIL_CALL_SLOW_PATH, TAIL_CALL_UNDECIDED, TAIL_CALLS, TRACE_AT_TC},
    verdict::{Direction, Origin},
};

use super::step::Step;
use crate::{
    maps::{Hook, Tc, count},
    trace,
};

#[btf_map(name = "tail_calls")]
static PROGRAMS: ProgramArray<TAIL_CALLS> = ProgramArray::new();

/// The first entry of [`PROGRAMS`] that is of the same load as this program: set when they are
/// loaded.
#[unsafe(no_mangle)]
static TAIL_CALL: Global<u32> = Global::new(0);

/// The word of `skb->cb` that says where the packet was seen. These words are a program's own until
/// it ends, and of those that it calls.
const SEEN: usize = 0;

const NETWORK: u32 = 0;
const POD: u32 = 1;
const PROCESS: u32 = 2;
const EGRESS: u32 = 3;

/// Ends this program; the one for `step` says what becomes of the packet.
///
/// Where there is no such program, which is nowhere unless somebody has deleted it, the packet goes
/// on as it is, and is counted.
#[inline(always)]
pub(super) fn hand_over(ctx: &TcContext, seen: Direction, step: Step) -> i32 {
    let program = match step {
        Step::SlowPath => TAIL_CALL_SLOW_PATH,
        _ => TAIL_CALL_UNDECIDED,
    };
    // SAFETY: the context is valid while the program runs; there is nothing here to be dropped.
    unsafe {
        (*ctx.skb.skb).cb[SEEN] = match seen {
            Direction::Ingress(Origin::Network) => NETWORK,
            Direction::Ingress(Origin::Pod) => POD,
            Direction::Ingress(Origin::Process) => PROCESS,
            Direction::Egress => EGRESS,
        };
        PROGRAMS.tail_call(ctx, TAIL_CALL.load() + program);
    }
    missing(ctx)
}

/// Counts a packet that nobody has taken over, and tells tracers of its device: nobody has looked
/// whose it is.
#[inline(never)]
fn missing(ctx: &TcContext) -> i32 {
    count(Event::ProgramMissing);
    if trace::is_on() {
        let mut record = trace::Record {
            events: Event::ProgramMissing.bit(),
            hook: TRACE_AT_TC,
            // SAFETY: the context is valid while the program runs.
            device: unsafe { Tc::device(ctx.as_ptr()) },
            ..trace::Record::default()
        };
        trace::send(&mut record);
    }
    TC_ACT_UNSPEC
}

/// Where the packet that was handed over was seen. What leaves the node on the slow path was seen as
/// a process's, which [`process::direction`](super::process::direction) judges.
#[inline(always)]
pub(super) fn seen(ctx: &TcContext) -> Direction {
    // SAFETY: the context is valid while the program runs.
    match unsafe { (*ctx.skb.skb).cb[SEEN] } {
        NETWORK => Direction::Ingress(Origin::Network),
        POD => Direction::Ingress(Origin::Pod),
        PROCESS => Direction::Ingress(Origin::Process),
        _ => Direction::Egress,
    }
}
