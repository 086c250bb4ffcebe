//! `--watch`: what changes is told once, as it changes.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    sync::mpsc,
    thread,
};

use serde_json::Value;

use super::*;

/// A verb that goes on, and the lines that it prints.
fn watch(agent: &Agent, args: &[&str]) -> (Child, mpsc::Receiver<String>) {
    let mut command = agent.verb(args).unwrap();
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    (child, lines)
}

/// The next line that a test accepts.
fn next(lines: &mpsc::Receiver<String>, accepts: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = lines.recv_timeout(left).expect("a line in time");
        if accepts(&line) {
            return line;
        }
    }
}

/// A3: a Service that comes, loses its backend and goes is a line each time, for people and for
/// scripts; so is an agent that ends.
#[test]
fn what_changes_is_told_as_it_changes() {
    let mut cluster = Cluster::start("off", &[]);
    let (mut table, rows) = watch(&cluster.agents[0], &["services", "--watch"]);
    let (mut json, objects) = watch(&cluster.agents[0], &["services", "-w", "-o", "json"]);
    let (mut backends, serving) = watch(&cluster.agents[0], &["backends", "-w", "solo"]);
    let (mut status, heads) = watch(&cluster.agents[0], &["status", "-w"]);
    assert!(next(&rows, |_| true).starts_with("NAMESPACE  SERVICE"));
    next(&rows, |line| {
        line.contains("10.96.0.2:80") && line.ends_with("  1")
    });
    next(&objects, |line| line.contains("10.96.0.2"));
    next(&serving, |line| line.contains("TCP"));
    next(&heads, |line| line.starts_with("fine: "));

    let path = cluster.manifests.path().join("solo.yaml");
    fs::remove_file(path).unwrap();
    let gone = |line: &str| line.contains("10.96.0.2:80") && line.ends_with("  gone");
    next(&rows, gone);
    let object = next(&objects, |line| line.contains("\"gone\":true"));
    let object: Value = serde_json::from_str(&object).unwrap();
    assert_eq!(object["service"], "solo", "{object}");
    next(&serving, |line| line.ends_with("  gone"));

    cluster.agents[0].stop().unwrap();
    next(&heads, |line| line.starts_with("not fine: no agent runs"));
    for child in [&mut table, &mut json, &mut backends, &mut status] {
        // It goes on without an agent, until somebody ends it.
        assert_eq!(child.try_wait().unwrap(), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
