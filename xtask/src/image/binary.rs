//! The agent as one static file, for the machine's architecture and for others whose target is
//! installed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::arch::Arch;
use crate::shell::{capture, cargo, run, say, target, which};

/// A target whose programs need nothing at run time.
struct Static {
    triple: String,
    /// glibc links statically only when told to.
    crt_static: bool,
}

/// Adds musl's target for this machine to the toolchain, where rustup has that; glibc's will do
/// without.
pub(super) fn setup() {
    let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    if !installed(&triple) && which("rustup").is_some() {
        say("setup", format_args!("rustup target add {triple}"));
        let _ = run(Command::new("rustup").args(["target", "add", &triple]));
    }
}

/// Whether a static agent can be built for it here.
pub(super) fn can_build(arch: Arch) -> bool {
    static_target(arch).is_some() && (arch.is_here() || c_compiler(arch).is_some())
}

/// musl's target when the toolchain has it: it resolves names without the files that glibc loads at
/// run time. Otherwise, for this machine, glibc's.
fn static_target(arch: Arch) -> Option<Static> {
    ["musl", "gnu"].into_iter().find_map(|libc| {
        let triple = format!("{}-unknown-linux-{libc}", arch.rust());
        installed(&triple).then(|| Static {
            triple,
            crt_static: libc == "gnu",
        })
    })
}

/// Whether the toolchain has the standard library of a target.
fn installed(triple: &str) -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let folder =
        capture(Command::new(rustc).args(["--print", "target-libdir", "--target", triple]));
    folder.is_ok_and(|folder| Path::new(folder.trim()).is_dir())
}

/// A C compiler for it: `ring` has some C, and it is the linker of another architecture too.
fn c_compiler(arch: Arch) -> Option<PathBuf> {
    let names = [
        format!("{}-linux-musl-gcc", arch.rust()),
        "musl-gcc".to_owned(),
        format!("{}-linux-gnu-gcc", arch.rust()),
        // ring's C takes nothing from the C library, so the usual headers do.
        "gcc".to_owned(),
        "cc".to_owned(),
    ];
    let fits = |name: &&String| arch.is_here() || name.starts_with(arch.rust());
    names.iter().filter(fits).find_map(|name| which(name))
}

/// Builds the static agent and returns where it is.
///
/// # Errors
///
/// When the target is not installed, or the build fails.
pub(super) fn build(arch: Arch) -> Result<PathBuf> {
    let it = static_target(arch).with_context(|| {
        format!(
            "no static target for {arch:?}: rustup target add {}-unknown-linux-musl",
            arch.rust()
        )
    })?;
    let compiler = c_compiler(arch).with_context(|| match arch {
        Arch::Amd64 => "no C compiler for amd64: apt-get install gcc-x86-64-linux-gnu",
        Arch::Arm64 => "no C compiler for arm64: apt-get install gcc-aarch64-linux-gnu",
    })?;
    say("build", format_args!("the agent for {}", it.triple));
    let mut command = cargo();
    // The debug information stays out of the image; names of functions stay in, for backtraces.
    command.args([
        "rustc",
        "--release",
        "--package=proxy-userspace",
        "--bin=shunt",
        "--target",
        &it.triple,
    ]);
    command.args(["--", "-Cstrip=debuginfo"]);
    let underscored = it.triple.replace('-', "_");
    command.env(format!("CC_{underscored}"), &compiler);
    let variable = |what: &str| format!("CARGO_TARGET_{}_{what}", underscored.to_uppercase());
    if it.crt_static {
        command.env(variable("RUSTFLAGS"), "-Ctarget-feature=+crt-static");
    }
    if !arch.is_here() {
        command.env(variable("LINKER"), &compiler);
    }
    run(&mut command)?;
    Ok(target().join(&it.triple).join("release/shunt"))
}

/// Whether it is a program that runs in an otherwise empty image and has the BPF programs in it.
///
/// # Errors
///
/// With what is wrong.
pub(super) fn check(program: &[u8]) -> Result<()> {
    ensure!(
        program.starts_with(b"\x7fELF\x02"),
        "is no 64-bit ELF program"
    );
    let half = |at: usize| {
        Some(u64::from(u16::from_le_bytes(
            program.get(at..at + 2)?.try_into().ok()?,
        )))
    };
    let long = |at: usize| {
        Some(u64::from_le_bytes(
            program.get(at..at + 8)?.try_into().ok()?,
        ))
    };
    // e_phoff, e_phentsize and e_phnum of elf(5).
    let (Some(start), Some(size), Some(count)) = (long(32), half(54), half(56)) else {
        bail!("is cut off");
    };
    for index in 0..count {
        let at = (start + index * size) as usize;
        // PT_INTERP: the dynamic linker that the program asks for.
        ensure!(
            program.get(at..at + 4) != Some(&3_u32.to_le_bytes()),
            "is linked dynamically; the image has no libraries"
        );
    }
    // The section of a program in the embedded object.
    let object = b"tc_node_in";
    ensure!(
        program.windows(object.len()).any(|bytes| bytes == object),
        "has no BPF programs in it"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_would_not_run_are_told() {
        let text = |program: &[u8]| format!("{:#}", check(program).unwrap_err());
        assert!(text(b"#!/bin/sh").contains("no 64-bit ELF"));
        assert!(text(b"\x7fELF\x02").contains("cut off"));
        // This test is linked with glibc and libgcc, dynamically, on the usual toolchain.
        if cfg!(target_env = "gnu") {
            let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
            assert!(text(&this).contains("dynamically"));
        }
    }
}
