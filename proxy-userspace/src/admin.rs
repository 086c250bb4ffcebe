//! What the agent answers about itself, as kube-proxy does (`proxy_health.go` in its `healthcheck`
//! package).
//!
//! On the healthz address: `/healthz` tells load balancers whether to send new connections to this
//! node, so it fails while the Node is being taken out of the cluster too; `/livez` tells the
//! kubelet whether the agent does its work, whatever becomes of the Node; `/readyz` (not
//! kube-proxy's) whether this very agent's datapath is live, so that a rolling update does not go
//! on to the next node before.
//!
//! On the metrics address: `/metrics`, `/proxyMode`, a `/healthz` that says no more than that
//! somebody answers, and for people `/configz`, `/flagz` and `/statusz`, which kube-proxy writes as
//! it pleases from one release to the next. Nothing there changes anything, and nothing there is a
//! secret: of credentials only the files' names are told.
//!
//! Methods make no difference, as with kube-proxy. Both addresses speak HTTP without asking who is
//! there.

use std::{env, net::SocketAddr, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, StatusCode};
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::{
    config::Settings,
    connections::Connections,
    health::Health,
    http::{self, Listening},
    metrics::{self, Exporter, Metrics},
};

/// Go's `http.NotFound`.
const NOT_FOUND: &str = "404 page not found\n";
/// Of answers in words.
const PLAIN: &str = "text/plain; charset=utf-8";

/// Answers health checks until it is dropped.
///
/// # Errors
/// With `hard_fail`, when it cannot listen.
pub async fn serve_health(
    address: SocketAddr,
    hard_fail: bool,
    connections: Connections,
    health: Health,
    metrics: Metrics,
) -> anyhow::Result<()> {
    let listening = Listening {
        subject: "--healthz-bind-address".to_owned(),
        trouble: Box::new(|message| tracing::warn!("--healthz-bind-address: {message}")),
        address,
        both_families: true,
        hard_fail,
        consequence: "load balancers and probes take this node for dead",
    };
    let answer = move |request: hyper::Request<_>| {
        let path = request.uri().path();
        let response = answer_health(path, &health);
        match path {
            "/healthz" => metrics.answered_healthz(response.status().as_u16()),
            "/livez" => metrics.answered_livez(response.status().as_u16()),
            _ => {}
        }
        async move { response }
    };
    http::serve(listening, connections, |_| true, answer).await
}

/// Answers scrapes until it is dropped.
///
/// # Errors
/// With `hard_fail`, when it cannot listen.
pub async fn serve_metrics(
    address: SocketAddr,
    hard_fail: bool,
    connections: Connections,
    exporter: Exporter,
    pages: Pages,
) -> anyhow::Result<()> {
    let pages = Arc::new(pages);
    let listening = Listening {
        subject: "--metrics-bind-address".to_owned(),
        trouble: Box::new(|message| tracing::warn!("--metrics-bind-address: {message}")),
        address,
        both_families: true,
        hard_fail,
        consequence: "nobody can read this agent's metrics",
    };
    let answer = move |request: hyper::Request<_>| {
        let (path, exporter, pages) = (
            request.uri().path().to_owned(),
            exporter.clone(),
            pages.clone(),
        );
        async move { answer_metrics(&path, exporter, &pages).await }
    };
    http::serve(listening, connections, |_| true, answer).await
}

/// What people may look up about a running agent.
#[derive(Clone, Debug)]
pub struct Pages {
    configz: String,
    flagz: String,
    started: SystemTime,
}

impl Pages {
    /// Of an agent with these settings, which starts now.
    ///
    /// # Errors
    /// A path in the settings that is no UTF-8 cannot be told.
    pub fn new(settings: &Settings) -> anyhow::Result<Self> {
        let args: Vec<_> = env::args().skip(1).collect();
        Ok(Self {
            configz: settings.configz()?,
            flagz: flagz(&args),
            started: SystemTime::now(),
        })
    }

