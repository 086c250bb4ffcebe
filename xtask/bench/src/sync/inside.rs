//! The model, the plan and the syncer in this process: what one event costs without anything around
//! it.

use std::{sync::Arc, time::Instant};

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};
use shunt::{
    datapath::{
        load::{LoadConfig, SocketLb, load},
        maps::Maps,
    },
    model::Model,
    object::{Event, NodeFacts},
    sync::{Syncer, node},
};
use shunt_lab::Lab;

use super::{
    figures::{CHANGE_US, FIRST_SYNC_S, capacities, line, nth},
    objects::{self, Generation},
};
use crate::{report::Line, world::node_settings};

/// First sync and changes of one endpoint.
pub(super) fn measure(services: u32, changes: u32) -> Result<Vec<Line>> {
    let lab = Lab::builder().nodes(&["node-a"]).build()?;
    let ns = lab.ns("node-a")?;
    ns.run(|| in_namespace(&lab, services, changes))
}

fn in_namespace(lab: &Lab, services: u32, changes: u32) -> Result<Vec<Line>> {
    shunt_lab::mount_bpffs()?;
    let bpf_root = lab.bpf_root("node-a");
    let capacities = capacities(services);
    let _datapath = load(&LoadConfig {
        bpf_root: bpf_root.clone(),
        capacities,
        socket_lb: SocketLb::On,
        xdp: false,
        fast_path: false,
        count_traffic: false,
    })?;
    let maps = Arc::new(Maps::open(&bpf_root)?);
    let settings = node_settings(&lab.node_ips("node-a")?);
    maps.set_config(&node::config(&settings, capacities.snat)?)?;
    let mut syncer = Syncer::new(maps)?;
    let mut model = Model::new(NodeFacts {
        name: "node-a".into(),
        ..NodeFacts::default()
    });

    // What a source would have made already.
    let events: Vec<Event> = (0..services)
        .flat_map(|n| {
            [
                Event::Service(objects::service(n)),
                Event::Slice(objects::slice(n, Generation(0))),
            ]
        })
        .chain([Event::Complete])
        .collect();
    let (began, cpu) = (Instant::now(), cpu_s());
    for event in events {
        model.apply(event);
    }
    let names: Vec<_> = model
        .services()
        .map(|service| service.name.clone())
        .collect();
    for name in &names {
        syncer.apply(&model.plan(name))?;
    }
    let (wall, cpu) = (began.elapsed().as_secs_f64(), cpu_s() - cpu);

    let mut times = Vec::new();
    for change in 1..=changes {
        let n = nth(change, services);
        let event = Event::Slice(objects::slice(n, Generation(change)));
        let began = Instant::now();
        for name in model.apply(event) {
            let applied = syncer.apply(&model.plan(&name))?;
            anyhow::ensure!(
                applied.frontends == 2,
                "the change of {name} changed {applied:?}"
            );
        }
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    drop(syncer);
    shunt_lab::remove_pins(&bpf_root);
    let name = |what: &str| format!("{services} Services, in process: {what}");
    Ok(vec![
        line(name("first sync, time"), &[wall], "s"),
        line(name("first sync, CPU"), &[cpu], "s").bound(services, FIRST_SYNC_S),
        line(name("one endpoint's change, object to map"), &times, "µs").bound(services, CHANGE_US),
    ])
}

/// CPU time of this thread, seconds.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
