use std::{
    collections::HashSet,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use shunt_common::{
    family::{Family, V4},
    filter,
    layout::FRONTEND_AFFINITY,
    maglev,
};

use super::{
    table::{Choice, FamilyIndex, FrontendTable},
    *,
};
use crate::{
    datapath::maps::{
        name_str,
        testing::{Capacities, Root},
    },
    object::Protocol,
    plan::{Backend, BackendSet, Frontend, FrontendAddress, FrontendKind, Scope, Table},
};

fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn backends(addresses: &[&str], port: u16) -> BackendSet {
    let mut set: Vec<_> = addresses
        .iter()
        .map(|address| Backend {
            address: address.parse().unwrap(),
            port,
            local: address.ends_with('1'),
        })
        .collect();
    set.sort();
    set.into()
}

fn ip(address: &str) -> FrontendAddress {
    FrontendAddress::Ip(address.parse().unwrap())
}

fn id(address: FrontendAddress, port: u16, scope: Scope) -> FrontendId {
    FrontendId {
        address,
        port,
        protocol: Protocol::Tcp,
        scope,
    }
}

/// Both scopes of a frontend.
fn frontend(
    address: FrontendAddress,
    port: u16,
    backends: &BackendSet,
    table: Table,
) -> [Frontend; 2] {
    [Scope::Internal, Scope::External].map(|scope| Frontend {
        id: id(address, port, scope),
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        port_index: 0,
        backends: backends.clone(),
        table,
        flags: 0,
        affinity_secs: 0,
        set: 0,
    })
}

fn plan(service: &str, frontends: impl IntoIterator<Item = [Frontend; 2]>) -> ServicePlan {
    ServicePlan {
        frontends: frontends.into_iter().flatten().collect(),
        ..ServicePlan::empty(name(service))
    }
}

/// One IPv4 cluster IP.
fn simple(service: &str, address: &str, addresses: &[&str]) -> ServicePlan {
    plan(
        service,
        [frontend(
            ip(address),
            80,
            &backends(addresses, 8080),
            Table::Direct,
        )],
    )
}

/// What a packet to this frontend can reach, sorted; `None` without an entry.
fn reach(maps: &Maps, id: &FrontendId) -> Option<Vec<(IpAddr, u16)>> {
    reach_slowly(maps, id, Duration::ZERO)
}

/// As [`reach`], with a pause between the lookup of the frontend and the reading of its slots.
fn reach_slowly(maps: &Maps, id: &FrontendId, pause: Duration) -> Option<Vec<(IpAddr, u16)>> {
    let table = maps.table(FamilyIndex::of(id));
    let entry = table.get(id).unwrap()?;
    if !pause.is_zero() {
        thread::sleep(pause);
    }
    let mut all: Vec<_> = (entry.slot_base..entry.slot_base + entry.slot_count)
        .map(|index| table.slot(index).unwrap())
        .map(|choice| (choice.address, choice.port))
        .collect();
    all.sort();
    all.dedup();
    Some(all)
}

fn set(addresses: &[&str], port: u16) -> Vec<(IpAddr, u16)> {
    let mut set: Vec<_> = addresses
        .iter()
        .map(|a| (a.parse().unwrap(), port))
        .collect();
    set.sort();
    set
}

fn syncer(root: &Root) -> Syncer {
    Syncer::new(Arc::new(root.maps())).unwrap()
}

#[test]
fn a_service_is_created_changed_and_removed_in_both_families() {
    let root = Root::new(Capacities::default());
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    for (address, node_port, pods) in [
        (
            "10.96.0.1",
            FrontendAddress::NodePortV4,
            ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
        ),
        (
            "fd00:96::1",
            FrontendAddress::NodePortV6,
            ["fd00::1", "fd00::2", "fd00::3"],
        ),
    ] {
        let both = |pods: &[&str]| {
            let set = backends(pods, 8080);
            let mut external = frontend(node_port, 30080, &set, Table::Maglev);
            external
                .iter_mut()
                .for_each(|f| f.kind = FrontendKind::NodePort);
            plan(
                "web",
                [frontend(ip(address), 80, &set, Table::Direct), external],
            )
        };
        let applied = syncer.apply(&both(&pods[..2])).unwrap();
        assert_eq!(applied.frontends, 4);
        for scope in [Scope::Internal, Scope::External] {
            assert_eq!(
                reach(&maps, &id(ip(address), 80, scope)),
                Some(set(&pods[..2], 8080))
            );
            assert_eq!(
                reach(&maps, &id(node_port, 30080, scope)),
                Some(set(&pods[..2], 8080))
            );
        }
        let table = maps.table(FamilyIndex::of(&id(node_port, 30080, Scope::External)));
        let entry = table
            .get(&id(node_port, 30080, Scope::External))
            .unwrap()
            .unwrap();
        assert_eq!(
            (entry.slot_count, entry.kind),
            (maglev::table_size(2), layout::KIND_NODE_PORT)
        );

        syncer.apply(&both(&pods[1..])).unwrap();
        assert_eq!(
            reach(&maps, &id(node_port, 30080, Scope::External)),
            Some(set(&pods[1..], 8080))
        );
        let empty = both(&[]);
        syncer.apply(&empty).unwrap();
        assert_eq!(
            reach(&maps, &id(ip(address), 80, Scope::Internal)),
            Some(vec![])
        );

        syncer.remove(&name("web")).unwrap();
        assert_eq!(reach(&maps, &id(ip(address), 80, Scope::Internal)), None);
        assert_eq!(reach(&maps, &id(node_port, 30080, Scope::External)), None);
    }
    assert_eq!(maps.services.count(|_| true).unwrap(), 0);
    assert_eq!(syncer.counts(), (0, 0));
}

#[test]
fn packets_pass_the_filter_before_the_entry_appears_and_names_are_kept() {
    let root = Root::new(Capacities::default());
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    let (frontend, backend) = (V4::words([10, 96, 0, 1]), V4::words([10, 0, 0, 2]));
    let bits = [
        filter::frontend::<V4>(frontend, 80, layout::TCP),
        filter::service::<V4>(frontend),
        filter::backend::<V4>(backend, 8080, layout::TCP),
    ];
    let is_set = |bit| {
        let (word, mask) = filter::word_and_mask(bit);
        maps.filter.get(word).unwrap() & mask != 0
    };
    assert!(bits.iter().all(|&bit| !is_set(bit)));
    syncer
        .apply(&simple("web", "10.96.0.1", &["10.0.0.2"]))
        .unwrap();
    assert!(bits.iter().all(|&bit| is_set(bit)));

    let entry = maps
        .table(FamilyIndex::V4)
        .get(&id(ip("10.96.0.1"), 80, Scope::Internal))
        .unwrap()
        .unwrap();
    let info = maps.services.get(&entry.service).unwrap().unwrap();
    assert_eq!(
        (name_str(&info.namespace), name_str(&info.name)),
        ("default".into(), "web".into())
    );
}

#[test]
fn equal_backends_share_slots_and_ids_and_scopes_may_differ() {
    let root = Root::new(Capacities::default());
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    let all = backends(&["10.0.0.1", "10.0.0.2"], 8080);
    let local = backends(&["10.0.0.1"], 8080);
    let mut node_port = frontend(FrontendAddress::NodePortV4, 30080, &all, Table::Direct);
    node_port[1].backends = local;
    syncer
        .apply(&plan(
            "web",
            [
                frontend(ip("10.96.0.1"), 80, &all, Table::Direct),
                node_port,
            ],
        ))
        .unwrap();

    let entry = |id| maps.v4.table_entry(id);
    let cluster = entry(id(ip("10.96.0.1"), 80, Scope::Internal));
    let internal = entry(id(FrontendAddress::NodePortV4, 30080, Scope::Internal));
    let external = entry(id(FrontendAddress::NodePortV4, 30080, Scope::External));
    assert_eq!(
        (cluster.slot_base, cluster.slot_count),
        (internal.slot_base, 2)
    );
    assert_eq!(external.slot_count, 1);
    let table = maps.table(FamilyIndex::V4);
    let ids: HashSet<u32> = (cluster.slot_base..cluster.slot_base + 2)
        .map(|i| table.slot(i).unwrap().id)
        .collect();
    assert!(
        ids.contains(&table.slot(external.slot_base).unwrap().id),
        "one id per Service port and endpoint"
    );
    assert!(table.slot(external.slot_base).unwrap().local);
    assert_eq!(syncer.counts(), (1, 2));
}

impl crate::datapath::maps::PerFamily<V4> {
    fn table_entry(&self, id: FrontendId) -> layout::Frontend {
        self.get(&id).unwrap().unwrap()
    }
}

#[test]
fn an_unchanged_plan_writes_nothing_even_after_a_restart() {
    let root = Root::new(Capacities::default());
    let plans = [
        simple("web", "10.96.0.1", &["10.0.0.1", "10.0.0.2"]),
        plan(
            "ext",
            [frontend(
                FrontendAddress::NodePortV6,
                30081,
                &backends(&["fd00::1", "fd00::2"], 53),
                Table::Maglev,
            )],
        ),
        plan(
            "none",
            [frontend(
                ip("10.96.0.3"),
                80,
                &backends(&[], 1),
                Table::Direct,
            )],
        ),
    ];
    let mut first = syncer(&root);
    for plan in &plans {
        first.apply(plan).unwrap();
    }
    let writes = first.maps().writes();
    for plan in &plans {
        assert_eq!(first.apply(plan).unwrap(), Applied::default());
    }
    assert_eq!(first.maps().writes(), writes);
    let id_of = |syncer: &Syncer| {
        let table = syncer.maps().table(FamilyIndex::V4);
        let entry = table
            .get(&id(ip("10.96.0.1"), 80, Scope::Internal))
            .unwrap()
            .unwrap();
        (table.slot(entry.slot_base).unwrap().id, entry.service)
    };
    let ids = id_of(&first);
    drop(first);

    let mut second = syncer(&root);
    for plan in &plans {
        assert_eq!(second.apply(plan).unwrap(), Applied::default());
    }
    second
        .prune(|name| plans.iter().any(|plan| plan.service == *name))
        .unwrap();
    assert_eq!(
        second.maps().writes(),
        0,
        "a restart over maps that are as they should be"
    );
    assert_eq!(id_of(&second), ids);

    // One more backend in one Service: its slots and its two entries, one id, one filter bit,
    // nothing else.
    let more = simple("web", "10.96.0.1", &["10.0.0.1", "10.0.0.2", "10.0.0.7"]);
    let applied = second.apply(&more).unwrap();
    assert_eq!(
        (applied.frontends, applied.slots, applied.deleted),
        (2, 3, 0)
    );
    assert_eq!(second.maps().writes(), 2 + 3 + 1 + 1);
    assert_eq!(id_of(&second), ids, "old backends keep their ids");
}

#[test]
fn a_restart_never_gives_a_used_range_or_id_away() {
    let root = Root::new(Capacities::default());
    let mut first = syncer(&root);
    first
        .apply(&simple("a", "10.96.0.1", &["10.0.0.1", "10.0.0.2"]))
        .unwrap();
    first
        .apply(&simple("b", "10.96.0.2", &["10.0.0.3", "10.0.0.4"]))
        .unwrap();
    // Gone when the agent is killed, but flows may name its id still.
    first
        .apply(&simple("b", "10.96.0.2", &["10.0.0.3"]))
        .unwrap();
    drop(first);

    let mut second = syncer(&root);
    let maps = second.maps().clone();
    second
        .apply(&simple("c", "10.96.0.3", &["10.0.0.5", "10.0.0.6"]))
        .unwrap();
    for (address, pods) in [
        ("10.96.0.1", &["10.0.0.1", "10.0.0.2"][..]),
        ("10.96.0.2", &["10.0.0.3"]),
        ("10.96.0.3", &["10.0.0.5", "10.0.0.6"]),
    ] {
        assert_eq!(
            reach(&maps, &id(ip(address), 80, Scope::External)),
            Some(set(pods, 8080))
        );
    }
    let entries = maps.table(FamilyIndex::V4).entries().unwrap();
    let c = maps
        .v4
        .table_entry(id(ip("10.96.0.3"), 80, Scope::Internal));
    assert_eq!(
        entries
            .iter()
            .filter(|(_, entry)| entry.service == c.service)
            .count(),
        2,
        "a number of its own"
    );
    let ids: Vec<u32> = (0..2)
        .map(|i| maps.v4.slots.get(c.slot_base + i).unwrap().backend)
        .collect();
    assert_eq!(ids, [5, 6], "1 to 3 are in use, 4 rests");

    assert_eq!(
        second.reclaim(Instant::now(), &IdSet::default()).unwrap(),
        1
    );
    assert_eq!(
        maps.backends.get(&4).unwrap(),
        Some(BackendState::default())
    );
    assert_ne!(
        maps.backends.get(&3).unwrap(),
        Some(BackendState::default())
    );
}

#[test]
fn nothing_is_pruned_before_the_source_is_complete_and_then_only_what_it_never_named() {
    let root = Root::new(Capacities::default());
    let mut first = syncer(&root);
    for (service, address) in [("a", "10.96.0.1"), ("b", "10.96.0.2"), ("c", "10.96.0.3")] {
        first
            .apply(&simple(service, address, &["10.0.0.1"]))
            .unwrap();
    }
    drop(first);

    let mut second = syncer(&root);
    let maps = second.maps().clone();
    second
        .apply(&simple("a", "10.96.0.1", &["10.0.0.2"]))
        .unwrap();
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.2"), 80, Scope::Internal)),
        Some(set(&["10.0.0.1"], 8080))
    );
    second
        .apply(&simple("c", "10.96.0.3", &["10.0.0.1"]))
        .unwrap();
    let pruned = second.prune(|service| *service != name("b")).unwrap();
    assert_eq!(pruned.deleted, 2);
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.2"), 80, Scope::Internal)),
        None
    );
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.3"), 80, Scope::Internal)),
        Some(set(&["10.0.0.1"], 8080))
    );
    assert_eq!(maps.services.count(|_| true).unwrap(), 2);
}

