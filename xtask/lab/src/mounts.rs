//! A folder in place of another, for one process.

use std::{
    ffi::{CStr, CString},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use rustix::{
    mount::{MountPropagationFlags, mount_bind, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Makes `command` start in a mount namespace of its own, where `folder` is at `place`.
pub(crate) fn mount_at(command: &mut Command, folder: &Path, place: &'static CStr) -> Result<()> {
    let folder =
        CString::new(folder.as_os_str().as_encoded_bytes()).context("a path with a zero in it")?;
    let mount = move || {
        // SAFETY: changes this thread's view of mounts only; it is a child's only thread, just
        // forked.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change(
            c"/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )?;
        mount_bind(&folder, place)?;
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, with texts that were made before.
    unsafe { command.pre_exec(mount) };
    Ok(())
}