    fn statusz(&self) -> String {
        let up = self.started.elapsed().unwrap_or_default().as_secs();
        let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
        let paths = METRICS_PATHS.join(" ");
        format!(
            "\nshunt statusz\n{NOT_FOR_MACHINES}\n\nStarted: {}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\n\
             Binary version: {}\nPaths: {paths}\n",
            rfc3339(self.started),
            env!("CARGO_PKG_VERSION"),
        )
    }
}

/// What is answered on the metrics address.
const METRICS_PATHS: [&str; 6] = [
    "/configz",
    "/flagz",
    "/healthz",
    "/metrics",
    "/proxyMode",
    "/statusz",
];
/// Kubernetes' components say the same.
const NOT_FOR_MACHINES: &str =
    "Warning: this page is for debugging, and its format may change at any time.";

/// The command line, a flag a line.
fn flagz(args: &[String]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for arg in args {
        match (arg.strip_prefix("--"), lines.last_mut()) {
            (Some(flag), _) => lines.push(flag.to_owned()),
            // The value of the flag before it.
            (None, Some(line)) => {
                line.push(if line.contains('=') { ',' } else { '=' });
                line.push_str(arg);
            }
            // The verb.
            (None, None) => {}
        }
    }
    format!(
        "\nshunt flagz\n{NOT_FOR_MACHINES}\n\n{}\n",
        lines.join("\n")
    )
}

async fn answer_metrics(path: &str, exporter: Exporter, pages: &Pages) -> Response<Full<Bytes>> {
    let response: Response<Bytes> = match path {
        "/metrics" => match exporter.scrape().await {
            Some(text) => http::response(StatusCode::OK, metrics::CONTENT_TYPE, text),
            None => http::response(
                StatusCode::INTERNAL_SERVER_ERROR,
                PLAIN,
                "the agent's log says why\n".into(),
            ),
        },
        "/healthz" => http::response(StatusCode::OK, PLAIN, "ok".into()),
        "/configz" => http::response(
            StatusCode::OK,
            "application/json",
            pages.configz.clone().into(),
        ),
        "/flagz" => http::response(StatusCode::OK, PLAIN, pages.flagz.clone().into()),
        "/statusz" => http::response(StatusCode::OK, PLAIN, pages.statusz().into()),
        "/proxyMode" => http::response(StatusCode::OK, PLAIN, "shunt".into()),
        _ => http::response(StatusCode::NOT_FOUND, PLAIN, NOT_FOUND.into()),
    };
    response.map(Full::new)
}

fn answer_health(path: &str, health: &Health) -> Response<String> {
    let keeps_up = health.keeps_up();
    let node_stays = health.node_stays();
    let (healthy, node_eligible) = match path {
        // A node without a datapath would drop what it is sent; the one of an earlier agent is one.
        "/healthz" => (keeps_up && health.serves() && node_stays, Some(node_stays)),
        // An API server that is away does not come back by ending agents: a start may take as long
        // as it takes.
        "/livez" => (keeps_up, None),
        "/readyz" => (keeps_up && health.is_live(), None),
        _ => return http::response(StatusCode::NOT_FOUND, PLAIN, NOT_FOUND.to_owned()),
    };
    let now = SystemTime::now();
    let programmed = health.last_programmed();
    let proxier = |healthy| {
        programmed.map(|time| Proxier {
            last_updated: rfc3339(time),
            healthy,
        })
    };
    // One path to the maps for both families.
    let status = Status {
        ipv4: proxier(keeps_up),
        ipv6: proxier(keeps_up),
    };
    let body = Body {
        // kube-proxy's: of one that is healthy the last update is always recent, whether or not
        // something changed.
        last_updated: match (healthy, programmed) {
            (true, _) => rfc3339(now),
            (false, Some(time)) => rfc3339(time),
            (false, None) => NEVER.to_owned(),
        },
        current_time: rfc3339(now),
        node_eligible,
        healthy: keeps_up,
        status: programmed.map(|_| status),
    };
    let status = match healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    // Neither maps with odd keys nor a writer that fails.
    let body = serde_json::to_string(&body).unwrap_or_default();
    http::response(status, "application/json", body)
}

