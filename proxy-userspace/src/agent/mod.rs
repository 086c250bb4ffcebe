//! The agent's life: wires source → model → plan → sync, loads and attaches the programs, and keeps
//! all of it going.
//!
//! The order of a start: load programs and maps (nothing is attached yet, and what an earlier agent
//! attached goes on), read the pinned maps back, wait until the source has told everything, bring
//! the maps to the plan, and only then attach. So a packet never meets an empty map, and a restart
//! changes nothing that need not change.
//!
//! The agent ends at SIGTERM or SIGINT and leaves the datapath attached: `shunt cleanup` takes that
//! away.

mod datapath_log;
mod netfilter;
mod node;
mod reconcile;
mod reload;

use std::{
    collections::{BTreeSet, HashMap},
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tracing::{debug, info, warn};

use self::reconcile::Agent;
use crate::{
    admin::{self, Pages},
    config::{Settings, flags::RunArgs},
    connections::Connections,
    datapath::{
        capability,
        left_out::LeftOut,
        load::{self, LoadConfig},
        maps::Maps,
        sockets::StaleSockets,
        start::{self, Part, Stopwatch},
        trace,
        xdp::XdpMode,
    },
    dns,
    gc::{self, Collector, Walk},
    health::Health,
    healthcheck::HealthChecks,
    metrics::{self, Exporter, Metrics},
    model::Model,
    object::{Event, NodeFacts},
    report::Reports,
    source::{kubernetes, manifests, queue::Queue},
    sync::{self, Syncer, slots},
};

/// Batches of events that wait while one is brought into the maps.
const QUEUE: usize = 64;
/// Longest pause between attempts to bring a Service in that did not fit.
const MAX_RETRY: Duration = Duration::from_secs(30);
/// The source is named in the log when it has not told everything after so long.
const SLOW_SOURCE: Duration = Duration::from_secs(10);

/// Runs the agent until a signal ends it. `args`: what `settings` were read from, and are read from
/// again when the file of `--config` changes. `watch` measures the start, and has begun with the
/// process.
///
/// # Errors
/// One line with the cause: what cannot be loaded, attached or read at the start.
pub fn run(settings: Settings, args: RunArgs, watch: Stopwatch) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?
        .block_on(until_signal(settings, args, watch))
}

async fn until_signal(settings: Settings, args: RunArgs, watch: Stopwatch) -> anyhow::Result<()> {
    // From here on a signal ends the agent in order, also in the middle of the start.
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let end = async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    tokio::select! {
        name = end => {
            info!("{name}: the agent ends, the datapath goes on");
            Ok(())
        }
        result = serve(settings, args, watch) => result,
    }
}

