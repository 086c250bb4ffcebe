//! ns per packet, net of the bare hook: each program beside its floor, round by round.

use std::{fs, net::IpAddr, os::fd::BorrowedFd, path::Path};

use anyhow::{Context, Result, bail};
use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep};
use rustix::{
    net::{AddressFamily, SocketType, netdevice::name_to_index, socket},
    thread::{CpuSet, sched_setaffinity},
};
use shunt_common::family::{V4, V6};
use shunt_lab::Lab;

use crate::{
    connect,
    replay::{Hook, Replay, Script, Vary},
    report::{self, Comparison, Line, Target, middle, spread},
    world::{
        self, BACKEND_PORT, CLIENT, CLUSTER_IP, FLOWS, LOCAL_PORT, REMOTE_PORT, TO_CLUSTER_IP,
        TO_LOCAL, TO_REMOTE, World,
    },
};

/// Bound on established flows beside their floor.
const ESTABLISHED: f64 = 1.25;
/// Bound on new flows beside a floor with two LRU inserts.
const NEW: f64 = 1.10;
/// Bound on what a packet of no Service pays, ns.
const STRANGER: f64 = 50.0;
/// Bound on figures with many Services beside those with one; where it is less than [`RESOLUTION`],
/// that stands for it.
const SAME: f64 = 1.03;
/// As finely as two loads of the same programs over like maps compare, ns.
const RESOLUTION: f64 = 0.5;
/// Rounds, and rounds of what takes a millisecond each.
const ROUNDS: [usize; 2] = [15, 120];
/// The same for a quick run.
const QUICK_ROUNDS: [usize; 2] = [3, 6];
/// The same where two builds are compared.
const QUICK_COMPARED_ROUNDS: [usize; 2] = [8, 40];
/// The fabric's addresses: next hop to outside clients.
const GATEWAYS: [&str; 2] = ["192.168.50.1", "fd50::1"];
/// Packets of one flow in one play.
const ONE_FLOW: u32 = 40_000;
/// New flows in one play: few enough for the source ports.
const NEW_FLOWS: u32 = 16_384;

/// One kind of packet at one hook.
#[derive(Clone)]
struct Case {
    name: String,
    hook: Hook,
    program: &'static str,
    /// Without one, the bare hook alone is taken off.
    floor: Option<String>,
    script: Script,
    repeat: u32,
    /// Every packet is a flow of its own.
    fresh: bool,
    v6: bool,
    at_most: Option<f64>,
}

/// Shunt with some Services, and what is played to it.
struct Stage {
    services: u32,
    world: World,
    replay: Replay,
}

/// Measures everything. Needs root.
pub(crate) fn measure(quick: bool, only: &str) -> Result<()> {
    let lab = lab()?;
    let counts: &[u32] = if quick { &[1] } else { &[1, 10_000, 100_000] };
    let rounds = if quick { QUICK_ROUNDS } else { ROUNDS };
    lab.ns("node-a")?
        .run(|| in_namespace(&lab, counts, rounds, only))
}

