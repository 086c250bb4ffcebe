//! What the machine boots into: busybox, the modules that reach this machine's files, and a script
//! that runs the tests.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use crate::shell::{capture, root, which};

/// Printed by the guest before the first test program and after the last, with the number of
/// programs that failed.
pub(super) const BEGIN: &str = "shunt-vm: begin";
pub(super) const END: &str = "shunt-vm: end, failed: ";
/// The way to a 9p root with a layer in memory. Debian's kernels have the PCI bus and ACPI built
/// in.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];
const INIT: &str = include_str!("init.sh");
const GUEST: &str = include_str!("guest.sh");

/// A test program, and the part of the names of its tests that are run.
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) filter: Option<String>,
}

/// Packs the initial file system of one run.
///
/// # Errors
///
/// When a module is missing or a file cannot be written.
pub(super) fn initramfs(
    folder: &Path,
    kernel: &Kernel,
    programs: &[Program],
    filter: &[String],
) -> Result<PathBuf> {
    let content = folder.join("initramfs");
    if content.exists() {
        fs::remove_dir_all(&content).with_context(|| format!("{}", content.display()))?;
    }
    for name in [
        "bin", "dev", "layer", "lower", "modules", "new", "proc", "sys",
    ] {
        fs::create_dir_all(content.join(name)).with_context(|| format!("{}", content.display()))?;
    }
    let busybox = which("busybox").context("busybox is not installed")?;
    fs::copy(&busybox, content.join("bin/busybox"))
        .with_context(|| format!("{}", busybox.display()))?;
    let order = modules(kernel, &content.join("modules"))?;
    fs::write(content.join("modules/order"), order.join("\n") + "\n")?;
    fs::write(content.join("guest.sh"), script(kernel, programs, filter))?;
    let init = content.join("init");
    fs::write(&init, INIT)?;
    capture(Command::new("chmod").arg("+x").arg(&init))?;

    let archive = folder.join("initramfs.cpio");
    let names = capture(Command::new("find").arg(".").current_dir(&content))?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet", "--owner=+0:+0"])
        .current_dir(&content)
        .stdin(Stdio::piped())
        .stdout(File::create(&archive).with_context(|| format!("{}", archive.display()))?)
        .spawn()
        .context("cannot run cpio")?;
    cpio.stdin
        .take()
        .context("cpio has no stdin")?
        .write_all(names.as_bytes())?;
    if !cpio.wait()?.success() {
        bail!("cpio failed");
    }
    Ok(archive)
}

/// Copies the modules, unpacked, and returns them in the order in which they are loaded.
fn modules(kernel: &Kernel, to: &Path) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for module in MODULES {
        let text = capture(
            Command::new("modprobe")
                .arg("--dirname")
                .arg(&kernel.root)
                .args(["--set-version", &kernel.release, "--show-depends", module]),
        )?;
        // The others are built in.
        for path in text.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let path = Path::new(path.trim());
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let plain = name.trim_end_matches(".xz").to_owned();
            if order.contains(&plain) {
                continue;
            }
            if plain == *name {
                fs::copy(path, to.join(&plain)).with_context(|| format!("{}", path.display()))?;
            } else {
                let file = File::create(to.join(&plain))?;
                let status = Command::new("xz")
                    .arg("-dc")
                    .arg(path)
                    .stdout(file)
                    .status()
                    .context("cannot run xz")?;
                if !status.success() {
                    bail!("{}: xz cannot unpack it", path.display());
                }
            }
            order.push(plain);
        }
    }
    Ok(order)
}

fn script(kernel: &Kernel, programs: &[Program], filter: &[String]) -> String {
    let words: Vec<String> = filter.iter().map(|word| quoted(word)).collect();
    let lines: Vec<String> = programs
        .iter()
        .map(|program| {
            let path = quoted(&program.path.to_string_lossy());
            // Several names are alternatives to a test program, so names that were asked for stand
            // alone.
            let named = filter.iter().any(|word| !word.starts_with('-'));
            let own = program.filter.as_deref().filter(|_| !named).map(quoted);
            let words: Vec<String> = own.into_iter().chain(words.iter().cloned()).collect();
            format!(
                "echo; echo {path}; {path} {} || failed=$((failed + 1))",
                words.join(" ")
            )
        })
        .collect();
    GUEST
        .replace(
            "{modules}",
            &quoted(&kernel.root.join("lib/modules").to_string_lossy()),
        )
        .replace(
            "{folder}",
            &quoted(&root().join("proxy-userspace").to_string_lossy()),
        )
        .replace("{begin}", BEGIN)
        .replace("{end}", END)
        .replace("{programs}", &lines.join("\n"))
}

/// One word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
