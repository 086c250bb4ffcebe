//! `shunt cleanup`: takes away everything that shunt left in the kernel under a `--bpf-root`, and
//! nothing else.
//!
//! Links are detached, not only unpinned, so that devices are free at once whoever else holds a
//! link open.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::Output;
use crate::datapath::{
    Paths,
    bpf::{self, link},
    clsact,
    load::{MOUNT_SOURCE, is_bpffs},
    lock::{LockError, RootLock},
};

/// What the kernel puts into every bpffs (`CONFIG_BPF_PRELOAD`).
const KERNEL_FILES: [&str; 2] = ["maps.debug", "progs.debug"];

/// What was removed, or what stays.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Links that were detached, `<device>-<program>`.
    pub links: Vec<String>,
    /// Devices whose clsact filters were removed; with the qdisc if shunt had made it.
    pub filters: Vec<String>,
    /// Programs.
    pub programs: Vec<String>,
    /// Maps.
    pub maps: Vec<String>,
    /// Folders, and the bpffs if shunt had mounted it for this `--bpf-root`.
    pub folders: Vec<PathBuf>,
    /// What is in the folders and not shunt's.
    pub foreign: Vec<PathBuf>,
}

/// Why something is left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// An agent would attach everything again.
    #[error("{0}; `shunt cleanup` is for after it")]
    Running(#[source] LockError),
    /// The folder cannot be locked.
    #[error(transparent)]
    Lock(LockError),
    /// Something cannot be removed.
    #[error("{what} {}: {error}{}", path.display(), if error.kind() == io::ErrorKind::PermissionDenied { ": run as root" } else { "" })]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// Removes all of shunt under `bpf_root`, in the network namespace of the calling thread. Doing so
/// twice is no error.
///
/// # Errors
/// When an agent works there, or something cannot be removed; the message says what.
pub fn cleanup(bpf_root: &Path) -> Result<Removed, CleanupError> {
    let mut removed = Removed::default();
    if !bpf_root.exists() {
        return Ok(removed);
    }
    let lock = RootLock::acquire(bpf_root).map_err(|error| match error {
        LockError::Held { .. } => CleanupError::Running(error),
        LockError::Io { .. } => CleanupError::Lock(error),
    })?;
    if is_bpffs(bpf_root) {
        for version in versions(bpf_root)? {
            remove_version(bpf_root, &version, &mut removed)?;
        }
    }
    drop(lock);
    remove_root(bpf_root, &mut removed)?;
    Ok(removed)
}

/// The folders of map layouts, `v1` and so on.
fn versions(root: &Path) -> Result<Vec<PathBuf>, CleanupError> {
    let is_version = |path: &PathBuf| {
        path.file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_prefix('v'))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    Ok(entries(root)?.into_iter().filter(is_version).collect())
}

fn remove_version(root: &Path, version: &Path, removed: &mut Removed) -> Result<(), CleanupError> {
    // Off the devices first, then the rest.
    for pin in entries(&version.join("links"))? {
        match bpf::open(&pin) {
            Ok(link) => link::detach(link.as_fd()).map_err(io_error("detach", &pin))?,
            // Not a link any more than a file that somebody put there; the pin goes in any case.
            Err(error) => tracing::debug!("{}: {error}", pin.display()),
        }
        unpin(&pin, &mut removed.links)?;
    }
    let clsact = version.join("clsact");
    let paths = Paths::new(root);
    // Notes are in the folder of the layout that made them; only this version's are known here.
    if paths.clsact() == clsact {
        for note in clsact::notes(&paths).map_err(io_error("read", &clsact))? {
            clsact::detach(&note).map_err(io_error(
                "remove the clsact filters of",
                Path::new(&note.device),
            ))?;
            note.remove(&paths).map_err(io_error("remove", &clsact))?;
            removed.filters.push(note.device);
        }
    }
    for pin in entries(&version.join("progs"))? {
        unpin(&pin, &mut removed.programs)?;
    }
    for pin in entries(&version.join("maps"))? {
        unpin(&pin, &mut removed.maps)?;
    }
    for folder in ["links", "clsact", "progs", "maps"] {
        remove_folder(&version.join(folder), removed)?;
    }
    remove_folder(version, removed)
}

fn remove_root(root: &Path, removed: &mut Removed) -> Result<(), CleanupError> {
    let mut left = entries(root)?;
    let mounted = mounted_by_shunt(root);
    if mounted {
        // The kernel's own iterators, in every bpffs; they go with the mount.
        left.retain(|path| !KERNEL_FILES.iter().any(|name| path.ends_with(name)));
    }
    if left.is_empty() {
        if mounted {
            rustix::mount::unmount(root, rustix::mount::UnmountFlags::empty())
                .map_err(|e| io_error("unmount", root)(e.into()))?;
        }
        // A mount point of somebody else stays (EBUSY), and so does a folder that is in use.
        match fs::remove_dir(root) {
            Ok(()) => removed.folders.push(root.to_owned()),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EBUSY | libc::ENOTEMPTY | libc::EPERM)
                ) => {}
            Err(e) => return Err(io_error("remove", root)(e)),
        }
    } else {
        removed.foreign.extend(left);
    }
    Ok(())
}

