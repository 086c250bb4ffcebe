//! `cargo xtask bench compare OLD NEW`: two commits in one run on one CPU, round by round.
//!
//! Each commit is exported into a git worktree under `target/compare`, which is removed afterwards.
//! Where both have this tree's map layout, only their BPF objects are built, with this tree's
//! compiler flags, and one process loads each twice, over maps of its own, and plays every packet
//! to them in turn: by how much the two loads of one commit differ is noise. Where a layout differs, no process can fill the maps of both: `shunt-bench` of
//! each commit is built, and whole runs of the two alternate, which is slower and noisier.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, de::DeserializeOwned};

use super::page::circumstances;
use crate::shell::{capture, cargo, root, run, say, target};

/// What is no change: a part of the old figure, or ns; and what noise explains: twice the figure's
/// own, or that of three quarters of all figures (two loads may agree by chance).
const NOISE: (f64, f64) = (0.03, 2.0);
/// How often the runs of two `shunt-bench` alternate; fewer with `--quick`.
const RUNS: [usize; 2] = [5, 3];

/// Arguments of `bench compare`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The older commit, as git names it.
    pub(super) old: String,
    /// The newer commit; the working tree if none is named.
    pub(super) new: Option<String>,
    /// Fewer rounds.
    #[arg(long)]
    pub(super) quick: bool,
    /// Only figures whose name contains this.
    #[arg(long, default_value = "")]
    pub(super) only: String,
    /// Whole runs of each commit's own `shunt-bench`, as where the map layouts differ.
    #[arg(long)]
    pub(super) whole: bool,
}

/// A figure of both commits, ns.
#[derive(Deserialize)]
struct Comparison {
    name: String,
    old: f64,
    new: f64,
    /// By how much two measurements of one commit differ.
    noise: f64,
}

impl Comparison {
    /// `usual`: the noise that figures of this run have, as a part of the old figure.
    fn is_noise(&self, usual: f64) -> bool {
        let (part, ns) = NOISE;
        let least = ns.max(part.max(usual) * self.old);
        (self.new - self.old).abs() <= least.max(2.0 * self.noise)
    }
}

/// A line of `shunt-bench datapath`.
#[derive(Deserialize)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
}

/// The files of a commit, removed when dropped, or the working tree.
struct Tree {
    folder: PathBuf,
    exported: bool,
}

impl Tree {
    fn new(commit: Option<&str>) -> Result<Self> {
        let Some(commit) = commit else {
            return Ok(Self {
                folder: root(),
                exported: false,
            });
        };
        let name = format!("{commit}^{{commit}}");
        let hash = capture(git().args(["rev-parse", "--verify", "--short", &name]))
            .with_context(|| format!("{commit} is not a commit of this repository"))?;
        let folder =
            target()
                .join("compare")
                .join(format!("{}-{}", hash.trim(), std::process::id()));
        capture(
            git()
                .args(["worktree", "add", "--detach", "--force"])
                .arg(&folder)
                .arg(commit),
        )?;
        let tree = Self {
            folder,
            exported: true,
        };
        // Its build scripts look there for the compiler that `setup` has found.
        fs::create_dir(tree.folder.join("target"))?;
        symlink(target().join("tools"), tree.folder.join("target/tools"))?;
        Ok(tree)
    }

    /// The files that say what stands in the maps, and where. Between releases they change under
    /// one version number.
    fn layout(&self) -> Result<Vec<String>> {
        let sources = self.folder.join("proxy-common/src");
        let mut files = vec![sources.join("layout.rs"), sources.join("snat.rs")];
        if let Ok(parts) = fs::read_dir(sources.join("layout")) {
            for part in parts {
                files.push(part?.path());
            }
        }
        files.sort();
        let read = |file: PathBuf| {
            fs::read_to_string(&file).with_context(|| format!("{}", file.display()))
        };
        files.into_iter().map(read).collect()
    }

