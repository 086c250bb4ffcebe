//! Runs tests, each as a process of its own, some at a time.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    param::clock_ticks_per_second,
    process::{Pid, WaitId, WaitIdOptions, waitid},
};
use shunt_lab::RUN_VARIABLE;

use super::{
    programs::Test,
    report::{Report, Took},
};
use crate::shell::{as_root, target};

/// A test that runs for so long hangs.
const HANGS: Duration = Duration::from_secs(15 * 60);
/// Lines of a failed test's output that are shown; the file has all of them.
const SHOWN: usize = 150;
/// Tests of which one runs at a time, by program and the beginning of their names: they share a
/// real API server when one is named.
const ALONE: [(&str, &str); 1] = [("cluster", "kubernetes::")];

/// How tests are run.
#[derive(Debug)]
pub(super) struct Settings {
    /// The run that everything started belongs to.
    pub(super) run: String,
    /// How many at a time.
    pub(super) jobs: usize,
    /// Whether what they print is shown when they pass.
    pub(super) show: bool,
    /// More of their environment.
    pub(super) variables: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct Queue {
    left: Vec<Test>,
    busy: Vec<usize>,
}

fn alone(test: &Test) -> Option<usize> {
    ALONE
        .iter()
        .position(|(program, start)| test.program.name == *program && test.name.starts_with(start))
}

/// Runs them all, in the order given as far as that goes.
pub(super) fn run(tests: &[Test], settings: &Settings, report: &Report) {
    let queue = Mutex::new(Queue {
        left: tests.iter().rev().cloned().collect(),
        busy: Vec::new(),
    });
    let freed = Condvar::new();
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    thread::scope(|scope| {
        for _ in 0..settings.jobs {
            scope.spawn(|| {
                loop {
                    let mut queue = lock();
                    let test = loop {
                        let free = |test: &Test| {
                            alone(test).is_none_or(|group| !queue.busy.contains(&group))
                        };
                        if let Some(place) = queue.left.iter().rposition(free) {
                            break queue.left.remove(place);
                        }
                        if queue.left.is_empty() {
                            return;
                        }
                        queue = freed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    };
                    queue.busy.extend(alone(&test));
                    drop(queue);
                    one(&test, settings, report);
                    let mut queue = lock();
                    if let Some(group) = alone(&test) {
                        queue.busy.retain(|busy| *busy != group);
                    }
                    drop(queue);
                    freed.notify_all();
                }
            });
        }
    });
}

fn one(test: &Test, settings: &Settings, report: &Report) {
    let began = Instant::now();
    let (program, name) = (test.program.name.as_str(), test.name.as_str());
    let log = log_file(program, name);
    let result = process(test, settings, &log);
    let took = Took {
        time: began.elapsed(),
        cpu: result.as_ref().ok().map(|(_, cpu)| *cpu),
    };
    let output = fs::read(&log).unwrap_or_default();
    let output = String::from_utf8_lossy(&output);
    if settings.show {
        print!("{output}");
    }
    match result {
        Err(error) => report.failed(program, name, took, &format!("{error:#}")),
        Ok((Some(status), _)) if status.success() => match skipped(&output) {
            Some(reason) => report.skipped(program, name, took, reason),
            None => report.passed(program, name, took),
        },
        Ok((status, _)) => {
            let what = status.map_or_else(
                || format!("ran for {} minutes and was ended", HANGS.as_secs() / 60),
                |status| status.to_string(),
            );
            let lines: Vec<&str> = output.lines().collect();
            let shown = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
            report.failed(
                program,
                name,
                took,
                &format!("{shown}\n{what}; all of it: {}", log.display()),
            );
        }
    }
}

/// Where a test's output goes.
fn log_file(program: &str, name: &str) -> PathBuf {
    target()
        .join("test-logs")
        .join(format!("{program}-{}.log", name.replace("::", "-")))
}

/// The reason that a test gave for not being able to do its work.
fn skipped(output: &str) -> Option<&str> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix(shunt_lab::SKIPPED))
        .map(str::trim)
        .find(|reason| !reason.is_empty())
}

/// Runs one; without a status when it had to be ended. And the CPU time of all that it started.
fn process(test: &Test, settings: &Settings, log: &Path) -> Result<(Option<ExitStatus>, Duration)> {
    fs::create_dir_all(log.parent().unwrap_or(log))
        .with_context(|| format!("{}", log.display()))?;
    let file = File::create(log).with_context(|| format!("{}", log.display()))?;
    let mut command = as_root(&test.program.path.to_string_lossy())?;
    command
        .args([&test.name, "--exact", "--nocapture", "--test-threads=1"])
        .args(test.ignored.then_some("--ignored"))
        .current_dir(&test.program.folder)
        .env(RUN_VARIABLE, &settings.run)
        .envs(settings.variables.iter().map(|(key, value)| (key, value)))
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let die = || {
        // When this program is killed, nobody waits for the test any more.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(io::Error::from)
    };
    // SAFETY: between fork and exec only the prctl system call is made.
    unsafe { command.pre_exec(die) };
    let mut child = command.spawn().context("cannot run the test program")?;
    wait(&mut child).context("cannot wait for the test program")
}

fn wait(child: &mut Child) -> io::Result<(Option<ExitStatus>, Duration)> {
    let deadline = Instant::now() + HANGS;
    let pid = Pid::from_child(child);
    let how = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let mut pause = Duration::from_millis(1);
    while Instant::now() < deadline {
        // Not taken yet: its times are there until it is.
        if waitid(WaitId::Pid(pid), how)?.is_some() {
            let cpu = cpu_time(pid).unwrap_or_default();
            return Ok((Some(child.wait()?), cpu));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    let cpu = cpu_time(pid).unwrap_or_default();
    child.kill()?;
    child.wait()?;
    Ok((None, cpu))
}

/// The CPU time of a process and of all that it has waited for, from /proc/PID/stat.
fn cpu_time(pid: Pid) -> Option<Duration> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    ticks(&text)
        .map(|ticks| Duration::from_secs_f64(ticks as f64 / clock_ticks_per_second() as f64))
}

/// The sum of utime, stime, cutime and cstime: the 14th to 17th field; the second one, in
/// parentheses, may have spaces.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields
        .split(' ')
        .skip(11)
        .take(4)
        .map(|field| field.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn cpu_times_are_found_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 80 90 0 0 10 20 300 4000 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(4330));
        assert_eq!(ticks("7 (a) S 1"), Some(0));
    }

    #[test]
    fn a_test_says_that_it_was_skipped_on_a_line_of_its_own() {
        let output = format!(
            "running 1 test\ntest a ... \n{} no SCTP\nok\n",
            shunt_lab::SKIPPED
        );
        assert_eq!(skipped(&output), Some("no SCTP"));
        assert_eq!(skipped("skipped:\n  a list of them\n"), None);
        assert_eq!(skipped("an endpoint is skipped: it is none"), None);
    }
}
