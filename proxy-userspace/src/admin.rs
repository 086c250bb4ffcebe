//! What the agent answers about itself, as kube-proxy does (`proxy_health.go` in its `healthcheck` package).
//!
//! On the healthz address: `/healthz` tells load balancers whether to send new connections to this node, so it fails while the
//! Node is being taken out of the cluster too; `/livez` tells the kubelet whether the agent does its work, whatever becomes of
//! the Node; `/readyz` (not kube-proxy's) whether this very agent's datapath is live, so that a rolling update does not go on to
//! the next node before.
//!
//! On the metrics address: `/metrics`, `/proxyMode`, and a `/healthz` that says no more than that somebody answers.
//!
//! Methods make no difference, as with kube-proxy. Both addresses speak HTTP without asking who is there.

use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, StatusCode};
use k8s_openapi::jiff::Timestamp;

use crate::{
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
) -> anyhow::Result<()> {
    let listening = Listening {
        subject: "--metrics-bind-address".to_owned(),
        trouble: Box::new(|message| tracing::warn!("--metrics-bind-address: {message}")),
        address,
        both_families: true,
        hard_fail,
        consequence: "nobody can read this agent's metrics",
    };
    let answer = move |request: hyper::Request<_>| {
        let (path, exporter) = (request.uri().path().to_owned(), exporter.clone());
        async move { answer_metrics(&path, exporter).await }
    };
    http::serve(listening, connections, |_| true, answer).await
}

async fn answer_metrics(path: &str, exporter: Exporter) -> Response<Full<Bytes>> {
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
        // An API server that is away does not come back by ending agents: a start may take as long as it takes.
        "/livez" => (keeps_up, None),
        "/readyz" => (keeps_up && health.is_live(), None),
        _ => return http::response(StatusCode::NOT_FOUND, PLAIN, NOT_FOUND.to_owned()),
    };
    let now = SystemTime::now();
    // kube-proxy's: of one that is healthy the last update is always recent, whether or not something changed.
    let updated = match healthy {
        true => now,
        false => health.last_programmed().unwrap_or(UNIX_EPOCH),
    };
    let status = match healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut body = format!(
        r#"{{"lastUpdated": "{}","currentTime": "{}""#,
        rfc3339(updated),
        rfc3339(now)
    );
    if let Some(eligible) = node_eligible {
        body.push_str(&format!(r#", "nodeEligible": {eligible}"#));
    }
    body.push('}');
    http::response(status, "application/json", body)
}

fn rfc3339(time: SystemTime) -> Timestamp {
    // Beyond the year 9999 only.
    Timestamp::try_from(time).unwrap_or(Timestamp::MAX)
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

    /// A2: kube-proxy's body, with times that anybody can parse, and its headers.
    #[test]
    fn the_answer_is_kube_proxys() {
        let health = Health::default();
        let bad = answer_health("/healthz", &health);
        assert!(
            bad.body()
                .starts_with(r#"{"lastUpdated": "1970-01-01T00:00:00Z","currentTime": "20"#),
            "{bad:?}"
        );
        health.goes_live();
        health.set_node_leaves(true);
        let body: serde_json::Value = serde_json::from_str(answer_health("/healthz", &health).body()).unwrap();
        assert_eq!(body["nodeEligible"], false);
        let good = answer_health("/livez", &health);
        assert_eq!(good.headers()["content-type"], "application/json");
        assert_eq!(good.headers()["x-content-type-options"], "nosniff");
        let body: serde_json::Value = serde_json::from_str(good.body()).unwrap();
        assert_eq!(body["lastUpdated"], body["currentTime"]);
        let time: Timestamp = body["currentTime"].as_str().unwrap().parse().unwrap();
        assert!(Timestamp::now().duration_since(time).as_secs() < 60);
        assert_eq!(body["nodeEligible"], serde_json::Value::Null);
    }
}
