//! `shunt conntrack list|flush`: the flows that are being translated. (The socket hook translates
//! sockets, not flows.)

use std::net::SocketAddr;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use shunt_common::layout::{
    FLOW_BACKEND_FIN, FLOW_CLIENT_FIN, FLOW_LOCAL_BACKEND, FLOW_LOCAL_CLIENT, FLOW_RESET,
    FLOW_SEEN_REPLY, FLOW_SNAT, Flow, FlowKey,
};

use super::{
    Common, Peer, open, print,
    rows::{Column, print_rows},
};
use crate::{
    datapath::maps::{MapError, MapFamily, Maps, PerFamily},
    gc,
    object::Protocol,
    sync::table::protocol,
};

/// `shunt conntrack`.
#[derive(Debug, Args)]
pub struct ConntrackArgs {
    #[command(subcommand)]
    verb: Option<ConntrackVerb>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum ConntrackVerb {
    /// Print flows (what `shunt conntrack` alone does).
    List(Filter),
    /// Delete flows: their next packet is that of a new flow.
    Flush(Filter),
}

/// Which flows; all without any of these.
#[derive(Clone, Debug, Default, Args)]
pub struct Filter {
    /// Only this protocol.
    #[arg(long, value_enum)]
    protocol: Option<ProtocolArg>,
    /// Only flows of this client.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    client: Option<Peer>,
    /// Only flows to this frontend.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    frontend: Option<Peer>,
    /// Only flows that this backend serves.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    backend: Option<Peer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProtocolArg {
    Tcp,
    Udp,
    Sctp,
}

impl Filter {
    fn admits<F: MapFamily>(&self, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
        let matches = |peer: &Option<Peer>, address: F::Addr, port: u16| {
            peer.is_none_or(|peer| peer.matches(F::address(address), port))
        };
        let of_protocol = match self.protocol {
            None => true,
            Some(ProtocolArg::Tcp) => key.proto == Protocol::Tcp as u8,
            Some(ProtocolArg::Udp) => key.proto == Protocol::Udp as u8,
            Some(ProtocolArg::Sctp) => key.proto == Protocol::Sctp as u8,
        };
        of_protocol
            && matches(&self.client, key.client, key.client_port)
            && matches(&self.frontend, flow.frontend, flow.frontend_port)
            && matches(&self.backend, flow.backend, flow.backend_port)
    }
}

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// No packet from the backend yet.
    Unanswered,
    /// Both sides have spoken.
    Established,
    /// One side has sent FIN.
    Closing,
    /// Both sides have sent FIN, or one RST.
    Closed,
}

