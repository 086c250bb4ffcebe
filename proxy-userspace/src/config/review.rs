//! What a `KubeProxyConfiguration` says that kube-proxy would not have taken, or not so: a warning
//! for each, with what has become of it here. (kube-proxy 1.37:
//! `pkg/proxy/apis/config/validation/validation.go`, `component-base/logs/api/v1/options.go`.)
//!
//! Nothing of this keeps a node from starting: what cannot be read at all has ended that before.

use std::time::Duration;

use ipnet::IpNet;
use serde_json::Value;

use super::values::{address, duration, network};

/// What kube-proxy wants a field to be.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Bool,
    /// From, to.
    Integer(i64, i64),
    /// From nothing on.
    Duration,
    /// One of these, or empty.
    OneOf(&'static [&'static str]),
    /// `MAJOR.MINOR`.
    Release,
    Networks,
}

use Wanted::{Bool, Integer, Networks, OneOf, Release};

/// Fields that have a use here as they are written, or none at all (`false`).
const FIELDS: &[(&str, Wanted, bool)] = &[
    ("bindAddressHardFail", Bool, true),
    ("clientConnection.burst", Integer(0, i32::MAX as i64), false),
    ("configSyncPeriod", Wanted::Duration, false),
    ("conntrack.maxPerCore", Integer(0, i32::MAX as i64), true),
    ("conntrack.min", Integer(0, i32::MAX as i64), true),
    ("conntrack.tcpBeLiberal", Bool, true),
    ("enableProfiling", Bool, false),
    ("iptables.localhostNodePorts", Bool, true),
    ("iptables.masqueradeAll", Bool, true),
    ("iptables.masqueradeBit", Integer(0, 31), false),
    ("iptables.minSyncPeriod", Wanted::Duration, false),
    ("iptables.syncPeriod", Wanted::Duration, false),
    ("ipvs.excludeCIDRs", Networks, false),
    ("ipvs.minSyncPeriod", Wanted::Duration, false),
    ("ipvs.strictARP", Bool, false),
    ("ipvs.syncPeriod", Wanted::Duration, false),
    ("ipvs.tcpFinTimeout", Wanted::Duration, false),
    ("ipvs.tcpTimeout", Wanted::Duration, false),
    ("ipvs.udpTimeout", Wanted::Duration, false),
    ("logging.format", OneOf(&["text", "json"]), true),
    ("logging.verbosity", Integer(0, u32::MAX as i64), true),
    ("mode", OneOf(&["iptables", "ipvs", "nftables"]), true),
    ("nftables.masqueradeAll", Bool, true),
    ("nftables.masqueradeBit", Integer(0, 31), false),
    ("nftables.minSyncPeriod", Wanted::Duration, false),
    ("nftables.syncPeriod", Wanted::Duration, false),
    ("oomScoreAdj", Integer(-1000, 1000), false),
    ("showHiddenMetricsForVersion", Release, false),
    ("windowsRunAsService", Bool, false),
    ("winkernel.enableDSR", Bool, false),
    ("winkernel.forwardHealthCheckVip", Bool, false),
];

/// Fields with addresses.
const ADDRESSES: &[&str] = &["bindAddress", "healthzBindAddress", "metricsBindAddress"];
/// Words of `nodePortAddresses`.
const KEYWORDS: [&str; 3] = ["primary", "localhost", "all"];

/// What is to be said of a document, by field.
pub(super) fn review(document: &Value) -> Vec<(String, String)> {
    let mut said = Vec::new();
    for &(field, wanted, has_use) in FIELDS {
        let Some(value) = at(document, field) else {
            continue;
        };
        if let Some(refusal) = wanted.refuses(value) {
            let outcome = if has_use {
                "taken as it reads"
            } else {
                "shunt has no use for it"
            };
            said.push((
                field.to_owned(),
                format!(
                    "{}: kube-proxy refuses that: {refusal}; {outcome}",
                    shown(value)
                ),
            ));
        }
    }
    periods(document, &mut said);
    addresses(document, &mut said);
    local_pods(document, &mut said);
    node_ports(document, &mut said);
    said
}

impl Wanted {
    /// What kube-proxy has against a value.
    fn refuses(self, value: &Value) -> Option<String> {
        let text = value.as_str();
        match self {
            Bool if !value.is_boolean() => Some("wants true or false".to_owned()),
            Integer(from, to)
                if !value
                    .as_i64()
                    .is_some_and(|number| (from..=to).contains(&number)) =>
            {
                Some(match to {
                    _ if to < i64::from(i32::MAX) => format!("wants a number from {from} to {to}"),
                    _ => format!("wants a number from {from} on"),
                })
            }
            // Go's decoder wants a text, and a negative one is no `std` duration.
            Self::Duration if text.and_then(duration).is_none() => {
                Some("wants a duration that is not negative, such as 30s".to_owned())
            }
            OneOf(words) if !text.is_some_and(|text| words.contains(&text)) => {
                Some(format!("wants {}", words.join(", ")))
            }
            Release if !text.is_some_and(is_release) => Some("wants MAJOR.MINOR".to_owned()),
            Networks => {
                let is_network =
                    |item: &Value| item.as_str().is_some_and(|text| network(text).is_some());
                let refused = value.as_array()?.iter().find(|item| !is_network(item))?;
                Some(format!("{} is no network", shown(refused)))
            }
            _ => None,
        }
    }
}

fn is_release(text: &str) -> bool {
    let is_number = |part: &str| part.parse::<u16>().is_ok();
    text.split_once('.')
        .is_some_and(|(major, minor)| is_number(major) && is_number(minor))
}

