//! Running a program as root with few capabilities, as a container has it.

use std::{io, os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result};

/// `linux/capability.h`: the name at every number, without `CAP_`, as a container's
/// `securityContext` writes it.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Makes `command` start with these capabilities and without a way to more (`no_new_privs`). What
/// is to be done with the rights of this process (entering namespaces, say) is to be asked of the
/// command before.
///
/// # Errors
///
/// When there is no capability of a name.
pub(crate) fn keep_only(command: &mut Command, names: &[String]) -> Result<()> {
    let mut kept = 0_u64;
    for name in names {
        let number = NAMES
            .iter()
            .position(|known| known == name)
            .with_context(|| format!("{name} is no capability"))?;
        kept |= 1 << number;
    }
    let restrict = move || {
        // Later kernels may know more; EINVAL is the end of theirs.
        for number in 0..64_u32 {
            if kept & (1 << number) != 0 {
                continue;
            }
            // SAFETY: changes a property of this process and takes plain numbers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) }
                != 0
            {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::EINVAL) {
                    break;
                }
                return Err(error);
            }
        }
        // SAFETY: as above.
        match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // A program that root starts gets what is in the bounding set.
    // SAFETY: between fork and exec only prctl is called.
    unsafe { command.pre_exec(restrict) };
    Ok(())
}
