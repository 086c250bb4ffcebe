//! Connections, requests and bytes per second in a cluster of namespaces, beside direct routing and
//! kube-proxy's rules.
//!
//! Every means has a cluster of its own, so nothing of one is in another's way; all of them stand
//! there during the whole run, and are measured in turn. The programs at both ends run on one CPU:
//! what a transaction costs the machine is then what it takes.
//!
//! With `SHUNT_BENCH_LOCK=FILE`, the file is locked exclusively while something is measured, and
//! not while clusters are made: others on the machine can wait for it.

mod kube_proxy;
pub(crate) mod peer;
mod world;

use std::{fs::File, time::Duration};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use self::{
    kube_proxy::Mode,
    peer::Load,
    world::{Dialled, Means, Seat, Tools, World},
};
use super::{Bench, Chart, Row, Target, stats};
use crate::shell::{cargo, run, say, target, which};

/// Numbers of Services.
const COUNTS: [usize; 4] = [1, 1_000, 10_000, 100_000];
/// The same for a quick run.
const QUICK_COUNTS: [usize; 2] = [1, 1_000];
/// The number at which what does not depend on it is measured, and kube-proxy is compared with.
const TYPICAL: usize = 10_000;
/// kube-proxy's, beside which all numbers of Services are measured.
const MODES: [Mode; 2] = [Mode::Iptables, Mode::Nftables];

/// One way through one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    means: Means,
    count: usize,
    seat: Seat,
}

impl Way {
    /// How rows call it.
    fn name(self, counted: bool) -> String {
        let name = match (self.means, self.seat) {
            (Means::Direct, _) => return "direct".to_owned(),
            (Means::Floor, _) => return "tc DNAT floor".to_owned(),
            (Means::FloorOnPods, _) => return "tc DNAT floor on all pods' devices".to_owned(),
            (Means::FastPath, _) => return "shunt by tc, fast path".to_owned(),
            (Means::Shunt, Seat::HookedPod) => "shunt by socket".to_owned(),
            (Means::Shunt, _) => "shunt by tc".to_owned(),
            (Means::KubeProxy(mode), _) => format!("kube-proxy {}", mode.name()),
        };
        if counted {
            format!("{name}, {} Services", number(self.count))
        } else {
            name
        }
    }
}

/// With commas.
fn number(number: usize) -> String {
    match number {
        0..1000 => number.to_string(),
        _ => format!("{},{:03}", number / 1000, number % 1000),
    }
}

/// What the rounds of a way came to.
#[derive(Clone, Debug, Default)]
struct Samples {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

/// Rounds of a load, and how long a way's part in one lasts.
struct Plan {
    rounds: usize,
    part: Duration,
}

/// All clusters.
struct Worlds(Vec<((Means, usize), World)>);

impl Worlds {
    fn get(&mut self, way: Way) -> Result<&mut World> {
        let found = self
            .0
            .iter_mut()
            .find(|(key, _)| *key == (way.means, way.count));
        found.map(|(_, world)| world).context("no such cluster")
    }

    fn has(&self, means: Means, count: usize) -> bool {
        self.0.iter().any(|(key, _)| *key == (means, count))
    }
}

/// Measures.
///
/// # Errors
///
/// When the clusters cannot be made or a connection fails.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    run(cargo().args(["build", "--quiet", "--release", "--package=shunt-bench"]))?;
    let tools = Tools {
        shunt: bench.shunt.clone(),
        bench: target().join("release/shunt-bench"),
    };
    shunt_lab::Lab::sweep_stale()?;
    let counts: &[usize] = if bench.quick { &QUICK_COUNTS } else { &COUNTS };
    let mut worlds = make(bench, counts, &tools)?;
    let typical = counts
        .iter()
        .copied()
        .filter(|&count| count <= TYPICAL)
        .max()
        .unwrap_or(1);
    let plan = |rounds, millis| Plan {
        rounds,
        part: Duration::from_millis(millis),
    };
    let (connect, other) = if bench.quick {
        (plan(3, 40), plan(3, 30))
    } else {
        (plan(15, 200), plan(11, 150))
    };
    // Each takes a source port of the node towards the one backend, which is not taken again within
    // TIME_WAIT: more than a few thousand a minute would measure how the range is used up.
    let few = Plan {
        rounds: connect.rounds,
        part: Duration::from_millis(15),
    };
    let plans = [
        (Dialled::ClusterIp, &connect),
        (Dialled::NodePortNear, &connect),
        (Dialled::NodePortFar, &few),
    ];
    for (dialled, plan) in plans {
        connections(bench, &mut worlds, counts, typical, dialled, plan)?;
    }
    for load in [Load::Request, Load::Bulk] {
        for dialled in [
            Dialled::ClusterIp,
            Dialled::NodePortNear,
            Dialled::NodePortFar,
        ] {
            kept(bench, &mut worlds, typical, dialled, load, &other)?;
        }
    }
    Ok(())
}

