//! What Prometheus scrapes: kube-proxy's metrics where the meaning is the same, and the datapath's
//! own.
//!
//! The agent counts and times its own work in [`Metrics`], which costs it a few atomic additions.
//! All else is read when somebody asks: the maps ([`kernel`]), what Services got ([`flows`]), and
//! the process ([`process`]).
//!
//! kube-proxy's names: `pkg/proxy/metrics/metrics.go`. It calls a gauge `…_total` once, and so does
//! this.

pub mod flows;
pub mod kernel;
pub mod process;
mod servers;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets, linear_buckets},
        info::Info,
    },
    registry::Registry,
};
use shunt_common::layout::LAYOUT_VERSION;
use tokio::sync::watch;

use self::kernel::FAMILIES;
use crate::{connections::Connections, datapath::maps::Maps, dns, health::Health, object::Event};

/// Media type of what [`Exporter::scrape`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `code` of an HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: u16,
}

/// As client-go labels its requests.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    code: String,
    method: String,
    host: String,
}

/// As client-go labels their durations.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verb {
    verb: String,
    host: String,
}

/// Services of one family; what concerns both has the same value for each.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IpFamily {
    ip_family: &'static str,
}

/// A histogram by family.
type ByFamily = Family<IpFamily, Histogram, fn() -> Histogram>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Policy {
    traffic_policy: &'static str,
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: String,
}

/// What Kubernetes' components say of themselves; what has no meaning here is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KubernetesBuild {
    major: &'static str,
    minor: &'static str,
    git_version: String,
    git_commit: &'static str,
    git_tree_state: &'static str,
    build_date: &'static str,
    go_version: &'static str,
    compiler: &'static str,
    platform: String,
}

impl KubernetesBuild {
    fn of_shunt() -> Self {
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            major: env!("CARGO_PKG_VERSION_MAJOR"),
            minor: env!("CARGO_PKG_VERSION_MINOR"),
            git_version: format!("v{}", env!("CARGO_PKG_VERSION")),
            git_commit: "",
            git_tree_state: "",
            build_date: "",
            go_version: "",
            compiler: "rustc",
            platform: format!("{}/{arch}", std::env::consts::OS),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    layout: u32,
}

/// What became of a changed file of `--config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reload {
    /// It is good. What cannot change live is counted by [`Metrics::set_waits_for_restart`].
    Applied,
    /// It is broken, or cannot be: the last good one goes on.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Reload {
    fn label(self) -> Outcome {
        let outcome = match self {
            Self::Applied => "applied",
            Self::Refused => "refused",
        };
        Outcome { outcome }
    }
}

/// Changes of objects of one kind.
#[derive(Clone, Debug, Default)]
struct Changes {
    total: Counter,
    pending: Gauge,
}

/// What the agent counts and times of its own work; clones share the values.
#[derive(Clone, Debug)]
pub struct Metrics {
    sync_duration: ByFamily,
    programming_duration: ByFamily,
    services: Changes,
    endpoints: Changes,
    no_local_endpoints: Family<Policy, Gauge>,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    requests: Family<Request, Counter>,
    request_duration: Family<Verb, Histogram, fn() -> Histogram>,
    event_lag: Histogram,
    problems: Family<Kind, Counter>,
    unprogrammed: Gauge,
    reloads: Family<Outcome, Counter>,
    last_reload_successful: Gauge,
    waits_for_restart: Gauge,
    dns: dns::Metrics,
}

impl Default for Metrics {
    fn default() -> Self {
        // kube-proxy's buckets.
        let sync: fn() -> Histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let programming: fn() -> Histogram = || {
            Histogram::new(
                linear_buckets(0.25, 0.25, 2)
                    .chain(linear_buckets(1.0, 1.0, 59))
                    .chain(linear_buckets(60.0, 5.0, 12))
                    .chain(linear_buckets(120.0, 30.0, 7)),
            )
        };
        // client-go's, as Kubernetes' components have them.
        let request: fn() -> Histogram = || {
            Histogram::new([
                0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0,
            ])
        };
        Self {
            sync_duration: Family::new_with_constructor(sync),
            programming_duration: Family::new_with_constructor(programming),
            services: Changes::default(),
            endpoints: Changes::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(request),
            event_lag: sync(),
            problems: Family::default(),
            unprogrammed: Gauge::default(),
            reloads: Family::default(),
            last_reload_successful: Gauge::default(),
            waits_for_restart: Gauge::default(),
            dns: dns::Metrics::default(),
        }
    }
}

