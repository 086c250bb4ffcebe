//! A way to a server from a network namespace that has none: bytes go to and fro, and can be
//! stopped.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

/// Connections by number, both ends.
type Open = Arc<Mutex<Option<BTreeMap<u64, [TcpStream; 2]>>>>;

/// Passes connections on to the server of a kubeconfig; it ends with the process.
#[derive(Debug)]
pub struct Relay {
    open: Open,
    passed: Arc<Passed>,
    folder: TempDir,
}

/// How many connections have come, and how many of the first of them are mute.
#[derive(Debug, Default)]
struct Passed {
    come: AtomicU64,
    mute: AtomicU64,
}

impl Relay {
    /// Accepts on `listener`, connects from where the calling process is.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read, names no server, or its server's name cannot be
    /// resolved.
    pub fn start(kubeconfig: &Path, listener: TcpListener) -> Result<Self> {
        let text = fs::read_to_string(kubeconfig)
            .with_context(|| format!("{}: cannot be read", kubeconfig.display()))?;
        let mut config: Value = serde_saphyr::from_str(&text)
            .with_context(|| format!("{}: is no YAML", kubeconfig.display()))?;
        // Only those of the current context matter, and only they are resolved.
        let context = config["current-context"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let list = |config: &Value, list: &str, name: &str| {
            let list = config[list].as_array()?;
            list.iter().position(|item| item["name"] == name)
        };
        let cluster = list(&config, "contexts", &context)
            .and_then(|i| config["contexts"][i]["context"]["cluster"].as_str())
            .and_then(|name| list(&config, "clusters", name))
            .context("the kubeconfig's current context names no cluster")?;
        let folder = TempDir::new()?;
        let base = kubeconfig.parent().unwrap_or(Path::new("."));
        absolute(&mut config, base);

        let cluster = &mut config["clusters"][cluster]["cluster"];
        let server = cluster["server"].as_str().unwrap_or_default();
        let host = server
            .strip_prefix("https://")
            .context("the server's URL is not https")?;
        let host = host.split('/').next().unwrap_or_default();
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => (name, port.parse()?),
            _ => (host, 443),
        };
        let name = name
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let to = (name.as_str(), port)
            .to_socket_addrs()?
            .next()
            .context("the server's name has no address")?;
        if cluster["tls-server-name"].is_null() {
            cluster["tls-server-name"] = name.into();
        }
        cluster["server"] = format!("https://{}", listener.local_addr()?).into();
        fs::write(folder.path().join("kubeconfig"), config.to_string())?;

        let relay = Self {
            open: Arc::new(Mutex::new(Some(BTreeMap::new()))),
            passed: Arc::default(),
            folder,
        };
        let (open, passed) = (relay.open.clone(), relay.passed.clone());
        thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || accept(&listener, to, &open, &passed))?;
        Ok(relay)
    }

    /// The kubeconfig for those who come through here.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Ends all connections, and new ones as soon as they come.
    pub fn close(&self) {
        let open = self
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        for stream in open.into_iter().flat_map(BTreeMap::into_values).flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Swallows all bytes of the connections that there are, as a middlebox does that has forgotten
    /// them; new ones are let through.
    pub fn mute(&self) {
        self.passed
            .mute
            .store(self.passed.come.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Lets connections through again.
    pub fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(BTreeMap::new());
    }
}

/// Paths in a kubeconfig are relative to its folder.
fn absolute(value: &mut Value, base: &Path) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let is_path = [
                    "certificate-authority",
                    "client-certificate",
                    "client-key",
                    "tokenFile",
                ];
                match value.as_str() {
                    Some(path)
                        if is_path.contains(&name.as_str()) && Path::new(path).is_relative() =>
                    {
                        let path = base.join(path);
                        *value = path.canonicalize().unwrap_or(path).to_string_lossy().into();
                    }
                    _ => absolute(value, base),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| absolute(item, base)),
        _ => {}
    }
}

fn accept(listener: &TcpListener, to: SocketAddr, open: &Open, passed: &Arc<Passed>) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        // A server that is away is a client's loss.
        let _ = pass(client, to, open, passed);
    }
}

fn pass(client: TcpStream, to: SocketAddr, open: &Open, passed: &Arc<Passed>) -> io::Result<()> {
    let number = passed.come.fetch_add(1, Ordering::Relaxed);
    let ways = {
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(connections) = open.as_mut() else {
            return client.shutdown(Shutdown::Both);
        };
        let server = TcpStream::connect(to)?;
        let ways = [
            (client.try_clone()?, server.try_clone()?),
            (server.try_clone()?, client.try_clone()?),
        ];
        connections.insert(number, [client, server]);
        ways
    };
    for (mut from, mut to) in ways {
        let (open, passed) = (open.clone(), passed.clone());
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                if number < passed.mute.load(Ordering::Relaxed) {
                    continue;
                }
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
            if let Some(open) = open.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                open.remove(&number);
            }
        });
    }
    Ok(())
}
