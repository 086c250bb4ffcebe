//! `healthCheckNodePort`.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use super::*;

/// An HTTP response from a process on a node: status line and headers, body. `None` when nobody
/// answers.
fn get(cluster: &Cluster, node: &str, to: SocketAddr, request: &str) -> Option<(String, String)> {
    let ns = cluster.lab.ns(node).unwrap();
    let request = request.to_owned();
    ns.run(move || {
        let mut stream = TcpStream::connect(to).ok()?;
        stream
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        Some((head.to_lowercase(), body.to_owned()))
    })
}

/// P4, F13: as node ports, health checks are answered on the addresses that are admitted, as
/// kube-proxy's `nodePortAddresses` says, each family by itself.
#[test]
fn load_balancers_are_answered_on_admitted_addresses() {
    let spec = "  externalTrafficPolicy: Local\n  healthCheckNodePort: 32001\n";
    let extra = ["--nodeport-addresses", "fd50::/64,127.0.0.0/8"];
    let cluster = Cluster::start(Source::Manifests, "off", &extra, |cluster| {
        cluster.documents("web", 1, spec, &ready(&["web-a"]))
    });
    let asked = |v6| {
        let to = SocketAddr::new(cluster.ip("node-a", v6), 32_001);
        get(
            &cluster,
            "node-b",
            to,
            "GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n",
        )
    };
    let began = Instant::now();
    while asked(true).is_none_or(|(head, _)| !head.starts_with("http/1.1 200")) {
        assert!(began.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(asked(false), None);
}

/// P4: `healthCheckNodePort` follows the Service and its ready local endpoints, on each node, over
/// IPv4 and IPv6.
pub(super) fn local_endpoints(cluster: &Cluster) {
    const REQUEST: &str = "GET /any/path?x HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    let spec =
        |port: u16| format!("  externalTrafficPolicy: Local\n  healthCheckNodePort: {port}\n");
    let three = ready(&["web-a", "web-b", "web-c"]);
    cluster.apply(&cluster.documents("web", 1, &spec(32_001), &three));
    let status = |node: &str, v6: bool, port: u16| -> Option<u16> {
        let to = SocketAddr::new(cluster.ip(node, v6), port);
        let (head, _) = get(cluster, "node-b", to, REQUEST)?;
        Some(head.split(' ').nth(1)?.parse().unwrap())
    };
    let all = |port: u16| NODES.map(|node| [false, true].map(|v6| status(node, v6, port)));
    // A listener opens and closes a moment after the maps are written.
    let until = |port: u16, wanted: [[Option<u16>; 2]; 2]| {
        let began = Instant::now();
        while all(port) != wanted {
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "port {port}: {:?}",
                all(port)
            );
            thread::sleep(Duration::from_millis(50));
        }
    };
    until(32_001, [[Some(200); 2]; 2]);
    for (node, count) in [("node-a", 1), ("node-b", 2)] {
        for v6 in [false, true] {
            for method in ["GET", "POST"] {
                let request = REQUEST.replace("GET", method);
                let to = SocketAddr::new(cluster.ip(node, v6), 32_001);
                let (head, body) = get(cluster, "node-a", to, &request).unwrap();
                for line in [
                    "http/1.1 200 ok",
                    "content-type: application/json",
                    "x-content-type-options: nosniff",
                    &format!("x-load-balancing-endpoint-weight: {count}"),
                ] {
                    assert!(
                        head.lines().any(|found| found == line),
                        "{node}: no {line} in {head}"
                    );
                }
                let body: serde_json::Value = serde_json::from_str(&body).unwrap();
                let expected = serde_json::json!({
                    "service": { "namespace": "default", "name": "web" },
                    "localEndpoints": count, "serviceProxyHealthy": true,
                });
                assert_eq!(body, expected);
            }
        }
    }
    // Terminating and unready endpoints do not count, though new flows may still reach them.
    for conditions in [NOT_READY, TERMINATING] {
        let endpoints = [endpoint("web-a", conditions), endpoint("web-b", READY)];
        cluster.apply(&cluster.documents("web", 1, &spec(32_001), &endpoints));
        until(32_001, [[Some(503); 2], [Some(200); 2]]);
    }
    // An endpoint in a slice without a port that the Service has can serve nobody.
    for ports in [
        "[]",
        "[{ name: t, protocol: TCP }]",
        "[{ name: other, protocol: TCP, port: 8080 }]",
    ] {
        let documents = cluster.documents("web", 1, &spec(32_001), &ready(&["web-a"]));
        let without = documents.iter().map(|text| {
            let line = format!(
                "ports: [{{ name: t, protocol: TCP, port: {APP} }}, {{ name: u, protocol: UDP, port: {APP} }}]"
            );
            text.replace(&line, &format!("ports: {ports}"))
        });
        let mut documents: Vec<String> = without.collect();
        let other = cluster.slices("web", &ready(&["web-b"]));
        documents.extend(
            other
                .iter()
                .map(|text| text.replace("name: web-", "name: whole-")),
        );
        cluster.apply(&documents);
        until(32_001, [[Some(503); 2], [Some(200); 2]]);
    }
    // Another port, and a second Service that wants the same.
    cluster.apply(&cluster.documents("web", 1, &spec(32_002), &ready(&["web-b"])));
    until(32_002, [[Some(503); 2], [Some(200); 2]]);
    until(32_001, [[None; 2]; 2]);
    let mut both = cluster.documents("web", 1, &spec(32_002), &ready(&["web-b"]));
    both.extend(cluster.documents("web2", 2, &spec(32_002), &ready(&["web-a"])));
    cluster.apply(&both);
    let warning = "Service default/web2: spec.healthCheckNodePort: cannot listen on 0.0.0.0:32002";
    cluster.agents[0]
        .wait_for(warning, Duration::from_secs(5))
        .unwrap();
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(
        cluster.agents[0].output().matches(warning).count(),
        1,
        "said once"
    );
    until(32_002, [[Some(503); 2], [Some(200); 2]]);
    // The first is gone: the second has the port.
    cluster.apply(&cluster.documents("web2", 2, &spec(32_002), &ready(&["web-a"])));
    until(32_002, [[Some(200); 2], [Some(503); 2]]);
    cluster.apply(&[]);
    until(32_002, [[None; 2]; 2]);
}
