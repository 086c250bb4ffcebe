//! What the source says, brought into the maps; and what follows when this node changes.

use std::{
    collections::{BTreeSet, HashMap},
    future::pending,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Context;
use tokio::{sync::watch, task::JoinSet};
use tracing::{debug, info, warn};

use super::{netfilter, node as this_node};
use crate::{
    config::Settings,
    datapath::{
        attach::Attacher,
        device_watcher::DeviceWatcher,
        devices::{DevicePatterns, Glob},
        left_out::LeftOut,
        load::Datapath,
        maps::settings,
        netns::{self, NodePortAddresses},
        start::{Part, Stopwatch},
    },
    dns::{self, ServiceNames},
    healthcheck::HealthChecks,
    metrics::Metrics,
    model::Model,
    object::{Event, ObjectName, Problem, Service},
    report::Reports,
    sync::{Syncer, direct, node},
};

/// The agent's state between events.
pub(super) struct Agent {
    pub(super) settings: Settings,
    pub(super) datapath: Datapath,
    /// Of the start, until the agent is live.
    pub(super) watch: Stopwatch,
    pub(super) model: Model,
    pub(super) syncer: Syncer,
    /// Services to be planned and applied.
    pub(super) pending: BTreeSet<ObjectName>,
    /// The last error of every Service that is not wholly in the maps, so that each is said once.
    pub(super) errors: HashMap<ObjectName, String>,
    /// With `--socket-lb-labels`.
    pub(super) left_out: Option<LeftOut>,
    /// `None` until the source has told everything.
    pub(super) live: Option<Live>,
    pub(super) metrics: Metrics,
    pub(super) reports: Reports,
    /// Services whose endpoints are all elsewhere, by internal and external traffic policy `Local`.
    pub(super) lack_local: [LackLocal; 2],
    /// Whether a warning has said that Services of IPv4, or of IPv6, have no address here to be
    /// translated to.
    pub(super) unaddressed: [bool; 2],
    /// Sets what is to be set in netfilter's table; ends with the agent.
    pub(super) tuning: JoinSet<()>,
    pub(super) checks: HealthChecks,
    /// What Services are called, when somebody may ask.
    pub(super) names: Option<Arc<dns::Index>>,
}

/// Services whose endpoints are all elsewhere although they want local ones.
#[derive(Debug, Default)]
pub(super) struct LackLocal {
    families: HashMap<ObjectName, [bool; 2]>,
    /// How many of them are of IPv4, and of IPv6.
    counts: [usize; 2],
}

impl LackLocal {
    /// Notes the families of a Service that is one of these, or that it is none.
    fn set(&mut self, name: &ObjectName, families: Option<[bool; 2]>) {
        let before = match families {
            Some(families) => self.families.insert(name.clone(), families),
            None => self.families.remove(name),
        };
        for (n, count) in self.counts.iter_mut().enumerate() {
            *count += usize::from(families.is_some_and(|families| families[n]));
            *count -= usize::from(before.is_some_and(|families| families[n]));
        }
    }
}

/// What goes on once programs are attached.
pub(super) struct Live {
    /// This node's addresses as configured.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) devices: DeviceWatcher,
    pub(super) admitted: watch::Receiver<BTreeSet<IpAddr>>,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.devices.task.abort();
    }
}

impl Agent {
    /// Sees to netfilter's own connection table, as the settings have it now.
    pub(super) fn tune_netfilter(&mut self) {
        self.tuning.abort_all();
        if let Some(wanted) = self.settings.netfilter {
            self.tuning.spawn(netfilter::tune(wanted));
        }
    }

    /// Takes in what the source says. Until it has told everything the maps stay as they are: what
    /// is not named yet is not gone. Says whether something was freed.
    pub(super) async fn take(&mut self, batch: Vec<Event>) -> anyhow::Result<bool> {
        let mut completes = false;
        let mut node_changes = false;
        for mut event in batch {
            if let Event::Service(service) = &mut event {
                service.masquerade = self.settings.masquerade_all;
                if !self.settings.external_ips {
                    service.external_ips.clear();
                }
            }
            if let (Event::LeftOut(uids), Some(left_out)) = (&event, &self.left_out) {
                left_out.set(uids.clone());
            }
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
            self.watch.lap(Part::Source);
            self.pending
                .extend(self.model.services().map(|service| service.name.clone()));
        }
        let mut freed = self.reconcile_pending();
        if let Some(names) = &self.names {
            names.set_complete();
            self.metrics.dns().set_services(names.len());
        }
        if completes {
            freed |= self.prune();
        }
        if first {
            self.watch.lap(Part::Services);
        }
        if first || node_changes {
            self.follow_node(false).await?;
        }
        if first {
            self.watch.lap(Part::Attach);
        }
        self.warn_of_missing_addresses();
        Ok(freed)
    }

