//! The API server's address and credentials, read again when they no longer work.

use std::{
    net::IpAddr,
    path::Path,
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use http_body_util::BodyExt;
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::connect::HttpConnector,
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client,
    client::{Body, ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::time::timeout;
use tower::{
    BoxError,
    util::{MapErrLayer, option_layer},
};

use super::failure::{Failure, Status};
use crate::metrics::Metrics;

/// How long an answer may take until its first byte. The server itself gives up after a minute.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection that is silent for so long is asked whether it lives (HTTP/2), while requests or
/// watches wait on it.
const PING: Duration = Duration::from_secs(10);
/// It is given up when it has not answered by then.
const PONG: Duration = Duration::from_secs(10);
/// The most of an error's body that is read.
const MAX_STATUS: usize = 64 * 1024;

/// A client that follows its kubeconfig (or service account).
pub(super) struct Connection {
    kubeconfig: Option<std::path::PathBuf>,
    current: std::sync::RwLock<(Client, String)>,
    /// Rings when the server answers.
    answers: tokio::sync::Notify,
    metrics: Metrics,
}

impl Connection {
    /// Reads the credentials; connects with the first request.
    ///
    /// # Errors
    /// A configuration that cannot be used.
    pub(super) async fn new(kubeconfig: Option<&Path>, metrics: Metrics) -> anyhow::Result<Self> {
        Ok(Self {
            kubeconfig: kubeconfig.map(Path::to_owned),
            current: std::sync::RwLock::new(read(kubeconfig).await?),
            answers: tokio::sync::Notify::new(),
            metrics,
        })
    }

    /// The client of now.
    pub(super) fn client(&self) -> Client {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    fn server(&self) -> String {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone()
    }

    /// The server's address, if it has no name.
    pub(super) fn address(&self) -> Option<IpAddr> {
        let server: http::Uri = self.server().parse().ok()?;
        let host = server.host()?;
        host.trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .ok()
    }

    /// What to do about a server that cannot be reached.
    fn advice(&self, cause: &str) -> &'static str {
        match (self.kubeconfig.is_some(), cause.contains("certificate")) {
            (true, true) => "check the certificate authority in the kubeconfig",
            (true, false) => "check that the API server runs, and its address in the kubeconfig",
            (false, true) => "check that KUBERNETES_SERVICE_HOST stands in its certificate",
            (false, false) => {
                "check that the API server runs, and that KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT lead to it \
                 without a service proxy: on a new node a cluster IP does not (deploy/MIGRATION.md, step 2)"
            }
        }
    }

    /// Reads the credentials again: a client keeps the token of a file for a minute, certificates
    /// and addresses for ever.
    pub(super) async fn renew(&self) {
        match read(self.kubeconfig.as_deref()).await {
            Ok(new) => *self.current.write().unwrap_or_else(PoisonError::into_inner) = new,
            Err(error) => tracing::warn!("{error:#}; going on with what it said before"),
        }
    }

    /// Waits; less long when the server could not be reached and another request is answered
    /// meanwhile.
    pub(super) async fn pause(&self, time: Duration, was_unreachable: bool) {
        let answered = async {
            match was_unreachable {
                true => self.answers.notified().await,
                false => std::future::pending().await,
            }
        };
        let _ = timeout(time, answered).await;
    }

    /// Sends a request and returns the body of its answer, which has begun.
    ///
    /// # Errors
    /// An answer that is an error, or none.
    pub(super) async fn send(&self, request: http::Request<Vec<u8>>) -> Result<Body, Failure> {
        let unreachable = |cause: String| Failure::Unreachable {
            server: self.server(),
            advice: self.advice(&cause),
            cause,
        };
        let client = self.client();
        let method = request.method().clone();
        let asked = Instant::now();
        let answer = timeout(ANSWER, client.send(request.map(Body::from))).await;
        let code = answer.as_ref().ok().and_then(|answer| answer.as_ref().ok());
        let code = code.map(|answer| answer.status().as_u16());
        let server = self.server();
        let host = server.split_once("://").map_or(&*server, |(_, host)| host);
        self.metrics.requested(method.as_str(), host, code);
        let took = asked.elapsed().as_secs_f64();
        self.metrics.request_took(method.as_str(), host, took);
        let answer = answer
            .map_err(|_| unreachable(format!("no answer within {ANSWER:?}")))?
            .map_err(|error| unreachable(root_cause(&error)))?;
        if answer.status().is_success() {
            self.answers.notify_waiters();
            return Ok(answer.into_body());
        }
        let code = answer.status().as_u16();
        let header = answer.headers().get(http::header::RETRY_AFTER);
        let retry_after = header.and_then(|value| value.to_str().ok()?.parse().ok());
        let body = http_body_util::Limited::new(answer.into_body(), MAX_STATUS).collect();
        let body = match timeout(ANSWER, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            _ => bytes::Bytes::new(),
        };
        let mut status: Status = serde_json::from_slice(&body).unwrap_or_default();
        if status.code == 0 || status.message.is_empty() {
            status.message = http::StatusCode::from_u16(code)
                .ok()
                .and_then(|code| code.canonical_reason())
                .unwrap_or("no reason given")
                .to_owned();
        }
        status.code = code;
        Err(Failure::Status {
            status,
            retry_after: retry_after.map(Duration::from_secs),
        })
    }
}

/// A client and the server's address.
pub(super) async fn read(kubeconfig: Option<&Path>) -> anyhow::Result<(Client, String)> {
    let mut config = match kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| {
                anyhow!(
                    "--kubeconfig {}: cannot be used: {}",
                    path.display(),
                    first_line(&error)
                )
            })?;
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
            config.map_err(|error| {
                let cause = first_line(&error);
                anyhow!(
                    "--kubeconfig {}: its current context cannot be used: {cause}",
                    path.display()
                )
            })?
        }
        None => kube::Config::incluster()
            .context("no service account to reach the API server with: give --kubeconfig FILE outside a cluster")?,
    };
    // Retries are ours: they know what else fails, and wait as long as the server asks for.
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT);
    let server = config
        .cluster_url
        .to_string()
        .trim_end_matches('/')
        .to_owned();
    let client = client(config).with_context(|| {
        format!("the credentials for {server} cannot be used: check token and certificates")
    })?;
    Ok((client, server))
}

