//! `cargo xtask vm`: tests inside another kernel.
//!
//! One of Debian's kernel packages boots under QEMU's own emulation, which needs nothing of the
//! machine (KVM hangs on some hosts that are virtual themselves). Its root is this machine's, read
//! through 9p with a layer in memory on top: the test programs that cargo has built here run there
//! as they are, and what they leave is gone with the machine.

mod guest;
mod kernel;

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use guest::{BEGIN, END, Program};

use crate::{
    setup,
    shell::{cargo, say, target},
};

/// Arguments of `vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Debian's newest kernel of this series (6.1, 6.12, …), or a folder with `boot/vmlinuz-*` and
    /// `lib/modules`.
    #[arg(long, default_value = "6.12", value_name = "SERIES|DIR")]
    kernel: String,
    /// Test programs of `proxy-userspace/tests`, each with a part of the names of its tests that
    /// are run if not all are.
    #[arg(long = "test", value_name = "NAME[:FILTER]", default_values = ["packet", "cluster:sctp::"])]
    tests: Vec<String>,
    /// The machine is turned off after so many minutes: emulation is some twenty times slower.
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    timeout: u64,
    /// `test`, and what is passed on to the test programs: names of tests, `--nocapture`, …
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, default_values = ["test"])]
    command: Vec<String>,
}

/// Builds the tests, boots the kernel and runs them in it.
///
/// # Errors
///
/// When the set-up or the build fails, the kernel cannot be had or does not boot, or a test fails.
pub(crate) fn vm(args: &Args) -> Result<()> {
    let Some((verb, filter)) = args
        .command
        .split_first()
        .filter(|(verb, _)| *verb == "test")
    else {
        bail!(
            "the verb is test, and what is passed on to the test programs follows: there is no other verb in a VM"
        );
    };
    if std::env::consts::ARCH != "x86_64" {
        bail!("{verb} in a VM: only x86-64 machines are emulated");
    }
    setup::setup()?;
    setup::vm()?;
    let tests: Vec<(&str, Option<&str>)> = args
        .tests
        .iter()
        .map(|test| {
            test.split_once(':')
                .map_or((&**test, None), |(name, filter)| (name, Some(filter)))
        })
        .collect();
    let programs = build(&tests)?;
    let folder = target().join("vm");
    let kernel = kernel::find(&folder, &args.kernel)?;
    let initramfs = guest::initramfs(&folder, &kernel, &programs, filter)?;
    say("boot", format_args!("Linux {}", kernel.release));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        "4096",
    ])
    .args([
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "stdio",
        "-nic",
        "none",
        "-no-reboot",
    ])
    .arg("-kernel")
    .arg(&kernel.image)
    .arg("-initrd")
    .arg(&initramfs)
    .args(["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"])
    .args([
        "-fsdev",
        "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
    ])
    .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    let failed = watch(&mut qemu, Duration::from_secs(60 * args.timeout))?;
    if failed > 0 {
        bail!(
            "{failed} of {} test programs failed in Linux {}",
            programs.len(),
            kernel.release
        );
    }
    Ok(())
}

/// Builds test programs.
fn build(tests: &[(&str, Option<&str>)]) -> Result<Vec<Program>> {
    let mut command = cargo();
    command.args([
        "test",
        "--no-run",
        "--package=proxy-userspace",
        "--message-format=json-render-diagnostics",
    ]);
    for (name, _) in tests {
        command.args(["--test", name]);
    }
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo test --no-run")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let built: Vec<(String, PathBuf)> = messages
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect();
    tests
        .iter()
        .map(|(name, filter)| {
            let (_, path) = built
                .iter()
                .find(|(built, _)| built == name)
                .with_context(|| format!("cargo built no test program {name}"))?;
            Ok(Program {
                path: path.clone(),
                filter: filter.map(str::to_owned),
            })
        })
        .collect()
}

/// Runs the machine, shows what its tests print, and returns how many test programs failed.
fn watch(qemu: &mut Command, timeout: Duration) -> Result<usize> {
    let mut machine = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run qemu-system-x86_64")?;
    let console = machine.stdout.take().context("qemu has no stdout")?;
    let (sender, lines) = channel();
    let reader = thread::spawn(move || {
        // Firmware writes what is no UTF-8.
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + timeout;
    let (mut before, mut begun, mut failed) = (Vec::new(), false, None);
    let late = loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line == BEGIN => begun = true,
            Ok(line) => {
                if let Some(count) = line.strip_prefix(END) {
                    failed = count.parse().ok();
                } else if begun {
                    println!("{line}");
                } else {
                    before.push(line);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    if late {
        // It may have ended by itself meanwhile.
        let _ = machine.kill();
    }
    machine.wait().context("qemu-system-x86_64")?;
    // Its pipe is closed.
    let _ = reader.join();
    match failed {
        _ if late => bail!(
            "still running after {} minutes: turned off (--timeout)",
            timeout.as_secs() / 60
        ),
        Some(failed) => Ok(failed),
        None if begun => bail!("the machine ended in the middle of the tests"),
        None => bail!("the kernel did not come up:\n{}", before.join("\n")),
    }
}
