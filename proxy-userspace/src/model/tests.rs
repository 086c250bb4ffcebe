//! Who has what when several ask for it, what an event touches, and that the order of events does
//! not matter.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::object::{Endpoint, EndpointPort, ServicePort, TrafficPolicy};

fn service(name: &str) -> Service {
    Service {
        name: ObjectName::new("default", name),
        exposure: Default::default(),
        created: None,
        cluster_ips: Vec::new(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        affinity_secs: None,
        external_policy: TrafficPolicy::Cluster,
        internal_policy: TrafficPolicy::Cluster,
        health_check_node_port: None,
        source_ranges: Vec::new(),
        limits_sources: [false; 2],
        masquerade: false,
        publish_not_ready: false,
        retry: Default::default(),
    }
}

fn with_ip(name: &str, ip: &str) -> Service {
    Service {
        cluster_ips: vec![ip.parse().unwrap()],
        ..service(name)
    }
}

fn with_node_port(name: &str, port: u16) -> Service {
    let mut service = service(name);
    service.ports[0].node_port = Some(port);
    service
}

fn slice(name: &str, service: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoint = |address: &&str| Endpoint {
        address: address.parse().unwrap(),
        hostname: None,
        node: None,
        ready: true,
        serving: true,
        terminating: false,
        zones: BTreeSet::new(),
        nodes: BTreeSet::new(),
    };
    EndpointSlice {
        name: ObjectName::new("default", name),
        service: ObjectName::new("default", service),
        names_only: false,
        ports: vec![EndpointPort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: addresses.iter().map(endpoint).collect(),
    }
}

/// A model that has been told everything there was.
fn complete() -> Model {
    let mut model = Model::new(NodeFacts::default());
    model.apply(Event::Complete);
    model
}

fn apply(model: &mut Model, event: Event) -> Vec<String> {
    model
        .apply(event)
        .iter()
        .map(|name| name.name.to_string())
        .collect()
}

fn gone(name: &str) -> Event {
    Event::ServiceGone(ObjectName::new("default", name))
}

fn frontends(model: &Model, name: &str) -> usize {
    model
        .plan(&ObjectName::new("default", name))
        .frontends
        .len()
}

fn problems(model: &mut Model) -> Vec<String> {
    model
        .take_problems()
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn an_event_touches_the_services_it_concerns() {
    let mut model = complete();
    assert_eq!(
        apply(&mut model, Event::Slice(slice("a-1", "a", &["10.0.0.1"]))),
        [""; 0],
        "no such Service yet"
    );
    assert_eq!(
        apply(&mut model, Event::Service(with_ip("a", "10.96.0.1"))),
        ["a"]
    );
    assert_eq!(
        apply(&mut model, Event::Service(with_ip("b", "10.96.0.2"))),
        ["b"]
    );
    assert_eq!(
        apply(&mut model, Event::Service(with_ip("b", "10.96.0.2"))),
        [""; 0],
        "the same again"
    );
    assert_eq!(
        apply(&mut model, Event::Slice(slice("a-1", "a", &["10.0.0.1"]))),
        [""; 0],
        "the same again"
    );
    assert_eq!(
        apply(&mut model, Event::Slice(slice("a-1", "a", &["10.0.0.2"]))),
        ["a"]
    );
    // A slice that changes hands.
    assert_eq!(
        apply(&mut model, Event::Slice(slice("a-1", "b", &["10.0.0.2"]))),
        ["a", "b"]
    );
    assert_eq!(
        apply(
            &mut model,
            Event::SliceGone(ObjectName::new("default", "a-1"))
        ),
        ["b"]
    );
    assert_eq!(
        apply(
            &mut model,
            Event::SliceGone(ObjectName::new("default", "a-1"))
        ),
        [""; 0]
    );
    let facts = NodeFacts {
        zone: Some(Arc::from("z")),
        ..NodeFacts::default()
    };
    assert_eq!(apply(&mut model, Event::Node(facts.clone())), ["a", "b"]);
    assert_eq!(apply(&mut model, Event::Node(facts.clone())), [""; 0]);
    // A Node that is on its way out serves as before.
    let leaving = NodeFacts {
        leaves: true,
        ..facts
    };
    assert_eq!(apply(&mut model, Event::Node(leaving)), [""; 0]);
    assert!(model.node().leaves);
    assert_eq!(apply(&mut model, Event::NodeGone), [""; 0]);
    assert_eq!(model.node().zone.as_deref(), Some("z"));
    assert_eq!(apply(&mut model, gone("a")), ["a"]);
    assert_eq!(apply(&mut model, gone("a")), [""; 0]);
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (0, 2));
}

#[test]
fn who_has_a_node_port_keeps_it_and_the_other_takes_over() {
    let mut model = complete();
    apply(&mut model, Event::Service(with_node_port("b", 30_080)));
    assert_eq!(
        apply(&mut model, Event::Service(with_node_port("a", 30_080))),
        ["a"]
    );
    assert_eq!(
        problems(&mut model),
        [
            "Service default/a: spec.ports[0].nodePort: 30080/TCP already belongs to Service default/b \
          (spec.ports[0].nodePort) and is not served here; choose another"
        ]
    );
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (0, 4));
    // An update of either changes nothing, and nobody is told again.
    for name in ["a", "b"] {
        let mut update = with_node_port(name, 30_080);
        update.affinity_secs = Some(1);
        assert_eq!(apply(&mut model, Event::Service(update)), [name]);
    }
    assert_eq!(problems(&mut model), [""; 0]);
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (0, 4));
    // Neither does a new port before it.
    let mut update = with_node_port("b", 30_080);
    update.ports.insert(
        0,
        ServicePort {
            name: "new".into(),
            port: 81,
            ..update.ports[0].clone()
        },
    );
    update.ports[0].node_port = None;
    apply(&mut model, Event::Service(update));
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (0, 4));
    // The other protocol is another port.
    let mut udp = with_node_port("c", 30_080);
    udp.ports[0].protocol = Protocol::Udp;
    apply(&mut model, Event::Service(udp));
    assert_eq!(frontends(&model, "c"), 4);

    assert_eq!(apply(&mut model, gone("b")), ["a", "b"]);
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (4, 0));
    assert_eq!(problems(&mut model), [""; 0]);
    apply(&mut model, Event::Service(with_node_port("b", 30_080)));
    assert_eq!(
        problems(&mut model).len(),
        1,
        "told again: now it is the other one"
    );
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (4, 0));
    // The owner asks for another one.
    assert_eq!(
        apply(&mut model, Event::Service(with_node_port("a", 30_081))),
        ["a", "b"]
    );
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (4, 4));
}

