//! `shunt trace` beside real clients.

use std::{
    io::{self, BufRead, BufReader},
    process::{Child, Stdio},
    thread,
};

use serde_json::Value;

use super::*;

/// A tracer that runs until it has printed so many lines.
fn trace(agent: &Agent, args: &[&str]) -> Child {
    let mut command = agent
        .verb(&[&["trace", "-o", "json"], args].concat())
        .unwrap();
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// The lines that it prints until it ends.
fn lines(tracer: Child) -> thread::JoinHandle<Vec<Value>> {
    thread::spawn(move || {
        let mut tracer = tracer;
        let out = BufReader::new(tracer.stdout.take().unwrap());
        let read = |line: io::Result<String>| serde_json::from_str(&line.unwrap()).unwrap();
        let lines = out.lines().map(read).collect();
        assert!(tracer.wait().unwrap().success());
        lines
    })
}

/// A8: what clients do is told as they do it, by packets and by sockets, and what is not asked for
/// is not; mistakes are told in one sentence.
#[test]
fn trace_tells_what_clients_do() {
    let cluster = Cluster::start("native", &[]);
    let agent = &cluster.agents[0];
    let failed = |args: &[&str]| {
        let output = agent.cli(&[&["trace"], args].concat()).unwrap();
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert_eq!(text.lines().count(), 1, "{text}");
        (output.status.code(), text)
    };
    let (code, text) = failed(&["--service", "wbe"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("the nearest: default/web"), "{text}");
    let output = agent.cli(&["trace", "--flow", "10.0.0.1"]).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    for v6 in [false, true] {
        let solo = at(if v6 { "fd96::2" } else { "10.96.0.2" }, 80);
        let empty = at(if v6 { "fd96::3" } else { "10.96.0.3" }, 80);
        let client = cluster.ip("client", v6).to_string();
        let told = lines(trace(agent, &["--service", "solo", "--count", "4"]));
        let drops = lines(trace(agent, &["--drop", "--pod", &client, "--count", "1"]));
        // Both have their ring buffers, or the first lines would be missing.
        wait_until("both trace", || {
            let status = agent.json(&["status"]).unwrap();
            status["tracers"] == 2
        });
        let outside = cluster.client("client");
        let hooked = cluster.client("hooked");
        for proto in BOTH {
            outside.once(proto, solo, &Dial::default()).unwrap();
            hooked.once(proto, solo, &Dial::default()).unwrap();
        }
        outside
            .once(Proto::Tcp, empty, &Dial::default())
            .unwrap_err();
        let told = told.join().unwrap();
        let server = cluster.ip("solo", v6).to_string();
        let kinds: BTreeSet<_> = told
            .iter()
            .map(|line| {
                assert_eq!(line["service"], "default/solo", "{line}");
                let backend: SocketAddr = line["backend"].as_str().unwrap().parse().unwrap();
                assert_eq!(backend.ip().to_string(), server, "{line}");
                let text = |key: &str| line[key].as_str().unwrap().to_owned();
                (text("kind"), text("protocol"))
            })
            .collect();
        let wanted = [
            ("new", "TCP"),
            ("new", "UDP"),
            ("pick", "TCP"),
            ("pick", "UDP"),
        ];
        let wanted = wanted.map(|(kind, protocol)| (kind.to_owned(), protocol.to_owned()));
        assert_eq!(kinds, wanted.into(), "{told:?}");
        let drops = drops.join().unwrap();
        assert_eq!(drops[0]["kind"], "refused", "{drops:?}");
        assert_eq!(
            drops[0]["events"],
            serde_json::json!(["no_backend"]),
            "{drops:?}"
        );
    }
    // One that is killed leaves nothing on.
    let mut tracer = trace(agent, &[]);
    wait_until("it traces", || {
        agent.json(&["status"]).unwrap()["tracers"] == 1
    });
    tracer.kill().unwrap();
    tracer.wait().unwrap();
    wait_until("nobody traces", || {
        agent.json(&["status"]).unwrap()["tracers"] == 0
    });
}