/// A node whose neighbours are known.
pub(crate) fn lab() -> Result<Lab> {
    Lab::sweep_stale()?;
    let lab = Lab::new()?;
    let ns = lab.ns("node-a")?;
    let peers = lab.node_ips("node-b")?;
    let neighbours = GATEWAYS.iter().map(|text| (*text).to_owned());
    let lines: Vec<String> = neighbours
        .chain(peers.iter().map(ToString::to_string))
        .map(|address| {
            format!("neighbour replace {address} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
        })
        .collect();
    ns.ip(&lines)?;
    Ok(lab)
}

/// Two objects, each loaded twice over maps of its own, beside each other: every case with flows in
/// order and, where there are many, in random order. Needs root.
pub(crate) fn compare(old: &Path, new: &Path, quick: bool, only: &str) -> Result<()> {
    let lab = lab()?;
    let (old, new) = (fs::read(old)?, fs::read(new)?);
    let objects = [
        ("old", &old),
        ("new", &new),
        ("old-again", &old),
        ("new-again", &new),
    ];
    let rounds = if quick { QUICK_COMPARED_ROUNDS } else { ROUNDS };
    lab.ns("node-a")?.run(|| {
        let device = pin_to_cpu()?;
        let mut stages = Vec::new();
        for (name, object) in objects {
            let world = World::of_object(&lab, name, object)
                .with_context(|| format!("the {name} programs"))?;
            let replay = Replay::load(&world.datapath, device)?;
            stages.push(Stage {
                services: 1,
                world,
                replay,
            });
        }
        let worlds: Vec<&World> = stages.iter().map(|stage| &stage.world).collect();
        connect::compare(&worlds, rounds[0], only)?;
        for v6 in [false, true] {
            prepare(&mut stages, v6)?;
            for case in compared(cases(&stages[0].world, v6)) {
                if case.name.contains(only) {
                    play_beside(&mut stages, &case, rounds).with_context(|| case.name.clone())?;
                }
            }
        }
        Ok(())
    })
}

/// The same without floors, and of many flows also in a random order.
fn compared(cases: Vec<Case>) -> impl Iterator<Item = Case> {
    cases.into_iter().flat_map(|case| {
        let case = Case {
            floor: None,
            ..case
        };
        let many = !case.fresh && case.script.mask != 0;
        let random = many.then(|| Case {
            name: format!("{}, random order", case.name),
            script: Script {
                random: true,
                ..case.script.clone()
            },
            ..case.clone()
        });
        [Some(case), random].into_iter().flatten()
    })
}

/// Plays a case on all four stages, round by round, the first one in turn, and prints its line.
fn play_beside(stages: &mut [Stage], case: &Case, rounds: [usize; 2]) -> Result<()> {
    let mut figures: [Vec<f64>; 4] = Default::default();
    let mut bare = Vec::new();
    let rounds = rounds[usize::from(case.repeat == ONE_FLOW)];
    for round in 0..=rounds {
        for turn in 0..stages.len() {
            let which = (round + turn) % stages.len();
            let (own, _, empty) = one_round(&mut stages[which], case, round)?;
            // The first round warms up.
            if round > 0 {
                figures[which].push(own);
                bare.push(empty);
            }
        }
    }
    Comparison::of(case.name.clone(), &figures, report::quick(&bare)).print()
}

/// Keeps this thread on one CPU; the index of the device that packets come in through.
fn pin_to_cpu() -> Result<u32> {
    let mut cpus = CpuSet::new();
    cpus.set(1);
    // With one CPU there is none to choose.
    let _one = sched_setaffinity(None, &cpus);
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(name_to_index(socket, "eth0")?)
}

fn in_namespace(lab: &Lab, counts: &[u32], rounds: [usize; 2], only: &str) -> Result<()> {
    let device = pin_to_cpu()?;
    let mut stages = Vec::new();
    for &services in counts {
        let world = World::new(lab, services)?;
        let replay = Replay::load(&world.datapath, device)?;
        stages.push(Stage {
            services,
            world,
            replay,
        });
    }
    connect::measure(&stages[0].world, &stages[0].replay, rounds[0], only)?;
    for v6 in [false, true] {
        prepare(&mut stages, v6)?;
        for case in cases(&stages[0].world, v6) {
            if case.name.contains(only) {
                play(&mut stages, &case, rounds).with_context(|| case.name.clone())?;
            }
        }
    }
    Ok(())
}

/// Opens the flows of a family on every stage, and fills what new ones evict.
fn prepare(stages: &mut [Stage], v6: bool) -> Result<()> {
    for stage in stages {
        let Stage { world, replay, .. } = stage;
        let places = match v6 {
            false => world.places::<V4>(false),
            true => world.places::<V6>(true),
        };
        let table: Vec<(u16, u8)> = places
            .into_iter()
            .map(|(which, port)| (port, last(world::backend(v6, false, which))))
            .collect();
        replay.set_ports(&table)?;
        world.open_flows()?;
        fill(world, replay, v6)?;
    }
    Ok(())
}

/// Fills the LRU maps, so that every new flow evicts an older one.
fn fill(world: &World, replay: &mut Replay, v6: bool) -> Result<()> {
    for case in cases(world, v6)
        .iter()
        .filter(|case| case.program == "xdp_node" && case.fresh)
    {
        let program = world
            .datapath
            .program(case.program)
            .context("the program is not loaded")?;
        let floor = case.floor.as_deref().unwrap_or_default();
        if floor.starts_with("floor_new_lcl") {
            replay.play(case.hook, program, &case.script, 150_000)?;
            replay.play(case.hook, replay.program(floor)?, &case.script, 600_000)?;
            replay.next = replay.next.wrapping_add(600_000);
        }
    }
    Ok(())
}

fn last(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    }
}