/// Everything, until it fails.
async fn serve(settings: Settings, args: RunArgs, mut watch: Stopwatch) -> anyhow::Result<()> {
    let node_name = node::name(&settings)?;
    let missing = capability::missing();
    anyhow::ensure!(
        missing.is_empty(),
        "the capabilities {} are missing: run as root, or add them to the container's securityContext.capabilities",
        missing.join(", ")
    );
    let load_config = LoadConfig {
        bpf_root: settings.bpf_root.clone(),
        capacities: settings.capacities,
        socket_lb: settings.socket_lb,
        xdp: settings.xdp != XdpMode::Off,
        fast_path: settings.fast_path,
        count_traffic: settings.count_traffic,
    };
    let datapath = load::load_timed(&load_config, &mut watch)?;
    let maps = Arc::new(Maps::open(&settings.bpf_root)?);
    let syncer = Syncer::new(maps.clone())?;
    let programs = if datapath.taken_over() {
        "taken over"
    } else {
        "loaded"
    };
    info!(
        "programs {programs}, maps read back: {} Services from before",
        syncer.counts().0
    );
    watch.lap(Part::ReadBack);
    // Settings that cannot be should end the agent before it waits for a source.
    sync::node::config(&node::settings(&settings, &[]), maps.v4.snat.capacity())?;

    let health = Health::default();
    let metrics = Metrics::default();
    let reports = Reports::new(metrics.clone());
    if syncer.counts().0 > 0 {
        health.takes_over();
    }
    let connections = Connections::within_file_limit();
    // End with this value.
    let mut servers = JoinSet::new();
    let hard_fail = settings.bind_address_hard_fail;
    if let Some(address) = settings.healthz_bind_address {
        let (health, metrics) = (health.clone(), metrics.clone());
        servers.spawn(admin::serve_health(
            address,
            hard_fail,
            connections.clone(),
            health,
            metrics,
        ));
    }
    if let Some(address) = settings.metrics_bind_address {
        let exporter = Exporter::new(
            &metrics,
            health.clone(),
            maps.clone(),
            connections.clone(),
            settings.metrics_services,
        );
        let pages = Pages::new(&settings)?;
        servers.spawn(admin::serve_metrics(
            address,
            hard_fail,
            connections.clone(),
            exporter,
            pages,
        ));
    }

    let names = (!settings.dns.addresses.is_empty()).then(Arc::<dns::Index>::default);
    if let Some(names) = &names {
        servers.spawn(dns::serve(
            dns_config(&settings),
            names.clone(),
            metrics.dns().clone(),
        ));
    }

    let (tx, mut events) = mpsc::channel(QUEUE);
    let mut source = spawn_source(
        &settings,
        &node_name,
        Queue::new(tx, health.clone(), reports.clone()),
    );
    let configured = NodeFacts {
        name: node_name.as_str().into(),
        zone: None,
        addresses: settings.node_ips.iter().copied().collect(),
        leaves: false,
    };
    let (walks_tx, mut walks) = mpsc::channel::<Walk>(1);
    let report = move |walk| drop(walks_tx.blocking_send(walk));
    let _collector =
        Collector::spawn(maps.clone(), gc::INTERVAL, report).context("cannot start a thread")?;
    let _datapath_log = datapath_log::Writer::spawn(maps.clone(), settings.datapath_log)
        .context("cannot start a thread")?;
    let stale_sockets = StaleSockets::spawn(maps).context("cannot start a thread")?;

    let left_out = settings
        .socket_lb_labels
        .then(|| LeftOut::spawn(&datapath, node::cgroup_root(&settings)))
        .transpose()
        .context("cannot follow which pods are left out of the socket hook")?;

    let mut reads = reload::follow(args, settings.clone());
    let mut agent = Agent {
        model: Model::new(configured),
        syncer,
        pending: BTreeSet::new(),
        errors: HashMap::new(),
        left_out,
        live: None,
        lack_local: Default::default(),
        unaddressed: [false; 2],
        tuning: JoinSet::new(),
        metrics: metrics.clone(),
        reports: reports.clone(),
        names,
        checks: HealthChecks::new(connections, health.clone(), reports.clone()),
        settings,
        datapath,
        watch,
    };
    agent.tune_netfilter();
    let mut retry = slots::GRACE;
    let slow = tokio::time::sleep(SLOW_SOURCE);
    tokio::pin!(slow);
    loop {
        let waits_for_retry = agent.live.is_some() && !agent.syncer.failed().is_empty();
        tokio::select! {
            batch = events.recv() => match batch {
                Some(batch) => {
                    let was_live = agent.live.is_some();
                    let changes = metrics::count_changes(&batch);
                    let triggers: Vec<SystemTime> = batch.iter().filter_map(Event::triggered).collect();
                    let began = Instant::now();
                    let freed = agent.take(batch).await?;
                    if freed {
                        retry = slots::GRACE;
                    }
                    health.set_node_leaves(agent.model.node().leaves);
                    if let Some(queued) = health.programmed() {
                        metrics.event_programmed(queued.elapsed().as_secs_f64());
                    }
                    metrics.programmed(changes, began.elapsed().as_secs_f64());
                    for time in triggers {
                        // The clocks of two machines may differ.
                        metrics.network_programmed(time.elapsed().unwrap_or_default().as_secs_f64());
                    }
                    stale_sockets.look();
                    if let (false, Some(live)) = (was_live, &agent.live) {
                        health.goes_live();
                        let (services, backends) = agent.syncer.counts();
                        debug!("node addresses: {:?}", live.addresses);
                        // Whoever waits for the line may ask `shunt status` right after it.
                        if let Err(error) = start::write(agent.datapath.paths(), &agent.watch, agent.datapath.taken_over()) {
                            warn!("how long the start took cannot be noted for `shunt status`: {error}");
                        }
                        let took = agent.watch.elapsed();
                        announce(&format!(
                            "ready: {services} services, {backends} backends, took {took:.1?}, programs {programs}"
                        ))?;
                        trim_heap();
                    }
                }
                // The source has ended, or its task holds the reason why.
                None => return source_ended((&mut source).await),
            },
            Some(walk) = walks.recv() => {
                if let Err(error) = trace::clear(&agent.settings.bpf_root) {
                    warn!("what a tracer has left stays until the next walk: {error}");
                }
                let reclaimed = agent.syncer.reclaim(walk.started, &walk.referenced)?;
                if reclaimed > 0 {
                    debug!("{reclaimed} backend ids are free again");
                }
                agent.follow_local_ports();
            }
            Some(ended) = servers.join_next() => ended.context("a server of the agent has failed")??,
            () = agent.addresses_changed() => agent.write_addresses(),
            Some(read) = reads.recv() => agent.reload(&node_name, read).await?,
            () = tokio::time::sleep(retry), if waits_for_retry => {
                agent.pending.extend(agent.syncer.failed().iter().cloned());
                let freed = agent.reconcile_pending();
                retry = if freed { slots::GRACE } else { (retry * 2).min(MAX_RETRY) };
            }
            () = &mut slow, if agent.live.is_none() && !slow.is_elapsed() => {
                warn!("{} has not told everything after {SLOW_SOURCE:?}: waiting; what an earlier agent attached goes on",
                    if agent.settings.manifests.is_empty() { "the API server" } else { "--manifests" });
            }
        }
    }
}

