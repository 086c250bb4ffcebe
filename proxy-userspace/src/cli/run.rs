//! `shunt run`: the agent. Wires source → model → plan → sync, loads and attaches the programs, and keeps all of it going.
//!
//! The order of a start: load programs and maps (nothing is attached yet, and what an earlier agent attached goes on), read
//! the pinned maps back, wait until the source has told everything, bring the maps to the plan, and only then attach. So a
//! packet never meets an empty map, and a restart changes nothing that need not change.
//!
//! The agent ends at SIGTERM or SIGINT and leaves the datapath attached: `shunt cleanup` takes that away.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    future::pending,
    io::{self, IsTerminal},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use ipnet::IpNet;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
};
use tracing::{debug, info, warn};
use tracing_subscriber::EnvFilter;

use super::{default_cgroup_root, print};
use crate::{
    admin,
    config::{Settings, flags::RunArgs},
    datapath::{
        attach::{Attacher, XdpMode},
        capability,
        devices::{self, DevicePatterns, DeviceWatcher, Glob},
        load::{self, Datapath, LoadConfig},
        maps::{Maps, settings},
        netns::{self, NodePortAddresses},
        sockets::StaleSockets,
    },
    gc::{self, Collector, Walk},
    health::Health,
    healthcheck::HealthChecks,
    metrics::{self, Exporter, Metrics},
    model::Model,
    object::{Event, NodeFacts, ObjectName, Problem},
    report::Reports,
    source::{kubernetes, manifests, queue::Queue},
    sync::{
        Syncer,
        node::{self, NodeSettings},
        slots,
    },
};

/// Batches of events that wait while one is brought into the maps.
const QUEUE: usize = 64;
/// Longest pause between attempts to bring a Service in that did not fit.
const MAX_RETRY: Duration = Duration::from_secs(30);
/// The source is named in the log when it has not told everything after so long.
const SLOW_SOURCE: Duration = Duration::from_secs(10);

/// Runs the agent until a signal ends it.
///
/// # Errors
/// One line with the cause: what cannot be loaded, attached or read at the start.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    let dump = args.dump_config;
    let (settings, warnings) = args.settings()?;
    for warning in warnings {
        warn!("{warning}");
    }
    if dump {
        return print(&settings.dump()?);
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?
        .block_on(agent(settings))
}

async fn agent(settings: Settings) -> anyhow::Result<()> {
    let begin = Instant::now();
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
        result = serve(settings, begin) => result,
    }
}