    /// Builds its programs, and keeps the object under `target/compare` as `name`.
    fn object(&self, name: &str) -> Result<PathBuf> {
        say("compare", format!("building the {name} programs"));
        let place = target().join("compare");
        let endian = if cfg!(target_endian = "big") {
            "bpfeb"
        } else {
            "bpfel"
        };
        let (built, _) = shunt_bpf_build::compile(
            &self.folder,
            &place.join("bpf"),
            &target().join("tools/env"),
            &format!("{endian}-unknown-none"),
            "proxy-ebpf",
            "shunt-bpf",
        )
        .map_err(|message| anyhow!(message))?;
        keep(&built, &place.join(format!("{name}.o")))
    }

    /// Builds its `shunt-bench`, and keeps it under `target/compare` as `name`.
    fn bench(&self, name: &str) -> Result<PathBuf> {
        say("compare", format!("building the {name} shunt-bench"));
        let place = target().join("compare");
        let into = place.join("release");
        let mut command = cargo();
        command
            .current_dir(&self.folder)
            .args(["build", "--quiet", "--release", "--package=shunt-bench"])
            .arg("--target-dir")
            .arg(&into);
        run(&mut command)?;
        keep(&into.join("release/shunt-bench"), &place.join(name))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if self.exported {
            // Left-over ones do no harm: `target` is nobody's but cargo's.
            let _removed = capture(
                git()
                    .args(["worktree", "remove", "--force"])
                    .arg(&self.folder),
            );
        }
    }
}

/// Removes the trees of runs that were killed: the last part of such a name is the process.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(target().join("compare"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some((_, process)) = name.rsplit_once('-') else {
            continue;
        };
        let process: Option<u32> = process.parse().ok();
        let ended = process.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists());
        if path.is_dir() && ended {
            drop(Tree {
                folder: path,
                exported: true,
            });
        }
    }
    Ok(())
}

fn keep(file: &Path, place: &Path) -> Result<PathBuf> {
    fs::copy(file, place).with_context(|| format!("{}", file.display()))?;
    Ok(place.to_owned())
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.current_dir(root());
    command
}

/// Builds, measures and prints what has changed. Needs root.
///
/// # Errors
/// When a commit is none, does not build, or its programs do not load.
pub(super) fn compare(args: &Args) -> Result<()> {
    fs::create_dir_all(target().join("compare"))?;
    sweep()?;
    let old = Tree::new(Some(&args.old))?;
    let new = Tree::new(args.new.as_deref())?;
    let here = Tree::new(None)?.layout()?;
    let layouts = [old.layout()?, new.layout()?];
    let whole = args.whole || layouts.iter().any(|layout| *layout != here);
    let all = if whole {
        alternate([old.bench("old")?, new.bench("new")?], args)?
    } else {
        side_by_side([old.object("old")?, new.object("new")?], args)?
    };
    if all.is_empty() {
        bail!("no figure's name contains {:?}", args.only);
    }
    println!("{}", report(args, whole, &all));
    Ok(())
}

/// Both objects in one process.
fn side_by_side(objects: [PathBuf; 2], args: &Args) -> Result<Vec<Comparison>> {
    run(cargo().args(["build", "--quiet", "--release", "--package=shunt-bench"]))?;
    let mut command = Command::new(target().join("release/shunt-bench"));
    command.arg("compare").args(objects);
    lines(command, args.quick, &args.only)
}

/// Each commit's own `shunt-bench` in turn.
fn alternate(programs: [PathBuf; 2], args: &Args) -> Result<Vec<Comparison>> {
    let mut figures = [BTreeMap::new(), BTreeMap::new()];
    let mut names = Vec::new();
    let runs = RUNS[usize::from(args.quick)];
    for n in 0..runs {
        for turn in 0..2 {
            let which = (n + turn) % 2;
            say(
                "compare",
                format!("run {} of {}", 2 * n + turn + 1, 2 * runs),
            );
            let mut command = Command::new(&programs[which]);
            command.arg("datapath");
            let lines: Vec<Figure> = lines(command, true, &args.only)?;
            for line in lines.into_iter().filter(|line| line.unit == "ns") {
                if !names.contains(&line.name) {
                    names.push(line.name.clone());
                }
                let rounds: &mut Vec<f64> = figures[which].entry(line.name).or_default();
                rounds.push(line.value);
            }
        }
    }
    let [old, new] = figures;
    let both = |name: String| {
        let (Some(old), Some(new)) = (old.get(&name), new.get(&name)) else {
            say("compare", format!("only one of the two has {name:?}"));
            return None;
        };
        Some(Comparison {
            name,
            old: median(old),
            new: median(new),
            noise: spread(old).max(spread(new)),
        })
    };
    Ok(names.into_iter().filter_map(both).collect())
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Between the quartiles.
fn spread(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() * 3 / 4] - sorted[sorted.len() / 4]
}

