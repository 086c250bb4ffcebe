//! Services and a Pod of a cluster, read once: for verbs that look at objects as the API server has
//! them.

use std::path::Path;

use anyhow::{Context, anyhow};
use kube::{
    Client,
    api::{GetParams, ListParams},
    core::Request,
};
use serde::Deserialize;

use super::{
    super::kinds::{Pod, Service},
    connection,
};

/// A list.
#[derive(Deserialize)]
struct List<T> {
    // null for an empty list.
    items: Option<Vec<T>>,
}

/// The Services of some namespaces, and the Pod `pod` of the first of these.
///
/// # Errors
/// One line that says what cannot be read, and what to do.
pub async fn snapshot(
    kubeconfig: Option<&Path>,
    namespaces: &[&str],
    pod: Option<&str>,
) -> anyhow::Result<(Vec<Service>, Option<Pod>)> {
    let (client, server) = connection::read(kubeconfig).await?;
    let mut services = Vec::new();
    for namespace in namespaces {
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/services"));
        let request = request
            .list(&ListParams::default())
            .context("cannot ask for a list")?;
        let list = client.request::<List<Service>>(request).await;
        let list = list.map_err(|error| {
            refused(
                &error,
                &format!("list the Services of {namespace}"),
                &server,
            )
        })?;
        services.extend(list.items.into_iter().flatten());
    }
    let pod = match (pod, namespaces.first()) {
        (Some(pod), Some(namespace)) => Some(read_pod(client, namespace, pod, &server).await?),
        _ => None,
    };
    Ok((services, pod))
}

async fn read_pod(
    client: Client,
    namespace: &str,
    name: &str,
    server: &str,
) -> anyhow::Result<Pod> {
    let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods"));
    let request = request
        .get(name, &GetParams::default())
        .context("cannot ask for a Pod")?;
    match client.request::<Pod>(request).await {
        Ok(pod) => Ok(pod),
        Err(kube::Error::Api(status)) if status.code == 404 => Err(anyhow!(
            "--pod {name}: there is no such Pod in namespace {namespace}"
        )),
        Err(error) => Err(refused(
            &error,
            &format!("read the Pod {namespace}/{name}"),
            server,
        )),
    }
}

fn refused(error: &kube::Error, what: &str, server: &str) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 403 => anyhow!(
            "{server}: may not {what}: {}; give --kubeconfig of somebody who may, or without --pod give --enable-service-links",
            status.message
        ),
        kube::Error::Api(status) => anyhow!("{server}: cannot {what}: {}", status.message),
        error => anyhow!("{server}: cannot {what}: {}", connection::root_cause(error)),
    }
}
