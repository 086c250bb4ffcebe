//! Network namespaces by name, as `ip netns` keeps them: a file under `/run/netns` with the
//! namespace mounted on it.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, bail};
use rustix::{
    mount::{
        MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change,
        unmount,
    },
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// Where `ip netns` looks for namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// A network namespace that was made here; it goes when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct NetNs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
}

impl Drop for Inner {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Makes the folder of namespaces a mount of its own, shared, as `ip netns add` does when it is
/// not: that would hide the namespaces that are there already, and nobody could remove them any
/// more.
pub(crate) fn share_dir() -> Result<()> {
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    let share = || -> io::Result<()> {
        std::fs::create_dir_all(NETNS_DIR)?;
        if mount_change(NETNS_DIR, shared) == Err(rustix::io::Errno::INVAL) {
            // It is no mount yet.
            mount_bind_recursive(NETNS_DIR, NETNS_DIR)?;
            mount_change(NETNS_DIR, shared)?;
        }
        Ok(())
    };
    share().with_context(|| format!("{NETNS_DIR}: cannot be made a shared mount (needs root)"))
}

/// Unmounts and unlinks a namespace's file; the kernel ends the namespace with its last process and
/// socket.
pub(crate) fn remove(path: &Path) {
    // Neither can be helped here, and `Lab::sweep_stale` tries again.
    let _ = unmount(path, UnmountFlags::DETACH);
    let _ = std::fs::remove_file(path);
}

impl NetNs {
    /// Makes a namespace with its loopback device up.
    ///
    /// # Errors
    ///
    /// When the name is taken or the process may not make namespaces.
    pub(crate) fn create(name: &str) -> Result<Self> {
        std::fs::create_dir_all(NETNS_DIR)
            .with_context(|| format!("{NETNS_DIR}: cannot create"))?;
        let path = Path::new(NETNS_DIR).join(name);
        File::create_new(&path)
            .with_context(|| format!("namespace {name}: cannot create {}", path.display()))?;
        let made = thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<()> {
                    // SAFETY: only the network namespace of this thread, which ends below, is
                    // unshared; the file table stays shared.
                    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
                    mount_bind("/proc/thread-self/ns/net", &path)?;
                    Ok(())
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("thread panicked")))
        });
        let opened = made.and_then(|()| File::open(&path));
        match opened {
            Ok(file) => {
                let ns = Self(Arc::new(Inner { path, file }));
                ns.ip(&["link set lo up".to_owned()])?;
                Ok(ns)
            }
            Err(error) => {
                remove(&path);
                Err(error).with_context(|| format!("namespace {name}: cannot create (needs root)"))
            }
        }
    }

    /// The file that holds the namespace: for `nsenter --net=…`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The name under which `ip netns` lists it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0
            .path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
    }

    /// Runs `f` in a thread of its own inside the namespace; what it opens stays there, and
    /// children it starts too.
    ///
    /// # Panics
    ///
    /// When `f` panics, or the namespace cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let joined = thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(
                        self.0.file.as_fd(),
                        Some(LinkNameSpaceType::Network),
                    )
                    .unwrap_or_else(|error| {
                        panic!("namespace {}: cannot enter: {error}", self.name())
                    });
                    f()
                })
                .join()
        });
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Makes `command` start inside the namespace.
    ///
    /// # Errors
    ///
    /// When the process is out of file descriptors.
    pub fn enter(&self, command: &mut Command) -> Result<()> {
        let file = self
            .0
            .file
            .try_clone()
            .with_context(|| format!("namespace {}", self.name()))?;
        let enter = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(io::Error::from)
        };
        // SAFETY: between fork and exec only the setns system call is made, on a descriptor opened
        // before.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }

    /// Runs `ip` commands (without the leading `ip`) as one batch, which stops at the first that
    /// fails.
    ///
    /// # Errors
    ///
    /// With the message of `ip`.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        let mut command = Command::new("ip");
        command
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        self.enter(&mut command)?;
        let mut child = command.spawn().context("cannot run ip: install iproute2")?;
        let mut stdin = child.stdin.take().context("ip has no stdin")?;
        let text = lines.join("\n");
        // A broken pipe means that `ip` stopped at a line: its message below says which.
        let _ = writeln!(stdin, "{text}");
        drop(stdin);
        let output = child.wait_with_output().context("ip")?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', "; ");
            bail!(
                "namespace {}: ip: {message} (commands: {})",
                self.name(),
                lines.join("; ")
            );
        }
        Ok(())
    }

    /// Runs a program inside the namespace and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it cannot be run or fails.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null());
        self.enter(&mut command)?;
        let output = command
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr)
                .trim()
                .replace('\n', "; ");
            bail!(
                "namespace {}: {program} {}: {message}",
                self.name(),
                args.join(" ")
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets values under `/proc/sys/net` of this namespace, by dotted names without `net.`
    /// (`ipv4.ip_forward`).
    ///
    /// # Errors
    ///
    /// When one is unknown or may not be set.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (name, value) in settings {
                let path = format!("/proc/sys/net/{}", name.replace('.', "/"));
                std::fs::write(&path, value)
                    .with_context(|| format!("cannot write {value} to {path}"))?;
            }
            Ok(())
        })
    }
}
