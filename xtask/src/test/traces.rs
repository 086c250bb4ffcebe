//! What a run of tests leaves on the machine: it must be nothing.
//!
//! Runs go side by side, so whatever is new at the end is asked whose it is: names from the labs'
//! registry have an owner, and processes have the run in their environment.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use shunt_lab::{Owner, RUN_VARIABLE};

use super::{report::Report, this};
use crate::shell::{as_root, capture};

/// How long what ends after its test may take: sockets and maps are freed by the kernel in its own
/// time.
const PATIENCE: Duration = Duration::from_secs(15);

/// Arguments of `traces`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Of this run; otherwise what is there is swept of dead runs' things first.
    #[arg(long)]
    run: Option<String>,
}

/// Prints what there is, for [`now`], which starts this as root.
///
/// # Errors
///
/// When the labs' registry cannot be read.
pub(crate) fn print(args: &Args) -> Result<()> {
    if args.run.is_none() {
        shunt_lab::Lab::sweep_stale()?;
    }
    println!("{}", serde_json::to_string(&found(args.run.as_deref()))?);
    Ok(())
}

/// What there is now, of a run, or of any.
pub(super) fn now(run: Option<&str>) -> Result<BTreeSet<String>> {
    let this = this::program()?;
    let mut command = as_root(&this.to_string_lossy())?;
    command
        .arg("traces")
        .args(run.iter().flat_map(|run| ["--run", run]));
    serde_json::from_str(&capture(&mut command)?).context("what traces prints")
}

/// What the run has left; waits a little for it to go.
pub(super) fn left(run: &str, before: &BTreeSet<String>) -> Result<Vec<String>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left: Vec<String> = now(Some(run))?.difference(before).cloned().collect();
        if left.is_empty() || Instant::now() >= deadline {
            return Ok(left);
        }
        thread::sleep(Duration::from_millis(250));
    }
}

/// Whether nothing is left, as one check.
pub(super) fn judge(report: &Report, left: Result<Vec<String>>) {
    let text = match left {
        Ok(left) if left.is_empty() => {
            return report.passed("check", "nothing is left behind", Duration::ZERO);
        }
        Ok(left) => left.join("\n"),
        Err(error) => format!("{error:#}"),
    };
    report.failed("check", "nothing is left behind", Duration::ZERO, &text);
}

/// Names and processes of the run, and names whose owner nobody knows.
fn found(run: Option<&str>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let cgroups = shunt_lab::cgroup_mount_point().unwrap_or_default();
    for (what, folder) in [
        ("namespace", Path::new("/run/netns")),
        ("pin", Path::new("/sys/fs/bpf")),
        ("cgroup", &*cgroups),
    ] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("shunt") && is_ours(&name, run) && entry.path().exists() {
                found.insert(format!("{what} {name}"));
            }
        }
    }
    found.extend(mounts());
    found.extend(qdiscs());
    if let Some(run) = run {
        found.extend(processes(run));
    }
    found
}

/// Whether a name is of the run, or of nobody.
fn is_ours(name: &str, run: Option<&str>) -> bool {
    match (shunt_lab::owner(name), run) {
        (Owner::Lab { run: theirs, .. }, Some(run)) => theirs == run,
        (Owner::Process { alive: true }, Some(_)) => false,
        _ => true,
    }
}

/// bpf file systems.
fn mounts() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields.get(2) == Some(&"bpf"))
        .filter_map(|fields| Some(format!("mount {}", fields.get(1)?)))
        .collect()
}

/// Hooks for tc programs on this machine's own devices: no test is to come near them.
fn qdiscs() -> Vec<String> {
    let text = capture(Command::new("tc").args(["qdisc", "show"])).unwrap_or_default();
    text.lines()
        .filter(|line| line.contains("clsact") || line.contains("ingress"))
        .map(|line| line.trim().to_owned())
        .collect()
}

fn processes(run: &str) -> Vec<String> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment
            .split(|byte| *byte == 0)
            .any(|word| word == mark.as_bytes())
        {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(format!(
                "process {} {}",
                entry.file_name().to_string_lossy(),
                command.trim()
            ));
        }
    }
    found
}

#[cfg(test)]
mod unit {
    use std::{env, process::Stdio};

    use shunt_lab::UniqueName;

    use super::*;

    /// Needs root.
    #[test]
    fn a_run_fails_for_what_a_lab_of_its_own_leaves() {
        let run = env::var(RUN_VARIABLE).unwrap_or_default();
        let name = UniqueName::take().unwrap();
        let prefix = name.prefix();
        let of = |run: &str| -> Vec<String> {
            let found = found(Some(run)).into_iter();
            found.filter(|line| line.contains(&prefix)).collect()
        };
        assert_eq!(of(&run), [""; 0]);

        let planted = format!("{prefix}-planted");
        capture(Command::new("ip").args(["netns", "add", &planted])).unwrap();
        fs::create_dir(name.bpf_root("planted")).unwrap();
        let cgroup = shunt_lab::cgroup_mount_point().unwrap().join(&prefix);
        fs::create_dir(&cgroup).unwrap();
        // In its command line is the name, and the run in its environment.
        let mut process = Command::new("tail")
            .args(["-f", "/dev/null", "--pid=1", &format!("/dev/{prefix}")])
            .env(RUN_VARIABLE, &run)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let left = of(&run);
        process.kill().unwrap();
        let id = process.id();
        process.wait().unwrap();
        let (processes, names): (Vec<String>, Vec<String>) = left
            .iter()
            .cloned()
            .partition(|line| line.starts_with("process "));
        assert_eq!(
            names,
            [
                format!("cgroup {prefix}"),
                format!("namespace {planted}"),
                format!("pin {planted}")
            ]
        );
        assert_eq!(processes.len(), 1, "{processes:?}");
        assert!(processes[0].starts_with(&format!("process {id} ")));
        assert_eq!(of("another run"), [""; 0]);
        let report = Report::default();
        judge(&report, Ok(left));
        assert!(report.summary(Duration::ZERO).is_err());

        drop(name);
        assert_eq!(of(&run), [""; 0]);
    }
}