fn observe(histogram: &ByFamily, seconds: f64) {
    for ip_family in FAMILIES {
        histogram
            .get_or_create(&IpFamily { ip_family })
            .observe(seconds);
    }
}

/// How many changes a batch holds, of Services and of endpoint slices.
pub fn count_changes(batch: &[Event]) -> (u64, u64) {
    let services = |event: &&Event| matches!(event, Event::Service(_) | Event::ServiceGone(_));
    let slices = |event: &&Event| matches!(event, Event::Slice(_) | Event::SliceGone(_));
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    (
        count(batch.iter().filter(services).count()),
        count(batch.iter().filter(slices).count()),
    )
}

impl Metrics {
    /// A batch waits to be brought into the maps.
    pub fn queued(&self, batch: &[Event]) {
        let (services, endpoints) = count_changes(batch);
        for (changes, n) in [(&self.services, services), (&self.endpoints, endpoints)] {
            changes.total.inc_by(n);
            changes.pending.inc_by(n.cast_signed());
        }
    }

    /// So many changes of Services and slices are in the maps, which took so many seconds.
    pub fn programmed(&self, (services, endpoints): (u64, u64), seconds: f64) {
        self.services.pending.dec_by(services.cast_signed());
        self.endpoints.pending.dec_by(endpoints.cast_signed());
        observe(&self.sync_duration, seconds);
    }

    /// So many seconds lay between a change in the cluster and its being in the maps.
    pub fn network_programmed(&self, seconds: f64) {
        observe(&self.programming_duration, seconds);
    }

    /// So many Services with `internalTrafficPolicy` and with `externalTrafficPolicy: Local` have
    /// endpoints, and none here; of IPv4 and of IPv6.
    pub fn set_no_local_endpoints(&self, [internal, external]: [[usize; 2]; 2]) {
        for (traffic_policy, counts) in [("internal", internal), ("external", external)] {
            for (ip_family, count) in FAMILIES.into_iter().zip(counts) {
                let labels = Policy {
                    traffic_policy,
                    ip_family,
                };
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.no_local_endpoints.get_or_create(&labels).set(count);
            }
        }
    }

    /// `/healthz` was answered.
    pub fn answered_healthz(&self, code: u16) {
        self.healthz.get_or_create(&Code { code }).inc();
    }

    /// `/livez` was answered.
    pub fn answered_livez(&self, code: u16) {
        self.livez.get_or_create(&Code { code }).inc();
    }