/// Everything, until it fails.
async fn serve(settings: Settings, begin: Instant) -> anyhow::Result<()> {
    let node_name = node_name(&settings)?;
    let missing = capability::missing();
    anyhow::ensure!(
        missing.is_empty(),
        "the capabilities {} are missing: run as root, or add them to the container's securityContext.capabilities",
        missing.join(", ")
    );
    let datapath = load::load(&LoadConfig {
        bpf_root: settings.bpf_root.clone(),
        capacities: settings.capacities,
        socket_lb: settings.socket_lb,
        xdp: settings.xdp != XdpMode::Off,
        fast_path: settings.fast_path,
        count_traffic: settings.count_traffic,
    })?;
    let maps = Arc::new(Maps::open(&settings.bpf_root)?);
    let syncer = Syncer::new(maps.clone())?;
    info!(
        "programs loaded, maps read back: {} Services from before",
        syncer.counts().0
    );
    // Settings that cannot be should end the agent before it waits for a source.
    node::config(&node_settings(&settings, &[]), maps.v4.snat.capacity())?;

    let health = Health::default();
    let metrics = Metrics::default();
    let reports = Reports::new(metrics.clone());
    if syncer.counts().0 > 0 {
        health.takes_over();
    }
    // End with this value.
    let mut servers = JoinSet::new();
    let hard_fail = settings.bind_address_hard_fail;
    if let Some(address) = settings.healthz_bind_address {
        servers.spawn(admin::serve_health(address, hard_fail, health.clone(), metrics.clone()));
    }
    if let Some(address) = settings.metrics_bind_address {
        let exporter = Exporter::new(&metrics, health.clone(), maps.clone());
        servers.spawn(admin::serve_metrics(address, hard_fail, exporter));
    }

    let (tx, mut events) = mpsc::channel(QUEUE);
    let mut source = spawn_source(&settings, &node_name, Queue::new(tx, health.clone(), reports.clone()));
    let configured = NodeFacts {
        name: node_name.as_str().into(),
        zone: None,
        addresses: settings.node_ips.iter().copied().collect(),
        leaves: false,
    };
    let (walks_tx, mut walks) = mpsc::channel::<Walk>(1);
    let report = move |walk| drop(walks_tx.blocking_send(walk));
    let _collector = Collector::spawn(maps.clone(), gc::INTERVAL, report).context("cannot start a thread")?;
    let stale_sockets = StaleSockets::spawn(maps).context("cannot start a thread")?;

    let mut agent = Agent {
        model: Model::new(configured),
        syncer,
        pending: BTreeSet::new(),
        errors: HashMap::new(),
        live: None,
        lack_local: Default::default(),
        metrics: metrics.clone(),
        reports: reports.clone(),
        checks: HealthChecks::new(health.clone(), reports.clone()),
        settings,
        datapath,
    };
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
                    health.programmed();
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
                        print(&format!("ready: {services} services, {backends} backends, took {:.1?}", begin.elapsed()))?;
                        trim_heap();
                    }
                }
                // The source has ended, or its task holds the reason why.
                None => return source_ended((&mut source).await),
            },
            Some(walk) = walks.recv() => {
                let reclaimed = agent.syncer.reclaim(walk.started, &walk.referenced)?;
                if reclaimed > 0 {
                    debug!("{reclaimed} backend ids are free again");
                }
            }
            Some(ended) = servers.join_next() => ended.context("a server of the agent has failed")??,
            () = agent.addresses_changed() => agent.write_addresses(),
            () = tokio::time::sleep(retry), if waits_for_retry => {
                agent.pending.extend(agent.syncer.failed().iter().cloned());
                let freed = agent.bring_pending();
                retry = if freed { slots::GRACE } else { (retry * 2).min(MAX_RETRY) };
            }
            () = &mut slow, if agent.live.is_none() && !slow.is_elapsed() => {
                warn!("{} has not told everything after {SLOW_SOURCE:?}: waiting; what an earlier agent attached goes on",
                    if agent.settings.manifests.is_empty() { "the API server" } else { "--manifests" });
            }
        }
    }
}

/// Gives memory back that only the start needed: the parsed programs and the first lists leave a hundred MiB of holes behind,
/// which glibc keeps. (musl does not.)
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

/// The agent's state between events.
struct Agent {
    settings: Settings,
    datapath: Datapath,
    model: Model,
    syncer: Syncer,
    /// Services to be planned and applied.
    pending: BTreeSet<ObjectName>,
    /// The last error of every Service that is not wholly in the maps, so that each is said once.
    errors: HashMap<ObjectName, String>,
    /// `None` until the source has told everything.
    live: Option<Live>,
    metrics: Metrics,
    reports: Reports,
    /// Services whose endpoints are all elsewhere, by internal and external traffic policy `Local`.
    lack_local: [HashSet<ObjectName>; 2],
    checks: HealthChecks,
}

/// What goes on once programs are attached.
struct Live {
    /// This node's addresses as configured.
    addresses: Vec<IpAddr>,
    devices: DeviceWatcher,
    admitted: watch::Receiver<BTreeSet<IpAddr>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.devices.task.abort();
    }
}

impl Agent {
    /// Takes in what the source says. Until it has told everything the maps stay as they are: what is not named yet is not
    /// gone. Says whether something was freed.
    async fn take(&mut self, batch: Vec<Event>) -> anyhow::Result<bool> {
        let mut completes = false;
        let mut node_changes = false;
        for event in batch {
            completes |= event == Event::Complete;
            node_changes |= matches!(event, Event::Node(_));
            self.pending.extend(self.model.apply(event));
        }
        for problem in self.model.take_problems() {
            self.reports.report(problem);
        }
        if !self.model.is_complete() {
            return Ok(false);
        }
        let first = self.live.is_none();
        if first {
            self.pending
                .extend(self.model.services().map(|service| service.name.clone()));
        }
        let mut freed = self.bring_pending();
        if completes {
            freed |= self.prune();
        }
        if first || node_changes {
            self.follow_node().await?;
        }
        Ok(freed)
    }

    /// Plans and applies what is pending; when that frees something, also what failed before. Says whether it did.
    fn bring_pending(&mut self) -> bool {
        let pending = std::mem::take(&mut self.pending);
        let mut freed = false;
        for name in &pending {
            freed |= self.bring(name);
        }
        if freed {
            let failed: Vec<_> = self.syncer.failed().difference(&pending).cloned().collect();
            for name in &failed {
                self.bring(name);
            }
        }
        self.metrics
            .set_no_local_endpoints(self.lack_local.each_ref().map(HashSet::len));
        self.metrics.set_unprogrammed(self.syncer.failed().len());
        freed
    }