#[test]
fn an_address_goes_from_one_service_to_another_in_one_update() {
    let root = Root::new(Capacities::default());
    let mut first = syncer(&root);
    first
        .apply(&simple("old", "10.96.0.1", &["10.0.0.1"]))
        .unwrap();
    drop(first);

    // While no agent ran, `old` was deleted and `new` was given its address.
    let mut second = syncer(&root);
    let maps = second.maps().clone();
    second
        .apply(&simple("new", "10.96.0.1", &["10.0.0.2"]))
        .unwrap();
    second.prune(|service| *service == name("new")).unwrap();
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.1"), 80, Scope::External)),
        Some(set(&["10.0.0.2"], 8080))
    );

    // Between living ones, one at a time: the model says whose it is. Whoever had it takes nothing
    // away afterwards.
    second
        .apply(&simple("third", "10.96.0.1", &["10.0.0.3"]))
        .unwrap();
    second.remove(&name("new")).unwrap();
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.1"), 80, Scope::External)),
        Some(set(&["10.0.0.3"], 8080))
    );
    assert_eq!(second.counts(), (1, 1));
}

/// SPEC L9: swapped, renamed, or one after the other, whatever the names: at every moment one of
/// the two has the frontend, and no slot or id is lost by it.
#[test]
fn frontends_that_change_their_service_are_never_without_one() {
    for (giver, taker) in [("a", "b"), ("b", "a")] {
        let root = Root::new(Capacities::default());
        let maps = Arc::new(root.maps());
        let mut syncer = Syncer::with_grace(maps.clone(), Duration::ZERO).unwrap();
        let moving = ["192.0.2.1", "2001:db8::1"];
        let swapped = ["192.0.2.2", "2001:db8::2"];
        let pods = |service: &str| {
            if service == giver {
                ["10.0.0.1", "fd00::1"]
            } else {
                ["10.0.0.2", "fd00::2"]
            }
        };
        let with = |service: &str, external: &[&str]| {
            let own = if service == "a" {
                "10.96.0.1"
            } else {
                "10.96.0.2"
            };
            let of = |address: &&str| {
                let pod = pods(service)[usize::from(address.contains(':'))];
                frontend(ip(address), 80, &backends(&[pod], 8080), Table::Maglev)
            };
            plan(service, [own].iter().chain(external).map(of))
        };
        let watched: Vec<FrontendId> = moving
            .iter()
            .chain(&swapped)
            .map(|address| id(ip(address), 80, Scope::External))
            .collect();
        let in_order = |plans: [ServicePlan; 2]| {
            let mut plans = plans;
            plans.sort_by(|a, b| a.service.cmp(&b.service));
            plans
        };
        let begin = in_order([with(giver, &moving), with(taker, &swapped)]);
        syncer.apply_all(begin.clone());
        let free = syncer.slots.each_ref().map(SlotAllocator::free);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut looks = 0u64;
                while !done.load(Ordering::Relaxed) {
                    for id in &watched {
                        let entry = maps.table(FamilyIndex::of(id)).get(id).unwrap();
                        assert!(
                            entry.is_some_and(|entry| entry.slot_count > 0),
                            "{id} is nobody's"
                        );
                    }
                    looks += 1;
                }
                looks
            });
            // Ids of backends rest until no flow can name them, and there are 256.
            for _ in 0..15 {
                // Swapped, and all given to one, and back.
                for plans in [
                    [with(giver, &swapped), with(taker, &moving)],
                    [with(giver, &[moving, swapped].concat()), with(taker, &[])],
                    [with(giver, &moving), with(taker, &swapped)],
                ] {
                    for (service, result) in syncer.apply_all(in_order(plans)) {
                        result.unwrap_or_else(|error| panic!("{service}: {error}"));
                    }
                }
                // Renamed: one is gone altogether.
                let both = [moving, swapped].concat();
                syncer.apply_all(in_order([
                    with(giver, &both),
                    ServicePlan::empty(name(taker)),
                ]));
                syncer.apply_all(in_order([
                    ServicePlan::empty(name(giver)),
                    with(taker, &both),
                ]));
                assert_eq!(syncer.counts().0, 1);
                syncer.apply_all(begin.clone());
            }
            done.store(true, Ordering::Relaxed);
            assert!(watcher.join().unwrap() > 0);
        });
        thread::sleep(Duration::from_millis(5));
        syncer.apply_all(begin.clone());
        assert_eq!(syncer.counts(), (2, 4));
        assert_eq!(
            syncer.slots.each_ref().map(SlotAllocator::free),
            free,
            "no slot is lost"
        );
        let mut next = Syncer::new(maps.clone()).unwrap();
        let writes = maps.writes();
        next.apply_all(begin);
        assert_eq!(maps.writes(), writes, "the maps are as they should be");
    }
}