#[test]
fn a_cluster_ip_belongs_to_one_service_whatever_the_port() {
    let mut model = complete();
    apply(&mut model, Event::Service(with_ip("a", "10.96.0.1")));
    let mut other = with_ip("b", "10.96.0.1");
    other.ports[0].port = 81;
    other.ports[0].node_port = Some(30_081);
    apply(&mut model, Event::Service(other));
    assert_eq!(
        problems(&mut model),
        [
            "Service default/b: spec.clusterIPs[0]: 10.96.0.1 already belongs to Service default/a (spec.clusterIPs[0]) \
          and is not served here; choose another"
        ]
    );
    assert_eq!(
        (frontends(&model, "a"), frontends(&model, "b")),
        (2, 2),
        "b keeps its node port"
    );
}

#[test]
fn external_addresses_are_shared_by_port_but_never_taken_from_a_cluster_ip() {
    let external = |name: &str, port: u16| {
        let mut service = service(name);
        service.external_ips = vec!["192.0.2.1".parse().unwrap()];
        service.ports[0].port = port;
        service
    };
    let mut model = complete();
    apply(&mut model, Event::Service(external("a", 80)));
    apply(&mut model, Event::Service(external("b", 81)));
    assert_eq!((frontends(&model, "a"), frontends(&model, "b")), (2, 2));
    assert_eq!(problems(&mut model), [""; 0]);
    apply(&mut model, Event::Service(external("c", 80)));
    assert_eq!(frontends(&model, "c"), 0);
    assert_eq!(
        problems(&mut model),
        [
            "Service default/c: spec.externalIPs: 192.0.2.1 port 80/TCP already belongs to Service default/a \
          (spec.externalIPs) and is not served here; choose another"
        ]
    );
    // Any user can write an external IP: it does not stand against a cluster IP, even one that
    // comes later.
    assert_eq!(
        apply(&mut model, Event::Service(with_ip("d", "192.0.2.1"))),
        ["a", "b", "c", "d"]
    );
    assert_eq!(
        ["a", "b", "c", "d"].map(|name| frontends(&model, name)),
        [0, 0, 0, 2]
    );
    assert_eq!(problems(&mut model).len(), 3);
    assert_eq!(apply(&mut model, gone("d")), ["a", "b", "c", "d"]);
    assert_eq!(
        ["a", "b", "c", "d"].map(|name| frontends(&model, name)),
        [2, 2, 0, 0]
    );
}

