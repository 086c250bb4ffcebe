//! `shunt services`: what clients can dial.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use clap::Args;
use serde::Serialize;
use shunt_common::layout::{self, FRONTEND_DROP, FRONTEND_KEEP_SOURCE, FRONTEND_SOURCE_RANGES};

use super::{
    Common, open,
    rows::{self, Column, Watched, print_rows},
    service_name, service_names,
};
use crate::{
    datapath::maps::{MapError, Maps},
    plan::{FrontendAddress, FrontendId, Scope},
    sync::table::{Choice, FamilyIndex, kind_name},
};

/// `shunt services`.
#[derive(Debug, Args)]
pub struct ServicesArgs {
    #[command(flatten)]
    common: Common,
    /// Only this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Go on, and print what comes, changes or goes.
    #[arg(short, long)]
    watch: bool,
}

/// One frontend, both scopes together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRow {
    /// `metadata.namespace` of the Service.
    pub namespace: String,
    /// `metadata.name` of the Service.
    pub service: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub kind: &'static str,
    /// The address; unspecified for a node port.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// For clients inside the cluster; `None` while the entry is missing.
    pub internal: Option<ScopeRow>,
    /// For all others.
    pub external: Option<ScopeRow>,
    /// Seconds of client affinity; 0 without.
    pub affinity_seconds: u32,
    /// Whether only sources in `loadBalancerSourceRanges` are let in.
    pub source_ranges: bool,
}

/// What clients of one scope get.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScopeRow {
    /// Number of different backends.
    pub backends: usize,
    /// Number of slots: more than backends for a Maglev table.
    pub slots: u32,
    /// Whether packets are dropped while there is no backend; else they are refused.
    pub drops: bool,
    /// Whether the backend sees the client's own address in any case (`externalTrafficPolicy:
    /// Local`).
    pub keeps_source: bool,
}

impl ScopeRow {
    fn cell(&self) -> String {
        match (self.backends, self.drops) {
            (0, true) => "none: dropped".into(),
            (0, false) => "none: refused".into(),
            (n, _) => n.to_string(),
        }
    }
}

impl FrontendRow {
    /// Address and port.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    fn backends_cell(&self) -> String {
        let cell =
            |scope: &Option<ScopeRow>| scope.as_ref().map_or("missing".into(), ScopeRow::cell);
        let (internal, external) = (cell(&self.internal), cell(&self.external));
        if internal == external {
            internal
        } else {
            format!("{internal} inside, {external} outside")
        }
    }

    fn slots_cell(&self) -> String {
        let slots = |scope: &Option<ScopeRow>| scope.as_ref().map_or(0, |scope| scope.slots);
        let (internal, external) = (slots(&self.internal), slots(&self.external));
        match internal == external {
            true => internal.to_string(),
            false => format!("{internal}, {external}"),
        }
    }

    fn policies_cell(&self) -> String {
        let mut policies = Vec::new();
        if self.affinity_seconds > 0 {
            policies.push(format!("affinity {}s", self.affinity_seconds));
        }
        if self.source_ranges {
            policies.push("source ranges".into());
        }
        if self
            .external
            .as_ref()
            .is_some_and(|scope| scope.keeps_source)
        {
            policies.push("local outside".into());
        }
        policies.join(", ")
    }
}

/// The address of a frontend as people write it.
pub(super) fn address(id: &FrontendId) -> IpAddr {
    match id.address {
        FrontendAddress::Ip(address) => address,
        FrontendAddress::NodePortV4 => Ipv4Addr::UNSPECIFIED.into(),
        FrontendAddress::NodePortV6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The different backends of a frontend entry.
pub(super) fn backends_of(
    maps: &Maps,
    family: FamilyIndex,
    entry: &layout::Frontend,
) -> BTreeSet<Choice> {
    let table = maps.table(family);
    let end = entry.slot_base.saturating_add(entry.slot_count);
    (entry.slot_base..end)
        .map_while(|index| table.slot(index))
        .collect()
}

/// All frontends in the maps, sorted.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn list(maps: &Maps) -> Result<Vec<FrontendRow>, MapError> {
    let names = service_names(maps)?;
    let mut rows: BTreeMap<(u32, IpAddr, u16, String), FrontendRow> = BTreeMap::new();
    for family in FamilyIndex::ALL {
        for (id, entry) in maps.table(family).entries()? {
            let (namespace, service) = service_name(&names, entry.service);
            let protocol = id.protocol.to_string();
            let row = rows
                .entry((entry.service, address(&id), id.port, protocol.clone()))
                .or_insert_with(|| FrontendRow {
                    namespace,
                    service,
                    kind: kind_name(entry.kind),
                    address: address(&id),
                    port: id.port,
                    protocol,
                    internal: None,
                    external: None,
                    affinity_seconds: entry.affinity_secs,
                    source_ranges: entry.flags & FRONTEND_SOURCE_RANGES != 0,
                });
            let scope = Some(ScopeRow {
                backends: backends_of(maps, family, &entry).len(),
                slots: entry.slot_count,
                drops: entry.flags & FRONTEND_DROP != 0,
                keeps_source: entry.flags & FRONTEND_KEEP_SOURCE != 0,
            });
            match id.scope {
                Scope::Internal => row.internal = scope,
                Scope::External => row.external = scope,
            }
        }
    }
    let mut rows: Vec<FrontendRow> = rows.into_values().collect();
    rows.sort();
    Ok(rows)
}

impl Watched for FrontendRow {
    type Key = (String, String, SocketAddr, String);
    type State = Self;

    fn key(&self) -> Self::Key {
        let (namespace, service) = (self.namespace.clone(), self.service.clone());
        (namespace, service, self.socket(), self.protocol.clone())
    }

    fn state(&self) -> Self {
        self.clone()
    }
}

const COLUMNS: &[Column<FrontendRow>] = &[
    Column::new("NAMESPACE", |row| row.namespace.clone()),
    Column::new("SERVICE", |row| row.service.clone()),
    Column::new("KIND", |row| row.kind.into()),
    Column::new("FRONTEND", |row| row.socket().to_string()),
    Column::new("PROTOCOL", |row| row.protocol.clone()),
    Column::new("BACKENDS", FrontendRow::backends_cell),
    Column::wide("SLOTS", FrontendRow::slots_cell),
    Column::wide("POLICIES", FrontendRow::policies_cell),
];

/// Runs the verb.
///
/// # Errors
/// No maps, or the kernel's.
pub fn run(args: &ServicesArgs) -> anyhow::Result<()> {
    let read = || {
        let mut rows = list(&open(&args.common.bpf_root)?)?;
        if let Some(namespace) = &args.namespace {
            rows.retain(|row| row.namespace == *namespace);
        }
        anyhow::Ok(rows)
    };
    match args.watch {
        true => rows::watch(args.common.output, COLUMNS, read),
        false => print_rows(args.common.output, read()?, COLUMNS),
    }
}
