//! Settings of the built-in DNS ([`crate::dns`]).

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use super::values::{Listen, Text, or_null, set, set_option};
use crate::dns::PORT;

/// The zone, unless said otherwise: the kubelet's `clusterDomain`.
pub const ZONE: &str = "cluster.local";

/// `--dns` and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// `--dns`; empty: no such server.
    pub addresses: Vec<SocketAddr>,
    /// `--dns-zone`, in lower case, without a dot at its end.
    pub zone: String,
    /// `--dns-upstream`; empty: those of `/etc/resolv.conf`.
    pub upstreams: Vec<SocketAddr>,
    /// `--dns-namespace`; empty: names without the zone are not looked up; `None`: the source
    /// decides.
    pub namespace: Option<String>,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            addresses: Vec::new(),
            zone: ZONE.to_owned(),
            upstreams: Vec::new(),
            namespace: None,
        }
    }
}

impl Dns {
    /// The namespace of bare names, if names without the zone are looked up at all. With a cluster
    /// they are not unless asked for: there others may make namespaces, and one called `com` would
    /// stand in for everybody's names below it.
    pub fn short_names(&self, with_manifests: bool) -> Option<String> {
        match &self.namespace {
            Some(namespace) => (!namespace.is_empty()).then(|| namespace.clone()),
            None => with_manifests.then(|| "default".to_owned()),
        }
    }
}

/// A zone as it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Zone(pub String);

impl FromStr for Zone {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let zone = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let is_label = |label: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            (1..=63).contains(&label.len())
                && label.bytes().all(plain)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // Room for the longest name of an endpoint's port.
        match zone.len() <= MAX_ZONE && zone.split('.').all(is_label) {
            true => Ok(Self(zone)),
            false => Err("give a DNS name of at most 57 characters, such as cluster.local"),
        }
    }
}

/// Characters of a zone: `<host name>.<service>.<namespace>.svc.` has up to 197 of a name's 255.
const MAX_ZONE: usize = 57;

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `dns` of a ShuntConfiguration.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DnsConfiguration {
    #[serde(deserialize_with = "or_null")]
    addresses: Vec<Text<Listen<PORT>>>,
    /// Empty means something.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    #[serde(deserialize_with = "or_null")]
    upstreams: Vec<Text<Listen<PORT>>>,
    #[serde(with = "super::values::or_empty")]
    zone: Option<Zone>,
}

impl DnsConfiguration {
    pub(super) fn write(self, to: &mut Dns) {
        let addresses =
            |texts: Vec<Text<Listen<PORT>>>| texts.into_iter().map(|text| text.0).collect();
        Given {
            addresses: addresses(self.addresses),
            zone: self.zone,
            upstreams: addresses(self.upstreams),
            namespace: self.namespace,
        }
        .write(to);
    }
}

impl From<&Dns> for DnsConfiguration {
    fn from(dns: &Dns) -> Self {
        let texts = |addresses: &[SocketAddr]| {
            addresses
                .iter()
                .map(|address| Text(Listen(Some(*address))))
                .collect()
        };
        Self {
            addresses: texts(&dns.addresses),
            namespace: dns.namespace.clone(),
            upstreams: texts(&dns.upstreams),
            zone: Some(Zone(dns.zone.clone())),
        }
    }
}

/// What a file or flags say.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) addresses: Vec<Listen<PORT>>,
    pub(super) zone: Option<Zone>,
    pub(super) upstreams: Vec<Listen<PORT>>,
    pub(super) namespace: Option<String>,
}

impl Given {
    pub(super) fn write(self, to: &mut Dns) {
        for (to, given) in [
            (&mut to.addresses, self.addresses),
            (&mut to.upstreams, self.upstreams),
        ] {
            // An empty one alone takes away what a file says.
            if !given.is_empty() {
                *to = given.into_iter().filter_map(|listen| listen.0).collect();
            }
        }
        set(&mut to.zone, self.zone.map(|zone| zone.0));
        set_option(
            &mut to.namespace,
            self.namespace.map(|namespace| namespace.to_lowercase()),
        );
    }
}