/// Makes all clusters, some at a time.
fn make(bench: &Bench, counts: &[usize], tools: &Tools) -> Result<Worlds> {
    let mut wanted = vec![
        (Means::Direct, 0),
        (Means::Floor, 0),
        (Means::FloorOnPods, 0),
        (Means::FastPath, 1),
    ];
    wanted.extend(counts.iter().map(|&count| (Means::Shunt, count)));
    for mode in MODES {
        if which(mode.program()).is_none() {
            say(
                "missing",
                format!(
                    "{}: no figures for kube-proxy's {} rules",
                    mode.program(),
                    mode.name()
                ),
            );
            continue;
        }
        wanted.extend(counts.iter().map(|&count| (Means::KubeProxy(mode), count)));
    }
    // The slow ones first.
    wanted.sort_by_key(|&(means, count)| std::cmp::Reverse((count, means)));
    bench.steps(wanted.len());
    let queue = std::sync::Mutex::new(wanted.into_iter());
    let work = || -> Result<Vec<_>> {
        let mut made = Vec::new();
        loop {
            let next = queue.lock().ok().and_then(|mut queue| queue.next());
            let Some((means, count)) = next else {
                return Ok(made);
            };
            bench.step(format!(
                "a cluster with {}",
                Way {
                    means,
                    count,
                    seat: Seat::Pod
                }
                .name(true)
            ));
            match World::make(means, count, tools) {
                Ok(world) => made.push(((means, count), world)),
                // A small machine may have no room for it, or no time.
                Err(error) if count > TYPICAL => {
                    say(
                        "missing",
                        format!("{means:?} with {} Services: {error:#}", number(count)),
                    );
                }
                Err(error) => {
                    return Err(
                        error.context(format!("the cluster with {means:?} and {count} Services"))
                    );
                }
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, Into::into);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut worlds = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(made) => worlds.extend(made?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(Worlds(worlds))
    })
}

/// Plays the ways in turn, round by round.
fn rounds(
    bench: &Bench,
    worlds: &mut Worlds,
    ways: &[Way],
    dialled: Dialled,
    load: Load,
    plan: &Plan,
) -> Result<Vec<Samples>> {
    let _quiet = quiet()?;
    bench.steps(plan.rounds + 1);
    let mut samples = vec![Samples::default(); ways.len()];
    for round in 0..=plan.rounds {
        bench.step(format!(
            "{load:?} to {}, round {round} of {}",
            name(dialled),
            plan.rounds
        ));
        for turn in 0..ways.len() {
            // Whoever comes first is another one each time.
            let place = (turn + round) % ways.len();
            let way = ways[place];
            let world = worlds.get(way)?;
            let to = world.address(dialled);
            let done = world
                .client(way.seat)?
                .play(load, to, plan.part)
                .with_context(|| format!("{} to {}", way.name(true), name(dialled)))?;
            // The first round warms up.
            if round > 0 {
                samples[place].rate.push(done.rate);
                samples[place].p50.push(done.p50);
                samples[place].p99.push(done.p99);
            }
        }
    }
    Ok(samples)
}

/// Keeps the machine's other work out, if that was asked for.
fn quiet() -> Result<Option<File>> {
    let Some(path) = std::env::var_os("SHUNT_BENCH_LOCK") else {
        return Ok(None);
    };
    let file = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .context("SHUNT_BENCH_LOCK")?;
    flock(&file, FlockOperation::LockExclusive).context("SHUNT_BENCH_LOCK")?;
    Ok(Some(file))
}

fn name(dialled: Dialled) -> &'static str {
    match dialled {
        Dialled::ClusterIp => "ClusterIP",
        Dialled::NodePortNear => "NodePort, local backend",
        Dialled::NodePortFar => "NodePort, remote backend",
    }
}