#[test]
fn among_the_first_the_oldest_has_it() {
    for order in [["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"]] {
        let mut model = Model::new(NodeFacts::default());
        for name in order {
            let created = [("a", None), ("b", Some(20)), ("c", Some(10))]
                .iter()
                .find(|(other, _)| *other == name)
                .unwrap()
                .1;
            let mut service = with_node_port(name, 30_080);
            service.created = created;
            model.apply(Event::Service(service));
        }
        assert_eq!(problems(&mut model), [""; 0], "not before all are known");
        model.apply(Event::Complete);
        assert_eq!(
            ["a", "b", "c"].map(|name| frontends(&model, name)),
            [0, 0, 4],
            "{order:?}"
        );
        assert_eq!(problems(&mut model).len(), 2);
    }
}

#[test]
fn an_endpoint_that_is_a_cluster_ip_is_skipped_as_long_as_it_is_one() {
    let backends = |model: &Model| {
        model.plan(&ObjectName::new("default", "a")).frontends[0]
            .backends
            .len()
    };
    let mut model = complete();
    apply(&mut model, Event::Service(with_ip("a", "10.96.0.1")));
    apply(
        &mut model,
        Event::Slice(slice("a-1", "a", &["10.0.0.1", "10.96.0.2"])),
    );
    assert_eq!((backends(&model), problems(&mut model).len()), (2, 0));
    assert_eq!(
        apply(&mut model, Event::Service(with_ip("b", "10.96.0.2"))),
        ["a", "b"]
    );
    assert_eq!(backends(&model), 1);
    assert_eq!(
        problems(&mut model),
        [
            "EndpointSlice default/a-1: endpoints: 10.96.0.2 is the cluster IP of Service default/b; \
          a Service cannot stand behind a Service, it is skipped"
        ]
    );
    apply(
        &mut model,
        Event::Slice(slice("a-1", "a", &["10.0.0.1", "10.0.0.3", "10.96.0.2"])),
    );
    assert_eq!(
        (backends(&model), problems(&mut model).len()),
        (2, 0),
        "told once"
    );
    assert_eq!(apply(&mut model, gone("b")), ["a", "b"]);
    assert_eq!(backends(&model), 3);
}

#[test]
fn a_node_object_adds_to_what_was_configured() {
    let mut model = Model::new(NodeFacts {
        name: "node-a".into(),
        zone: None,
        addresses: BTreeSet::from(["192.0.2.1".parse().unwrap()]),
        leaves: false,
    });
    model.apply(Event::Node(NodeFacts {
        name: "node-a".into(),
        zone: Some("z".into()),
        addresses: BTreeSet::from(["192.0.2.2".parse().unwrap()]),
        leaves: false,
    }));
    assert_eq!(
        (model.node().zone.as_deref(), model.node().addresses.len()),
        (Some("z"), 2)
    );
    model.apply(Event::Node(NodeFacts::default()));
    assert_eq!(
        (model.node().zone.as_deref(), model.node().addresses.len()),
        (None, 1)
    );
    assert_eq!(&*model.node().name, "node-a");
}