/// Go's time when there is none.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// `ProxyHealth` of kube-proxy, with its fields in their order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    /// Whether changes come into the maps in time, whatever becomes of the Node.
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
}

#[derive(Serialize)]
struct Status {
    #[serde(rename = "IPv4")]
    ipv4: Option<Proxier>,
    #[serde(rename = "IPv6")]
    ipv6: Option<Proxier>,
}

/// `ProxierHealth`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Proxier {
    last_updated: String,
    healthy: bool,
}

fn rfc3339(time: SystemTime) -> String {
    // Beyond the year 9999 only.
    Timestamp::try_from(time)
        .unwrap_or(Timestamp::MAX)
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(path: &str, health: &Health) -> u16 {
        answer_health(path, health).status().as_u16()
    }

    fn all(health: &Health) -> [u16; 3] {
        ["/healthz", "/livez", "/readyz"].map(|path| status(path, health))
    }

    /// A2: who is told what, from the start to the Node's end.
    #[test]
    fn each_path_has_its_own_question() {
        let health = Health::default();
        assert_eq!(
            all(&health),
            [503, 200, 503],
            "no datapath yet, and that is nobody's fault"
        );
        health.takes_over();
        assert_eq!(all(&health), [200, 200, 503], "an earlier agent's goes on");
        health.goes_live();
        assert_eq!(all(&health), [200; 3]);
        health.set_node_leaves(true);
        assert_eq!(all(&health), [503, 200, 200]);
        health.set_node_leaves(false);
        assert_eq!(all(&health), [200; 3]);
        assert_eq!(status("/", &health), 404);
        assert_eq!(status("/healthz/", &health), 404);
    }

    /// A2: kube-proxy's body (1.37), with times that anybody can parse, and its headers.
    #[test]
    fn the_answer_is_kube_proxys() {
        let text = |path: &str, health: &Health| answer_health(path, health).body().clone();
        let body = |path: &str, health: &Health| -> serde_json::Value {
            serde_json::from_str(&text(path, health)).unwrap()
        };
        let health = Health::default();
        let bad = text("/healthz", &health);
        assert!(
            bad.starts_with(r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"20"#),
            "{bad}"
        );
        assert!(
            bad.ends_with(r#","nodeEligible":true,"healthy":true}"#),
            "{bad}"
        );
        health.queued();
        health.programmed();
        health.goes_live();
        health.set_node_leaves(true);
        let leaving = body("/healthz", &health);
        assert_eq!(
            (&leaving["nodeEligible"], &leaving["healthy"]),
            (&false.into(), &true.into())
        );
        for family in ["IPv4", "IPv6"] {
            assert_eq!(leaving["status"][family]["healthy"], true);
            assert_eq!(
                leaving["status"][family]["lastUpdated"],
                leaving["lastUpdated"]
            );
        }
        let good = answer_health("/livez", &health);
        assert_eq!(good.headers()["content-type"], "application/json");
        assert_eq!(good.headers()["x-content-type-options"], "nosniff");
        let good = body("/livez", &health);
        assert_eq!(good["lastUpdated"], good["currentTime"]);
        let time: Timestamp = good["currentTime"].as_str().unwrap().parse().unwrap();
        assert!(Timestamp::now().duration_since(time).as_secs() < 60);
        assert_eq!(good["nodeEligible"], serde_json::Value::Null);
        assert_eq!(good["healthy"], true);
    }

    #[test]
    fn flags_are_a_line_each() {
        let args = [
            "run",
            "--xdp",
            "off",
            "--devices",
            "a",
            "b",
            "--config=/c",
            "--dump-config",
        ]
        .map(str::to_owned);
        let page = flagz(&args);
        assert!(
            page.ends_with("\n\nxdp=off\ndevices=a,b\nconfig=/c\ndump-config\n"),
            "{page}"
        );
    }
}