    fn bring(&mut self, name: &ObjectName) -> bool {
        self.checks.set(name, self.model.health_check(name).as_ref());
        for (lacking, lacks) in self.lack_local.iter_mut().zip(self.model.lacks_local_endpoints(name)) {
            match lacks {
                true => drop(lacking.insert(name.clone())),
                false => drop(lacking.remove(name)),
            }
        }
        match self.syncer.apply(&self.model.plan(name)) {
            Ok(applied) => {
                for warning in &applied.warnings {
                    self.reports.report_here(Problem::new("Service", name, "", warning));
                }
                if self.errors.remove(name).is_some() {
                    info!("Service {name}: wholly in the maps now");
                }
                debug!("Service {name}: {applied:?}");
                applied.deleted > 0
            }
            Err(error) => {
                let text = error.to_string();
                if self.errors.get(name) != Some(&text) {
                    self.reports.report_here(error.problem());
                    self.errors.insert(name.clone(), text);
                }
                false
            }
        }
    }

    fn prune(&mut self) -> bool {
        let model = &self.model;
        match self.syncer.prune(|name| model.service(name).is_some()) {
            Ok(applied) => {
                if applied.deleted > 0 {
                    info!("{} entries of Services that are gone deleted", applied.deleted);
                }
                applied.deleted > 0
            }
            Err(error) => {
                warn!("{error}");
                false
            }
        }
    }

    /// Writes this node's addresses into the configuration and (again) attaches to its devices, when they have changed.
    async fn follow_node(&mut self) -> anyhow::Result<()> {
        let addresses = node_addresses(&self.settings, self.model.node())?;
        if self.live.as_ref().is_some_and(|live| live.addresses == addresses) {
            return Ok(());
        }
        if addresses.is_empty() {
            warn!("this node has no address: translated packets have no source; give --node-ip");
        }
        let maps = self.syncer.maps().clone();
        let mut config = node::config(&node_settings(&self.settings, &addresses), maps.v4.snat.capacity())?;
        self.syncer.cover(&mut config);
        if maps.set_config(&config)? {
            info!("node addresses: {addresses:?}");
        }
        let policy =
            NodePortAddresses::parse(&self.settings.nodeport_addresses, &addresses).map_err(anyhow::Error::msg)?;
        let (admitted, _) = netns::watch_addresses(policy).context("cannot follow this node's addresses")?;
        node::set_addresses(&maps, &admitted.borrow())?;
        self.admit_health_checks(&admitted.borrow());

        // The old watcher changes the same links; it must be gone before another begins.
        if let Some(mut old) = self.live.take() {
            old.devices.task.abort();
            let _ = (&mut old.devices.task).await;
        }
        let upgrade = self.datapath.take_upgrade();
        if let Some(upgrade) = &upgrade {
            upgrade
                .before_switch()
                .context("cannot copy flows of another map layout")?;
        }
        let mut attacher = Attacher::new(&self.datapath, self.settings.xdp).context("cannot attach programs")?;
        let cgroup_root = self.settings.cgroup_root.clone().unwrap_or_else(default_cgroup_root);
        attacher.attach_cgroup(&cgroup_root)?;
        let globs = |patterns: &[String]| patterns.iter().map(|pattern| Glob::new(pattern)).collect();
        let patterns = DevicePatterns {
            devices: globs(&self.settings.devices),
            pod_devices: globs(&self.settings.pod_devices),
            node_ips: addresses.iter().copied().collect(),
        };
        if let Some(upgrade) = &upgrade {
            upgrade.catch_up().context("cannot copy flows of another map layout")?;
        }
        self.live = Some(Live {
            addresses,
            devices: DeviceWatcher::spawn(attacher, patterns)?,
            admitted,
        });
        if let Some(upgrade) = upgrade
            && let Err(error) = upgrade.finish()
        {
            warn!("flows of another map layout, opened during the switch, are not copied: {error}");
        }
        Ok(())
    }

    /// Waits until the node has other addresses.
    async fn addresses_changed(&mut self) {
        let changed = match &mut self.live {
            Some(live) => live.admitted.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            pending().await
        }
    }

    /// Health checks are answered where node ports are, but on loopback addresses too when nothing is said.
    fn admit_health_checks(&self, admitted: &BTreeSet<IpAddr>) {
        let restricted = !self.settings.nodeport_addresses.is_empty();
        self.checks.admit(restricted.then(|| admitted.clone()));
    }

