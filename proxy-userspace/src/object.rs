//! The few fields of Kubernetes objects that shunt keeps: what every source yields and the model
//! stores.

use std::{collections::BTreeSet, fmt, net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};

/// `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// The namespace; `default` where a manifest names none, empty for a Node.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectName {
    /// `namespace/name` from its parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            // A Node.
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Transport protocol of a Service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    /// `TCP`, the default.
    Tcp = shunt_common::layout::TCP,
    /// `UDP`.
    Udp = shunt_common::layout::UDP,
    /// `SCTP`.
    Sctp = shunt_common::layout::SCTP,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// `spec.externalTrafficPolicy` and `spec.internalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    /// All backends.
    #[default]
    Cluster,
    /// Backends of this node only.
    Local,
}

/// Whether connections that a backend does not answer, or refuses, try another
/// ([`shunt_common::failover`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Those whose packets are translated anyway.
    #[default]
    Packets,
    /// Also those of sockets in pods, which take the packet path for it.
    Sockets,
    /// None.
    Off,
}

/// One entry of `spec.ports`, checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// `name`, empty when the Service has a single unnamed port; joins it to the slices' ports.
    pub name: Arc<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, 1 to 65535.
    pub port: u16,
    /// `nodePort`, if there is one.
    pub node_port: Option<u16>,
}

/// How clients reach a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Exposure {
    /// By addresses that this proxy serves.
    #[default]
    Frontends,
    /// `clusterIP: None`: by the names of its endpoints only (SPEC F5).
    Headless,
    /// `type: ExternalName`: by the name of something else, in lower case and without a trailing
    /// dot (SPEC F6).
    ExternalName(Arc<str>),
    /// By addresses that another proxy serves (SPEC F7). Its names resolve all the same.
    OtherProxy,
}

/// A Service. Those without frontends ([`Exposure`]) are kept for their names alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Service {
    /// `namespace/name`.
    pub name: ObjectName,
    /// How clients reach it.
    pub exposure: Exposure,
    /// `metadata.creationTimestamp`, seconds since 1970; where two Services claim one address, the
    /// older has it.
    pub created: Option<i64>,
    /// `spec.clusterIPs`, parsed.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`, parsed.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose `ipMode` is not `Proxy`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP` and its time-out in seconds.
    pub affinity_secs: Option<u32>,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort`.
    pub health_check_node_port: Option<u16>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<ipnet::IpNet>,
    /// Whether `source_ranges` limit clients of a family (IPv4, IPv6), be it to nobody; a family
    /// that the Service names no range of is not limited.
    pub limits_sources: [bool; 2],
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Annotation `shunt.dev/retry`.
    pub retry: Retry,
    /// Whether backends see this node's address as the source wherever the Service does not keep
    /// the client's: `masqueradeAll`, which is the agent's and not the object's.
    pub masquerade: bool,
}

impl Service {
    /// Whether it has addresses that this proxy serves.
    pub fn has_frontends(&self) -> bool {
        self.exposure == Exposure::Frontends
    }
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// `addresses[0]`: consumers use the first only (EndpointSlice API reference).
    pub address: IpAddr,
    /// `hostname`: the endpoint's label in DNS.
    pub hostname: Option<Arc<str>>,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `conditions.ready`; absent means true.
    pub ready: bool,
    /// `conditions.serving`; absent means true.
    pub serving: bool,
    /// `conditions.terminating`; absent means false.
    pub terminating: bool,
    /// `hints.forZones[].name`.
    pub zones: BTreeSet<Arc<str>>,
    /// `hints.forNodes[].name`.
    pub nodes: BTreeSet<Arc<str>>,
}

/// One entry of a slice's `ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointPort {
    /// `name`; empty when absent. Joins it to [`ServicePort::name`].
    pub name: Arc<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, 1 to 65535.
    pub port: u16,
}

/// An EndpointSlice, or what is its like: an `Endpoints` object, or the ready Pods that a selector
/// finds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointSlice {
    /// The slice's own `namespace/name`, for messages and as key.
    pub name: ObjectName,
    /// The Service it belongs to: label `kubernetes.io/service-name`.
    pub service: ObjectName,
    /// Labelled as a headless Service's or another proxy's (SPEC F7): its endpoints have names, and
    /// are no backends here.
    pub names_only: bool,
    /// `ports`.
    pub ports: Vec<EndpointPort>,
    /// `endpoints`, without FQDN slices and those of forbidden addresses.
    pub endpoints: Vec<Endpoint>,
}