#[test]
fn a_full_frontend_map_names_its_setting_and_what_was_there_goes_on() {
    let root = Root::new(Capacities {
        frontends: 6,
        ..Default::default()
    });
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    for n in 1..=3 {
        syncer
            .apply(&simple(
                &format!("s{n}"),
                &format!("10.96.0.{n}"),
                &["10.0.0.1"],
            ))
            .unwrap();
    }
    let error = syncer
        .apply(&simple("s4", "10.96.0.4", &["10.0.0.1"]))
        .unwrap_err();
    assert!(error.to_string().contains("--max-frontends"), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("Service default/s4: map frontends4 is full (6 entries)"),
        "{error}"
    );

    // Changes of what is there still get through, one that needs a new entry in exchange for an old
    // one included.
    syncer
        .apply(&simple("s1", "10.96.0.1", &["10.0.0.1", "10.0.0.2"]))
        .unwrap();
    syncer
        .apply(&simple("s2", "10.96.0.22", &["10.0.0.1"]))
        .unwrap();
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.1"), 80, Scope::Internal)),
        Some(set(&["10.0.0.1", "10.0.0.2"], 8080))
    );
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.22"), 80, Scope::Internal)),
        Some(set(&["10.0.0.1"], 8080))
    );

    // A Service that asks for one entry too many still has its old entries brought up to date.
    let set3 = backends(&["10.0.0.9"], 8080);
    let wide = plan(
        "s3",
        ["10.96.0.3", "10.96.0.33"].map(|address| frontend(ip(address), 80, &set3, Table::Direct)),
    );
    syncer.apply(&wide).unwrap_err();
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.3"), 80, Scope::Internal)),
        Some(set(&["10.0.0.9"], 8080))
    );

    // Room appears: what failed fits.
    syncer.remove(&name("s1")).unwrap();
    syncer
        .apply(&simple("s4", "10.96.0.4", &["10.0.0.1"]))
        .unwrap();
    assert_eq!(syncer.failed().iter().collect::<Vec<_>>(), [&name("s3")]);
}

