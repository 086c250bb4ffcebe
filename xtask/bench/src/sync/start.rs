//! How long an agent takes from exec to its `ready:` line, part by part: cold, and with the
//! programs of the same build pinned.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{Agent, AgentOptions, Lab, PodSpec};

use super::{
    figures::line,
    objects::{self, Generation},
};
use crate::report::{Line, Target};

/// Services, in manifests.
const SERVICES: u32 = 1_000;
/// Pods on the node, whose devices get programs.
const PODS: u32 = 10;
/// Starts of each kind, and in a quick run.
const STARTS: [usize; 2] = [11, 3];
/// Bound on a cold start, seconds.
const COLD_S: f64 = 1.0;
/// Bound on a start that takes the pinned programs over, seconds.
const WARM_S: f64 = 0.3;
/// What `shunt status` tells of the last start, and what it is called here.
const PARTS: [(&str, &str); 7] = [
    ("settings", "settings"),
    ("maps", "maps"),
    ("programs", "programs"),
    ("readBack", "reading the maps back"),
    ("source", "reading the manifests"),
    ("services", "Services into the maps"),
    ("attach", "attaching"),
];

/// The manifests' folder, removed when dropped.
struct Manifests(PathBuf);

impl Manifests {
    fn new() -> Result<Self> {
        let folder =
            std::env::temp_dir().join(format!("shunt-bench-manifests-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let manifests = Self(folder);
        let mut text = String::new();
        for n in 0..SERVICES {
            // Written as items of a list, which have no type of their own.
            let typed = |version: &str, kind: &str, item: &str| {
                format!(
                    r#"{{"apiVersion":"{version}","kind":"{kind}",{}"#,
                    &item[1..]
                )
            };
            text += &typed("v1", "Service", &objects::service_json(n));
            text += "\n---\n";
            let slice = objects::slice_json(n, Generation(0), 1);
            text += &typed("discovery.k8s.io/v1", "EndpointSlice", &slice);
            text += "\n---\n";
        }
        fs::write(manifests.0.join("services.yaml"), text)?;
        Ok(manifests)
    }
}

impl Drop for Manifests {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Cold and warm starts.
pub(super) fn measure(quick: bool) -> Result<Vec<Line>> {
    let manifests = Manifests::new()?;
    let lab = Lab::builder().nodes(&["node-a"]).build()?;
    for n in 0..PODS {
        lab.add_pod(&PodSpec::new(&format!("pod-{n}"), "node-a", &[]))?;
    }
    let starts = STARTS[usize::from(quick)];
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..starts {
        let mut agent = lab.agent("node-a", &options(&manifests.0))?;
        cold.push(start(&mut agent, false)?);
        agent.kill()?;
        warm.push(start(&mut agent, true)?);
        // Dropped, the agent ends and takes everything away that is pinned.
    }
    let mut lines = Vec::new();
    for (kind, bound, starts) in [("cold", COLD_S, cold), ("warm", WARM_S, warm)] {
        let name = |what: &str| format!("{SERVICES} Services in manifests, {kind} start: {what}");
        let totals: Vec<f64> = starts.iter().map(|(total, _)| *total).collect();
        let mut total = line(name("exec to ready"), &totals, "s");
        total.target = Some(Target::ValueAtMost(bound));
        lines.push(total);
        for (i, (_, part)) in PARTS.iter().enumerate() {
            let times: Vec<f64> = starts.iter().map(|(_, parts)| parts[i] * 1e3).collect();
            lines.push(line(name(part), &times, "ms"));
        }
    }
    Ok(lines)
}

fn options(manifests: &Path) -> AgentOptions {
    AgentOptions::manifests(manifests).xdp("native")
}

/// Starts an agent; seconds from exec to ready, and those of its parts.
fn start(agent: &mut Agent, expect_taken_over: bool) -> Result<(f64, [f64; PARTS.len()])> {
    let began = Instant::now();
    agent.spawn()?;
    agent.wait_ready()?;
    let total = began.elapsed().as_secs_f64();
    let status = agent.json(&["status"])?;
    let start = &status["start"];
    let taken_over = start["takenOver"]
        .as_bool()
        .context("status tells no start")?;
    ensure!(
        taken_over == expect_taken_over,
        "the programs were {}taken over: {}",
        if taken_over { "" } else { "not " },
        agent.output()
    );
    let mut parts = [0.0; PARTS.len()];
    for (time, (key, _)) in parts.iter_mut().zip(PARTS) {
        *time = start[key]
            .as_f64()
            .with_context(|| format!("status tells no {key}"))?;
    }
    Ok((total, parts))
}
