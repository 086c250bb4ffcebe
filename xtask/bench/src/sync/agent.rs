//! An agent as a process, with an API server: what its first sync costs, how much memory it keeps,
//! and how soon the maps show a change that the server told.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt::{
    datapath::maps::Maps,
    object::Protocol,
    plan::{FrontendAddress, FrontendId, Scope},
    sync::table::FamilyIndex,
};
use shunt_lab::{AgentOptions, Lab};

use super::{
    cli,
    figures::{
        ARRIVAL_US, ENDPOINTS, FIRST_SYNC_S, MEMORY_MIB, TARGETED, capacities, field, line, nth,
    },
    objects,
    server::Server,
};
use crate::report::Line;

/// Longest wait for a change to show.
const PATIENCE: Duration = Duration::from_secs(10);
/// After the first sync: what was only needed for it has been given back.
const SETTLED: Duration = Duration::from_secs(3);
/// Between looks into the map; without it this would take a CPU from the agent.
const LOOK: Duration = Duration::from_micros(10);
/// Between changes, so that each is alone.
const PAUSE: Duration = Duration::from_millis(5);

/// First sync, memory and changes of one endpoint.
pub(super) fn measure(services: u32, changes: u32) -> Result<Vec<Line>> {
    let lab = Lab::builder().nodes(&["node-a"]).build()?;
    // Only the agent is in it.
    let cpu_stat = lab.node_cgroup("node-a").join("host/cpu.stat");
    let cpu = move || cgroup_cpu_s(&cpu_stat);
    let at_end = cpu.clone();
    let server = lab.ns("node-a")?.run(|| Server::start(services, at_end))?;
    let kubeconfig = std::env::temp_dir().join(format!("shunt-bench-{}.yaml", std::process::id()));
    fs::write(&kubeconfig, kubeconfig_of(&server))?;

    let capacities = capacities(services);
    let options = AgentOptions {
        finds_addresses: false,
        ..AgentOptions::kubeconfig(&kubeconfig).xdp("off")
    };
    let options = options.args(&[
        "--max-frontends",
        &capacities.frontends.to_string(),
        "--max-slots",
        &capacities.slots.to_string(),
        "--max-backends",
        &capacities.backends.to_string(),
    ]);
    let agent = lab.start_agent("node-a", &options);
    fs::remove_file(&kubeconfig)?;
    let agent = agent?;
    let (ready, cpu_ready) = (Instant::now(), cpu());
    let expected = format!(
        "ready: {services} services, {} backends",
        services * ENDPOINTS
    );
    ensure!(
        agent.ready_line().starts_with(&expected),
        "{} instead of {expected}",
        agent.ready_line()
    );
    let (listed, cpu_listed) = server.lists_ended().context("the agent listed nothing")?;

    thread::sleep(SETTLED);
    let pid = agent.pid().context("the agent has ended")?;
    let memory = |key: &str| -> Result<f64> {
        Ok(field(&fs::read_to_string(format!("/proc/{pid}/status"))?, key)? / 1024.0)
    };
    let (rss, anonymous) = (memory("VmRSS")?, memory("RssAnon")?);
    let maps_mib = map_memory(agent.bpf_root())?;

    // Sleeps are as short as they say; usually the kernel adds 50 µs.
    rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
    let maps = Maps::open(agent.bpf_root())?;
    let table = maps.table(FamilyIndex::V4);
    let (mut times, before) = (Vec::new(), cpu());
    for change in 1..=changes {
        let n = nth(change, services);
        let id = FrontendId {
            address: FrontendAddress::Ip(objects::cluster_ip(n)),
            port: 80,
            protocol: Protocol::Tcp,
            scope: Scope::Internal,
        };
        let old = table.get(&id)?.context("a Service is not in the map")?;
        let told = server.change(n, change)?;
        while table.get(&id)? == Some(old) {
            ensure!(
                told.elapsed() < PATIENCE,
                "a change does not come into the map"
            );
            thread::sleep(LOOK);
        }
        times.push(told.elapsed().as_secs_f64() * 1e6);
        thread::sleep(PAUSE);
    }
    let each = (cpu() - before) / f64::from(changes) * 1e6;
    times.sort_by(f64::total_cmp);
    let p99 = times[(times.len() - 1) * 99 / 100];

    let name = |what: &str| format!("{services} Services, agent and API server: {what}");
    let first = line(
        name("first sync, lists' end to ready"),
        &[(ready - listed).as_secs_f64()],
        "s",
    );
    let mut lines = vec![
        match services {
            // NUMBERS: one `nft -f` of 10,000 Services, in a run of its own.
            TARGETED => first.beside(
                "kube-proxy's nftables rules loaded at once (2026-11-20)",
                70.0,
            ),
            _ => first,
        },
        line(
            name("first sync, CPU from the lists' end"),
            &[cpu_ready - cpu_listed],
            "s",
        )
        .bound(services, FIRST_SYNC_S),
        line(
            name("start to ready, CPU, programs and lists included"),
            &[cpu_ready],
            "s",
        ),
        line(name("memory of the agent, resident"), &[rss], "MiB").bound(services, MEMORY_MIB),
        line(name("memory of the agent, its own"), &[anonymous], "MiB"),
        line(name("memory of the maps"), &[maps_mib], "MiB"),
        line(name("one endpoint's change, arrival to map"), &times, "µs"),
        line(name("the same, 99th percentile"), &[p99], "µs").bound(services, ARRIVAL_US),
        line(name("the same, CPU of the agent"), &[each], "µs"),
    ];
    lines.extend(cli::measure(&agent, services)?);
    Ok(lines)
}

fn kubeconfig_of(server: &Server) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: bench\n\
         clusters: [{{name: bench, cluster: {{server: 'http://{}'}}}}]\n\
         users: [{{name: bench, user: {{}}}}]\n\
         contexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\n",
        server.address
    )
}

/// CPU time of a cgroup, seconds; zero when it does not say.
fn cgroup_cpu_s(file: &Path) -> f64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    field(&text, "usage_usec").map_or(0.0, |micros| micros / 1e6)
}

/// What the kernel has allocated for the maps under a bpf root, MiB.
fn map_memory(bpf_root: &Path) -> Result<f64> {
    let mut bytes = 0.0;
    for entry in fs::read_dir(shunt::datapath::maps::maps_dir(bpf_root))? {
        let map = aya::maps::MapData::from_pin(entry?.path())?;
        let info = fs::read_to_string(format!(
            "/proc/self/fdinfo/{}",
            map.fd().as_fd().as_raw_fd()
        ))?;
        bytes += field(&info, "memlock")?;
    }
    Ok(bytes / f64::from(1 << 20))
}