/// Runs a `shunt-bench`, and reads the lines of JSON that it prints.
fn lines<T: DeserializeOwned>(mut command: Command, quick: bool, only: &str) -> Result<Vec<T>> {
    command
        .args(["--only", only])
        .args(quick.then_some("--quick"))
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot run shunt-bench")?;
    let stdout = child.stdout.take().context("shunt-bench has no stdout")?;
    let lines = BufReader::new(stdout)
        .lines()
        .map(|line| serde_json::from_str(&line?).context("shunt-bench"))
        .collect();
    let status = child.wait().context("shunt-bench")?;
    if !status.success() {
        bail!("shunt-bench failed ({status})");
    }
    lines
}

/// The upper quartile of all figures' noise, as a part of the old figure.
fn usual_noise(all: &[Comparison]) -> f64 {
    let mut parts: Vec<f64> = all
        .iter()
        .map(|line| line.noise / line.old.max(1.0))
        .collect();
    parts.sort_by(f64::total_cmp);
    parts[parts.len() * 3 / 4]
}

fn report(args: &Args, whole: bool, all: &[Comparison]) -> String {
    let usual = usual_noise(all);
    let changed: Vec<&Comparison> = all.iter().filter(|line| !line.is_noise(usual)).collect();
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "name",
        "old, ns",
        "new, ns",
        "difference, ns",
        "noise, ns",
        "ratio",
    ]);
    for line in &changed {
        table.add_row([
            line.name.clone(),
            format!("{:.1}", line.old),
            format!("{:.1}", line.new),
            format!("{:+.1}", line.new - line.old),
            format!("{:.1}", line.noise),
            format!("{:.3}", line.new / line.old),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let how = if whole {
        "whole runs in turn"
    } else {
        "round by round in one process"
    };
    let summary = format!(
        "{} and {}, {how}: {} of {} figures changed by more than 3 %, 2 ns and their noise ({:.1} % for \
         three quarters of them).\n{}",
        args.old,
        args.new.as_deref().unwrap_or("the working tree"),
        changed.len(),
        all.len(),
        100.0 * usual,
        circumstances()
    );
    if changed.is_empty() {
        summary
    } else {
        format!("{table}\n{summary}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_three_percent_or_two_nanoseconds() {
        let of = |old, new| Comparison {
            name: String::new(),
            old,
            new,
            noise: 0.0,
        };
        assert!(of(10.0, 12.0).is_noise(0.0) && !of(10.0, 12.1).is_noise(0.0));
        assert!(of(200.0, 206.0).is_noise(0.0) && !of(200.0, 193.9).is_noise(0.0));
        assert!(!of(200.0, 206.1).is_noise(0.0));
    }

    #[test]
    fn what_noise_explains_is_no_change() {
        let of = |new, noise| Comparison {
            name: String::new(),
            old: 200.0,
            new,
            noise,
        };
        assert!(of(216.0, 8.0).is_noise(0.0) && !of(216.1, 8.0).is_noise(0.0));
        // Its own two measurements agree by chance.
        assert!(of(220.0, 0.0).is_noise(0.1) && !of(220.1, 0.0).is_noise(0.1));
        let all = [0.0, 2.0, 4.0, 20.0].map(|noise| of(200.0, noise));
        assert_eq!(usual_noise(&all), 0.1);
    }

    #[test]
    fn a_commit_that_is_none_is_named() {
        let error = Tree::new(Some("no-such-commit")).err().expect("an error");
        assert!(error.to_string().contains("no-such-commit is not a commit"));
    }
}