/// Whether the bpffs mounted exactly at `root` is one that shunt mounted.
fn mounted_by_shunt(root: &Path) -> bool {
    let Ok(root) = root.canonicalize() else {
        return false;
    };
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
        return false;
    };
    // 36 35 0:31 / /mnt/bpf rw,relatime - bpf shunt rw
    mounts.lines().any(|line| {
        let Some((place, kind)) = line.split_once(" - ") else {
            return false;
        };
        let mut kind = kind.split(' ');
        place
            .split(' ')
            .nth(4)
            .is_some_and(|p| Path::new(p) == root)
            && kind.next() == Some("bpf")
            && kind.next() == Some(MOUNT_SOURCE)
    })
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, CleanupError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(folder)?
            .map(|e| Ok(e?.path()))
            .collect::<io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    };
    match read() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(io_error("read", folder)),
    }
}

fn unpin(pin: &Path, removed: &mut Vec<String>) -> Result<(), CleanupError> {
    if pin.is_dir() {
        // Not shunt's: it is reported with the folder that it keeps.
        return Ok(());
    }
    fs::remove_file(pin).map_err(io_error("remove", pin))?;
    removed.extend(pin.file_name().map(|n| n.to_string_lossy().into_owned()));
    Ok(())
}

fn remove_folder(folder: &Path, removed: &mut Removed) -> Result<(), CleanupError> {
    match fs::remove_dir(folder) {
        Ok(()) => removed.folders.push(folder.to_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
            let inside = entries(folder)?;
            // A folder that is kept by what is in it is not named again.
            let news: Vec<_> = inside
                .into_iter()
                .filter(|p| !removed.foreign.iter().any(|f| f.starts_with(p)))
                .collect();
            removed.foreign.extend(news);
        }
        Err(e) => return Err(io_error("remove", folder)(e)),
    }
    Ok(())
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CleanupError + 'a {
    move |error| CleanupError::Io {
        what,
        path: path.to_owned(),
        error,
    }
}

/// Runs the verb and prints what was removed, as JSON or text.
///
/// # Errors
/// As [`cleanup`].
pub fn run(bpf_root: &Path, output: Output) -> anyhow::Result<()> {
    let removed = cleanup(bpf_root)?;
    if let Some(text) = output.structured(&removed)? {
        println!("{text}");
        return Ok(());
    }
    for (what, names) in [
        ("link", &removed.links),
        ("clsact filters on", &removed.filters),
        ("program", &removed.programs),
        ("map", &removed.maps),
    ] {
        for name in names {
            println!("removed {what} {name}");
        }
    }
    for folder in &removed.folders {
        println!("removed {}", folder.display());
    }
    for path in &removed.foreign {
        println!("left {}: not made by shunt", path.display());
    }
    if removed == Removed::default() {
        println!("nothing of shunt under {}", bpf_root.display());
    }
    Ok(())
}