    fn write_addresses(&mut self) {
        let Some(live) = &mut self.live else { return };
        let addresses = live.admitted.borrow_and_update().clone();
        self.admit_health_checks(&addresses);
        match node::set_addresses(self.syncer.maps(), &addresses) {
            Ok(n) => debug!("node ports answer on {addresses:?}: {n} written"),
            Err(error) => warn!("{error}; {} can admit fewer", settings::NODEPORT_ADDRESSES),
        }
    }
}

/// The Node's name: as given, or the host name; in lower case, as kubelet and kube-proxy have it.
fn node_name(settings: &Settings) -> anyhow::Result<String> {
    if let Some(name) = &settings.node_name {
        return Ok(name.trim().to_lowercase());
    }
    let host = rustix::system::uname();
    let name = host
        .nodename()
        .to_str()
        .context("the host name is not UTF-8: give --node-name")?;
    Ok(name.trim().to_lowercase())
}

fn spawn_source(settings: &Settings, node_name: &str, tx: Queue) -> JoinHandle<anyhow::Result<()>> {
    let node_name = node_name.to_owned();
    if settings.manifests.is_empty() {
        let config = kubernetes::Config {
            kubeconfig: settings.kubeconfig.clone(),
            node_name,
            proxy_name: settings.service_proxy_name.clone(),
        };
        tokio::spawn(kubernetes::Kubernetes::new(config).run(tx))
    } else {
        let config = manifests::Config {
            paths: settings.manifests.clone(),
            service_cidrs: settings.service_cidrs(),
            node_ports: settings.service_node_port_range.0.clone(),
            load_balancer_cidrs: settings.load_balancer_cidrs.clone(),
            node_name,
        };
        tokio::spawn(manifests::Manifests::new(config).run(tx))
    }
}

fn node_settings(settings: &Settings, addresses: &[IpAddr]) -> NodeSettings {
    // Without networks that say otherwise, the node's own processes reach node ports on loopback too (SPEC F2).
    let networks: Vec<IpNet> = settings
        .nodeport_addresses
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    let is_loopback = |network: &IpNet| {
        [IpAddr::from([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.into()]
            .iter()
            .any(|address| network.contains(address))
    };
    NodeSettings {
        addresses: addresses.to_vec(),
        cluster_cidrs: settings.cluster_cidrs.clone(),
        service_cidrs: settings.service_cidrs(),
        answer_ping: settings.answer_ping,
        retry_silence: settings.retry_silence,
        snat_ports: settings.snat_ports.0.clone(),
        timeouts: settings.conntrack.ticks(),
        loopback: settings.localhost_node_ports && (networks.is_empty() || networks.iter().any(is_loopback)),
        host_netns: netns::cookie(),
    }
}

/// This node's addresses, best first: as given; else `bindAddress` and the Node object's, those that a device here has before others (an
/// external IP often lies on a gateway); else those of the device with the default route; else any.
fn node_addresses(settings: &Settings, node: &NodeFacts) -> anyhow::Result<Vec<IpAddr>> {
    if !settings.node_ips.is_empty() {
        return Ok(settings.node_ips.clone());
    }
    let mut addresses = found_addresses(node)?;
    if let Some(address) = settings.bind_address {
        addresses.retain(|other| *other != address);
        addresses.insert(0, address);
    }
    Ok(addresses)
}

fn found_addresses(node: &NodeFacts) -> anyhow::Result<Vec<IpAddr>> {
    let mut devices = devices::list().context("cannot list the devices")?;
    devices.retain(|device| !device.loopback);
    devices.sort_by_key(|device| !device.default_route);
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_link_local(),
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    let here: Vec<IpAddr> = devices
        .into_iter()
        .flat_map(|device| device.addresses)
        .filter(usable)
        .collect();
    if node.addresses.is_empty() {
        // One of each family: the others are of bridges and pods.
        let first = |is_v4: bool| here.iter().copied().find(|address| address.is_ipv4() == is_v4);
        return Ok([true, false].into_iter().filter_map(first).collect());
    }
    let mut addresses: Vec<IpAddr> = here
        .into_iter()
        .filter(|address| node.addresses.contains(address))
        .collect();
    addresses.extend(
        node.addresses
            .iter()
            .filter(|address| !addresses.contains(address))
            .copied()
            .collect::<Vec<_>>(),
    );
    Ok(addresses)
}
