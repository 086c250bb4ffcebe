//! Services and a Pod of a cluster, read once: for verbs that look at objects as the API server has them.

use std::path::Path;

use anyhow::{Context, anyhow};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, Client, api::ListParams};

use super::connection;

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
        let api: Api<Service> = Api::namespaced(client.clone(), namespace);
        let list = api.list(&ListParams::default()).await;
        let list = list.map_err(|error| refused(&error, &format!("list the Services of {namespace}"), &server))?;
        services.extend(list.items);
    }
    let pod = match (pod, namespaces.first()) {
        (Some(pod), Some(namespace)) => Some(read_pod(client, namespace, pod, &server).await?),
        _ => None,
    };
    Ok((services, pod))
}

async fn read_pod(client: Client, namespace: &str, name: &str, server: &str) -> anyhow::Result<Pod> {
    let api: Api<Pod> = Api::namespaced(client, namespace);
    let found = api.get_opt(name).await;
    let found = found.map_err(|error| refused(&error, &format!("read the Pod {namespace}/{name}"), server))?;
    found.with_context(|| format!("--pod {name}: there is no such Pod in namespace {namespace}"))
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