/// Results by way.
struct Results<'a> {
    ways: &'a [Way],
    samples: &'a [Samples],
    dialled: Dialled,
    unit: &'static str,
    what: &'static str,
}

impl Results<'_> {
    fn of(&self, way: Way) -> Option<&Samples> {
        let place = self.ways.iter().position(|other| *other == way)?;
        Some(&self.samples[place])
    }

    /// The rate of one way by that of another.
    fn rate(&self, way: Way, against: Way, counted: bool) -> Option<Row> {
        let (samples, baseline) = (self.of(way)?, self.of(against)?);
        let counted_baseline =
            counted && matches!(against.means, Means::Shunt | Means::KubeProxy(_));
        let row = Row::median(
            format!(
                "{}, {}, {}",
                self.what,
                name(self.dialled),
                way.name(counted)
            ),
            stats::median(&samples.rate),
            self.unit,
        );
        let against = against.name(counted_baseline);
        Some(
            row.against(&against, stats::median(&baseline.rate).value)
                .ratio(stats::ratio(&samples.rate, &baseline.rate)),
        )
    }
}

/// New connections per second, at every number of Services.
fn connections(
    bench: &mut Bench,
    worlds: &mut Worlds,
    counts: &[usize],
    typical: usize,
    dialled: Dialled,
    plan: &Plan,
) -> Result<()> {
    let seat = if dialled == Dialled::ClusterIp {
        Seat::Pod
    } else {
        Seat::Lan
    };
    let way = |means, count| Way { means, count, seat };
    let socket = |count| Way {
        seat: Seat::HookedPod,
        ..way(Means::Shunt, count)
    };
    let shunt = |count| way(Means::Shunt, count);
    let (direct, floor, fast) = (
        way(Means::Direct, 0),
        way(Means::Floor, 0),
        way(Means::FastPath, 1),
    );
    let floor_on_pods = way(Means::FloorOnPods, 0);
    let mut ways = vec![direct, fast];
    if dialled != Dialled::NodePortFar {
        ways.extend([floor, floor_on_pods]);
    }
    for &count in counts {
        ways.push(shunt(count));
        if dialled == Dialled::ClusterIp {
            ways.push(socket(count));
        }
        let modes = MODES.map(|mode| way(Means::KubeProxy(mode), count));
        ways.extend(modes);
    }
    ways.retain(|way| worlds.has(way.means, way.count));
    let samples = rounds(bench, worlds, &ways, dialled, Load::Connect, plan)?;
    let results = Results {
        ways: &ways,
        samples: &samples,
        dialled,
        unit: "1/s",
        what: "new connections",
    };
    let mut rows: Vec<Option<Row>> = Vec::new();
    let at_least = |row: Option<Row>, least| row.map(|row| row.target(Target::AtLeast(least)));
    let made = counts
        .iter()
        .copied()
        .filter(|&count| worlds.has(Means::Shunt, count));
    let most = made.max().unwrap_or(1);
    let fewest = counts.iter().copied().min().unwrap_or(1);
    let nftables = way(Means::KubeProxy(Mode::Nftables), typical);
    for &count in counts {
        rows.push(at_least(results.rate(socket(count), direct, true), 0.98));
    }
    for &count in counts {
        rows.push(at_least(results.rate(shunt(count), floor, true), 0.97));
    }
    for (many, few) in [(socket(most), socket(fewest)), (shunt(most), shunt(fewest))] {
        let row = results.rate(many, few, true);
        rows.push(row.map(|row| row.target(Target::Within(0.03))));
    }
    rows.push(at_least(
        results.rate(socket(typical), nftables, true),
        1.12,
    ));
    let by_tc = results.rate(shunt(typical), nftables, true);
    rows.push(if dialled == Dialled::ClusterIp {
        at_least(by_tc, 1.04)
    } else {
        by_tc
    });
    let fast_path = results.rate(fast, direct, false);
    rows.push(if dialled == Dialled::ClusterIp {
        at_least(fast_path, 1.0)
    } else {
        fast_path
    });
    rows.push(results.rate(shunt(fewest), floor_on_pods, false));
    rows.push(results.rate(floor, direct, false));
    rows.push(results.rate(floor_on_pods, direct, false));
    for &count in counts {
        rows.push(results.rate(shunt(count), direct, true));
    }
    for mode in MODES {
        for &count in counts {
            rows.push(results.rate(way(Means::KubeProxy(mode), count), direct, true));
        }
    }
    rows.into_iter().flatten().for_each(|row| bench.row(row));
    latencies(bench, &results, |way| {
        way.count == typical
            || matches!(
                way.means,
                Means::Direct | Means::Floor | Means::FloorOnPods | Means::FastPath
            )
    });
    draw(bench, &results, "new")
}

