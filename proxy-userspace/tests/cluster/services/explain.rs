//! `shunt explain` says what packets and sockets then find.

use std::{collections::BTreeMap, io::Read};

use serde_json::Value;

use super::*;

fn ends(value: &Value, which: &str) -> SocketAddr {
    let text = value[which].as_str();
    text.unwrap_or_else(|| panic!("no {which} in {value}"))
        .parse()
        .unwrap()
}

/// A7: whoever dials is served by the backend that was told, which sees the source that was told;
/// refusals, names that nobody has, and what a socket of a pod may get.
#[test]
fn explain_tells_what_a_client_then_finds() {
    let mut cluster = Cluster::start("native", &[]);
    let agent = &cluster.agents[0];
    let outside = cluster.client("client");
    let mut port = 41_000;
    let mut remote = 0;
    for v6 in [false, true] {
        let client = cluster.ip("client", v6);
        let node = cluster.node_ip("node-a", v6);
        let web = at(if v6 { "fd96::1" } else { "10.96.0.1" }, 80);
        for proto in BOTH {
            for frontend in [web, SocketAddr::new(node, NODE_PORT)] {
                for _ in 0..4 {
                    port += 1;
                    let source = SocketAddr::new(client, port);
                    let protocol = proto.to_string().to_lowercase();
                    let told = agent
                        .json(&[
                            "explain",
                            &protocol,
                            &source.to_string(),
                            &frontend.to_string(),
                        ])
                        .unwrap();
                    assert_eq!(told["verdict"], "translate", "{told}");
                    assert_eq!(told["sender"], "outside", "{told}");
                    assert_eq!(told["frontend"]["service"], "web", "{told}");
                    assert_eq!(told["warnings"], serde_json::json!([]), "{told}");
                    let backends = told["backends"].as_array().unwrap();
                    let chosen = backends.iter().find(|backend| backend["chosen"] == true);
                    let chosen = ends(chosen.unwrap(), "address");
                    let sent = ends(&told["sent"], "source");
                    assert_eq!(ends(&told["answer"], "source"), frontend, "{told}");
                    assert_eq!(ends(&told["answer"], "destination"), source, "{told}");
                    let dial = Dial {
                        bind: Some(source),
                        ..Dial::default()
                    };
                    let answer = outside.once(proto, frontend, &dial).unwrap();
                    let server = cluster.lab.name_of(chosen.ip()).unwrap();
                    assert_eq!(answer.server, server, "{told}");
                    assert_eq!(answer.seen_peer, sent, "{told}");
                    remote += usize::from(sent.ip() == node);
                }
            }
        }
    }
    assert!(remote > 0, "no backend elsewhere was chosen");

    let failed = |args: &[&str]| {
        let output = agent.cli(args).unwrap();
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        (output.status.code(), text)
    };
    let from = cluster.ip("client", false).to_string();
    let told = agent.json(&["explain", "tcp", &from, "empty:80"]).unwrap();
    assert_eq!(told["verdict"], "refuse", "{told}");
    assert!(told["advice"].is_string(), "{told}");
    let told = agent
        .json(&["explain", "tcp", &from, "10.96.0.1:81"])
        .unwrap();
    assert_eq!(told["verdict"], "refuse", "{told}");
    let told = agent
        .json(&["explain", "tcp", &from, "192.0.2.9:80"])
        .unwrap();
    assert_eq!(told["verdict"], "pass", "{told}");
    let (code, text) = failed(&["explain", "tcp", &from, "webb:80"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("the nearest: default/web"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    let (code, text) = failed(&["explain", "tcp", &from, "web:79"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("it has 80/TCP, 80/UDP"), "{text}");
    let (code, text) = failed(&["explain", "icmp", &from, "web:80"]);
    assert_eq!(code, Some(2), "{text}");

    let manifests = cluster.manifests.path().to_str().unwrap();
    let told = agent
        .json(&[
            "explain",
            "tcp",
            "pod/default/web-a",
            "web:80",
            "--manifests",
            manifests,
        ])
        .unwrap();
    assert_eq!(told["verdict"], "connect", "{told}");
    assert_eq!(told["backends"].as_array().unwrap().len(), 2, "{told}");
    let node = cluster.node_ip("node-a", false).to_string();
    let told = agent.json(&["explain", "tcp", &node, "solo:80"]).unwrap();
    assert_eq!(told["verdict"], "connect", "{told}");
    let told = agent.json(&["explain", "udp", &node, "solo:80"]).unwrap();
    assert_eq!(told["verdict"], "translate", "{told}");

    let output = agent.cli(&["explain", "tcp", &from, "web:80"]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("default/web"),
        "{text}"
    );
    println!("{text}");

    symptoms_are_told_with_what_to_do(&cluster);
    archives_hold_no_names_when_anonymised(&cluster);
    let status = |agent: &Agent| {
        let output = agent.cli(&["status"]).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().unwrap_or_default().to_owned()
    };
    let line = status(&cluster.agents[0]);
    assert!(line.starts_with("fine: 5 Services, programs on "), "{line}");
    cluster.agents[0].kill().unwrap();
    let line = status(&cluster.agents[0]);
    assert!(line.starts_with("not fine: no agent runs"), "{line}");
}

/// The symptoms of docs/troubleshooting.md: `--nocapture` prints what stands there.
fn symptoms_are_told_with_what_to_do(cluster: &Cluster) {
    let agent = &cluster.agents[0];
    let far = "  type: NodePort\n  externalTrafficPolicy: Local\n";
    let ranged = "  type: LoadBalancer\n  loadBalancerSourceRanges: [192.0.2.0/24]\n";
    let status = "status: { loadBalancer: { ingress: [{ ip: 198.51.100.9 }] } }\n";
    cluster.write(
        "symptoms.yaml",
        &[
            service("far", 4, far),
            cluster.pod("web-c", "far", "node-b"),
            service("ranged", 5, ranged) + status,
            cluster.pod("web-b", "ranged", "node-b"),
        ],
    );
    let from = cluster.ip("client", false).to_string();
    let pod = cluster.ip("solo", false).to_string();
    let node = cluster.node_ip("node-a", false);
    let far = SocketAddr::new(node, NODE_PORT + 3).to_string();
    wait_until("the Services are there", || {
        let told = agent.json(&["explain", "tcp", &from, &far]).unwrap();
        told["verdict"] == "drop"
            && agent
                .cli(&["explain", "tcp", &from, "ranged:80"])
                .unwrap()
                .status
                .success()
    });
    let told = |args: &[&str], words: &[&str]| {
        let output = agent.cli(args).unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        println!("$ shunt {}\n{text}", args.join(" "));
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    };
    told(
        &["explain", "tcp", &from, "empty:80"],
        &["refused at once", "no backend", "to do:"],
    );
    told(
        &["explain", "tcp", &from, &far],
        &["is dropped", "policy is Local", "on another node"],
    );
    told(
        &["explain", "tcp", &from, "198.51.100.9:80"],
        &["is dropped", "loadBalancerSourceRanges", "192.0.2.0/24"],
    );
    told(
        &["explain", "tcp", &from, "10.96.0.1:8080"],
        &["refused at once", "no Service has this port"],
    );
    told(
        &["explain", "tcp", &from, "10.96.7.7:80"],
        &["is dropped", "no Service has it"],
    );
    told(
        &["explain", "tcp", &from, "wbe:80"],
        &["the nearest: default/web"],
    );
    let ns = cluster.lab.ns("node-a").unwrap();
    ns.sysctl(&[("ipv4/conf/eth0/rp_filter", "1")]).unwrap();
    told(
        &[
            "explain",
            "tcp",
            &pod,
            "10.96.0.1:80",
            "--from",
            "outside",
            "--device",
            "eth0",
        ],
        &["warning:", "rp_filter"],
    );
    ns.sysctl(&[("ipv4/conf/eth0/rp_filter", "0")]).unwrap();
    let guard =
        "table inet guard {\nchain f {\ntype filter hook forward priority 0\npolicy drop\n}\n}";
    ns.output("nft", &[guard]).unwrap();
    told(
        &["explain", "tcp", &from, "10.96.0.1:80"],
        &["warning:", "netfilter may drop it", "guard"],
    );
    ns.output("nft", &["delete table inet guard"]).unwrap();
    ns.ip(&[
        "link add bare type bridge".to_owned(),
        "link set bare up".to_owned(),
    ])
    .unwrap();
    told(
        &["explain", "tcp", &from, "10.96.0.1:80", "--device", "bare"],
        &["warning:  bare has no program", "it goes on as it is"],
    );
    ns.ip(&["link del bare".to_owned()]).unwrap();
    told(
        &["explain", "tcp", &from, "10.96.0.1:80", "--device", "none"],
        &["none of that name"],
    );
    told(&["explain", "tcp", &pod, "web:80"], &["connect goes to "]);
    told(
        &["explain", "tcp", &from, "web:80", "-o", "yaml"],
        &["verdict: translate"],
    );
    told(&["services", "-n", "default"], &["ExternalIP"]);
    told(&["backends", "web"], &["local"]);
    told(&["backends", "web", "-o", "wide"], &["10.96.0.1:80"]);
    for verb in ["services", "backends", "conntrack", "status"] {
        let output = agent.cli(&[verb]).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let longest = text
            .lines()
            .max_by_key(|line| line.chars().count())
            .unwrap();
        assert!(longest.chars().count() <= 100, "{verb}: {longest}");
    }
    told(&["status"], &["fine: "]);
}

/// A10.
fn archives_hold_no_names_when_anonymised(cluster: &Cluster) {
    for anonymise in [false, true] {
        let path = cluster.manifests.path().join("dump.tar.gz");
        let mut args = vec!["sysdump", "--output", path.to_str().unwrap()];
        if anonymise {
            args.push("--anonymise");
        }
        let output = cluster.agents[0].cli(&args).unwrap();
        assert!(output.status.success(), "{output:?}");
        let packed = flate2::read::GzDecoder::new(fs::File::open(&path).unwrap());
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(packed).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().file_name().unwrap().to_owned();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            files.insert(name.into_string().unwrap(), text);
        }
        for name in [
            "version.txt",
            "status.json",
            "services.json",
            "backends.json",
            "flows.json",
            "programs.json",
            "check.json",
            "links.txt",
            "addresses.txt",
            "routes.txt",
            "rules.txt",
            "neighbours.txt",
            "netfilter.txt",
            "sysctls.txt",
            "command-line.txt",
            "configz.txt",
            "events.jsonl",
            "errors.txt",
        ] {
            assert!(
                files.contains_key(name),
                "{name}: {:?}",
                files["errors.txt"]
            );
        }
        let programs: Value = serde_json::from_str(&files["programs.json"]).unwrap();
        assert!(programs.as_array().unwrap().len() >= 14, "{programs}");
        assert!(
            programs[0]["tag"].as_str().unwrap().len() == 16,
            "{programs}"
        );
        let services: Value = serde_json::from_str(&files["services.json"]).unwrap();
        let named = services.to_string().contains("\"web\"");
        assert_eq!(named, !anonymise, "{services}");
        if anonymise {
            for (file, text) in &files {
                let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
                let found = words.find(|word| ["web", "solo", "node-a", "web-a"].contains(word));
                assert_eq!(found, None, "{file}: {text}");
            }
        }
    }
}
