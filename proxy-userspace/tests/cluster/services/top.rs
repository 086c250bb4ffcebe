//! `shunt top` beside real clients.

use std::{
    process::{Command, Stdio},
    thread,
};

use serde_json::Value;

use super::*;

fn service<'a>(report: &'a Value, name: &str) -> &'a Value {
    let services = report["services"].as_array().unwrap();
    services
        .iter()
        .find(|line| line["service"] == name)
        .unwrap_or_else(|| panic!("no {name}: {report:#}"))
}

/// A9: what clients do within an interval is counted by Service, backend and reason, by packets and
/// by sockets; where there is no terminal, or no agent, one sentence says so.
#[test]
fn top_counts_what_clients_do() {
    let cluster = Cluster::start("native", &["--count-traffic", "on"]);
    let agent = &cluster.agents[0];
    let failed = |args: &[&str]| {
        let output = agent.cli(&[&["top"], args].concat()).unwrap();
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        (output.status.code(), text)
    };
    let (code, text) = failed(&[]);
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("no terminal: `shunt top --once`"), "{text}");
    let nobody = Command::new(env!("CARGO_BIN_EXE_shunt"))
        .args(["top", "--bpf-root", "/sys/fs/bpf/nobody"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&nobody.stderr);
    assert_eq!(
        (nobody.status.code(), text.lines().count()),
        (Some(1), 1),
        "{text}"
    );
    assert!(text.contains("no agent"), "{text}");
    assert_eq!(failed(&["--interval", "0"]).0, Some(2));

    for v6 in [false, true] {
        let solo = at(if v6 { "fd96::2" } else { "10.96.0.2" }, 80);
        let empty = at(if v6 { "fd96::3" } else { "10.96.0.3" }, 80);
        let (outside, hooked) = (cluster.client("client"), cluster.client("hooked"));
        // Packets are counted from the first one on, and top looks whether there was any.
        outside.once(Proto::Tcp, solo, &Dial::default()).unwrap();
        let mut top = agent
            .verb(&["top", "--once", "--interval", "4", "-o", "json"])
            .unwrap();
        let top = top.stdout(Stdio::piped()).spawn().unwrap();
        wait_until("it looks", || {
            agent.json(&["status"]).unwrap()["tracers"] == 1
        });
        // Its first look comes right after that.
        thread::sleep(Duration::from_millis(500));
        for _ in 0..3 {
            for proto in BOTH {
                outside.once(proto, solo, &Dial::default()).unwrap();
                hooked.once(proto, solo, &Dial::default()).unwrap();
            }
            outside
                .once(Proto::Tcp, empty, &Dial::default())
                .unwrap_err();
        }
        let output = top.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let seconds = report["seconds"].as_f64().unwrap();
        assert!((3.9..10.0).contains(&seconds), "{report:#}");
        let line = service(&report, "solo");
        assert_eq!(line["connections"], 12, "{line:#}");
        assert_eq!(line["retries"], 0, "{line:#}");
        assert_eq!(line["refusals"], 0, "{line:#}");
        assert!(line["packets"].as_u64().unwrap() >= 6 * 2, "{line:#}");
        assert!(line["bytes"].as_u64().unwrap() > 500, "{line:#}");
        let server = cluster.ip("solo", v6).to_string();
        let backends = line["backends"].as_array().unwrap();
        let mine: Vec<&Value> = backends
            .iter()
            .filter(|backend| {
                let address: SocketAddr = backend["address"].as_str().unwrap().parse().unwrap();
                address.ip().to_string() == server
            })
            .collect();
        assert_eq!(mine.len(), 2, "one of each protocol: {line:#}");
        for backend in mine {
            assert_eq!(backend["connections"], 6, "{line:#}");
            assert_eq!(backend["share"], 50.0, "{line:#}");
            assert_eq!(backend["local"], true, "{line:#}");
        }
        let line = service(&report, "empty");
        assert!(line["refusals"].as_u64().unwrap() >= 3, "{line:#}");
        assert_eq!(line["connections"], 0);
        assert!(report["events"]["no_backend"].as_u64().unwrap() >= 3);
        assert_eq!(report["lost"], 0);
        let idle = report["services"].as_array().unwrap();
        assert!(
            idle.iter().all(|line| line["service"] != "web"),
            "{report:#}"
        );
    }
    // Nothing is left of it, and for people it fits 100 columns.
    assert_eq!(agent.json(&["status"]).unwrap()["tracers"], 0);
    let output = agent
        .cli(&["top", "--once", "--all", "--interval", "0.2"])
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("NAMESPACE  SERVICE"), "{text}");
    assert!(text.contains("default    web"), "{text}");
    assert!(
        text.lines().all(|line| line.chars().count() <= 100),
        "{text}"
    );
}
