//! The agent with kube-proxy's configuration and command line (SPEC A1, F13, F14).

use std::{fs, os::unix::fs::symlink, process::Command};

use rustix::process::Signal;
use serde_json::Value;

use super::process::{Agent, FRONTENDS, Node, SERVICE, SHUNT, pod};

/// Which of [`FRONTENDS`]' node ports answer: on the node's IPv4 address, its IPv6 address,
/// 127.0.0.1, ::1.
fn node_ports(node: &Node) -> String {
    let answers = |(address, port): &(&str, u16)| {
        if node.dial(address, *port).is_some() {
            "y"
        } else {
            "-"
        }
    };
    FRONTENDS[2..].iter().map(answers).collect()
}

/// A1: a kube-proxy pod's command line under kube-proxy's name, with a configuration that has an
/// odd value in it.
#[test]
fn what_starts_kube_proxy_starts_shunt() {
    let node = Node::new();
    let external = SERVICE.replace("  selector:", "  externalIPs: [198.51.100.9]\n  selector:");
    node.manifest("web.yaml", &external);
    node.manifest("pod1.yaml", &pod(1));
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("kube-proxy");
    symlink(SHUNT, &program).unwrap();
    let config = folder.path().join("config.conf");
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.00
conntrack: {udpTimeout: 1s, maxPerCore: 0}
featureGates: {AllowServiceExternalIPs: false}
logging: {format: json}
mode: nftables
";
    fs::write(&config, text).unwrap();
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{}", node.name))
        .arg(&program);
    command.arg(format!("--config={}", config.display()));
    command.args([
        "--hostname-override=node-a",
        "--v=2",
        "--oom-score-adj=-998",
        "--masquerade_all=false",
    ]);
    // What kube-proxy does not need.
    command.arg("--manifests").arg(node.manifests.path());
    command.arg("--bpf-root").arg(&node.bpf_root);
    command.arg("--cgroup-root").arg(&node.cgroup);
    command.args([
        "--max-flows=1024",
        "--max-new-flows=1024",
        "--max-snat=20000",
    ]);
    let agent = Agent::spawn(&mut command);
    agent.ready();

    assert_eq!(node.dial("10.96.0.10", 80).as_deref(), Some("pod1"));
    assert_eq!(
        node_ports(&node),
        "yy--",
        "in nftables mode on the primary addresses alone"
    );
    let services = node.json(&["services"]).to_string();
    assert!(
        !services.contains("198.51.100.9") && services.contains("10.96.0.10"),
        "{services}"
    );

    // N10: netfilter's table is as kube-proxy has it, with the value as it was given.
    let netfilter = |name: &str| {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let cat = [
            "nsenter",
            &format!("--net=/run/netns/{}", node.name),
            "cat",
            &path,
        ]
        .map(str::to_owned);
        let output = Command::new(&cat[0]).args(&cat[1..]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    if netfilter("count").is_empty() {
        eprintln!("skipped in part: this kernel has no nf_conntrack");
    } else {
        let found = [
            "tcp_timeout_established",
            "tcp_timeout_close_wait",
            "udp_timeout",
        ]
        .map(netfilter);
        assert_eq!(found, ["86400", "3600", "1"]);
    }

    let (code, log) = agent.end(Signal::TERM);
    assert_eq!(code, Some(0), "{log}");
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert!(
        lines
            .iter()
            .all(|line| line["ts"].is_f64() && line["msg"].is_string()),
        "{log}"
    );
    let warnings: Vec<_> = lines
        .iter()
        .filter(|line| line["severity"] == "warning")
        .collect();
    for said in [
        "bindAddress: `0.0.0.00`: leading zeros",
        "conntrack.udpTimeout (--conntrack-udp-timeout) 1s: shunt's flows last from 5s",
        "shunt has no use for --oom-score-adj: ignored",
    ] {
        let of_it = warnings
            .iter()
            .filter(|line| line["msg"].as_str().unwrap().contains(said));
        assert_eq!(of_it.count(), 1, "{said}: {log}");
    }
}

/// F13: what is said of one family limits that one alone, loopback addresses among it.
#[test]
fn node_port_addresses_limit_their_own_family() {
    let node = Node::new();
    node.manifest("web.yaml", SERVICE);
    node.manifest("pod1.yaml", &pod(1));
    for (addresses, answers) in [
        ("192.0.2.0/24", "yy-y"),
        ("2001:db8::/64", "yyy-"),
        ("localhost", "--yy"),
        ("primary,127.0.0.0/8", "yyy-"),
    ] {
        let agent = node.start(&["--nodeport-addresses", addresses]);
        agent.ready();
        assert_eq!(node_ports(&node), answers, "{addresses}");
        agent.end(Signal::TERM);
    }
}