#[test]
fn exhausted_slots_name_their_setting_and_come_back_after_the_grace_period() {
    let root = Root::new(Capacities {
        slots: 4,
        ..Default::default()
    });
    let mut syncer = Syncer::with_grace(Arc::new(root.maps()), Duration::from_millis(50)).unwrap();
    let maps = syncer.maps().clone();
    syncer
        .apply(&simple(
            "a",
            "10.96.0.1",
            &["10.0.0.1", "10.0.0.2", "10.0.0.3"],
        ))
        .unwrap();
    let error = syncer
        .apply(&simple("a", "10.96.0.1", &["10.0.0.4", "10.0.0.5"]))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("map slots4 has no 2 consecutive free slots (1 of 4 are free)"),
        "{error}"
    );
    assert!(error.to_string().contains("--max-slots"), "{error}");
    assert_eq!(
        reach(&maps, &id(ip("10.96.0.1"), 80, Scope::Internal)),
        Some(set(&["10.0.0.1", "10.0.0.2", "10.0.0.3"], 8080))
    );
    syncer
        .apply(&simple("a", "10.96.0.1", &["10.0.0.4"]))
        .unwrap();
    syncer
        .apply(&simple("a", "10.96.0.1", &["10.0.0.5", "10.0.0.6"]))
        .unwrap_err();
    thread::sleep(Duration::from_millis(60));
    syncer
        .apply(&simple("a", "10.96.0.1", &["10.0.0.5", "10.0.0.6"]))
        .unwrap();
    assert!(syncer.failed().is_empty());
}

