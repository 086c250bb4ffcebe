//! What is next for a packet, from one function of a tc program to another.
//!
//! The functions are called one after the other and not by each other, because the BPF stack holds
//! 512 bytes for a whole chain of calls; so each says which is next.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use shunt_common::verdict::{InScratch, Verdict};

/// What is next for a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing: this action ends the program.
    End(i32),
    /// It is not plain TCP or UDP: the slow path.
    SlowPath,
    /// It may open a flow, or refuses to.
    Undecided,
    /// It goes to a backend, or back to a translated client, as
    /// [`Scratch::translation`](shunt_common::balance::Scratch::translation) says.
    Translated,
    /// It is a reply that would become
    /// [`Scratch::translation`](shunt_common::balance::Scratch::translation) on its way out: host
    /// routing.
    Reply,
    /// A process of this node sends it to what may be a frontend, or to a backend by a source port that
    /// a flow of ours has, and it may open a flow.
    Dialled,
    /// A process of this node sends it to a backend, as
    /// [`Scratch::translation`](shunt_common::balance::Scratch::translation) says.
    Sent,
    /// It is refused: it becomes its own refusal.
    Refuse,
    /// Its connection is over: it becomes its own reset.
    Reset,
    /// It is as it was, and goes through the node's stack.
    Stack,
}

/// A [`Step`] as functions return it that are not inlined: a BPF function has one register for its
/// result.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Encoded(i32);

/// Numbers that no action has: the least of those is [`TC_ACT_UNSPEC`].
const SLOW_PATH: i32 = i32::MIN;
const UNDECIDED: i32 = i32::MIN + 1;
const TRANSLATED: i32 = i32::MIN + 2;
const REPLY: i32 = i32::MIN + 3;
const DIALLED: i32 = i32::MIN + 4;
const SENT: i32 = i32::MIN + 5;
const REFUSE: i32 = i32::MIN + 6;
const RESET: i32 = i32::MIN + 7;

impl Step {
    #[inline(always)]
    pub(super) fn encode(self) -> Encoded {
        Encoded(match self {
            Self::End(action) => action,
            Self::SlowPath => SLOW_PATH,
            Self::Undecided => UNDECIDED,
            Self::Translated => TRANSLATED,
            Self::Reply => REPLY,
            Self::Dialled => DIALLED,
            Self::Sent => SENT,
            Self::Refuse => REFUSE,
            Self::Reset => RESET,
            Self::Stack => i32::MIN + 8,
        })
    }
}

impl From<Verdict> for Step {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => Self::End(TC_ACT_UNSPEC),
            Verdict::Drop => Self::End(TC_ACT_SHOT),
            Verdict::Refuse => Self::Refuse,
            Verdict::Reset => Self::Reset,
            Verdict::Translate(InScratch) => Self::Translated,
        }
    }
}

impl Encoded {
    #[inline(always)]
    pub(super) fn step(self) -> Step {
        match self.0 {
            // First, because almost all packets need no more.
            action if action >= TC_ACT_UNSPEC => Step::End(action),
            SLOW_PATH => Step::SlowPath,
            UNDECIDED => Step::Undecided,
            TRANSLATED => Step::Translated,
            REPLY => Step::Reply,
            DIALLED => Step::Dialled,
            SENT => Step::Sent,
            REFUSE => Step::Refuse,
            RESET => Step::Reset,
            _ => Step::Stack,
        }
    }
}
