use std::{net::SocketAddr, sync::Arc};

use clap::CommandFactory;
use shunt_common::{
    family::{Family, V4, V6},
    layout::{
        AFFINITY_TICK_NS, BackendState, Config, FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_RESET,
        FLOW_SEEN_REPLY, FLOW_SNAT, FRONTEND_DROP, Flow, FlowKey, SnatSlot, TCP, TICK_NS, UDP,
    },
    snat,
};

use super::*;
use crate::{
    datapath::maps::{
        MapFamily, Maps, PerFamily,
        testing::{Capacities, Root},
    },
    gc,
    object::{ObjectName, Protocol},
    plan::{
        Backend, Frontend, FrontendAddress, FrontendId, FrontendKind, Scope, ServicePlan,
        Table as PlanTable,
    },
    sync::Syncer,
};

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn global_arguments_stand_before_and_after_the_verb_of_the_verb() {
    for line in [
        "shunt conntrack -o json list --bpf-root /x",
        "shunt conntrack list --bpf-root /x -o json",
    ] {
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Verb::Conntrack(args) = cli.verb else {
            panic!("{line}")
        };
        let text = format!("{args:?}");
        assert!(text.contains("\"/x\"") && text.contains("Json"), "{text}");
    }
}

#[test]
fn peers_are_addresses_with_or_without_port() {
    let peer: Peer = "10.0.0.1".parse().unwrap();
    assert!(peer.matches([10, 0, 0, 1].into(), 80) && peer.matches([10, 0, 0, 1].into(), 81));
    let peer: Peer = "[fd00::1]:53".parse().unwrap();
    assert!(
        peer.matches("fd00::1".parse().unwrap(), 53)
            && !peer.matches("fd00::1".parse().unwrap(), 54)
    );
    assert!("10.0.0".parse::<Peer>().is_err());
}

/// `shop/web`: a cluster IP with two backends, and a node port whose external scope has one of
/// them; `default/none` drops outside and refuses inside.
fn filled() -> (Root, Maps) {
    let root = Root::new(Capacities::default());
    let mut syncer = Syncer::new(Arc::new(root.maps())).unwrap();
    let backend = |n: u8, local| Backend {
        address: [10, 0, 0, n].into(),
        port: 8080,
        local,
    };
    let frontend = |address, port, scope, kind, backends: &[Backend], flags| Frontend {
        id: FrontendId {
            address,
            port,
            protocol: Protocol::Tcp,
            scope,
        },
        kind,
        port_name: "http".into(),
        port_index: 0,
        backends: backends.into(),
        table: if kind == FrontendKind::ClusterIp {
            PlanTable::Direct
        } else {
            PlanTable::Maglev
        },
        flags,
        affinity_secs: 0,
        set: 0,
    };
    let all = [backend(1, true), backend(2, false)];
    let cluster_ip = FrontendAddress::Ip([10, 96, 0, 1].into());
    let other_ip = FrontendAddress::Ip([192, 0, 2, 7].into());
    let node_port = FrontendAddress::NodePortV4;
    for (service, frontends) in [
        (
            ObjectName::new("shop", "web"),
            vec![
                frontend(
                    cluster_ip,
                    80,
                    Scope::Internal,
                    FrontendKind::ClusterIp,
                    &all,
                    0,
                ),
                frontend(
                    cluster_ip,
                    80,
                    Scope::External,
                    FrontendKind::ClusterIp,
                    &all,
                    0,
                ),
                frontend(
                    node_port,
                    30080,
                    Scope::Internal,
                    FrontendKind::NodePort,
                    &all,
                    0,
                ),
                frontend(
                    node_port,
                    30080,
                    Scope::External,
                    FrontendKind::NodePort,
                    &all[..1],
                    0,
                ),
            ],
        ),
        (
            ObjectName::new("default", "none"),
            vec![
                frontend(
                    other_ip,
                    443,
                    Scope::Internal,
                    FrontendKind::LoadBalancer,
                    &[],
                    0,
                ),
                frontend(
                    other_ip,
                    443,
                    Scope::External,
                    FrontendKind::LoadBalancer,
                    &[],
                    FRONTEND_DROP,
                ),
            ],
        ),
    ] {
        let plan = ServicePlan {
            frontends,
            ..ServicePlan::empty(service)
        };
        syncer.apply(&plan).unwrap();
    }
    let maps = root.maps();
    (root, maps)
}