/// What this node is, as far as plans depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct NodeFacts {
    /// The Node's name: endpoints with this `nodeName` are local.
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// The Node's addresses: an endpoint with one of these is local whatever its `nodeName` says.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether the Node is being taken out of the cluster: gone, with a `deletionTimestamp`, or
    /// with the cluster autoscaler's taint. Load balancers should send nothing new here; plans do
    /// not depend on it.
    pub leaves: bool,
}

impl NodeFacts {
    /// Whether an endpoint is on this node.
    pub fn is_local(&self, endpoint: &Endpoint) -> bool {
        let on_this_node = !self.name.is_empty() && endpoint.node.as_ref() == Some(&self.name);
        on_this_node || self.addresses.contains(&endpoint.address)
    }
}

/// One change, as a source tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A Service appeared or changed.
    Service(Service),
    /// A Service is gone, or no longer has frontends.
    ServiceGone(ObjectName),
    /// A slice appeared or changed.
    Slice(EndpointSlice),
    /// A slice is gone (its own name).
    SliceGone(ObjectName),
    /// The own Node's facts changed.
    Node(NodeFacts),
    /// The cluster has no such Node (any more). Its other facts stay: the machine is still there,
    /// and so are its addresses.
    NodeGone,
    /// The UIDs of all Pods of this node that are to be left out of the socket hook.
    LeftOut(BTreeSet<Arc<str>>),
    /// Of a change in this batch the cluster says that it happened then.
    Triggered(SystemTime),
    /// The source has now yielded everything there is: what was not named since its start (or since
    /// the last `Complete`-less restart of a list) does not exist. Nothing is pruned from the maps
    /// before the first one.
    Complete,
}

impl Event {
    /// When the change happened, as [`Self::Triggered`] has it.
    pub fn triggered(&self) -> Option<SystemTime> {
        match self {
            Self::Triggered(time) => Some(*time),
            _ => None,
        }
    }
}

/// Something in an object that cannot be served as it is written. Prints as one line; everything
/// else goes on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// The manifest it stands in.
    pub file: Option<PathBuf>,
    /// The line in `file`, from 1.
    pub line: Option<u64>,
    /// `kind` of the object; empty when it could not be read.
    pub kind: Arc<str>,
    /// The object, as far as it is known.
    pub name: Option<ObjectName>,
    /// Path of the field as `kubectl explain` writes it, with indices: `spec.ports[0].port`. Empty:
    /// the whole object.
    pub field: String,
    /// What is wrong, and what to do about it.
    pub message: String,
    /// Whether the object is served all the same, just as it is written.
    pub is_served: bool,
}

impl Problem {
    /// A problem of a field of a named object.
    pub fn new(
        kind: &str,
        name: &ObjectName,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            file: None,
            line: None,
            kind: kind.into(),
            name: Some(name.clone()),
            field: field.into(),
            message: message.into(),
            is_served: false,
        }
    }

    /// Something about a field that the user should know, though it is served as it is written.
    pub fn warning(
        kind: &str,
        name: &ObjectName,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            is_served: true,
            ..Self::new(kind, name, field, message)
        }
    }

    /// A problem of a whole file.
    pub fn in_file(
        file: impl Into<PathBuf>,
        line: Option<u64>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            file: Some(file.into()),
            line,
            kind: "".into(),
            name: None,
            field: String::new(),
            message: message.into(),
            is_served: false,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
            write!(f, ": ")?;
        }
        match (&*self.kind, &self.name) {
            ("", None) => {}
            (kind, None) => write!(f, "{kind}: ")?,
            ("", Some(name)) => write!(f, "{name}: ")?,
            (kind, Some(name)) => write!(f, "{kind} {name}: ")?,
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        // What others wrote (parser messages, names in manifests) may hold line breaks: a log line
        // is one line.
        let mut words = self.message.split_whitespace();
        if let Some(first) = words.next() {
            f.write_str(first)?;
        }
        words.try_for_each(|word| write!(f, " {word}"))
    }
}
