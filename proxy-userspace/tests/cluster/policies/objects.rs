//! Where the agents have their objects from: the same documents as a file of manifests, or as what
//! an API server stores.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::{SocketAddr, TcpListener},
};

use serde_json::{Value, json};
use shunt_apiserver::{ApiServer, Kind};
use shunt_lab::{AgentOptions, Lab};
use tempfile::TempDir;

/// The fabric, as seen from the nodes.
const SERVER: &str = "192.168.50.1:6443";

/// Who tells the agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Manifests,
    ApiServer,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Manifests => "through manifests",
            Self::ApiServer => "through an API server",
        })
    }
}

/// Kind, namespace (a Node's is empty) and name.
type Key = (Kind, String, String);

/// The objects that there are.
pub(super) enum Objects {
    Manifests(TempDir),
    /// The server, and what it was given.
    Stored(ApiServer, BTreeMap<Key, Value>),
}

impl Objects {
    pub(super) fn new(source: Source, lab: &Lab) -> Self {
        match source {
            Source::Manifests => Self::Manifests(TempDir::new().unwrap()),
            Source::ApiServer => {
                let address: SocketAddr = SERVER.parse().unwrap();
                let fabric = lab.ns("fabric").unwrap();
                let bind = move || fabric.run(|| TcpListener::bind(address));
                let server = ApiServer::start_with(address, bind).unwrap();
                Self::Stored(server, BTreeMap::new())
            }
        }
    }

    pub(super) fn options(&self) -> AgentOptions {
        match self {
            Self::Manifests(folder) => AgentOptions::manifests(folder.path()),
            Self::Stored(server, _) => AgentOptions::kubeconfig(&server.kubeconfig()),
        }
    }

    /// Replaces all objects. An API server's change one by one, in this order and those that are
    /// gone before `last`, which so is the last news of each of its kinds.
    pub(super) fn replace(&mut self, documents: &[String], last: &[String]) {
        match self {
            Self::Manifests(folder) => {
                let path = folder.path().join("all.yaml");
                let hidden = path.with_extension("new");
                fs::write(&hidden, [documents, last].concat().join("---\n")).unwrap();
                fs::rename(hidden, path).unwrap();
            }
            Self::Stored(server, stored) => {
                let (new, last) = (objects(documents), objects(last));
                let is_wanted =
                    |key: &Key| new.iter().chain(&last).any(|(wanted, _)| wanted == key);
                let gone: Vec<Key> = stored
                    .extract_if(.., |key, _| !is_wanted(key))
                    .map(|(key, _)| key)
                    .collect();
                set(server, stored, new);
                for (kind, namespace, name) in gone {
                    assert!(server.delete(kind, &namespace, &name));
                }
                set(server, stored, last);
            }
        }
    }
}

/// Writes what is new or different.
fn set(server: &ApiServer, stored: &mut BTreeMap<Key, Value>, objects: Vec<(Key, Value)>) {
    let is_new = |(key, object): &(Key, Value)| {
        stored.insert(key.clone(), object.clone()).as_ref() != Some(object)
    };
    let changed: Vec<_> = objects.into_iter().filter(is_new).collect();
    server.apply_all(changed.into_iter().map(|(_, object)| object));
}

/// The objects of documents, as `kubectl` would send them.
fn objects(documents: &[String]) -> Vec<(Key, Value)> {
    let object = |text: &String| {
        let mut object: Value = serde_saphyr::from_str(text).unwrap();
        let kind = Kind::of(&object).unwrap_or_else(|| panic!("no API server has this:\n{text}"));
        let metadata = &mut object["metadata"];
        if kind != Kind::Nodes && metadata["namespace"].is_null() {
            metadata["namespace"] = json!("default");
        }
        let text = |field: &str| metadata[field].as_str().unwrap_or_default().to_owned();
        ((kind, text("namespace"), text("name")), object)
    };
    documents.iter().map(object).collect()
}