fn ip(from: IpAddr, to: IpAddr) -> Result<PacketBuilderStep<IpHeaders>> {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    Ok(match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => bail!("{from} and {to} are of two families"),
    })
}

fn datagram(from: IpAddr, from_port: u16, to: IpAddr, to_port: u16) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let udp = ip(from, to)?.udp(from_port, to_port);
    udp.write(&mut bytes, &[0x55; 64])?;
    Ok(bytes)
}

fn packet(from: IpAddr, from_port: u16, to: IpAddr, to_port: u16, syn: bool) -> Result<Vec<u8>> {
    let tcp = ip(from, to)?.tcp(from_port, to_port, 1, 64_000);
    let tcp = if syn { tcp.syn() } else { tcp.ack(1) };
    let mut bytes = Vec::new();
    tcp.write(&mut bytes, &[0x55; 64])?;
    Ok(bytes)
}

fn low(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => u128::from(address) as u32,
    }
}

fn cases(world: &World, v6: bool) -> Vec<Case> {
    let i = usize::from(v6);
    let family = ["4", "6"][i];
    let (client, node): (IpAddr, IpAddr) = (CLIENT[i].parse().expect("an address"), world.node[i]);
    let cluster_ip: IpAddr = CLUSTER_IP[i].parse().expect("an address");
    let local = world::backend(v6, true, 0);
    let remote = world::backend(v6, false, 0);
    let stranger: IpAddr = ["192.0.2.7", "2001:db8:7::7"][i]
        .parse()
        .expect("an address");
    let forward = |port, to, to_port, mask| Script {
        packet: packet(client, port, to, to_port, false).expect("a packet"),
        vary: Vary::Source,
        mask,
        base: low(client),
        random: false,
    };
    let reply = |from, port, mask| Script {
        packet: packet(from, BACKEND_PORT, client, port, false).expect("a packet"),
        vary: Vary::Destination,
        mask,
        base: low(client),
        random: false,
    };
    let port = world.first_port();
    let snat_reply = |mask| Script {
        packet: packet(remote, BACKEND_PORT, node, port, false).expect("a packet"),
        vary: Vary::Port,
        mask,
        base: 0,
        random: false,
    };
    // Of the first flow only: client, port and backend would have to vary together.
    let snat_out = || Script {
        packet: packet(client, port, remote, BACKEND_PORT, false).expect("a packet"),
        vary: Vary::Source,
        mask: 0,
        base: low(client),
        random: false,
    };
    let snat_reply_out = || Script {
        packet: packet(remote, BACKEND_PORT, client, port, false).expect("a packet"),
        vary: Vary::Destination,
        mask: 0,
        base: low(client),
        random: false,
    };
    let fresh = |to, to_port| Script {
        packet: packet(client, 50_000, to, to_port, true).expect("a packet"),
        vary: Vary::Source,
        mask: 0xff_ffff,
        base: if v6 {
            0
        } else {
            u32::from_be_bytes([100, 0, 0, 0])
        },
        random: false,
    };
    let mut cases = Vec::new();
    for (mask, flows) in [(0, "1 flow"), (FLOWS - 1, "65,536 flows")] {
        let repeat = if mask == 0 { ONE_FLOW } else { FLOWS };
        let mut add = |group, name: &str, hook, program, floor: Option<&str>, script, at_most| {
            cases.push(Case {
                name: format!("{group} IPv{family}, {name}, {flows}"),
                hook,
                program,
                floor: floor.map(|floor| format!("{floor}{family}")),
                script,
                repeat,
                fresh: false,
                v6,
                at_most,
            });
        };
        let bound = Some(ESTABLISHED);
        add(
            "XDP",
            "established, SNAT + redirect",
            Hook::Xdp,
            "xdp_node",
            Some("floor_fwd"),
            forward(TO_REMOTE, node, REMOTE_PORT, mask),
            bound,
        );
        add(
            "XDP",
            "reply, SNAT + redirect",
            Hook::Xdp,
            "xdp_node",
            Some("floor_reply"),
            snat_reply(mask),
            bound,
        );
        add(
            "XDP",
            "established, backend here",
            Hook::Xdp,
            "xdp_node",
            Some("floor_local"),
            forward(TO_LOCAL, node, LOCAL_PORT, mask),
            None,
        );
        add(
            "tc",
            "ClusterIP established",
            Hook::Tc,
            "tc_pod_in",
            Some("floor_tc_fwd"),
            forward(TO_CLUSTER_IP, cluster_ip, 80, mask),
            bound,
        );
        add(
            "tc",
            "ClusterIP reply",
            Hook::Tc,
            "tc_pod_out",
            Some("floor_tc_reply"),
            reply(remote, TO_CLUSTER_IP, mask),
            bound,
        );
        add(
            "tc",
            "NodePort established, backend here",
            Hook::Tc,
            "tc_node_in",
            Some("floor_tc_fwd"),
            forward(TO_LOCAL, node, LOCAL_PORT, mask),
            bound,
        );
        add(
            "tc",
            "NodePort reply, backend here",
            Hook::Tc,
            "tc_node_out",
            Some("floor_tc_reply"),
            reply(local, TO_LOCAL, mask),
            bound,
        );
        add(
            "tc",
            "NodePort established, SNAT, arriving",
            Hook::Tc,
            "tc_node_in",
            Some("floor_snat_in"),
            forward(TO_REMOTE, node, REMOTE_PORT, mask),
            bound,
        );
        add(
            "tc",
            "NodePort reply, SNAT, arriving",
            Hook::Tc,
            "tc_node_in",
            Some("floor_sreply_in"),
            snat_reply(mask),
            bound,
        );
        if mask == 0 {
            add(
                "tc",
                "NodePort established, SNAT, leaving",
                Hook::Tc,
                "tc_node_out",
                Some("floor_snat_out"),
                snat_out(),
                bound,
            );
            add(
                "tc",
                "NodePort reply, SNAT, leaving",
                Hook::Tc,
                "tc_node_out",
                Some("floor_sreply_out"),
                snat_reply_out(),
                bound,
            );
        }
        for (hook, program) in [
            (Hook::Xdp, "xdp_node"),
            (Hook::Tc, "tc_node_in"),
            (Hook::Tc, "tc_node_out"),
            (Hook::Tc, "tc_pod_in"),
            (Hook::Tc, "tc_pod_out"),
        ] {
            add(
                "no Service",
                program,
                hook,
                program,
                None,
                forward(443, stranger, 8443, mask),
                Some(STRANGER),
            );
        }
        add(
            "no Service",
            "a pod's datagrams to a backend itself",
            Hook::Tc,
            "tc_pod_in",
            None,
            Script {
                packet: datagram(client, 443, local, BACKEND_PORT).expect("a packet"),
                ..forward(443, local, BACKEND_PORT, mask)
            },
            Some(STRANGER),
        );
    }
    cases.push(Case {
        name: format!("no Service IPv{family}, a pod's connection to a backend itself"),
        hook: Hook::Tc,
        program: "tc_pod_in",
        floor: None,
        script: fresh(local, BACKEND_PORT),
        repeat: NEW_FLOWS,
        fresh: true,
        v6,
        at_most: None,
    });
    let mut add = |group, name: &str, hook, program, floor: &str, script, at_most| {
        cases.push(Case {
            name: format!("{group} IPv{family}, {name}"),
            hook,
            program,
            floor: Some(format!("{floor}{family}")),
            script,
            repeat: NEW_FLOWS,
            fresh: true,
            v6,
            at_most,
        });
    };
    add(
        "XDP",
        "new flow, SNAT + redirect",
        Hook::Xdp,
        "xdp_node",
        "floor_new",
        fresh(node, REMOTE_PORT),
        Some(NEW),
    );
    add(
        "XDP",
        "new flow, backend here",
        Hook::Xdp,
        "xdp_node",
        "floor_new_lcl",
        fresh(node, LOCAL_PORT),
        Some(NEW),
    );
    add(
        "tc",
        "ClusterIP new flow",
        Hook::Tc,
        "tc_pod_in",
        "floor_tc_new",
        fresh(cluster_ip, 80),
        Some(NEW),
    );
    add(
        "tc",
        "NodePort new flow, backend here",
        Hook::Tc,
        "tc_node_in",
        "floor_tc_new_np",
        fresh(node, LOCAL_PORT),
        Some(NEW),
    );
    add(
        "tc",
        "NodePort new flow, SNAT, arriving",
        Hook::Tc,
        "tc_node_in",
        "floor_tc_new_np",
        fresh(node, REMOTE_PORT),
        Some(NEW),
    );
    cases
}

