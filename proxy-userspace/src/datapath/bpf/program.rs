//! What the kernel says about a loaded program, and maps that live as long as it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use super::{Command, bpf, object_info, raw};

/// Most maps of one program that [`info`] lists; the kernel admits 64 (`MAX_USED_MAPS`), and
/// [`bind_map`] more.
const MAPS_MAX: usize = 128;

/// Part of `struct bpf_prog_info`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProgramInfo {
    /// `enum bpf_prog_type`.
    pub program_type: u32,
    /// The program's id (`bpftool prog show`).
    pub id: u32,
    /// Its name; the kernel keeps 15 characters.
    pub name: String,
    /// Hash of its instructions.
    pub tag: [u8; 8],
    /// Ids of the maps that it uses, and of those that are bound to it.
    pub maps: Vec<u32>,
    /// How many instructions the verifier walked through, on all paths. 0 before kernel 5.16, which
    /// does not say.
    pub verified_instructions: u32,
}

/// What the kernel says about `program`.
///
/// # Errors
/// The kernel's, for example when `program` is no BPF object.
pub fn info(program: impl AsFd) -> io::Result<ProgramInfo> {
    /// `struct bpf_prog_info` of `linux/bpf.h`, up to `verified_insns`.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        lengths: [u32; 2],
        instructions: [u64; 2],
        load_time: u64,
        created_by_uid: u32,
        nr_map_ids: u32,
        map_ids: u64,
        name: [u8; 16],
        // From `ifindex` to `recursion_misses`.
        rest: [u64; 17],
        verified_insns: u32,
        attach_btf_obj_id: u32,
    }
    const { assert!(std::mem::offset_of!(Info, verified_insns) == 216) };
    let mut ids = [0_u32; MAPS_MAX];
    let mut info = Info {
        nr_map_ids: MAPS_MAX as u32,
        map_ids: ids.as_mut_ptr().expose_provenance() as u64,
        ..Info::default()
    };
    // The kernel writes at most `nr_map_ids` ids to the array, which outlives the call.
    object_info(program.as_fd(), &mut info)?;
    let name = info
        .name
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    Ok(ProgramInfo {
        program_type: info.kind,
        id: info.id,
        name: String::from_utf8_lossy(name).into_owned(),
        tag: info.tag,
        maps: ids[..(info.nr_map_ids as usize).min(MAPS_MAX)].to_vec(),
        verified_instructions: info.verified_insns,
    })
}

/// The id of a program.
///
/// # Errors
/// As [`info`].
pub fn id(program: impl AsFd) -> io::Result<u32> {
    Ok(info(program)?.id)
}

/// Makes `map` live as long as `program`, and be listed among its maps, though no instruction uses
/// it (kernel 5.10).
///
/// # Errors
/// The kernel's: `EINVAL` before 5.10.
pub fn bind_map(program: impl AsFd, map: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        map_fd: u32,
        flags: u32,
    }
    let mut attr = Attr {
        prog_fd: raw(program.as_fd()),
        map_fd: raw(map),
        flags: 0,
    };
    // SAFETY: `struct { … } prog_bind_map` without pointers.
    unsafe { bpf(Command::ProgBindMap, &mut attr) }.map(drop)
}