#[test]
fn exhausted_backend_ids_name_their_setting() {
    let root = Root::new(Capacities {
        backends: 4,
        ..Default::default()
    });
    let mut syncer = syncer(&root);
    syncer
        .apply(&simple(
            "a",
            "10.96.0.1",
            &["10.0.0.1", "10.0.0.2", "10.0.0.3"],
        ))
        .unwrap();
    let error = syncer
        .apply(&simple("b", "10.96.0.2", &["10.0.0.4"]))
        .unwrap_err();
    assert!(error.to_string().contains("--max-backends"), "{error}");
}

#[test]
fn a_maglev_table_that_does_not_fit_becomes_smaller_and_stays_so_without_writes() {
    let root = Root::new(Capacities {
        slots: 600,
        ..Default::default()
    });
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    // Twelve backends want 1021 slots; 509 fit. Then 91 are left: no table fits, the backends
    // themselves do.
    let pods: Vec<String> = (1..=12).map(|n| format!("10.0.0.{n}")).collect();
    let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
    let plans = ["10.1.0.1", "10.1.0.2"].map(|address| {
        plan(
            address,
            [frontend(
                ip(address),
                80,
                &backends(&pods, 8080),
                Table::Maglev,
            )],
        )
    });
    for (plan, len) in plans.iter().zip([509, 12]) {
        let applied = syncer.apply(plan).unwrap();
        assert_eq!(
            (applied.slots, applied.warnings.len()),
            (len, 1),
            "{:?}",
            applied.warnings
        );
        assert!(applied.warnings[0].contains("--max-slots"));
        assert_eq!(reach(&maps, &plan.frontends[0].id), Some(set(&pods, 8080)));
    }
    let writes = maps.writes();
    for plan in &plans {
        syncer.apply(plan).unwrap();
    }
    assert_eq!(maps.writes(), writes);
}