/// The rate on a connection that is kept.
fn kept(
    bench: &mut Bench,
    worlds: &mut Worlds,
    typical: usize,
    dialled: Dialled,
    load: Load,
    plan: &Plan,
) -> Result<()> {
    let seat = if dialled == Dialled::ClusterIp {
        Seat::Pod
    } else {
        Seat::Lan
    };
    let way = |means, count| Way { means, count, seat };
    let direct = way(Means::Direct, 0);
    let mut ways = vec![direct];
    if dialled == Dialled::ClusterIp {
        ways.push(Way {
            seat: Seat::HookedPod,
            ..way(Means::Shunt, typical)
        });
    }
    ways.extend([way(Means::Shunt, typical), way(Means::FastPath, 1)]);
    if dialled != Dialled::NodePortFar {
        ways.push(way(Means::Floor, 0));
    }
    let modes = MODES.map(|mode| way(Means::KubeProxy(mode), typical));
    ways.extend(
        modes
            .into_iter()
            .filter(|way| worlds.has(way.means, typical)),
    );
    let mut samples = rounds(bench, worlds, &ways, dialled, load, plan)?;
    let (unit, what) = match load {
        Load::Bulk => ("Gbit/s", "bulk"),
        _ => ("1/s", "requests"),
    };
    if load == Load::Bulk {
        let rates = samples.iter_mut().flat_map(|samples| &mut samples.rate);
        rates.for_each(|rate| *rate *= 8e-9);
    }
    let results = Results {
        ways: &ways,
        samples: &samples,
        dialled,
        unit,
        what,
    };
    bench.row(Row::median(
        format!("{what}, {}, direct", name(dialled)),
        stats::median(&samples[0].rate),
        unit,
    ));
    let rows: Vec<_> = ways[1..]
        .iter()
        .filter_map(|way| results.rate(*way, direct, true))
        .collect();
    rows.into_iter().for_each(|row| bench.row(row));
    if load == Load::Request {
        latencies(bench, &results, |_| true);
    }
    draw(bench, &results, what)
}

/// p50 and p99 of some ways.
fn latencies(bench: &mut Bench, results: &Results<'_>, which: impl Fn(&Way) -> bool) {
    for (way, samples) in results
        .ways
        .iter()
        .zip(results.samples)
        .filter(|(way, _)| which(way))
    {
        for (part, samples) in [("p50", &samples.p50), ("p99", &samples.p99)] {
            let name = format!(
                "{}, {}, {}, {part}",
                results.what,
                name(results.dialled),
                way.name(true)
            );
            bench.row(Row::median(name, stats::median(samples), "µs"));
        }
    }
}

fn draw(bench: &Bench, results: &Results<'_>, what: &str) -> Result<()> {
    let bars = results.ways.iter().zip(results.samples);
    let chart = Chart {
        title: format!(
            "{}, {}, {}",
            results.what,
            name(results.dialled),
            results.unit
        ),
        bars: bars
            .map(|(way, samples)| (way.name(true), stats::median(&samples.rate).value, None))
            .collect(),
        line: results
            .samples
            .first()
            .map(|direct| stats::median(&direct.rate).value),
    };
    let dialled = match results.dialled {
        Dialled::ClusterIp => "clusterip",
        Dialled::NodePortNear => "nodeport-local",
        Dialled::NodePortFar => "nodeport-remote",
    };
    bench.chart(&format!("{what}-{dialled}"), &chart)
}
