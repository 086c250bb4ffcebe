//! What the DNS server counts and times.

use std::{net::SocketAddr, time::Duration};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Types with a counter of their own; all others share one.
const KINDS: [(RecordType, &str); 8] = [
    (RecordType::A, "A"),
    (RecordType::AAAA, "AAAA"),
    (RecordType::CNAME, "CNAME"),
    (RecordType::PTR, "PTR"),
    (RecordType::SRV, "SRV"),
    (RecordType::TXT, "TXT"),
    (RecordType::SOA, "SOA"),
    (RecordType::HTTPS, "HTTPS"),
];
/// Response codes with a counter of their own; all others share one.
const CODES: [(ResponseCode, &str); 6] = [
    (ResponseCode::NoError, "NOERROR"),
    (ResponseCode::NXDomain, "NXDOMAIN"),
    (ResponseCode::ServFail, "SERVFAIL"),
    (ResponseCode::FormErr, "FORMERR"),
    (ResponseCode::Refused, "REFUSED"),
    (ResponseCode::NotImp, "NOTIMP"),
];
const OTHER: &str = "other";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    r#type: &'static str,
    rcode: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProtocolLabels {
    proto: Transport,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabels {
    upstream: String,
}

/// What a question came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(
    non_camel_case_types,
    reason = "values of a label as Prometheus has them"
)]
pub enum Transport {
    /// A datagram.
    udp,
    /// A connection.
    tcp,
}

/// The counters; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    answers: Family<AnswerLabels, Counter>,
    queries: Family<ProtocolLabels, Counter>,
    /// Datagrams whose answer the kernel did not take.
    pub unsent: Counter,
    /// Questions that were refused because too many are being asked of others.
    pub overload: Counter,
    /// Answers that the cache had.
    pub cache_hits: Counter,
    /// Answers that it did not have.
    pub cache_misses: Counter,
    /// Answers in the cache.
    pub cache_entries: Gauge,
    upstream_duration: Family<UpstreamLabels, Histogram, fn() -> Histogram>,
    upstream_errors: Family<UpstreamLabels, Counter>,
    /// Upstreams that lead back here.
    pub loops: Gauge,
    services: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            answers: Family::default(),
            queries: Family::default(),
            unsent: Counter::default(),
            overload: Counter::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            cache_entries: Gauge::default(),
            // From a quarter of a millisecond to 8 s.
            upstream_duration: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_25, 2.0, 16))
            }),
            upstream_errors: Family::default(),
            loops: Gauge::default(),
            services: Gauge::default(),
        }
    }
}

impl Metrics {
    /// So many Services have names.
    pub fn set_services(&self, services: usize) {
        self.services
            .set(i64::try_from(services).unwrap_or(i64::MAX));
    }

    /// A question came in.
    pub fn asked(&self, proto: Transport) {
        self.queries.get_or_create(&ProtocolLabels { proto }).inc();
    }

    /// It was answered; `None`: of a type that could not be read.
    pub fn answered(&self, kind: Option<RecordType>, code: ResponseCode) {
        let kind = kind.and_then(|kind| KINDS.iter().find(|(other, _)| *other == kind));
        let code = CODES.iter().find(|(other, _)| *other == code);
        let labels = AnswerLabels {
            r#type: kind.map_or(OTHER, |(_, name)| name),
            rcode: code.map_or(OTHER, |(_, name)| name),
        };
        self.answers.get_or_create(&labels).inc();
    }

    /// An upstream answered after so long.
    pub fn upstream_answered(&self, upstream: SocketAddr, after: Duration) {
        let upstream = upstream.to_string();
        self.upstream_duration
            .get_or_create(&UpstreamLabels { upstream })
            .observe(after.as_secs_f64());
    }

    /// An upstream did not answer, or with nothing that can be used.
    pub fn upstream_failed(&self, upstream: SocketAddr) {
        let upstream = upstream.to_string();
        self.upstream_errors
            .get_or_create(&UpstreamLabels { upstream })
            .inc();
    }

    /// Adds them to a registry whose prefix is the agent's.
    pub fn register(&self, registry: &mut Registry) {
        let dns = registry.sub_registry_with_prefix("dns");
        dns.register("queries", "Questions that came in", self.queries.clone());
        dns.register(
            "answers",
            "Answers, by type of the question and response code",
            self.answers.clone(),
        );
        dns.register(
            "unsent",
            "Answers that could not be sent",
            self.unsent.clone(),
        );
        dns.register(
            "overload",
            "Questions refused since too many were being asked of others",
            self.overload.clone(),
        );
        dns.register(
            "cache_hits",
            "Answers of others that the cache had",
            self.cache_hits.clone(),
        );
        dns.register(
            "cache_misses",
            "Answers that others were asked for",
            self.cache_misses.clone(),
        );
        dns.register(
            "cache_entries",
            "Answers of others in the cache",
            self.cache_entries.clone(),
        );
        dns.register(
            "upstream_duration_seconds",
            "Time until an upstream answered",
            self.upstream_duration.clone(),
        );
        dns.register(
            "upstream_errors",
            "Questions that an upstream did not answer, or not in a usable way",
            self.upstream_errors.clone(),
        );
        dns.register(
            "loops",
            "Upstreams that lead back to this server and are not asked",
            self.loops.clone(),
        );
        dns.register(
            "services",
            "Services that have names",
            self.services.clone(),
        );
    }
}
