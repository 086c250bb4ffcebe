//! What stands in the maps, and what tools show of it.

use std::path::Path;

use shunt::datapath::maps::Maps;
use shunt_common::layout::LAYOUT_VERSION;

use super::*;

/// What connected sockets dialled is remembered while they are open, and not longer; when there is
/// no room for it, they connect all the same, and the agent's log says so (A15), not for each of
/// many.
#[test]
fn connected_sockets_are_remembered_until_they_close() {
    let log = ["--max-sockets", "16", "--datapath-log", "warn"];
    let mut cluster = Cluster::start("off", &log);
    let maps = Maps::open(cluster.agents[0].bpf_root()).unwrap();
    let client = cluster.client("hooked");
    let dial = Dial {
        connected: true,
        ..Dial::default()
    };
    for proto in BOTH {
        for frontend in ["10.96.0.1", "fd96::1"] {
            let to = at(frontend, 80);
            let open: Vec<_> = (0..5)
                .map(|_| client.open(proto, to, &dial).unwrap())
                .collect();
            for conn in &open {
                conn.ask("who").unwrap();
                assert_eq!(conn.peer, to);
            }
            assert_eq!(
                maps.sockets.count(|peer| peer.frontend_port == 80).unwrap(),
                5
            );
            drop(open);
            wait_until("closed sockets are forgotten", || {
                maps.sockets.count(|_| true).unwrap() == 0
            });
        }
    }
    let open: Vec<_> = (0..20)
        .map(|_| client.open_tcp(at("10.96.0.1", 80)).unwrap())
        .collect();
    assert_eq!(maps.sockets.count(|_| true).unwrap(), 16);
    let status = cluster.agents[0].json(&["status"]).unwrap();
    assert_eq!(status["events"]["sockets_full"], 4, "{status}");
    let said = |agent: &Agent| -> Vec<String> {
        let output = agent.output();
        let lines = output
            .lines()
            .filter(|line| line.contains("shunt::programs"));
        lines.map(str::to_owned).collect()
    };
    let agent = &cluster.agents[0];
    wait_until("the log says so", || said(agent).len() == 4);
    for line in said(agent) {
        assert!(
            line.contains("WARN shunt::programs: sockets_full: TCP 10.96.0.1:80 default/web > "),
            "{line}"
        );
    }
    let before = said(agent).len();
    for _ in 0..100 {
        drop(client.open_tcp(at("fd96::1", 80)).unwrap());
    }
    let is_v6 = |line: &&String| line.contains("sockets_full: TCP [fd96::1]:80 default/web > ");
    wait_until("of IPv6 too", || {
        said(agent).iter().any(|line| is_v6(&line))
    });
    let began = Instant::now();
    wait_until("what was left out is counted", || {
        drop(client.open_tcp(at("fd96::1", 80)).unwrap());
        let lines = said(agent);
        lines
            .iter()
            .any(|line| line.contains(" more like it since the last line)"))
    });
    // Ten at once, and one a second.
    let most = 10 + 60 + began.elapsed().as_secs() as usize;
    assert!(said(agent).len() - before < most, "{:#?}", said(agent));
    drop(open);
    // An agent that ends takes its tracer away.
    assert_eq!(agent.json(&["status"]).unwrap()["tracers"], 1);
    cluster.agents[0].stop().unwrap();
    assert_eq!(cluster.agents[0].json(&["status"]).unwrap()["tracers"], 0);
}

/// A4: everything is pinned, named, and printed with field names by `bpftool`.
#[test]
fn bpftool_reads_the_maps() {
    let cluster = Cluster::start("native", &[]);
    let root = cluster
        .lab
        .bpf_root("node-a")
        .join(format!("v{LAYOUT_VERSION}"));
    let bpftool = |args: &[&str], path: &Path| -> serde_json::Value {
        let output = std::process::Command::new("bpftool")
            .args(["-j"])
            .args(args)
            .arg(path)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for entry in fs::read_dir(root.join("maps")).unwrap() {
        let path = entry.unwrap().path();
        let map = bpftool(&["map", "show", "pinned"], &path);
        assert_eq!(
            map["name"].as_str(),
            path.file_name().unwrap().to_str(),
            "{map}"
        );
        // The kernel takes no types for maps of maps.
        if map["type"] == "array_of_maps" {
            continue;
        }
        assert!(
            map["btf_id"].as_u64().is_some_and(|id| id > 0),
            "{map} has no BTF"
        );
    }
    for entry in fs::read_dir(root.join("progs")).unwrap() {
        let path = entry.unwrap().path();
        // Maps of one entry beside the programs: what they were loaded from, and how the start went
        // (`datapath::takeover`).
        if path.ends_with("build") || path.ends_with("start") {
            continue;
        }
        let program = bpftool(&["prog", "show", "pinned"], &path);
        assert!(
            program["btf_id"].as_u64().is_some_and(|id| id > 0),
            "{program} has no BTF"
        );
    }
    let dump = bpftool(&["map", "dump", "pinned"], &root.join("maps/frontends4"));
    let found = dump.as_array().unwrap().iter().any(|entry| {
        let key = &entry["formatted"]["key"];
        key["addr"] == serde_json::json!([10, 96, 0, 1]) && key["port"] == 80 && key["proto"] == 6
    });
    assert!(found, "no 10.96.0.1:80 in {dump}");
}