#[test]
fn what_another_broke_in_the_maps_is_mended_by_the_next_apply() {
    let root = Root::new(Capacities::default());
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    let plan = simple("web", "10.96.0.1", &["10.0.0.1"]);
    syncer.apply(&plan).unwrap();
    maps.table(FamilyIndex::V4)
        .delete(&plan.frontends[0].id)
        .unwrap();
    let base = maps.v4.table_entry(plan.frontends[1].id).slot_base;
    let wrong = Choice {
        address: "10.0.0.66".parse().unwrap(),
        port: 1,
        local: false,
        id: 9,
    };
    maps.table(FamilyIndex::V4).set_slot(base, &wrong);
    syncer.apply(&plan).unwrap();
    for frontend in &plan.frontends {
        assert_eq!(reach(&maps, &frontend.id), Some(set(&["10.0.0.1"], 8080)));
    }
}

/// Readers do what a program does (look the frontend up, then read its slots, one of them as if its
/// CPU were taken away in between) while the Service changes between three disjoint backend sets:
/// each must see one set, whole. The sizes differ, so that a range used again too early would lie
/// across an old one.
#[test]
fn a_packet_never_sees_a_state_in_between() {
    const FLIPS: usize = 5000;
    let root = Root::new(Capacities {
        slots: 1 << 16,
        backends: 1 << 15,
        ..Default::default()
    });
    let mut syncer = syncer(&root);
    let maps = syncer.maps().clone();
    let sets: [&[&str]; 3] = [
        &["10.0.1.1", "10.0.1.2"],
        &["10.0.2.1", "10.0.2.2", "10.0.2.3", "10.0.2.4", "10.0.2.5"],
        &["10.0.3.1", "10.0.3.2", "10.0.3.3"],
    ];
    let plans = sets.map(|set| simple("web", "10.96.0.1", set));
    let whole = sets.map(|pods| set(pods, 8080));
    syncer.apply(&plans[0]).unwrap();
    // No set twice in a row, and no cycle in which every set would find its own old slots again.
    let order: Vec<usize> = (0..FLIPS)
        .scan(0, |last, flip| {
            *last = (*last + 1 + (shunt_common::hash::mix(flip as u64) % 2) as usize) % 3;
            Some(*last)
        })
        .collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let readers: Vec<_> = [Scope::Internal, Scope::External]
            .map(|client| {
                let pause = Duration::from_millis(if client == Scope::Internal { 0 } else { 3 });
                let (maps, whole, done) = (&maps, &whole, &done);
                scope.spawn(move || {
                    let mut seen = [0usize; 3];
                    while !done.load(Ordering::Relaxed) {
                        let reached = reach_slowly(maps, &id(ip("10.96.0.1"), 80, client), pause)
                            .expect("never without an entry");
                        let which = whole.iter().position(|set| *set == reached);
                        seen[which.unwrap_or_else(|| panic!("a state in between: {reached:?}"))] +=
                            1;
                    }
                    seen
                })
            })
            .into();
        // Also when an assertion below fails: the scope waits for its threads.
        let stop = StopOnDrop(&done);
        for flip in 0..FLIPS {
            while let Err(error) = syncer.apply(&plans[order[flip]]) {
                // All ranges rest: the grace period at work.
                assert!(matches!(error.cause, Cause::Slots { .. }), "{error}");
                thread::sleep(Duration::from_millis(20));
            }
            if flip % 64 == 0 {
                thread::yield_now();
            }
        }
        drop(stop);
        for reader in readers {
            let seen = reader.join().expect("a reader's assertion");
            assert!(seen.iter().all(|&n| n > 0), "every set was seen: {seen:?}");
        }
    });
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A Service with affinity on a cluster IP (Direct) and an external IP (Maglev).
fn affine(pods: &[&str]) -> ServicePlan {
    let set = backends(pods, 8080);
    let mut plan = plan(
        "web",
        [
            frontend(ip("10.96.0.1"), 80, &set, Table::Direct),
            frontend(ip("198.51.100.1"), 80, &set, Table::Maglev),
        ],
    );
    for frontend in &mut plan.frontends {
        frontend.flags = FRONTEND_AFFINITY;
        frontend.affinity_secs = 60;
    }
    plan
}

