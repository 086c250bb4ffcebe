//! cgroup2 folders: what a node's socket hooks see is what runs below the node's folder.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// How long ended processes may take to leave their cgroup: the kernel frees an agent's maps first,
/// on a machine that may be busy.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Where cgroup2 is mounted on this machine.
///
/// # Errors
///
/// When it is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            Some((fields.nth(1)?, fields.next()?))
        })
        .find(|(_, kind)| *kind == "cgroup2")
        .map(|(path, _)| PathBuf::from(path))
        .context("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// Makes a cgroup and those above it.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cgroup {}: cannot create", path.display()))
}

/// Ends every process in the cgroup and below it, and removes the folders.
pub(crate) fn remove(path: &Path) {
    if !path.exists() {
        return;
    }
    // Since Linux 5.14.
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        for pid in processes(path) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
    let deadline = Instant::now() + LEAVE_TIMEOUT;
    while remove_folders(path).is_err() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
}

/// Process ids in the cgroup and below it.
pub(crate) fn processes(path: &Path) -> Vec<i32> {
    let mut pids: Vec<i32> = fs::read_to_string(path.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for folder in folders(path) {
        pids.extend(processes(&folder));
    }
    pids
}

fn folders(path: &Path) -> Vec<PathBuf> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_folders(path: &Path) -> std::io::Result<()> {
    for folder in folders(path) {
        remove_folders(&folder)?;
    }
    fs::remove_dir(path)
}