/// A client as kube builds it, which speaks HTTP/2 where the server offers it: all watches share a
/// connection, and one that is dead is noticed by its pings.
fn client(config: kube::Config) -> anyhow::Result<Client> {
    if config.proxy_url.is_some() {
        // Says that proxies are not supported.
        return Ok(Client::try_from(config)?);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(config.connect_timeout);
    let tls = HttpsConnectorBuilder::new()
        .with_tls_config(config.rustls_client_config()?)
        .https_or_http();
    let tls = match &config.tls_server_name {
        Some(name) => {
            tls.with_server_name_resolver(FixedServerNameResolver::new(name.clone().try_into()?))
        }
        None => tls,
    };
    let http = hyper_util::client::legacy::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(PING)
        .http2_keep_alive_timeout(PONG)
        .build::<_, Body>(tls.enable_all_versions().wrap_connector(tcp));
    Ok(ClientBuilder::new(http, &config.default_namespace)
        .with_layer(&config.extra_headers_layer()?)
        .with_layer(&MapErrLayer::new(BoxError::from))
        .with_layer(&option_layer(config.auth_layer()?))
        .with_layer(&config.base_uri_layer())
        .build())
}

/// Parsers go on with the text around the mistake.
fn first_line(error: &impl std::fmt::Display) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The innermost cause: outer layers of an HTTP client say little ("client error (Connect)").
pub(super) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut chain: Vec<String> = anyhow::Chain::new(error).map(ToString::to_string).collect();
    // Layers often repeat the one below.
    chain.dedup_by(|inner, outer| outer.contains(inner.as_str()));
    chain.into_iter().next_back().unwrap_or_default()
}