/// Asserts that every frontend with affinity finds all of its backends among the members, where
/// they stand, and says how many entries there are.
fn check_members(maps: &Maps) -> usize {
    let table = maps.table(FamilyIndex::V4);
    let members: HashMap<_, _> = table.members().entries().unwrap().into_iter().collect();
    for (id, entry) in table.entries().unwrap() {
        for index in entry.slot_base..entry.slot_base + entry.slot_count {
            let backend = table.slot(index).unwrap().id;
            let slot_base = entry.slot_base;
            let member = members
                .get(&layout::MemberKey { slot_base, backend })
                .copied();
            if entry.flags & FRONTEND_AFFINITY != 0 {
                let at = member.unwrap_or_else(|| panic!("{id}: backend {backend} is no member"));
                assert_eq!(table.slot(at).unwrap().id, backend, "{id}");
            }
        }
    }
    members.len()
}

#[test]
fn members_follow_the_backends_of_frontends_with_affinity() {
    let root = Root::new(Capacities {
        backends: 1024,
        ..Default::default()
    });
    let grace = Duration::from_millis(50);
    let mut syncer = Syncer::with_grace(Arc::new(root.maps()), grace).unwrap();
    let maps = syncer.maps().clone();
    syncer
        .apply(&simple("plain", "10.96.0.9", &["10.0.0.1", "10.0.0.2"]))
        .unwrap();
    assert_eq!(check_members(&maps), 0, "nobody asks for them");
    syncer
        .apply(&affine(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]))
        .unwrap();
    assert_eq!(check_members(&maps), 6);
    let writes = maps.writes();
    syncer
        .apply(&affine(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]))
        .unwrap();
    assert_eq!(maps.writes(), writes, "nothing changed, nothing is written");

    syncer.apply(&affine(&["10.0.0.2", "10.0.0.4"])).unwrap();
    assert_eq!(
        check_members(&maps),
        6 + 4,
        "the old ones rest with their slots"
    );
    // An agent that is killed now leaves them to the next one.
    drop(syncer);
    let mut syncer = Syncer::with_grace(maps.clone(), grace).unwrap();
    thread::sleep(2 * grace);
    syncer.apply(&affine(&["10.0.0.2", "10.0.0.4"])).unwrap();
    assert_eq!(check_members(&maps), 4);

    // For a hundred changes, within the grace period and after it.
    for n in 0..100u8 {
        let pods: Vec<String> = (0..=n % 5)
            .map(|i| format!("10.0.0.{}", 1 + (i * 7 + n) % 9))
            .collect();
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        syncer.apply(&affine(&pods)).unwrap();
        check_members(&maps);
        if n % 10 == 0 {
            thread::sleep(2 * grace);
        }
    }
    let mut without = affine(&["10.0.0.1"]);
    without
        .frontends
        .iter_mut()
        .for_each(|frontend| frontend.flags = 0);
    syncer.apply(&without).unwrap();
    thread::sleep(2 * grace);
    syncer.apply(&without).unwrap();
    assert_eq!(check_members(&maps), 0);
}

