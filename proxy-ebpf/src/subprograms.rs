//! The decision's [`Subprogram`]s as global functions: one for each hook and family, because a
//! function is verified with its hook's context, and a family's memory.
//!
//! A global function is one that BTF calls so, which the linker says of all that have a name of
//! their own (`no_mangle`). Their only argument is the context, or numbers beside it: kernels before
//! 5.13 know no other pointers.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use shunt_common::{
    balance::{Maps, Scratch, Subprogram, Subprograms, run},
    family::{V4, V6},
    layout::MAX_TRACERS,
};

use crate::{
    maps::{Hook, KernelFamily, KernelMaps, Tc, Xdp},
    trace,
};

/// A hook that packets pass.
pub(crate) trait PacketHook: Hook {
    /// Calls a subprogram of a family.
    fn call<F: KernelFamily>(ctx: *mut c_void, subprogram: Subprogram) -> u32;
    /// Tells tracers what became of a packet.
    fn tell<F: KernelFamily>(ctx: *mut c_void);
}

macro_rules! subprograms {
    ($hook:ident, $context:ty, $tell4:ident, $tell6:ident, $send4:ident, $send6:ident;
    $($subprogram:ident: $v4:ident, $v6:ident;)+) => {
        impl PacketHook for $hook {
            #[inline(always)]
            fn call<F: KernelFamily>(ctx: *mut c_void, subprogram: Subprogram) -> u32 {
                match subprogram {
                    $(Subprogram::$subprogram if F::INDEX == V4::INDEX => $v4(ctx.cast()),
                    Subprogram::$subprogram => $v6(ctx.cast()),)+
                }
            }

            #[inline(always)]
            fn tell<F: KernelFamily>(ctx: *mut c_void) {
                if F::INDEX == V4::INDEX {
                    $tell4(ctx.cast());
                } else {
                    $tell6(ctx.cast());
                }
            }
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $tell4(ctx: *mut $context) -> u32 {
            // SAFETY: as in `start`.
            unsafe { asm!("", in("r1") ctx, options(nostack, preserves_flags)) };
            if trace::is_on() {
                for place in 0..MAX_TRACERS as u32 {
                    $send4(ctx, place);
                }
            }
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $send4(ctx: *mut $context, place: u32) -> u32 {
            send::<V4, $hook>(ctx.cast(), place)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $tell6(ctx: *mut $context) -> u32 {
            // SAFETY: as in `start`.
            unsafe { asm!("", in("r1") ctx, options(nostack, preserves_flags)) };
            if trace::is_on() {
                for place in 0..MAX_TRACERS as u32 {
                    $send6(ctx, place);
                }
            }
            0
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $send6(ctx: *mut $context, place: u32) -> u32 {
            send::<V6, $hook>(ctx.cast(), place)
        }

        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $v4(ctx: *mut $context) -> u32 {
                start::<V4, $hook>(ctx.cast(), Subprogram::$subprogram)
            }

            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $v6(ctx: *mut $context) -> u32 {
                start::<V6, $hook>(ctx.cast(), Subprogram::$subprogram)
            }
        )+
    };
}

subprograms! {
    Tc, __sk_buff, tc_tell4, tc_tell6, tc_send4, tc_send6;
    Decide: tc_decide4, tc_decide6;
    LookUp: tc_look_up4, tc_look_up6;
    TakePort: tc_take_port4, tc_take_port6;
    LookAtPorts: tc_look_at_ports4, tc_look_at_ports6;
    LookAtPort: tc_look_at_port4, tc_look_at_port6;
    Explains: tc_explains4, tc_explains6;
    Unconfirmed: tc_unconfirmed4, tc_unconfirmed6;
    LookAtSlot: tc_look_at_slot4, tc_look_at_slot6;
    PickOtherBackend: tc_pick_other_backend4, tc_pick_other_backend6;
    HoldBack: tc_hold_back4, tc_hold_back6;
}

subprograms! {
    Xdp, xdp_md, xdp_tell4, xdp_tell6, xdp_send4, xdp_send6;
    Decide: xdp_decide4, xdp_decide6;
    LookUp: xdp_look_up4, xdp_look_up6;
    TakePort: xdp_take_port4, xdp_take_port6;
    LookAtPorts: xdp_look_at_ports4, xdp_look_at_ports6;
    LookAtPort: xdp_look_at_port4, xdp_look_at_port6;
    Explains: xdp_explains4, xdp_explains6;
    Unconfirmed: xdp_unconfirmed4, xdp_unconfirmed6;
    LookAtSlot: xdp_look_at_slot4, xdp_look_at_slot6;
    PickOtherBackend: xdp_pick_other_backend4, xdp_pick_other_backend6;
    HoldBack: xdp_hold_back4, xdp_hold_back6;
}

/// The body of a global function.
#[inline(always)]
fn start<F: KernelFamily, H: PacketHook>(ctx: *mut c_void, subprogram: Subprogram) -> u32 {
    // SAFETY: no instruction. It says that the argument is used, or LLVM would have callers pass
    // none.
    unsafe { asm!("", in("r1") ctx, options(nostack, preserves_flags)) };
    let maps = KernelMaps::<H>::new(ctx);
    match Maps::<F>::scratch(&maps) {
        Some(scratch) => run::<F, _>(&maps, scratch, subprogram),
        // A per-CPU array of one entry has it.
        None => 0,
    }
}

/// The body of the global function that tells a tracer, at an index that the verifier does not know:
/// it looks at one for all of them.
#[inline(always)]
fn send<F: KernelFamily, H: PacketHook>(ctx: *mut c_void, place: u32) -> u32 {
    // SAFETY: as in `start`.
    unsafe { asm!("", in("r1") ctx, in("r2") place, options(nostack, preserves_flags)) };
    KernelMaps::<H>::new(ctx).tell::<F>(place)
}

impl<F: KernelFamily, H: PacketHook> Subprograms<F> for KernelMaps<H> {
    #[inline(always)]
    fn call(&self, subprogram: Subprogram, scratch: &mut Scratch<F::Words>) -> u32 {
        let scratch = core::ptr::from_mut(scratch);
        // SAFETY: no instruction. It says that others know where `scratch` is: the subprogram,
        // which asks the map for it and writes to it.
        unsafe { asm!("", in("r0") scratch, options(nostack, preserves_flags)) };
        H::call::<F>(self.context(), subprogram)
    }
}
