//! What the kernel lets one do, tried out with the smallest programs and maps.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{Command, bpf, bpf_fd, link::Hook, map, raw};

/// Flag of `bpf_l4_csum_replace` (kernel 6.16): the packet is an IPv6 one.
pub const BPF_F_IPV6: u32 = 1 << 7;

/// Loads the smallest program there is, `return verdict`, to probe what the kernel lets one do with
/// it.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF`, `EINVAL` when it does not know the type.
pub fn load_trivial(program_type: u32, hook: Option<Hook>, verdict: i32) -> io::Result<OwnedFd> {
    // r0 = verdict; exit
    load_named("shunt_check", program_type, hook, verdict)
}

/// The same under a name of at most 15 characters.
pub(crate) fn load_named(
    name: &str,
    program_type: u32,
    hook: Option<Hook>,
    verdict: i32,
) -> io::Result<OwnedFd> {
    load_code(
        name,
        program_type,
        hook,
        [0xb7 | (u64::from(verdict as u32) << 32), 0x95],
    )
}

/// Loads a program of so many instructions, as they stand in memory on a little-endian machine.
fn load_code<const N: usize>(
    name: &str,
    program_type: u32,
    hook: Option<Hook>,
    code: [u64; N],
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    // An instruction is bytes (code, registers), a __s16 and a __s32: on big-endian machines not
    // the same as one number.
    let code = code.map(|word| {
        let [op, regs, o0, o1, i0, i1, i2, i3] = word.to_le_bytes();
        let (offset, immediate) = (
            i16::from_le_bytes([o0, o1]),
            i32::from_le_bytes([i0, i1, i2, i3]),
        );
        let ([o0, o1], [i0, i1, i2, i3]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
        [op, regs, o0, o1, i0, i1, i2, i3]
    });
    let mut prog_name = [0; 16];
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let mut attr = Attr {
        prog_type: program_type,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: hook.map_or(0, |h| h as u32),
    };
    // SAFETY: `insns` and `license` outlive the call; the command returns a descriptor.
    unsafe { bpf_fd(Command::ProgLoad, &mut attr) }
}

/// Whether a tc program that has functions may end in a tail call: kernels before 6.0 say no on
/// arm64, and so does one without its JIT compiler.
///
/// # Errors
/// The kernel's: `EINVAL` where it may not, `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`.
pub fn probe_tail_call() -> io::Result<()> {
    const SCHED_CLS: u32 = 3;
    let array = map::create(map::types::PROG_ARRAY, 4, 4, 1, 0)?;
    let array = u64::from(raw(array.as_fd()));
    // r6 = ctx; function(); bpf_tail_call(r6, array, 0); return 0
    load_code(
        "shunt_check",
        SCHED_CLS,
        None,
        [
            0xbf | 0x16 << 8,
            0x85 | 0x10 << 8 | 7 << 32,
            0xbf | 0x61 << 8,
            0x18 | 0x12 << 8 | array << 32,
            0,
            0xb7 | 3 << 8,
            0x85 | 12 << 32,
            0xb7,
            0x95,
            // The function.
            0xb7,
            0x95,
        ],
    )
    .map(drop)
}

/// Whether `bpf_l4_csum_replace` knows [`BPF_F_IPV6`]. Before, it spoiled the sum that a device had
/// computed over an IPv6 packet (`CHECKSUM_COMPLETE`): an IPv4 header's own checksum makes up for
/// new addresses, and IPv6 has none.
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`.
pub fn probe_csum_ipv6() -> io::Result<bool> {
    const SCHED_CLS: u32 = 3;
    const BPF_F_PSEUDO_HDR: u32 = 1 << 4;
    let set = |register: u64, value: u32| 0xb7 | register << 8 | u64::from(value) << 32;
    // return bpf_l4_csum_replace(ctx, 24, 0, 0, BPF_F_PSEUDO_HDR | BPF_F_IPV6)
    let program = load_code(
        "shunt_check",
        SCHED_CLS,
        None,
        [
            set(2, 24),
            set(3, 0),
            set(4, 0),
            set(5, BPF_F_PSEUDO_HDR | BPF_F_IPV6),
            0x85 | 11 << 32,
            0x95,
        ],
    )?;
    Ok(run(program.as_fd())? == 0)
}

/// Flags of `bpf_fib_lookup`: no look at neighbours (kernel 6.3), and the source address of the
/// route (kernel 6.7).
pub const BPF_FIB_LOOKUP_SOURCE: u32 = 1 << 2 | 1 << 4;

/// Whether `bpf_fib_lookup` knows [`BPF_FIB_LOOKUP_SOURCE`].
///
/// # Errors
/// The kernel's: `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN`.
pub fn probe_fib_source() -> io::Result<bool> {
    const SCHED_CLS: u32 = 3;
    /// `sizeof(struct bpf_fib_lookup)`.
    const SIZE: u32 = 64;
    let set = |register: u64, value: u32| 0xb7 | register << 8 | u64::from(value) << 32;
    // r1 is the context. r0 = 0; eight times *(u64 *)(r10 - n) = r0; r2 = r10; r2 += -64: a
    // question about no family
    let zero = |n: i16| 0x7b | 0x0a << 8 | u64::from((-n).cast_unsigned()) << 16;
    let program = load_code(
        "shunt_check",
        SCHED_CLS,
        None,
        [
            set(0, 0),
            zero(8),
            zero(16),
            zero(24),
            zero(32),
            zero(40),
            zero(48),
            zero(56),
            zero(64),
            0xbf | 0xa2 << 8,
            0x07 | 0x02 << 8 | u64::from((-64_i32).cast_unsigned()) << 32,
            set(3, SIZE),
            set(4, BPF_FIB_LOOKUP_SOURCE),
            0x85 | 69 << 32,
            0x95,
        ],
    )?;
    // It says which it does not know first: the flags, or else the family.
    Ok(run(program.as_fd())?.cast_signed() != -libc::EINVAL)
}

/// Runs a program of type `BPF_PROG_TYPE_SCHED_CLS` on a packet of zeros; what it returns.
fn run(program: BorrowedFd<'_>) -> io::Result<u32> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        rest: [u64; 6],
    }
    let packet = [0_u8; 64];
    let mut attr = Attr {
        prog_fd: raw(program),
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: 0,
        data_in: packet.as_ptr().expose_provenance() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
        rest: [0; 6],
    };
    // SAFETY: `data_in` outlives the call and is as long as said; nothing is written but the
    // attribute.
    unsafe { bpf(Command::ProgTestRun, &mut attr) }?;
    Ok(attr.retval)
}

/// Tries a batch operation on a small map of its own.
///
/// # Errors
/// `EINVAL` or `ENOTSUPP` before kernel 5.6.
pub fn probe_batch() -> io::Result<()> {
    let map = map::create(map::types::HASH, 4, 4, 2, 0)?;
    map::update_batch(map.as_fd(), &[1_u32, 2], &[3_u32, 4]).map_err(|(error, _)| error)
}