/// Plays a case on every stage in turn, round by round, and prints its lines.
fn play(stages: &mut [Stage], case: &Case, rounds: [usize; 2]) -> Result<()> {
    let mut figures = vec![(Vec::new(), Vec::new()); stages.len()];
    let rounds = rounds[usize::from(case.repeat == ONE_FLOW)];
    for round in 0..=rounds {
        for (stage, (own, floor)) in stages.iter_mut().zip(&mut figures) {
            let (a, b, c) = one_round(stage, case, round)?;
            // The first round warms up.
            if round > 0 {
                own.push(a - c);
                floor.push(b - c);
            }
        }
    }
    let (own, floor) = &figures[0];
    let ratios: Vec<f64> = own
        .iter()
        .zip(floor)
        .map(|(own, floor)| own / floor)
        .collect();
    let beside = case.floor.is_some();
    Line {
        name: case.name.clone(),
        value: middle(own),
        unit: "ns",
        against: beside.then_some("floor"),
        baseline: beside.then(|| middle(floor)),
        spread: spread(if beside { &ratios } else { own }),
        target: case.at_most.map(|bound| match beside {
            true => Target::AtMost(bound),
            false => Target::ValueAtMost(bound),
        }),
    }
    .print()?;
    for (stage, (more, _)) in stages.iter().zip(&figures).skip(1) {
        let ratios: Vec<f64> = more.iter().zip(own).map(|(more, own)| more / own).collect();
        Line {
            name: format!("{}, {} Services", case.name, stage.services),
            value: middle(more),
            unit: "ns",
            against: Some("1 Service"),
            baseline: Some(middle(own)),
            spread: spread(&ratios),
            target: Some(Target::AtMost(SAME.max(1.0 + RESOLUTION / middle(own)))),
        }
        .print()?;
    }
    Ok(())
}