#[test]
fn source_ranges_follow_their_service() {
    let root = Root::new(Capacities::default());
    let maps = Arc::new(root.maps());
    let mut syncer = Syncer::new(maps.clone()).unwrap();
    let in_maps = || {
        let tables = FamilyIndex::ALL.map(|family| maps.table(family).source_ranges().unwrap());
        let mut all: Vec<_> = tables
            .concat()
            .iter()
            .map(|(_, range)| range.to_string())
            .collect();
        all.sort();
        all
    };
    let with = |ranges: &[&str]| ServicePlan {
        source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..simple("web", "10.96.0.1", &["10.0.0.1"])
    };
    syncer
        .apply(&with(&["203.0.113.0/24", "0.0.0.0/0", "2001:db8::/32"]))
        .unwrap();
    assert_eq!(in_maps(), ["0.0.0.0/0", "2001:db8::/32", "203.0.113.0/24"]);
    syncer
        .apply(&with(&["203.0.113.0/25", "2001:db8::/32"]))
        .unwrap();
    assert_eq!(in_maps(), ["2001:db8::/32", "203.0.113.0/25"]);
    // The next agent knows whose they are.
    let mut syncer = Syncer::new(maps.clone()).unwrap();
    let writes = maps.writes();
    syncer
        .apply(&with(&["203.0.113.0/25", "2001:db8::/32"]))
        .unwrap();
    assert_eq!(maps.writes(), writes, "nothing changed, nothing is written");
    syncer.remove(&name("web")).unwrap();
    assert!(in_maps().is_empty());
}