impl State {
    fn of(bits: u32) -> Self {
        const FINS: u32 = FLOW_CLIENT_FIN | FLOW_BACKEND_FIN;
        match bits & FINS {
            _ if bits & FLOW_RESET != 0 => Self::Closed,
            FINS => Self::Closed,
            0 if bits & FLOW_SEEN_REPLY != 0 => Self::Established,
            0 => Self::Unanswered,
            _ => Self::Closing,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unanswered => "unanswered",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Closed => "closed",
        }
    }
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowRow {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Who dialled.
    pub client: SocketAddr,
    /// What it dialled.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// What the backend sees as source, where that is not the client.
    pub snat: Option<SocketAddr>,
    /// How far it is.
    pub state: State,
    /// Whether the client is on this node.
    pub local_client: bool,
    /// Whether the backend is on this node.
    pub local_backend: bool,
    /// Seconds since its last packet.
    pub idle_seconds: u64,
}

impl FlowRow {
    fn new<F: MapFamily>(key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>, now: u32) -> Self {
        let socket = |address: F::Addr, port: u16| SocketAddr::new(F::address(address), port);
        Self {
            protocol: protocol(key.proto)
                .map_or(key.proto.to_string(), |protocol| protocol.to_string()),
            client: socket(key.client, key.client_port),
            frontend: socket(flow.frontend, flow.frontend_port),
            backend: socket(flow.backend, flow.backend_port),
            snat: (flow.state & FLOW_SNAT != 0).then(|| socket(flow.snat, flow.snat_port)),
            state: State::of(flow.state),
            local_client: flow.state & FLOW_LOCAL_CLIENT != 0,
            local_backend: flow.state & FLOW_LOCAL_BACKEND != 0,
            idle_seconds: gc::idle(flow.last_seen, now).as_secs(),
        }
    }
}

/// All flows that a filter admits, sorted.
///
/// # Errors
/// `MapError::Kernel` when a map cannot be listed: `EPERM` without `CAP_BPF`, `ENOMEM` without
/// memory for a batch. Nothing has changed: try again.
pub fn list(maps: &Maps, filter: &Filter) -> Result<Vec<FlowRow>, MapError> {
    list_at(maps, filter, gc::now())
}

/// The same at a time in ticks, as [`Flow::last_seen`].
pub(super) fn list_at(maps: &Maps, filter: &Filter, now: u32) -> Result<Vec<FlowRow>, MapError> {
    fn family<F: MapFamily>(
        maps: &PerFamily<F>,
        filter: &Filter,
        now: u32,
        rows: &mut Vec<FlowRow>,
    ) -> Result<(), MapError> {
        for map in maps.flow_maps() {
            map.for_each_batch(|keys, flows| {
                let admitted = keys
                    .iter()
                    .zip(flows)
                    .filter(|(key, flow)| filter.admits::<F>(key, flow));
                rows.extend(admitted.map(|(key, flow)| FlowRow::new::<F>(key, flow, now)));
                Ok(())
            })?;
        }
        Ok(())
    }
    let mut rows = Vec::new();
    family(&maps.v4, filter, now, &mut rows)?;
    family(&maps.v6, filter, now, &mut rows)?;
    rows.sort();
    Ok(rows)
}

/// Deletes all flows that a filter admits, and frees their translated source ports; returns how
/// many.
///
/// # Errors
/// `MapError::Kernel` when an entry cannot be deleted: `EPERM` without `CAP_BPF`. What was deleted
/// before stays so: call it again.
pub fn flush(maps: &Maps, filter: &Filter) -> Result<u64, MapError> {
    fn family<F: MapFamily>(
        maps: &Maps,
        of: &PerFamily<F>,
        filter: &Filter,
    ) -> Result<u64, MapError> {
        let config = maps.config()?;
        let mut deleted = 0;
        for map in of.flow_maps() {
            map.for_each_batch(|keys, flows| {
                let mut doomed = Vec::new();
                for (key, flow) in keys
                    .iter()
                    .zip(flows)
                    .filter(|(key, flow)| filter.admits::<F>(key, flow))
                {
                    doomed.push(*key);
                    of.release_snat(&config, key, flow);
                }
                deleted += map.delete_all(&doomed)? as u64;
                Ok(())
            })?;
        }
        Ok(deleted)
    }
    Ok(family(maps, &maps.v4, filter)? + family(maps, &maps.v6, filter)?)
}

#[derive(Serialize)]
struct Flushed {
    deleted: u64,
}

/// Runs the verb.
///
/// # Errors
/// No maps, or the kernel's.
pub fn run(args: &ConntrackArgs) -> anyhow::Result<()> {
    let common = &args.common;
    let filter = match &args.verb {
        None => &Filter::default(),
        Some(ConntrackVerb::List(filter)) => filter,
        Some(ConntrackVerb::Flush(filter)) => {
            let deleted = flush(&open(&common.bpf_root)?, filter)?;
            return match common.output.structured(&Flushed { deleted })? {
                Some(text) => print(&text),
                None if deleted == 1 => print("1 flow deleted"),
                None => print(&format!("{deleted} flows deleted")),
            };
        }
    };
    print_flows(common, filter)
}

impl FlowRow {
    /// Which of its ends are on this node.
    fn here_cell(&self) -> String {
        match (self.local_client, self.local_backend) {
            (true, true) => "both",
            (true, false) => "client",
            (false, true) => "backend",
            (false, false) => "",
        }
        .into()
    }
}

const COLUMNS: &[Column<FlowRow>] = &[
    Column::new("PROTOCOL", |row| row.protocol.clone()),
    Column::new("CLIENT", |row| row.client.to_string()),
    Column::new("FRONTEND", |row| row.frontend.to_string()),
    Column::new("BACKEND", |row| row.backend.to_string()),
    Column::wide("HERE", FlowRow::here_cell),
    Column::wide("SOURCE", |row| {
        row.snat.map_or("kept".into(), |snat| snat.to_string())
    }),
    Column::new("STATE", |row| row.state.name().into()),
    Column::new("IDLE", |row| format!("{}s", row.idle_seconds)),
];

fn print_flows(common: &Common, filter: &Filter) -> anyhow::Result<()> {
    let rows = list(&open(&common.bpf_root)?, filter)?;
    print_rows(common.output, rows, COLUMNS)
}