    /// Says once for a family that there are Services of it, and no address of this node.
    fn warn_of_missing_addresses(&mut self) {
        let Some(live) = &self.live else { return };
        for (v6, warned) in [false, true].into_iter().zip(&mut self.unaddressed) {
            if live.addresses.iter().any(|ip| ip.is_ipv6() == v6) {
                *warned = false;
                continue;
            }
            let is_of = |service: &Service| service.cluster_ips.iter().any(|ip| ip.is_ipv6() == v6);
            if *warned || !self.model.services().any(is_of) {
                continue;
            }
            *warned = true;
            let family = if v6 { "IPv6" } else { "IPv4" };
            warn!(
                "this node has no {family} address: flows of {family} Services whose client and backend are both \
                 elsewhere are refused (no_source_address); give the node an address, or name one with --node-ip"
            );
        }
    }

    /// Plans and applies what is pending; when that frees something, also what failed before. Says
    /// whether it did.
    pub(super) fn reconcile_pending(&mut self) -> bool {
        let pending = std::mem::take(&mut self.pending);
        let freed = self.reconcile(&pending);
        if freed && !self.syncer.failed().is_empty() {
            self.reconcile(&self.syncer.failed().clone());
        }
        self.metrics
            .set_no_local_endpoints(self.lack_local.each_ref().map(|lacking| lacking.counts));
        self.metrics.set_unprogrammed(self.syncer.failed().len());
        freed
    }

    /// Brings Services to their plans, all at once: frontends may go from one of them to another.
    fn reconcile(&mut self, names: &BTreeSet<ObjectName>) -> bool {
        for name in names {
            self.checks
                .set(name, self.model.health_check(name).as_ref());
            let addresses = self
                .model
                .service(name)
                .map(|service| &service.cluster_ips[..]);
            let is_of = |v6| addresses.is_some_and(|ips| ips.iter().any(|ip| ip.is_ipv6() == v6));
            let families = [false, true].map(is_of);
            for (lacking, lacks) in self
                .lack_local
                .iter_mut()
                .zip(self.model.lacks_local_endpoints(name))
            {
                lacking.set(name, lacks.then_some(families));
            }
        }
        self.note_open_connections(names);
        let mut freed = false;
        for (name, result) in self
            .syncer
            .apply_all(names.iter().map(|name| self.model.plan(name)))
        {
            match result {
                Ok(applied) => {
                    for warning in &applied.warnings {
                        self.reports
                            .report_here(Problem::new("Service", &name, "", warning));
                    }
                    if self.errors.remove(&name).is_some() {
                        info!("Service {name}: wholly in the maps now");
                    }
                    debug!("Service {name}: {applied:?}");
                    freed |= applied.deleted > 0;
                }
                Err(error) => {
                    let text = error.to_string();
                    if self.errors.get(&name) != Some(&text) {
                        self.reports.report_here(error.problem());
                        self.errors.insert(name, text);
                    }
                }
            }
        }
        if let Some(index) = &self.names {
            for name in names {
                let service = self.model.service(name);
                index.set(
                    name,
                    service.map(|service| ServiceNames::new(service, self.model.slices(name))),
                );
            }
        }
        freed
    }