#[test]
fn services_are_one_row_per_frontend_with_both_scopes() {
    let (_root, maps) = filled();
    let rows = serde_json::to_value(services::list(&maps).unwrap()).unwrap();
    let scope = |backends, slots, drops| serde_json::json!({ "backends": backends, "slots": slots, "drops": drops, "keepsSource": false });
    let row = |namespace, service, kind, address, port, internal, external| {
        serde_json::json!({
            "namespace": namespace, "service": service, "kind": kind, "address": address, "port": port,
            "protocol": "TCP", "internal": internal, "external": external, "affinitySeconds": 0,
            "sourceRanges": false,
        })
    };
    let expected = serde_json::json!([
        row(
            "default",
            "none",
            "LoadBalancer",
            "192.0.2.7",
            443,
            scope(0, 0, false),
            scope(0, 0, true)
        ),
        row(
            "shop",
            "web",
            "ClusterIP",
            "10.96.0.1",
            80,
            scope(2, 2, false),
            scope(2, 2, false)
        ),
        row(
            "shop",
            "web",
            "NodePort",
            "0.0.0.0",
            30080,
            scope(2, 251, false),
            scope(1, 251, false)
        ),
    ]);
    assert_eq!(rows, expected);
}

#[test]
fn backends_count_flows_by_hook_and_name_their_frontends() {
    let (_root, maps) = filled();
    let local = backends::list(&maps)
        .unwrap()
        .into_iter()
        .find(|row| row.local)
        .unwrap();
    let state = BackendState {
        socket_flows: 3,
        tc_flows: 4,
        xdp_flows: 5,
        failures: 2,
        quarantined_until: gc::now_in(AFFINITY_TICK_NS) + 600,
        ..maps.backends.get(&local.id).unwrap().unwrap()
    };
    maps.backends.set(&local.id, &state).unwrap();

    let rows = backends::list(&maps).unwrap();
    assert_eq!(rows.len(), 2, "one per backend, not per frontend");
    let value = serde_json::to_value(rows.iter().find(|row| row.id == local.id).unwrap()).unwrap();
    assert_eq!(
        (&value["namespace"], &value["service"]),
        (&"shop".into(), &"web".into())
    );
    assert_eq!(
        (&value["address"], &value["port"]),
        (&"10.0.0.1".into(), &8080.into())
    );
    assert_eq!(
        value["flows"],
        serde_json::json!({ "socket": 3, "tc": 4, "xdp": 5 })
    );
    assert_eq!(
        value["frontends"],
        serde_json::json!(["0.0.0.0:30080", "10.96.0.1:80"])
    );
    assert_eq!(value["quarantine"]["failures"], 2);
    let remaining = value["quarantine"]["remainingMs"].as_u64().unwrap();
    assert!((9000..=10_067).contains(&remaining), "{remaining}");
    let remote = rows.iter().find(|row| !row.local).unwrap();
    assert_eq!(
        (remote.address, remote.frontends.len()),
        ([10, 0, 0, 2].into(), 2)
    );
    assert_eq!(remote.quarantine, None);
}

fn add_flow<F: MapFamily>(
    maps: &PerFamily<F>,
    client: F::Addr,
    port: u16,
    proto: u8,
    state: u32,
    idle: u64,
) -> Flow<F::Addr> {
    let none = F::bytes(F::UNSPECIFIED);
    let key = FlowKey {
        client,
        frontend: none,
        client_port: port,
        frontend_port: 0,
        proto,
        reserved: 0,
        reserved2: 0,
    };
    let flow = Flow {
        frontend: client,
        backend: client,
        snat: client,
        frontend_port: 80,
        backend_port: 8080,
        snat_port: 20_000 + port,
        state,
        backend_id: 1,
        last_seen: NOW - (idle * 1_000_000_000 / TICK_NS) as u32,
        epoch: 0,
        unanswered_since: 0,
        reserved: 0,
        tried: 0,
        reserved2: 0,
    };
    let table = usize::from(state & FLOW_SEEN_REPLY != 0);
    maps.flow_maps()[table].set(&key, &flow).unwrap();
    flow
}

/// The clock of these tests, in ticks: the machine may have booted later than their flows were last
/// seen.
const NOW: u32 = 10_000;

fn filter(line: &str) -> conntrack::Filter {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        filter: conntrack::Filter,
    }
    Line::try_parse_from(["x"].into_iter().chain(line.split_whitespace()))
        .unwrap()
        .filter
}