/// A Service of few names, addresses and ports, so that many collide.
fn any_service() -> impl Strategy<Value = Service> {
    let address = (0_u8..4).prop_map(|i| IpAddr::from([10, 96, 0, i]));
    let ips = || proptest::collection::vec(address.clone(), 0..2);
    let port = (0_u16..2, proptest::option::of(30_000_u16..30_002));
    (
        0..5_usize,
        ips(),
        ips(),
        proptest::collection::vec(port, 1..3),
    )
        .prop_map(|(name, cluster, external, ports)| {
            let name = ["a", "b", "c", "d", "e"][name];
            let mut service = service(name);
            service.created = Some(name.len() as i64);
            service.cluster_ips = cluster;
            service.external_ips = external;
            service.ports = ports
                .into_iter()
                .enumerate()
                .map(|(i, (port, node_port))| ServicePort {
                    name: i.to_string().into(),
                    protocol: Protocol::Tcp,
                    port: 80 + port,
                    node_port,
                })
                .collect();
            service.ports.dedup_by_key(|port| port.port);
            service
        })
}

fn any_event() -> impl Strategy<Value = Event> {
    let slice = (0..3_usize, 0..5_usize, 0_u8..6).prop_map(|(i, service, address)| {
        let name = ["s", "t", "u"][i];
        let service = ["a", "b", "c", "d", "e"][service];
        let mut slice = slice(name, service, &[&format!("10.96.0.{address}")]);
        slice.ports[0].name = "0".into();
        slice
    });
    prop_oneof![
        4 => any_service().prop_map(Event::Service),
        1 => (0..5_usize).prop_map(|i| gone(["a", "b", "c", "d", "e"][i])),
        4 => slice.prop_map(Event::Slice),
        1 => (0..3_usize).prop_map(|i| Event::SliceGone(ObjectName::new("default", ["s", "t", "u"][i]))),
    ]
}

fn plans(model: &Model) -> BTreeMap<ObjectName, ServicePlan> {
    model
        .services()
        .map(|service| (service.name.clone(), model.plan(&service.name)))
        .collect()
}

proptest! {
    /// What came before the list was complete, in any order and with any detours, gives the plans
    /// of what is left.
    #[test]
    fn the_order_of_the_first_events_does_not_matter(
        detours in proptest::collection::vec(any_event(), 0..40),
        last in proptest::collection::vec(any_event(), 0..20),
        order in any::<u64>(),
    ) {
        let mut straight = Model::new(NodeFacts::default());
        let mut services = BTreeMap::new();
        let mut slices = BTreeMap::new();
        for event in detours.iter().chain(&last) {
            match event.clone() {
                Event::Service(service) => drop(services.insert(service.name.clone(), service)),
                Event::ServiceGone(name) => drop(services.remove(&name)),
                Event::Slice(slice) => drop(slices.insert(slice.name.clone(), slice)),
                Event::SliceGone(name) => drop(slices.remove(&name)),
                _ => {}
            }
        }
        let mut events: Vec<Event> =
            services.into_values().map(Event::Service).chain(slices.into_values().map(Event::Slice)).collect();
        // Any permutation will do: a fixed one of the seed.
        let mut state = order | 1;
        events.sort_by_cached_key(|_| {
            state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
            state
        });
        events.into_iter().for_each(|event| drop(straight.apply(event)));
        let mut detoured = Model::new(NodeFacts::default());
        detours.into_iter().chain(last).for_each(|event| drop(detoured.apply(event)));
        prop_assert_eq!(plans(&straight), plans(&detoured));
    }

    /// A plan that changed belongs to a touched Service, and no frontend is ever planned twice.
    #[test]
    fn what_is_not_touched_does_not_change(
        events in proptest::collection::vec(any_event(), 1..60),
        complete_after in 0..30_usize,
    ) {
        let mut model = Model::new(NodeFacts::default());
        let mut before = plans(&model);
        for (i, event) in events.into_iter().enumerate() {
            if i == complete_after {
                model.apply(Event::Complete);
            }
            let touched = model.apply(event);
            let after = plans(&model);
            for name in before.keys().chain(after.keys()) {
                prop_assert!(
                    touched.contains(name) || before.get(name) == after.get(name),
                    "{} changed from {:?} to {:?}", name, before.get(name), after.get(name)
                );
            }
            let mut planned = HashSet::new();
            for frontend in after.values().flat_map(|plan| &plan.frontends) {
                prop_assert!(planned.insert(frontend.id), "{} is planned twice", frontend);
            }
            before = after;
        }
    }
}
