//! A Kubernetes API server for tests: Services, EndpointSlices, Nodes, Namespaces and Events over
//! TLS with a bearer token, lists in pages or streamed, watches with bookmarks — and every kind of
//! misbehaviour that a real one shows, on demand.
//!
//! What it says is the truth about what it holds: versions only grow, a watch from a version tells
//! everything that came after it, or that the version is gone. Misbehaviour is in how and whether
//! it is said ([`Faults`], [`ApiServer::close`], [`ApiServer::cut_watches`], [`ApiServer::expire`],
//! [`ApiServer::set_token`]).
//!
//! ```no_run
//! let server = shunt_apiserver::ApiServer::start().unwrap();
//! server.apply(serde_json::json!({ "kind": "Node", "metadata": { "name": "node-a" } }));
//! // shunt run --kubeconfig …
//! println!("{}", server.kubeconfig().display());
//! ```

mod faults;
mod relay;
mod selector;
mod serve;
mod state;
mod store;

use std::{
    collections::BTreeSet,
    fs, io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

pub use faults::{Faults, Gone, Refusal, Streaming};
pub use relay::Relay;
pub use store::Kind;

use state::{Shared, State};
use store::Store;

/// What clients are let in with at first.
const FIRST_TOKEN: &str = "first-token";
/// The address of the Service `default/kubernetes` where a test makes one: real servers have it in
/// their certificate too.
pub const CLUSTER_IP: &str = "10.96.0.1";
/// Where a pod finds its service account, from `/run` on.
const SERVICE_ACCOUNT: &str = "secrets/kubernetes.io/serviceaccount";
/// The first version; real ones do not begin with 1 either.
const FIRST_VERSION: u64 = 1000;

/// What the thread that serves is told.
enum Order {
    Open(bool, mpsc::Sender<io::Result<()>>),
    /// All connections.
    Disconnect(mpsc::Sender<io::Result<()>>),
}

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    orders: tokio::sync::mpsc::UnboundedSender<Order>,
    folder: TempDir,
}