    /// The API server has answered a request; `<error>` in place of a code when it has not, as
    /// client-go has it.
    pub fn requested(&self, method: &str, host: &str, code: Option<u16>) {
        let labels = Request {
            code: code.map_or_else(|| "<error>".to_owned(), |code| code.to_string()),
            method: method.to_owned(),
            host: host.to_owned(),
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// An answer of the API server has begun so many seconds after it was asked for.
    pub fn request_took(&self, method: &str, host: &str, seconds: f64) {
        let labels = Verb {
            verb: method.to_owned(),
            host: host.to_owned(),
        };
        self.request_duration
            .get_or_create(&labels)
            .observe(seconds);
    }

    /// So many seconds lay between the source's word of a batch of changes and its being in the
    /// maps.
    pub fn event_programmed(&self, seconds: f64) {
        self.event_lag.observe(seconds);
    }

    /// Something in an object of this kind cannot be served.
    pub fn problem(&self, kind: &str) {
        let kind = kind.to_owned();
        self.problems.get_or_create(&Kind { kind }).inc();
    }

    /// So many Services are not wholly in the maps.
    pub fn set_unprogrammed(&self, services: usize) {
        self.unprogrammed
            .set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    /// The file of `--config` has changed.
    pub fn reloaded(&self, outcome: Reload) {
        self.reloads.get_or_create(&outcome.label()).inc();
        self.last_reload_successful
            .set(i64::from(outcome == Reload::Applied));
    }

    /// So many settings of the file take effect when the agent starts again.
    pub fn set_waits_for_restart(&self, settings: usize) {
        self.waits_for_restart
            .set(i64::try_from(settings).unwrap_or(i64::MAX));
    }

    /// What the DNS server counts.
    pub fn dns(&self) -> &dns::Metrics {
        &self.dns
    }

    fn register(&self, registry: &mut Registry) {
        // Zeros say more than nothing.
        for outcome in [Reload::Applied, Reload::Refused] {
            drop(self.reloads.get_or_create(&outcome.label()));
        }
        // The one that the agent has started with.
        self.last_reload_successful.set(1);
        self.set_no_local_endpoints([[0; 2]; 2]);
        for ip_family in FAMILIES {
            drop(self.sync_duration.get_or_create(&IpFamily { ip_family }));
            drop(
                self.programming_duration
                    .get_or_create(&IpFamily { ip_family }),
            );
        }
        for code in [200, 503] {
            drop(self.healthz.get_or_create(&Code { code }));
            drop(self.livez.get_or_create(&Code { code }));
        }
        for kind in ["Service", "EndpointSlice"] {
            let kind = kind.to_owned();
            drop(self.problems.get_or_create(&Kind { kind }));
        }
        let kube_proxy = registry.sub_registry_with_prefix("kubeproxy");
        kube_proxy.register(
            "sync_proxy_rules_duration_seconds",
            "Time to bring a batch of changes into the maps",
            self.sync_duration.clone(),
        );
        kube_proxy.register(
            "network_programming_duration_seconds",
            "Time from a change of a pod or Service to its being in the maps",
            self.programming_duration.clone(),
        );
        for (name, what, changes) in [
            ("service", "Services", &self.services),
            ("endpoint", "endpoint slices", &self.endpoints),
        ] {
            kube_proxy.register(
                format!("sync_proxy_rules_{name}_changes"),
                format!("Changes of {what}"),
                changes.total.clone(),
            );
            kube_proxy.register(
                format!("sync_proxy_rules_{name}_changes_pending"),
                format!("Changes of {what} that are not in the maps yet"),
                changes.pending.clone(),
            );
        }
        kube_proxy.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Services with a Local traffic policy that have endpoints, and none on this node",
            self.no_local_endpoints.clone(),
        );
        kube_proxy.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        kube_proxy.register("proxy_livez", "Answers of /livez", self.livez.clone());
        let build: Family<KubernetesBuild, Gauge> = Family::default();
        build.get_or_create(&KubernetesBuild::of_shunt()).set(1);
        registry.register(
            "kubernetes_build_info",
            "1, with the version of the agent in the labels of Kubernetes' components",
            build,
        );
        registry.register(
            "rest_client_requests",
            "Requests to the API server",
            self.requests.clone(),
        );
        registry.register(
            "rest_client_request_duration_seconds",
            "Time until the API server's answer to a request begins",
            self.request_duration.clone(),
        );
        let own = registry.sub_registry_with_prefix("shunt");
        own.register(
            "object_problems",
            "Fields of objects that could not be served as they are written",
            self.problems.clone(),
        );
        own.register(
            "event_lag_seconds",
            "Time from the source's word of a batch of changes to its being in the maps, \
             its wait for others included",
            self.event_lag.clone(),
        );
        own.register(
            "unprogrammed_services",
            "Services that are not wholly in the maps",
            self.unprogrammed.clone(),
        );
        self.dns.register(own);
        own.register(
            "config_reloads",
            "Changes of the file of --config, by what became of them",
            self.reloads.clone(),
        );
        own.register(
            "config_last_reload_successful",
            "Whether the file of --config, as it is now, was good",
            self.last_reload_successful.clone(),
        );
        own.register(
            "config_waits_for_restart",
            "Settings of the file of --config that take effect when the agent starts again",
            self.waits_for_restart.clone(),
        );
        own.register(
            "build",
            "Version of the agent and of the layout of its maps",
            Info::new(Build {
                version: env!("CARGO_PKG_VERSION"),
                layout: LAYOUT_VERSION,
            }),
        );
    }
}

/// Longest pause between two renderings, however long they take.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// All metrics of an agent; clones share it.
#[derive(Clone, Debug)]
pub struct Exporter {
    registry: Arc<Mutex<Registry>>,
    renderings: Arc<Mutex<Renderings>>,
}

/// What scrapes share.
#[derive(Debug)]
struct Renderings {
    /// The rendering that is being made, `None` in it until it is done.
    current: Option<watch::Receiver<Option<Bytes>>>,
    /// The next one begins no sooner.
    not_before: Instant,
}

impl Exporter {
    /// Of an agent that counts in `metrics` and programs `maps`. So many ports of Services at most
    /// have samples of their own.
    pub fn new(
        metrics: &Metrics,
        health: Health,
        maps: Arc<Maps>,
        connections: Connections,
        services: u32,
    ) -> Self {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        registry.register_collector(Box::new(kernel::Kernel::new(maps, health, services)));
        registry.register_collector(Box::new(process::Process));
        registry.register_collector(Box::new(servers::Servers(connections)));
        Self::of(registry)
    }

    fn of(registry: Registry) -> Self {
        Self {
            registry: Arc::new(Mutex::new(registry)),
            renderings: Arc::new(Mutex::new(Renderings {
                current: None,
                not_before: Instant::now(),
            })),
        }
    }

    /// Everything, as OpenMetrics has it ([`CONTENT_TYPE`]); `None` if that has failed. Reads all
    /// maps, which takes a while where they have millions of entries: whoever asks meanwhile gets
    /// the same text, and from one rendering to the next passes as much time as it takes, so that
    /// no number of scrapes costs more than half a CPU.
    pub async fn scrape(&self) -> Option<Bytes> {
        let mut rendering = self.current();
        rendering.wait_for(Option::is_some).await.ok()?.clone()
    }

    /// The rendering that is being made, or a new one.
    fn current(&self) -> watch::Receiver<Option<Bytes>> {
        let mut renderings = self
            .renderings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // One that has failed is over too.
        let goes_on = |rendering: &&watch::Receiver<Option<Bytes>>| {
            rendering.has_changed().is_ok() && rendering.borrow().is_none()
        };
        if let Some(rendering) = renderings.current.as_ref().filter(goes_on) {
            return rendering.clone();
        }
        let (sender, rendering) = watch::channel(None);
        renderings.current = Some(rendering.clone());
        let (exporter, begin) = (self.clone(), renderings.not_before);
        tokio::spawn(async move {
            tokio::time::sleep_until(begin.into()).await;
            let text = tokio::task::spawn_blocking(move || exporter.render()).await;
            let _ = sender.send(text.ok());
        });
        rendering
    }

    fn render(&self) -> Bytes {
        let begin = Instant::now();
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        // Strings take whatever is written.
        let written = text::encode(&mut text, &registry);
        debug_assert!(written.is_ok());
        let end = Instant::now();
        let mut renderings = self
            .renderings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        renderings.not_before = end + (end - begin).min(MAX_PAUSE);
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

    use super::*;

    /// Takes its time, and counts.
    #[derive(Debug)]
    struct Slow(Arc<AtomicU32>, Duration);

    impl Collector for Slow {
        fn encode(&self, _: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(self.1);
            Ok(())
        }
    }

    /// H3: scrapes that come together are one rendering, and others leave it half of a CPU.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn scrapes_share_renderings() {
        let (count, each) = (Arc::new(AtomicU32::new(0)), Duration::from_millis(200));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Slow(count.clone(), each)));
        let exporter = Exporter::of(registry);
        let begin = Instant::now();
        let scrapes = (0..50).map(|_| exporter.scrape());
        let texts = futures::future::join_all(scrapes).await;
        assert!(
            texts
                .iter()
                .all(|text| text.as_deref() == Some(&b"# EOF\n"[..])),
            "{texts:?}"
        );
        assert_eq!(count.load(Ordering::Relaxed), 1);

        for _ in 0..3 {
            assert!(exporter.scrape().await.is_some());
        }
        assert_eq!(count.load(Ordering::Relaxed), 4);
        // Four renderings, and a pause as long before all but the first.
        assert!(begin.elapsed() >= 7 * each, "{:?}", begin.elapsed());
    }
}
