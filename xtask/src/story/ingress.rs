//! The piece of the demo that stands in for an ingress controller: from `Ingress`, `Secret` and
//! `Service` objects to a configuration of nginx. Not a controller: no status, no annotations, no
//! classes. A cluster brings a real one.
//!
//! <https://kubernetes.io/docs/concepts/services-networking/ingress/>

use std::{collections::BTreeMap, fmt::Write as _, fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::Value;

/// An nginx configuration, and what could not become part of it, one line each.
pub(super) struct Rendered {
    pub(super) config: String,
    pub(super) refused: Vec<String>,
}

/// Where the ports of Services are dialled: by `namespace/name`, then by port number; names of
/// ports beside.
pub(super) type Services = BTreeMap<String, Vec<ServicePort>>;

/// One port of a Service.
#[derive(Clone, Debug)]
pub(super) struct ServicePort {
    pub(super) name: String,
    pub(super) number: u16,
    pub(super) cluster_ip: SocketAddr,
}

#[derive(Deserialize)]
struct Ingress {
    metadata: Metadata,
    spec: Spec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    tls: Vec<Tls>,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tls {
    #[serde(default)]
    hosts: Vec<String>,
    secret_name: String,
}

#[derive(Deserialize)]
struct Rule {
    host: String,
    http: Option<Http>,
}

#[derive(Deserialize)]
struct Http {
    paths: Vec<HttpPath>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpPath {
    path: Option<String>,
    path_type: Option<String>,
    backend: Backend,
}

#[derive(Deserialize)]
struct Backend {
    service: BackendService,
}

#[derive(Deserialize)]
struct BackendService {
    name: String,
    port: BackendPort,
}

#[derive(Deserialize)]
struct BackendPort {
    number: Option<u16>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    data: BTreeMap<String, String>,
}

/// Renders all Ingresses among `objects` and writes certificates and keys into `folder`, which
/// nginx also gets as its own.
///
/// # Errors
///
/// When a file cannot be written; what is wrong in an object is in [`Rendered::refused`] and costs
/// only itself.
pub(super) fn render(objects: &[Value], services: &Services, folder: &Path) -> Result<Rendered> {
    let mut refused = Vec::new();
    let mut servers = String::new();
    for object in objects.iter().filter(|object| object["kind"] == "Ingress") {
        let ingress = match Ingress::deserialize(object) {
            Ok(ingress) => ingress,
            Err(error) => {
                let name = object["metadata"]["name"]
                    .as_str()
                    .unwrap_or("without a name");
                refused.push(format!("Ingress {name}: {error}"));
                continue;
            }
        };
        let namespace = ingress
            .metadata
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        let name = format!("Ingress {namespace}/{}", ingress.metadata.name);
        let mut certificates = BTreeMap::new();
        for (i, tls) in ingress.spec.tls.iter().enumerate() {
            match certificate(objects, &namespace, &tls.secret_name, folder) {
                Ok(()) => certificates.extend(
                    tls.hosts
                        .iter()
                        .map(|host| (host.clone(), tls.secret_name.clone())),
                ),
                Err(error) => refused.push(format!(
                    "{name}: spec.tls[{i}]: {error:#}; its hosts are served without TLS"
                )),
            }
        }
        for (r, rule) in ingress.spec.rules.iter().enumerate() {
            let mut locations = String::new();
            for (p, path) in rule.http.iter().flat_map(|http| &http.paths).enumerate() {
                match upstream(&path.backend.service, &namespace, services) {
                    Ok(upstream) => locations.push_str(&location(path, upstream)),
                    Err(error) => refused.push(format!(
                        "{name}: spec.rules[{r}].http.paths[{p}].backend.service: {error:#}"
                    )),
                }
            }
            let listen = match certificates.get(&rule.host) {
                None => "listen 80; listen [::]:80;".to_owned(),
                Some(secret) => format!(
                    "listen 80; listen [::]:80; listen 443 ssl; listen [::]:443 ssl;\n    \
                     ssl_certificate {0}/{namespace}.{secret}.crt; ssl_certificate_key {0}/{namespace}.{secret}.key;",
                    folder.display()
                ),
            };
            let host = &rule.host;
            let _ = writeln!(
                servers,
                "  server {{\n    {listen}\n    server_name {host};\n{locations}  }}"
            );
        }
    }
    Ok(Rendered {
        config: configuration(&servers, folder),
        refused,
    })
}

/// Writes a Secret's certificate and key where nginx finds them.
fn certificate(objects: &[Value], namespace: &str, name: &str, folder: &Path) -> Result<()> {
    let of = |object: &&Value| {
        object["kind"] == "Secret"
            && object["metadata"]["name"] == name
            && object["metadata"]["namespace"]
                .as_str()
                .unwrap_or("default")
                == namespace
    };
    let secret = objects
        .iter()
        .find(of)
        .with_context(|| format!("there is no Secret {namespace}/{name}"))?;
    let secret =
        Secret::deserialize(secret).with_context(|| format!("Secret {namespace}/{name}"))?;
    for (key, end) in [("tls.crt", "crt"), ("tls.key", "key")] {
        let text = secret.data.get(key).filter(|text| !text.is_empty());
        let text = text.with_context(|| {
            format!("Secret {namespace}/{name}: data[{key}] is missing or empty")
        })?;
        let bytes = BASE64_STANDARD.decode(text.trim());
        let bytes = bytes
            .with_context(|| format!("Secret {namespace}/{name}: data[{key}] is no base64"))?;
        fs::write(folder.join(format!("{namespace}.{name}.{end}")), bytes)?;
    }
    Ok(())
}

fn upstream(service: &BackendService, namespace: &str, services: &Services) -> Result<SocketAddr> {
    let full_name = format!("{namespace}/{}", service.name);
    let ports = services
        .get(&full_name)
        .with_context(|| format!("there is no Service {full_name} with a cluster IP"))?;
    let is_it = |port: &&ServicePort| match (&service.port.name, service.port.number) {
        (Some(name), _) => port.name == *name,
        (None, number) => Some(port.number) == number,
    };
    let found = ports.iter().find(is_it);
    found.map(|port| port.cluster_ip).with_context(|| {
        let wanted = service
            .port
            .name
            .clone()
            .or(service.port.number.map(|number| number.to_string()));
        format!(
            "Service {full_name} has no port {}",
            wanted.unwrap_or_else(|| "without number and name".to_owned())
        )
    })
}

/// `Prefix` matches whole elements: `/foo` is `/foo` and `/foo/bar`, and not `/foobar`. The longest
/// path wins, as in nginx.
fn location(path: &HttpPath, upstream: SocketAddr) -> String {
    let text = path.path.as_deref().unwrap_or("/");
    let pass = format!("{{ proxy_pass http://{upstream}; }}");
    let stem = text.trim_end_matches('/');
    match path.path_type.as_deref() {
        Some("Exact") => format!("    location = {text} {pass}\n"),
        _ if stem.is_empty() => format!("    location / {pass}\n"),
        _ => format!("    location = {stem} {pass}\n    location {stem}/ {pass}\n"),
    }
}

fn configuration(servers: &str, folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n  \
         log_format clients '$remote_addr $scheme $host \"$request\" $status $upstream_addr';\n  \
         access_log {folder}/access.log clients;\n  \
         client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n  \
         uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n  \
         proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr;\n  \
         server {{ listen 80 default_server; listen [::]:80 default_server; location / {{ return 404; }} }}\n\
         {servers}}}\n"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ingress(paths: Value) -> Value {
        json!({
            "kind": "Ingress", "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "tls": [{ "hosts": ["a.example"], "secretName": "cert" }],
                "rules": [{ "host": "a.example", "http": { "paths": paths } }],
            },
        })
    }

    fn services() -> Services {
        let port = |name: &str, number| ServicePort {
            name: name.to_owned(),
            number,
            cluster_ip: ([10, 96, 0, 1], number).into(),
        };
        [(
            "shop/web".to_owned(),
            vec![port("http", 80), port("admin", 81)],
        )]
        .into()
    }

    fn rendered(objects: &[Value]) -> Rendered {
        render(objects, &services(), tempfile::tempdir().unwrap().path()).unwrap()
    }

    #[test]
    fn paths_lead_to_cluster_ips_by_number_and_by_name() {
        let backend = |port: Value| json!({ "service": { "name": "web", "port": port } });
        let found = rendered(&[ingress(json!([
            { "path": "/", "pathType": "Prefix", "backend": backend(json!({ "number": 80 })) },
            { "path": "/foo/", "pathType": "Prefix", "backend": backend(json!({ "name": "admin" })) },
            { "path": "/bar", "pathType": "Exact", "backend": backend(json!({ "number": 81 })) },
        ]))]);
        for line in [
            "location / { proxy_pass http://10.96.0.1:80; }",
            "location = /foo { proxy_pass http://10.96.0.1:81; }",
            "location /foo/ { proxy_pass http://10.96.0.1:81; }",
            "location = /bar { proxy_pass http://10.96.0.1:81; }",
        ] {
            assert!(found.config.contains(line), "{line}: {}", found.config);
        }
    }

    #[test]
    fn what_is_wrong_costs_only_itself() {
        let path = |service: &str, port: Value| json!({ "path": "/", "backend": { "service": { "name": service, "port": port } } });
        let secret = |data: Value| json!({ "kind": "Secret", "metadata": { "name": "cert", "namespace": "shop" }, "data": data });
        let web = || path("web", json!({ "number": 80 }));
        for (objects, words) in [
            (
                vec![ingress(json!([web()]))],
                "Ingress shop/web: spec.tls[0]: there is no Secret shop/cert;",
            ),
            (
                vec![
                    ingress(json!([web()])),
                    secret(json!({ "tls.crt": "YQ==", "tls.key": "" })),
                ],
                "Secret shop/cert: data[tls.key] is missing or empty",
            ),
            (
                vec![ingress(json!([web()])), secret(json!({ "tls.crt": "???" }))],
                "Secret shop/cert: data[tls.crt] is no base64",
            ),
            (
                vec![ingress(json!([
                    path("nobody", json!({ "number": 80 })),
                    web()
                ]))],
                "spec.rules[0].http.paths[0].backend.service: there is no Service shop/nobody with a cluster IP",
            ),
            (
                vec![ingress(json!([
                    path("web", json!({ "name": "grpc" })),
                    web()
                ]))],
                "backend.service: Service shop/web has no port grpc",
            ),
            (
                vec![
                    json!({ "kind": "Ingress", "metadata": { "name": "odd" } }),
                    ingress(json!([web()])),
                ],
                "Ingress odd: ",
            ),
        ] {
            let found = rendered(&objects);
            assert!(
                found.refused.iter().any(|line| line.contains(words)),
                "{words}: {:?}",
                found.refused
            );
            assert!(
                found.config.contains("proxy_pass http://10.96.0.1:80"),
                "the rest serves"
            );
        }
    }
}