/// A field's value; `None` where it says nothing.
fn at<'a>(document: &'a Value, field: &str) -> Option<&'a Value> {
    let value = document.pointer(&format!("/{}", field.replace('.', "/")))?;
    (!value.is_null() && value.as_str() != Some("")).then_some(value)
}

fn text<'a>(document: &'a Value, field: &str) -> Option<&'a str> {
    at(document, field)?.as_str()
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

/// The pause between changes is not longer than that between looks at everything.
fn periods(document: &Value, said: &mut Vec<(String, String)>) {
    let mode = text(document, "mode")
        .filter(|mode| matches!(*mode, "ipvs" | "nftables"))
        .unwrap_or("iptables");
    let period = |name: &str, default: u64| {
        let given = text(document, &format!("{mode}.{name}")).and_then(duration);
        given
            .filter(|period| !period.is_zero())
            .unwrap_or(Duration::from_secs(default))
    };
    let least = period("minSyncPeriod", if mode == "ipvs" { 0 } else { 1 });
    let most = period("syncPeriod", 30);
    if least > most {
        let what = format!(
            "`{least:?}`: kube-proxy refuses that: longer than syncPeriod; shunt has no use for it"
        );
        said.push((format!("{mode}.minSyncPeriod"), what));
    }
}

fn addresses(document: &Value, said: &mut Vec<(String, String)>) {
    for &field in ADDRESSES {
        let Some(text) = text(document, field) else {
            continue;
        };
        if text
            .rsplit_once(':')
            .is_some_and(|(ip, port)| !ip.is_empty() && port.parse() == Ok(0_u16) && is_host(ip))
        {
            let what = format!(
                "`{text}`: kube-proxy refuses port 0; listening on a port that the kernel chooses"
            );
            said.push((field.to_owned(), what));
        }
        leading_zeros(field, text, said);
    }
    let networks = text(document, "clusterCIDR").unwrap_or_default();
    networks
        .split(',')
        .for_each(|network| leading_zeros("clusterCIDR", network.trim(), said));
    if networks.contains(char::is_whitespace) {
        let what = format!(
            "`{networks}`: kube-proxy refuses white space between networks; read without it"
        );
        said.push(("clusterCIDR".to_owned(), what));
    }
}

/// Whether this is what may stand before a port, rather than the better part of an IPv6 address.
fn is_host(text: &str) -> bool {
    text.starts_with('[') || !text.contains(':')
}

/// Numbers that other parsers take for octal ones, or refuse.
fn leading_zeros(field: &str, text: &str, said: &mut Vec<(String, String)>) {
    let (ip, rest) = match text.find([':', '/']) {
        Some(end) if !text.starts_with('[') => text.split_at(end),
        _ => (text, ""),
    };
    let zeros = |part: &str| part.len() > 1 && part.starts_with('0');
    let length = rest.strip_prefix('/').unwrap_or_default();
    if ip.contains('.') && (ip.split('.').any(zeros) || zeros(length)) {
        let read = match length {
            "" => address(ip).map(|ip| format!("{ip}{rest}")),
            _ => network(text).map(|network| network.to_string()),
        };
        if let Some(read) = read {
            said.push((
                field.to_owned(),
                format!("`{text}`: leading zeros, read as decimal numbers: {read}"),
            ));
        }
    }
}

/// How pods of this node are told from others.
fn local_pods(document: &Value, said: &mut Vec<(String, String)>) {
    let mode = text(document, "detectLocalMode").unwrap_or("ClusterCIDR");
    for (of, field) in [
        ("BridgeInterface", "detectLocal.bridgeInterface"),
        ("InterfaceNamePrefix", "detectLocal.interfaceNamePrefix"),
    ] {
        if mode == of && at(document, field).is_none() {
            let what = format!(
                "`{mode}`: kube-proxy refuses that without {field}; pods are found by their devices"
            );
            said.push(("detectLocalMode".to_owned(), what));
        }
    }
    let networks: Vec<IpNet> = text(document, "clusterCIDR")
        .into_iter()
        .flat_map(|text| text.split(','))
        .filter_map(|text| network(text.trim()))
        .collect();
    let of_family = |v6: bool| {
        networks
            .iter()
            .filter(|network| network.addr().is_ipv6() == v6)
            .count()
    };
    if mode == "ClusterCIDR" && (of_family(false) > 1 || of_family(true) > 1) {
        let what = "kube-proxy refuses two of a family; all of them are taken".to_owned();
        said.push(("clusterCIDR".to_owned(), what));
    }
}

fn node_ports(document: &Value, said: &mut Vec<(String, String)>) {
    let given = at(document, "nodePortAddresses").and_then(Value::as_array);
    let entries = given.into_iter().flatten().filter_map(Value::as_str);
    let split = |(n, text): (usize, &'_ str)| -> Vec<(usize, String)> {
        let parts = text.split(',').map(|part| (n, part.trim().to_owned()));
        parts.collect()
    };
    let given: Vec<_> = entries.enumerate().flat_map(split).collect();
    for (i, (n, text)) in given.iter().enumerate() {
        let field = format!("nodePortAddresses[{n}]");
        let before = given[..i].iter().any(|(_, other)| other == text);
        if KEYWORDS.contains(&text.as_str()) && before {
            said.push((
                field,
                format!("`{text}`: kube-proxy refuses a word twice; it means no more than once"),
            ));
        } else {
            leading_zeros(&field, text, said);
        }
    }
}
