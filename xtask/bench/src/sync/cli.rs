//! The command line beside that many Services: what a person waits for.

use std::{
    fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::param::clock_ticks_per_second;
use shunt_lab::Agent;

use super::{
    figures::{EXPLAIN_MS, LIST_MS, TOP_PERCENT, line},
    objects,
};
use crate::report::Line;

/// Runs of each verb.
const RUNS: usize = 5;
/// For how long `shunt top` is watched.
const WATCHED: Duration = Duration::from_secs(10);

/// How long verbs take from their start to their end, and how much of a CPU `top` takes.
pub(super) fn measure(agent: &Agent, services: u32) -> Result<Vec<Line>> {
    let client = "203.0.113.10";
    let frontend = format!("{}:80", objects::cluster_ip(services / 2));
    let verbs: [(&str, Vec<&str>, f64); 4] = [
        ("services", vec!["services"], LIST_MS),
        ("backends", vec!["backends"], LIST_MS),
        ("backends -o json", vec!["backends", "-o", "json"], LIST_MS),
        (
            "explain",
            vec!["explain", "tcp", client, &frontend, "--from", "outside"],
            EXPLAIN_MS,
        ),
    ];
    let mut lines = Vec::new();
    for (name, verb, bound) in verbs {
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let began = Instant::now();
            let output = agent.cli(&verb)?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
            ensure!(output.status.success(), "{name}: {output:?}");
        }
        let name = format!("{services} Services, command line: {name}");
        lines.push(line(name, &times, "ms").bound(services, bound));
    }
    lines.push(top(agent, services)?);
    Ok(lines)
}

fn top(agent: &Agent, services: u32) -> Result<Line> {
    let mut top = agent
        .verb(&["top", "-o", "json"])?
        .stdout(Stdio::null())
        .spawn()?;
    // Its start reads all that there is.
    thread::sleep(Duration::from_secs(2));
    let cpu = || cpu_s(top.id());
    let (began, before) = (Instant::now(), cpu()?);
    thread::sleep(WATCHED);
    let percent = 100.0 * (cpu()? - before) / began.elapsed().as_secs_f64();
    top.kill()?;
    top.wait()?;
    let name = format!("{services} Services, command line: top, of a CPU");
    Ok(line(name, &[percent], "%").bound(services, TOP_PERCENT))
}

/// CPU time of a process, seconds.
fn cpu_s(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // utime and stime, 14 and 15 in the manual, of which two are cut off.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / clock_ticks_per_second() as f64)
}