/// What the settings say of the DNS server.
fn dns_config(settings: &Settings) -> dns::Config {
    let dns = &settings.dns;
    dns::Config {
        addresses: dns.addresses.clone(),
        zone: dns.zone.clone(),
        short_names: dns.short_names(!settings.manifests.is_empty()),
        others: match dns.upstreams.is_empty() {
            true => dns::Source::File(dns::RESOLV_CONF.into()),
            false => dns::Source::Given(dns.upstreams.clone()),
        },
        hard_fail: settings.bind_address_hard_fail,
    }
}

/// One line on stdout, for whoever started the agent and waits.
fn announce(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// Gives memory back that only the start needed: the parsed programs and the first lists leave a
/// hundred MiB of holes behind, which glibc keeps. (musl does not.)
fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer; any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn source_ended(result: Result<anyhow::Result<()>, tokio::task::JoinError>) -> anyhow::Result<()> {
    result.context("the source of objects has failed")??;
    anyhow::bail!("the source of objects has ended")
}

fn spawn_source(settings: &Settings, node_name: &str, tx: Queue) -> JoinHandle<anyhow::Result<()>> {
    let node_name = node_name.to_owned();
    if settings.manifests.is_empty() {
        let config = kubernetes::Config {
            kubeconfig: settings.kubeconfig.clone(),
            node_name,
            proxy_name: settings.service_proxy_name.clone(),
            names: !settings.dns.addresses.is_empty(),
            socket_lb_labels: settings.socket_lb_labels,
        };
        tokio::spawn(kubernetes::Kubernetes::new(config).run(tx))
    } else {
        let config = manifests::Config {
            paths: settings.manifests.clone(),
            service_cidrs: settings.service_cidrs(),
            node_ports: settings.service_node_port_range.0.clone(),
            load_balancer_cidrs: settings.load_balancer_cidrs.clone(),
            node_name,
            socket_lb_labels: settings.socket_lb_labels,
        };
        tokio::spawn(manifests::Manifests::new(config).run(tx))
    }
}