#[test]
fn flows_of_both_tables_and_families_are_listed_and_filtered() {
    let root = Root::new(Capacities::default());
    let maps = root.maps();
    let v6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    add_flow(&maps.v4, [10, 0, 0, 1], 1, TCP, 0, 0);
    add_flow(
        &maps.v4,
        [10, 0, 0, 1],
        2,
        TCP,
        FLOW_SEEN_REPLY | FLOW_SNAT,
        100,
    );
    add_flow(
        &maps.v4,
        [10, 0, 0, 2],
        3,
        TCP,
        FLOW_SEEN_REPLY | FLOW_CLIENT_FIN,
        0,
    );
    add_flow(&maps.v4, [10, 0, 0, 2], 4, UDP, FLOW_SEEN_REPLY, 0);
    add_flow(
        &maps.v6,
        v6,
        5,
        TCP,
        FLOW_SEEN_REPLY | FLOW_CLIENT_FIN | FLOW_BACKEND_FIN,
        0,
    );
    add_flow(&maps.v6, v6, 6, TCP, FLOW_SEEN_REPLY | FLOW_RESET, 0);

    let states = |line: &str| -> Vec<(u16, String)> {
        let rows =
            serde_json::to_value(conntrack::list_at(&maps, &filter(line), NOW).unwrap()).unwrap();
        let state = |row: &serde_json::Value| {
            let client: SocketAddr = row["client"].as_str().unwrap().parse().unwrap();
            (client.port(), row["state"].as_str().unwrap().to_owned())
        };
        let mut states: Vec<_> = rows.as_array().unwrap().iter().map(state).collect();
        states.sort();
        states
    };
    let expected = [
        (1, "unanswered"),
        (2, "established"),
        (3, "closing"),
        (4, "established"),
        (5, "closed"),
        (6, "closed"),
    ];
    assert_eq!(
        states(""),
        expected.map(|(port, state)| (port, state.to_owned()))
    );
    let ports = |line: &str| {
        states(line)
            .into_iter()
            .map(|(port, _)| port)
            .collect::<Vec<_>>()
    };
    assert_eq!(ports("--protocol udp"), [4]);
    assert_eq!(ports("--client 10.0.0.1"), [1, 2]);
    assert_eq!(ports("--client 10.0.0.1:2"), [2]);
    assert_eq!(ports("--backend [fd00::1]:8080"), [5, 6]);
    assert_eq!(ports("--frontend 10.0.0.2:81"), [0; 0]);

    let rows = conntrack::list_at(&maps, &filter("--client 10.0.0.1:2"), NOW).unwrap();
    let value = serde_json::to_value(&rows[0]).unwrap();
    assert_eq!(value["snat"], "10.0.0.1:20002");
    assert!(
        (98..=102).contains(&value["idleSeconds"].as_u64().unwrap()),
        "{value}"
    );
}

#[test]
fn flush_deletes_what_its_filter_admits_frees_source_ports_and_says_how_many() {
    let root = Root::new(Capacities::default());
    let maps = root.maps();
    let config = Config {
        snat_first: 20_000,
        snat_ports: 100,
        snat_entries: 128,
        ..Default::default()
    };
    maps.set_config(&config).unwrap();
    add_flow(&maps.v4, [10, 0, 0, 1], 1, TCP, 0, 0);
    let flow = add_flow(
        &maps.v4,
        [10, 0, 0, 2],
        2,
        TCP,
        FLOW_SEEN_REPLY | FLOW_SNAT,
        0,
    );
    let [index, _] = snat::places::<V4>(
        &config,
        flow.snat_port,
        V4::words(flow.backend),
        flow.backend_port,
        TCP,
    );
    let slot = SnatSlot {
        client: [10, 0, 0, 2],
        frontend: flow.frontend,
        backend: flow.backend,
        snat: flow.snat,
        client_port: 2,
        frontend_port: flow.frontend_port,
        backend_port: flow.backend_port,
        snat_port: flow.snat_port,
        last_seen: NOW,
        owner: 0,
        state: FLOW_SEEN_REPLY,
        backend_id: 1,
        epoch: 0,
        proto: TCP,
        reserved: 0,
        reserved2: 0,
    };
    maps.v4.snat.set(index, slot);
    add_flow::<V6>(&maps.v6, [1; 16], 3, UDP, FLOW_SEEN_REPLY, 0);

    assert_eq!(
        conntrack::flush(&maps, &filter("--client 10.0.0.2")).unwrap(),
        1
    );
    assert_eq!(
        maps.v4.snat.get(index).unwrap().last_seen,
        0,
        "free for the next flow"
    );
    assert_eq!(
        conntrack::list_at(&maps, &filter(""), NOW).unwrap().len(),
        2
    );
    assert_eq!(conntrack::flush(&maps, &filter("")).unwrap(), 2);
    assert_eq!(conntrack::flush(&maps, &filter("")).unwrap(), 0);
}

#[test]
fn status_says_how_full_maps_are_and_that_no_agent_runs() {
    let (root, maps) = filled();
    let status = serde_json::to_value(status::Status::read(&maps).unwrap()).unwrap();
    assert_eq!(status["agentPid"], serde_json::Value::Null);
    assert_eq!(
        (&status["services"], &status["frontendEntries"]),
        (&2.into(), &6.into())
    );
    let usage = |name: &str| {
        let all = status["maps"].as_array().unwrap();
        let one = all.iter().find(|usage| usage["map"] == name).unwrap();
        (
            one["entries"].as_u64().unwrap(),
            one["capacity"].as_u64().unwrap(),
        )
    };
    assert_eq!(usage("frontends4"), (6, 256));
    assert_eq!(usage("slots4"), (2 + 251 + 251, 4096));
    assert_eq!(usage("backends"), (2, 256));
    assert_eq!(status["events"]["snat_exhausted"], 0);

    let _lock = crate::datapath::lock::RootLock::acquire(&root.0).unwrap();
    let status = serde_json::to_value(status::Status::read(&maps).unwrap()).unwrap();
    assert_eq!(status["agentPid"], std::process::id());
}