impl ApiServer {
    /// A server on a free port of the loopback device.
    ///
    /// # Errors
    /// When it cannot listen, or no file can be written.
    pub fn start() -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        Self::start_with(address, move || TcpListener::bind(address))
    }

    /// A server that listens with `bind`, which is called again whenever it opens its port again;
    /// clients reach it at `address`. A listener keeps the network namespace that it was made in.
    ///
    /// # Errors
    /// When it cannot listen, or no file can be written.
    pub fn start_with(
        address: SocketAddr,
        bind: impl Fn() -> io::Result<TcpListener> + Send + 'static,
    ) -> Result<Self> {
        let names = [
            address.ip().to_string(),
            CLUSTER_IP.to_owned(),
            "localhost".to_owned(),
        ];
        let certified =
            rcgen::generate_simple_self_signed(names).context("cannot make a certificate")?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(
            certified.signing_key.serialize_der(),
        ));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let old = TlsAcceptor::from(Arc::new(tls.clone()));
        tls.alpn_protocols.insert(0, b"h2".to_vec());

        let folder = TempDir::new().context("cannot make a folder for the kubeconfig")?;
        let server_url = format!("https://{address}");
        let account = folder.path().join(SERVICE_ACCOUNT);
        fs::create_dir_all(&account)?;
        fs::write(account.join("ca.crt"), certified.cert.pem())?;
        fs::write(account.join("token"), FIRST_TOKEN)?;
        fs::write(account.join("namespace"), "kube-system")?;
        fs::write(
            folder.path().join("kubeconfig"),
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
                 clusters: [{{ name: test, cluster: {{ server: '{server_url}', certificate-authority: '{0}/ca.crt' }} }}]\n\
                 users: [{{ name: test, user: {{ tokenFile: '{0}/token' }} }}]\n\
                 contexts: [{{ name: test, context: {{ cluster: test, user: test }} }}]\n",
                account.display()
            ),
        )?;

        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                store: Store::new(FIRST_VERSION),
                faults: Faults::default(),
                token: FIRST_TOKEN.to_owned(),
                requests: Vec::new(),
                drops: 0,
                cuts: 0,
                marks: 0,
            }),
            generation: watch::channel(0).0,
            watches: AtomicUsize::new(0),
        });
        let (orders, received) = tokio::sync::mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot make a runtime")?;
        let acceptors = [TlsAcceptor::from(Arc::new(tls)), old];
        let serving = shared.clone();
        std::thread::Builder::new()
            .name("apiserver".to_owned())
            .spawn(move || runtime.block_on(serve(bind, acceptors, serving, received)))
            .context("cannot start a thread")?;
        let server = Self {
            shared,
            address,
            orders,
            folder,
        };
        server.open()?;
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A kubeconfig file with its address, certificate, and a file that holds the token.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// A folder that a pod has as `/run`: a service account, with the same certificate and token.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// The certificate that clients trust.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join(SERVICE_ACCOUNT).join("ca.crt")
    }

    /// Creates or replaces an object.
    ///
    /// # Panics
    /// When it lacks a name or a known kind.
    pub fn apply(&self, object: Value) {
        let result = self.shared.lock().store.set(object);
        self.shared.notify();
        if let Err(message) = result {
            panic!("{message}");
        }
    }

    /// Creates or replaces many objects; watches learn of them together.
    ///
    /// # Panics
    /// As [`Self::apply`].
    pub fn apply_all(&self, objects: impl IntoIterator<Item = Value>) {
        for object in objects {
            // Not `apply`: watches would be woken for every one.
            if let Err(message) = self.shared.lock().store.set(object) {
                panic!("{message}");
            }
        }
        self.shared.notify();
    }

    /// Deletes an object (Nodes and Namespaces have an empty namespace); whether there was one.
    pub fn delete(&self, kind: Kind, namespace: &str, name: &str) -> bool {
        let deleted = self
            .shared
            .lock()
            .store
            .delete(kind, &(namespace.to_owned(), name.to_owned()));
        self.shared.notify();
        deleted
    }

    /// An object as it is now.
    #[must_use]
    pub fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        let state = self.shared.lock();
        let object = state
            .store
            .get(kind, &(namespace.to_owned(), name.to_owned()))?;
        serde_json::from_slice(&object.json).ok()
    }

    /// All objects of a kind.
    #[must_use]
    pub fn list(&self, kind: Kind) -> Vec<Value> {
        let state = self.shared.lock();
        let objects = state.store.objects(kind);
        objects
            .filter_map(|object| serde_json::from_slice(&object.json).ok())
            .collect()
    }

    /// Changes how it misbehaves.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.lock().faults);
        self.shared.notify();
    }

    /// Ends all watches in order, as at their time-out.
    pub fn drop_watches(&self) {
        self.shared.lock().drops += 1;
        self.shared.notify();
    }

    /// Ends all watches in the middle of an object.
    pub fn cut_watches(&self) {
        self.shared.lock().cuts += 1;
        self.shared.notify();
    }

    /// Sends a bookmark on all watches, of a version at which nothing happened that they watch.
    pub fn bookmark(&self) {
        let mut state = self.shared.lock();
        state.store.version += 1;
        state.marks += 1;
        drop(state);
        self.shared.notify();
    }

    /// Forgets all that happened before now: who knows an older version only is told 410 Gone.
    pub fn expire(&self) {
        let mut state = self.shared.lock();
        state.store.version += 1;
        state.store.oldest = state.store.version;
    }

    /// Lets clients in with this token only. Watches go on, as those of a real server do.
    pub fn set_token(&self, token: &str) {
        token.clone_into(&mut self.shared.lock().token);
    }

    /// Writes another token into the file that kubeconfig and service account have, as a kubelet
    /// does before one expires.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_token(&self, token: &str) -> io::Result<()> {
        let account = self.folder.path().join(SERVICE_ACCOUNT);
        let new = account.join("token.new");
        fs::write(&new, token)?;
        fs::rename(new, account.join("token"))
    }

    /// Closes the port and all connections: the server is away.
    ///
    /// # Errors
    /// When the thread that serves has ended.
    pub fn close(&self) -> Result<()> {
        self.order(|done| Order::Open(false, done))
    }

    /// Opens the port again.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn open(&self) -> Result<()> {
        self.order(|done| Order::Open(true, done))
    }

    /// Closes all connections, as at a restart behind a load balancer.
    ///
    /// # Errors
    /// When the thread that serves has ended.
    pub fn disconnect(&self) -> Result<()> {
        self.order(Order::Disconnect)
    }

    fn order(&self, order: impl FnOnce(mpsc::Sender<io::Result<()>>) -> Order) -> Result<()> {
        let (done, wait) = mpsc::channel();
        self.orders
            .send(order(done))
            .ok()
            .context("the API server has ended")?;
        Ok(wait.recv().context("the API server has ended")??)
    }

    /// How many requests hold `text` in `METHOD /path?query VERSION`.
    #[must_use]
    pub fn requests(&self, text: &str) -> usize {
        let state = self.shared.lock();
        state
            .requests
            .iter()
            .filter(|request| request.contains(text))
            .count()
    }

    /// The first request with `text` in it.
    #[must_use]
    pub fn request(&self, text: &str) -> Option<String> {
        let state = self.shared.lock();
        state
            .requests
            .iter()
            .find(|request| request.contains(text))
            .cloned()
    }

    /// What was asked for, in the words of a ClusterRole: `discovery.k8s.io/endpointslices watch`.
    #[must_use]
    pub fn permissions(&self) -> BTreeSet<String> {
        let state = self.shared.lock();
        state
            .requests
            .iter()
            .filter_map(|line| serve::permission(line))
            .collect()
    }

    /// Forgets the requests of before.
    pub fn forget_requests(&self) {
        self.shared.lock().requests.clear();
    }

    /// Watches that go on.
    #[must_use]
    pub fn watches(&self) -> usize {
        self.shared.watches.load(Ordering::Relaxed)
    }

    /// Waits until so many watches go on.
    ///
    /// # Panics
    /// When it takes longer.
    pub fn wait_for_watches(&self, count: usize, timeout: Duration) {
        let began = Instant::now();
        while self.watches() != count {
            assert!(
                began.elapsed() < timeout,
                "{} watches instead of {count} after {timeout:?}",
                self.watches()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

async fn serve(
    bind: impl Fn() -> io::Result<TcpListener>,
    [acceptor, old]: [TlsAcceptor; 2],
    shared: Arc<Shared>,
    mut orders: tokio::sync::mpsc::UnboundedReceiver<Order>,
) {
    let listen = || -> io::Result<tokio::net::TcpListener> {
        let listener = bind()?;
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    };
    let mut listener = None;
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => tokio::net::TcpListener::accept(listener).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = orders.recv() => match order {
                None => return,
                Some(Order::Open(open, done)) => {
                    let result = match (open, &listener) {
                        (true, None) => listen().map(|new| listener = Some(new)),
                        (true, Some(_)) => Ok(()),
                        (false, _) => {
                            listener = None;
                            connections.shutdown().await;
                            Ok(())
                        }
                    };
                    let _ = done.send(result);
                }
                Some(Order::Disconnect(done)) => {
                    connections.shutdown().await;
                    let _ = done.send(Ok(()));
                }
            },
            accepted = accepted => {
                let Ok((stream, _)) = accepted else { continue };
                let http1_only = shared.lock().faults.http1_only;
                let acceptor = if http1_only { old.clone() } else { acceptor.clone() };
                let shared = shared.clone();
                connections.spawn(async move {
                    // A client that goes away in the middle is its own business.
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let answer = hyper::service::service_fn(move |request| serve::answer(request, shared.clone()));
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), answer)
                        .await;
                });
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}