    /// Notes what is open from or to the node ports that these Services have and nobody had before:
    /// it is not theirs.
    fn note_open_connections(&self, names: &BTreeSet<ObjectName>) {
        let services = names.iter().filter_map(|name| self.model.service(name));
        let ports = services
            .flat_map(|service| &service.ports)
            .filter_map(|port| port.node_port);
        let maps = self.syncer.maps();
        let new = direct::new_ports(maps, ports);
        if new.is_empty() {
            return;
        }
        let noted = netns::addresses().and_then(|addresses| {
            let is_local =
                |to: SocketAddr| addresses.iter().any(|(_, address)| *address == to.ip());
            direct::note_open(maps, &new, is_local)
        });
        match noted {
            Ok(noted) => debug!("{noted} open connections on {} new node ports", new.len()),
            Err(error) => warn!(
                "netfilter's connection table cannot be read ({error}): connections that are open on a new node port's \
                 number may be taken for its Service's"
            ),
        }
    }

    pub(super) fn prune(&mut self) -> bool {
        let model = &self.model;
        match self
            .syncer
            .prune(|name| model.service(name).is_some_and(Service::has_frontends))
        {
            Ok(applied) => {
                if applied.deleted > 0 {
                    info!(
                        "{} entries of Services that are gone deleted",
                        applied.deleted
                    );
                }
                applied.deleted > 0
            }
            Err(error) => {
                warn!("{error}");
                false
            }
        }
    }

    /// Writes the settings and this node's addresses into the configuration that the programs read.
    pub(super) fn write_config(&self, addresses: &[IpAddr]) -> anyhow::Result<bool> {
        let maps = self.syncer.maps();
        let settings = this_node::settings(&self.settings, addresses);
        let mut config = node::config(&settings, maps.v4.snat.capacity())?;
        self.syncer.cover(&mut config);
        Ok(maps.set_config(&config)?)
    }

    /// Has new flows go by what the kernel gives to sockets now: nobody tells of a sysctl that changes.
    pub(super) fn follow_local_ports(&self) {
        let Some(live) = &self.live else { return };
        match self.write_config(&live.addresses) {
            Ok(true) => {
                info!("sockets of this node are given other ports now (ip_local_port_range)")
            }
            Ok(false) => {}
            Err(error) => warn!("ports that sockets of this node are given: {error:#}"),
        }
    }

    /// Writes this node's addresses into the configuration and (again) attaches to its devices,
    /// when they have changed, or `settings_change`.
    pub(super) async fn follow_node(&mut self, settings_change: bool) -> anyhow::Result<()> {
        let addresses = this_node::addresses(&self.settings, self.model.node())?;
        let same = |live: &Live| live.addresses == addresses;
        if !settings_change && self.live.as_ref().is_some_and(same) {
            return Ok(());
        }
        if addresses.is_empty() {
            warn!("this node has no address: translated packets have no source; give --node-ip");
        }
        let maps = self.syncer.maps().clone();
        if self.write_config(&addresses)? {
            info!("node addresses: {addresses:?}");
        }
        let policy = NodePortAddresses::parse(&self.settings.nodeport_addresses, &addresses)
            .map_err(anyhow::Error::msg)?;
        // Health checks are answered where node ports are.
        self.checks.admit(policy.clone());
        let (admitted, _) =
            netns::watch_addresses(policy).context("cannot follow this node's addresses")?;
        node::set_addresses(&maps, &admitted.borrow())?;

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
        let mut attacher =
            Attacher::new(&self.datapath, self.settings.xdp).context("cannot attach programs")?;
        attacher.attach_cgroup(&this_node::cgroup_root(&self.settings))?;
        let globs =
            |patterns: &[String]| patterns.iter().map(|pattern| Glob::new(pattern)).collect();
        let patterns = DevicePatterns {
            devices: globs(&self.settings.devices),
            pod_devices: globs(&self.settings.pod_devices),
            node_ips: addresses.iter().copied().collect(),
        };
        if let Some(upgrade) = &upgrade {
            upgrade
                .catch_up()
                .context("cannot copy flows of another map layout")?;
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
    pub(super) async fn addresses_changed(&mut self) {
        let changed = match &mut self.live {
            Some(live) => live.admitted.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            pending().await
        }
    }

    pub(super) fn write_addresses(&mut self) {
        let Some(live) = &mut self.live else { return };
        let addresses = live.admitted.borrow_and_update().clone();
        match node::set_addresses(self.syncer.maps(), &addresses) {
            Ok(n) => debug!("node ports answer on {addresses:?}: {n} written"),
            Err(error) => warn!("{error}; {} can admit fewer", settings::NODEPORT_ADDRESSES),
        }
    }
}
