//! What the cluster's Services are called: an index that is brought up to date Service by Service
//! and read without a lock.
//!
//! The agent's main task is the only writer ([`Index::set`]); it calls it for each Service that an
//! event touched, so that the next answer knows of the change, and what it costs is what that
//! Service costs. Servers read while it writes: each Service is one immutable value that is
//! exchanged whole.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use papaya::HashMap;

use crate::object::{EndpointPort, EndpointSlice, Exposure, ObjectName, Protocol, Service};

/// Longest `name.namespace` in bytes: two DNS labels and a dot.
const MAX_KEY: usize = 63 + 1 + 63;

/// What a Service's name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Its cluster IPs.
    ClusterIps(Box<[IpAddr]>),
    /// Its endpoints.
    Endpoints,
    /// Another name ([`Exposure::ExternalName`]).
    Name(Arc<str>),
}

/// A port of a Service that has a cluster IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Empty for a single unnamed port.
    pub name: Arc<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`.
    pub number: u16,
}

/// Endpoints with the same ports: those of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The slice's ports.
    pub ports: Box<[EndpointPort]>,
    /// Those that are ready, or all where the Service publishes all.
    pub endpoints: Box<[EndpointNames]>,
}

/// What an endpoint is called below its Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointNames {
    /// Its address.
    pub address: IpAddr,
    /// Its host name; `None`: it is called by its address, with dashes for dots and colons.
    pub hostname: Option<Arc<str>>,
}

/// A Service as far as its names are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceNames {
    /// `namespace/name`.
    pub name: ObjectName,
    /// What its name leads to.
    pub target: Target,
    /// Ports of a Service with a cluster IP; those of a headless one are its endpoints'.
    pub ports: Box<[Port]>,
    /// Its endpoints.
    pub groups: Box<[Group]>,
}

/// Whose an address is, for the way back from address to name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// The Service.
    pub service: ObjectName,
    /// The endpoint's name below it; `None`: the address is the Service's own.
    pub endpoint: Option<EndpointNames>,
}

/// All Services by name, all addresses with names, and the namespaces that have Services.
#[derive(Debug, Default)]
pub struct Index {
    services: HashMap<Box<[u8]>, Arc<ServiceNames>>,
    pointers: HashMap<IpAddr, Arc<[Pointer]>>,
    namespaces: HashMap<Box<[u8]>, u32>,
    complete: AtomicBool,
    serial: AtomicU32,
}

impl ServiceNames {
    /// Of a Service and all its slices.
    pub fn new<'s>(service: &Service, slices: impl IntoIterator<Item = &'s EndpointSlice>) -> Self {
        let target = match &service.exposure {
            Exposure::Frontends | Exposure::OtherProxy => {
                Target::ClusterIps(service.cluster_ips.as_slice().into())
            }
            Exposure::Headless => Target::Endpoints,
            Exposure::ExternalName(name) => Target::Name(name.clone()),
        };
        let mut seen = BTreeSet::new();
        let group = |slice: &'s EndpointSlice| {
            let ready = slice
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.ready || service.publish_not_ready)
                // Two slices may name an endpoint while the controller moves it from one to the
                // other.
                .filter(|endpoint| seen.insert((endpoint.address, slice.ports.as_slice())))
                .map(|endpoint| EndpointNames {
                    address: endpoint.address,
                    hostname: endpoint.hostname.clone(),
                });
            Group {
                endpoints: ready.collect(),
                ports: slice.ports.as_slice().into(),
            }
        };
        let groups = match target {
            Target::Name(_) => Box::default(),
            _ => slices
                .into_iter()
                .map(group)
                .filter(|group| !group.endpoints.is_empty())
                .collect(),
        };
        let ports = match target {
            Target::ClusterIps(_) => service
                .ports
                .iter()
                .map(|port| Port {
                    name: port.name.clone(),
                    protocol: port.protocol,
                    number: port.port,
                })
                .collect(),
            _ => Box::default(),
        };
        Self {
            name: service.name.clone(),
            target,
            ports,
            groups,
        }
    }

    /// All endpoints, each with the ports of its slice.
    pub fn endpoints(&self) -> impl Iterator<Item = (&EndpointNames, &[EndpointPort])> {
        self.groups.iter().flat_map(|group| {
            group
                .endpoints
                .iter()
                .map(|endpoint| (endpoint, &*group.ports))
        })
    }

    /// Addresses that lead back to names of this Service.
    fn pointers(&self) -> Vec<(IpAddr, Pointer)> {
        let pointer = |endpoint: Option<&EndpointNames>| Pointer {
            service: self.name.clone(),
            endpoint: endpoint.cloned(),
        };
        let mut all: Vec<(IpAddr, Pointer)> = match &self.target {
            Target::ClusterIps(ips) => ips.iter().map(|ip| (*ip, pointer(None))).collect(),
            Target::Endpoints | Target::Name(_) => Vec::new(),
        };
        let is_headless = self.target == Target::Endpoints;
        for (endpoint, _) in self.endpoints() {
            // A pod behind a cluster IP is nobody's host name unless it says so: else each pod
            // would have as many as Services.
            if is_headless || endpoint.hostname.is_some() {
                let entry = (endpoint.address, pointer(Some(endpoint)));
                if !all.contains(&entry) {
                    all.push(entry);
                }
            }
        }
        all
    }
}

impl Index {
    /// Takes in what a Service is called now; `None`: it is gone. Only one thread may call this.
    pub fn set(&self, name: &ObjectName, names: Option<ServiceNames>) {
        let key = key(name);
        let services = self.services.pin();
        let old = services.get(&key).cloned();
        if old.as_deref() == names.as_ref() {
            return;
        }
        let old_pointers = old.as_ref().map(|old| old.pointers()).unwrap_or_default();
        let new_pointers = names
            .as_ref()
            .map(ServiceNames::pointers)
            .unwrap_or_default();
        match (old.is_some(), names.is_some()) {
            (false, true) => self.count_namespace(&name.namespace, true),
            (true, false) => self.count_namespace(&name.namespace, false),
            _ => {}
        }
        match names {
            Some(names) => drop(services.insert(key, Arc::new(names))),
            None => drop(services.remove(&key)),
        }
        self.set_pointers(name, &old_pointers, new_pointers);
        // A serial number that grows with each change, as RFC 1982 wants it, also over a restart.
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.serial.store(now.as_secs() as u32, Ordering::Relaxed);
    }

    /// The source has told everything there is: a name that is not here does not exist.
    pub fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Whether a name that is not here does not exist.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Seconds since 1970 of the last change.
    pub fn serial(&self) -> u32 {
        self.serial.load(Ordering::Relaxed)
    }

    /// Number of Services.
    pub fn len(&self) -> usize {
        self.services.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// The Service of a name and a namespace, both in lower case.
    pub fn service(&self, name: &[u8], namespace: &[u8]) -> Option<Arc<ServiceNames>> {
        let mut key = [0; MAX_KEY];
        let end = name.len() + 1 + namespace.len();
        let whole = key.get_mut(..end)?;
        whole[..name.len()].copy_from_slice(name);
        whole[name.len()] = b'.';
        whole[name.len() + 1..].copy_from_slice(namespace);
        self.services.pin().get(&*whole).cloned()
    }

    /// Whether a namespace, in lower case, has Services.
    pub fn has_namespace(&self, namespace: &[u8]) -> bool {
        self.namespaces.pin().contains_key(namespace)
    }

    /// The names of an address: a Service's alone when it is a cluster IP, else those of endpoints.
    pub fn pointers(&self, address: IpAddr) -> Option<Arc<[Pointer]>> {
        self.pointers.pin().get(&address).cloned()
    }

    fn count_namespace(&self, namespace: &str, grows: bool) {
        let namespaces = self.namespaces.pin();
        let count = namespaces.get(namespace.as_bytes()).copied().unwrap_or(0);
        match if grows {
            count + 1
        } else {
            count.saturating_sub(1)
        } {
            0 => drop(namespaces.remove(namespace.as_bytes())),
            count => drop(namespaces.insert(namespace.as_bytes().into(), count)),
        }
    }

    fn set_pointers(
        &self,
        name: &ObjectName,
        old: &[(IpAddr, Pointer)],
        new: Vec<(IpAddr, Pointer)>,
    ) {
        let pointers = self.pointers.pin();
        let touched: BTreeSet<IpAddr> = old
            .iter()
            .chain(&new)
            .map(|(address, _)| *address)
            .collect();
        for address in touched {
            let before = pointers.get(&address).cloned();
            let others = before.iter().flat_map(|all| all.iter());
            let mut all: Vec<Pointer> = others
                .filter(|pointer| pointer.service != *name)
                .cloned()
                .collect();
            let own = new.iter().filter(|(other, _)| *other == address);
            all.extend(own.map(|(_, pointer)| pointer.clone()));
            all.sort_by(|a, b| {
                (a.endpoint.is_some(), &a.service).cmp(&(b.endpoint.is_some(), &b.service))
            });
            match all.is_empty() {
                true => drop(pointers.remove(&address)),
                false => drop(pointers.insert(address, all.into())),
            }
        }
    }
}

/// `name.namespace`.
fn key(name: &ObjectName) -> Box<[u8]> {
    format!("{}.{}", name.name, name.namespace)
        .into_bytes()
        .into()
}
