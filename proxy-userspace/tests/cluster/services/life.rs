//! Agents and Services come and go.

use std::path::Path;

use shunt_common::layout::LAYOUT_VERSION;
use shunt_lab::DialError;

use super::*;

/// L4: no agent, no difference; a new one, none either.
#[test]
fn the_datapath_outlives_its_agents() {
    let mut cluster = Cluster::start("native", &[]);
    let to = [
        at("10.96.0.1", 80),
        at("fd96::1", 80),
        SocketAddr::new(cluster.node_ip("node-a", false), NODE_PORT),
    ];
    let clients = ["hooked", "packets", "client"].map(|name| cluster.client(name));
    let open: Vec<_> = clients
        .iter()
        .flat_map(|client| to.map(|to| client.open_tcp(to).unwrap()))
        .collect();
    let links = |cluster: &Cluster| -> BTreeSet<String> {
        let path = cluster
            .lab
            .bpf_root("node-a")
            .join(format!("v{LAYOUT_VERSION}/links"));
        fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let before = links(&cluster);
    let all_answer = || {
        for client in &clients {
            for to in to {
                for proto in BOTH {
                    dial(client, proto, to);
                }
            }
        }
        for conn in &open {
            conn.ask("still there").unwrap();
        }
    };
    all_answer();
    for agent in &mut cluster.agents {
        agent.kill().unwrap();
    }
    all_answer();
    for agent in &mut cluster.agents {
        agent.restart().unwrap();
    }
    all_answer();
    for agent in &mut cluster.agents {
        agent.stop().unwrap();
    }
    all_answer();
    assert_eq!(links(&cluster), before);
}

/// Update and delete: a frontend that is gone is nobody's, and comes back.
#[test]
fn services_change_and_go() {
    let cluster = Cluster::start("native", &[]);
    let client = cluster.client("packets");
    let to = at("10.96.0.2", 80);
    dial(&client, Proto::Tcp, to);
    fs::remove_file(cluster.manifests.path().join("solo.yaml")).unwrap();
    let short = Dial::within(Duration::from_millis(300));
    let gone = |error: &DialError| {
        error.is_timeout() || error.is_refused() || !error.to_string().is_empty()
    };
    wait_until("the Service is gone", || {
        client
            .once(Proto::Tcp, to, &short)
            .as_ref()
            .is_err_and(gone)
    });
    cluster.write(
        "solo.yaml",
        &[
            service("solo", 2, "").replace("port: 80", "port: 81"),
            cluster.pod("solo", "solo", "node-a"),
        ],
    );
    wait_until("the port has moved", || {
        client.once(Proto::Tcp, at("10.96.0.2", 81), &short).is_ok()
    });
    assert!(client.once(Proto::Tcp, to, &short).is_err());
    // Bad input: one clear message, and what was goes on.
    cluster.write("solo.yaml", &["kind: Service\nspec: [\n".to_owned()]);
    cluster.agents[0]
        .wait_for("solo.yaml", Duration::from_secs(5))
        .unwrap();
    dial(&client, Proto::Tcp, at("10.96.0.2", 81));
}

/// A6: `cleanup` removes everything, and only then do Services end.
#[test]
fn cleanup_leaves_nothing() {
    let mut cluster = Cluster::start("native", &[]);
    let client = cluster.client("hooked");
    let root = cluster.lab.bpf_root("node-a");
    let refused = cluster.agents[0].cli(&["cleanup"]).unwrap();
    assert!(!refused.status.success(), "cleanup beside a running agent");
    cluster.agents[0].stop().unwrap();
    dial(&client, Proto::Tcp, at("10.96.0.1", 80));
    assert!(
        cluster.agents[0]
            .cli(&["cleanup"])
            .unwrap()
            .status
            .success()
    );
    assert!(is_empty(&root), "{} is not empty", root.display());
    let short = Dial::within(Duration::from_millis(300));
    assert!(
        client
            .once(Proto::Tcp, at("10.96.0.1", 80), &short)
            .is_err()
    );
}

fn is_empty(path: &Path) -> bool {
    fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none())
}