/// ns per packet of the program, its floor, and the bare hook.
fn one_round(stage: &mut Stage, case: &Case, round: usize) -> Result<(f64, f64, f64)> {
    let Stage { world, replay, .. } = stage;
    let program = world
        .datapath
        .program(case.program)
        .context("the program is not loaded")?;
    let empty = match case.hook {
        Hook::Xdp => "empty_xdp",
        Hook::Tc => "empty_tc",
    };
    if case.fresh {
        age(world, case.v6)?;
    }
    if round == 0 {
        check(replay, case, program)?;
    }
    let play = |program| {
        Ok::<_, anyhow::Error>(
            replay
                .play(case.hook, program, &case.script, case.repeat)?
                .0,
        )
    };
    let floor = || match &case.floor {
        Some(name) => play(replay.program(name)?),
        None => Ok(0.0),
    };
    let turn = round % 2 == 1;
    // Both find the flows as this pass leaves them in the caches; and they take turns in who comes
    // first.
    if !case.fresh {
        play(program)?;
    }
    let (own, floor) = if turn {
        let floor = floor()?;
        (play(program)?, floor)
    } else {
        (play(program)?, floor()?)
    };
    let empty = play(replay.program(empty)?)?;
    if case.fresh {
        replay.next = replay.next.wrapping_add(case.repeat);
    }
    Ok((own, floor, empty))
}

fn age(world: &World, v6: bool) -> Result<()> {
    match v6 {
        false => world.age_snat::<V4>(false),
        true => world.age_snat::<V6>(true),
    }
}

/// One packet through both: the same verdict, and for an open flow the same packet comes out.
fn check(replay: &mut Replay, case: &Case, program: BorrowedFd<'_>) -> Result<()> {
    let (_, verdict, out) = replay.play(case.hook, program, &case.script, 1)?;
    if let Some(name) = &case.floor {
        let (_, floor_verdict, floor_out) =
            replay.play(case.hook, replay.program(name)?, &case.script, 1)?;
        if verdict != floor_verdict {
            bail!(
                "the verdict is {}, the floor's {}",
                verdict as i32,
                floor_verdict as i32
            );
        }
        if !case.fresh && out != floor_out {
            bail!("the packet is not the floor's:\n{out:02x?}\n{floor_out:02x?}");
        }
    }
    if case.fresh {
        replay.next = replay.next.wrapping_add(1);
    }
    Ok(())
}
