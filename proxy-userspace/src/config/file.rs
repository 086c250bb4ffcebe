//! The file of `--config`: one document of kube-proxy's kind and one of our own, either of which
//! may be missing.

use std::{env, fs, path::Path};

use anyhow::{Context, anyhow};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;

use super::{
    Settings,
    kube_proxy::{self, Idle, KubeProxyConfiguration, Notes},
    own::{self, ShuntConfiguration},
    review,
};
use crate::yaml::{self, Document, Mistake};

/// The head of a document.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Head {
    api_version: Option<String>,
    kind: Option<String>,
}

/// Writes what a file says into settings: kube-proxy's document, and then ours over it. Returns
/// warnings, one line each.
///
/// # Errors
/// One line that names file, line and field.
pub(super) fn read(path: &Path, to: &mut Settings) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("--config {}: cannot be read", path.display()))?;
    parse(
        &text,
        to,
        &path.display().to_string(),
        has_service_account(),
    )
}

/// The same for a file's text; says whether it is a pod's.
pub(super) fn parse(
    text: &str,
    to: &mut Settings,
    file: &str,
    in_pod: bool,
) -> anyhow::Result<Vec<String>> {
    let place = |line: Option<u64>| line.map_or(file.to_owned(), |line| format!("{file}:{line}"));
    let mut warnings = Vec::new();
    let (mut theirs, mut ours) = (None, None);
    for document in yaml::documents(text) {
        let error = |kind: &str, mistake: Mistake| {
            let of = [
                place(mistake.line).as_str(),
                kind,
                &mistake.field,
                &mistake.message,
            ]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(": ");
            anyhow!(of.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        warnings.extend(twice(&document, place));
        let head =
            serde_saphyr::from_str_with_options::<Option<Head>>(document.text, yaml::options())
                .map_err(|cause| error("", yaml::mistake(&cause, document, "")))?;
        let Some(head) = head else { continue };
        let version = head.api_version.unwrap_or_default();
        let kind = head.kind.unwrap_or_default();
        let twice = match (version.as_str(), kind.as_str()) {
            (kube_proxy::API_VERSION, kube_proxy::KIND) => {
                let read = read_document(document).map_err(|mistake| error(&kind, mistake))?;
                let mut idle = Idle::default();
                read.ignored
                    .iter()
                    .for_each(|(field, value)| idle.sort(field, value));
                warnings.extend(unknown(&idle.unknown, &document, &kind, place));
                let said = review::review(&read.tree);
                // One warning each.
                idle.unused
                    .retain(|field| said.iter().all(|(other, _)| other != field));
                let at = |field: &str| place(document.line_of(field));
                warnings.extend(
                    said.iter()
                        .map(|(field, what)| format!("{}: {kind}: {field}: {what}", at(field))),
                );
                theirs
                    .replace((read.parsed, idle.unused, document))
                    .is_some()
            }
            (own::API_VERSION, own::KIND) => {
                let read = read_document::<ShuntConfiguration>(document)
                    .map_err(|mistake| error(&kind, mistake))?;
                let fields: Vec<_> = read.ignored.into_iter().map(|(field, _)| field).collect();
                warnings.extend(unknown(&fields, &document, &kind, place));
                ours.replace(read.parsed).is_some()
            }
            _ => {
                let place = place(document.line_of("kind"));
                anyhow::bail!(
                    "{place}: `{kind}` of `{version}` is no configuration: give {} of {}, {} of {}, or both",
                    kube_proxy::KIND,
                    kube_proxy::API_VERSION,
                    own::KIND,
                    own::API_VERSION
                );
            }
        };
        anyhow::ensure!(
            !twice,
            "{}: a second {kind}: give one",
            place(document.line_of("kind"))
        );
    }
    if theirs.is_none() && ours.is_none() {
        warnings.push(format!(
            "{file}: says nothing, which kube-proxy refuses: defaults and flags hold"
        ));
    }
    if let Some((theirs, unused, document)) = theirs {
        let mut notes = Notes {
            unused,
            ..Notes::default()
        };
        KubeProxyConfiguration::write(theirs, to, &mut notes);
        let Notes {
            unused,
            warnings: said,
        } = notes;
        warnings.extend(said.iter().map(|(field, what)| {
            let place = place(document.line_of(field));
            format!("{place}: {}: {field}: {what}", kube_proxy::KIND)
        }));
        if !unused.is_empty() {
            warnings.push(format!(
                "{file}: {}: shunt has no use for {}: ignored",
                kube_proxy::KIND,
                unused.join(", ")
            ));
        }
    }
    if let Some(path) = to.kubeconfig.take_if(|path| in_pod && !path.exists()) {
        // kubeadm's lies in kube-proxy's ConfigMap, which may not be mounted, or go with
        // kube-proxy.
        warnings.push(format!(
            "{file}: {}: clientConnection.kubeconfig: there is no {}: using this pod's service account",
            kube_proxy::KIND,
            path.display()
        ));
    }
    if let Some(ours) = ours {
        ours.write(to);
    }
    Ok(warnings)
}

/// Whether this runs in a pod
/// (<https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/#directly-accessing-the-rest-api>).
fn has_service_account() -> bool {
    env::var_os("KUBERNETES_SERVICE_HOST").is_some()
        && Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()
}

/// A document that has been read.
struct Read<T> {
    parsed: T,
    /// Fields that the type does not have.
    ignored: Vec<(String, Value)>,
    /// All of it.
    tree: Value,
}

fn read_document<T: DeserializeOwned>(document: Document<'_>) -> Result<Read<T>, Mistake> {
    let mut ignored = Vec::new();
    let parsed = serde_saphyr::with_deserializer_from_str_with_options(
        document.text,
        yaml::options(),
        |deserializer| {
            // A question mark is the path's word for what may be null.
            serde_ignored::deserialize(deserializer, |path| {
                ignored.push(path.to_string().replace("?.", ""))
            })
        },
    );
    let mistake = |cause| yaml::mistake(&cause, document, "");
    let parsed = parsed.map_err(mistake)?;
    let tree: Value =
        serde_saphyr::from_str_with_options(document.text, yaml::options()).map_err(mistake)?;
    let with_value = |field: String| {
        let value = tree
            .pointer(&format!("/{}", field.replace('.', "/")))
            .cloned();
        (field, value.unwrap_or_default())
    };
    let ignored = ignored.into_iter().map(with_value).collect();
    Ok(Read {
        parsed,
        ignored,
        tree,
    })
}

/// Whether a field stands in a document twice.
fn twice(document: &Document<'_>, place: impl Fn(Option<u64>) -> String) -> Option<String> {
    let error =
        serde_saphyr::from_str_with_options::<IgnoredAny>(document.text, yaml::strict()).err()?;
    let mistake = yaml::mistake(&error, *document, "");
    let is_that = mistake.message.contains("duplicate");
    is_that.then(|| {
        format!(
            "{}: {}: stands there twice, the last one holds",
            place(mistake.line),
            mistake.field
        )
    })
}

/// A warning per field that is nobody's.
fn unknown(
    fields: &[String],
    document: &Document<'_>,
    kind: &str,
    place: impl Fn(Option<u64>) -> String,
) -> Vec<String> {
    let warning = |field: &String| {
        format!(
            "{}: {kind}: {field}: no such field, ignored",
            place(document.line_of(field))
        )
    };
    fields.iter().map(warning).collect()
}

impl Settings {
    /// These settings as a file of `--config` that says the same.
    ///
    /// # Errors
    /// A path that is no UTF-8 cannot be told.
    pub fn dump(&self) -> anyhow::Result<String> {
        let theirs = serde_saphyr::to_string(&KubeProxyConfiguration::from(self))?;
        let ours = serde_saphyr::to_string(&ShuntConfiguration::from(self))?;
        Ok(format!("{}\n---\n{}", theirs.trim_end(), ours.trim_end()))
    }

    /// The same as JSON (`/configz`): under kube-proxy's name what its document says, and under
    /// ours the rest.
    ///
    /// # Errors
    /// A path that is no UTF-8 cannot be told.
    pub fn configz(&self) -> anyhow::Result<String> {
        let group = |version: &'static str| version.split('/').next().unwrap_or(version);
        let documents = serde_json::json!({
            group(kube_proxy::API_VERSION): KubeProxyConfiguration::from(self),
            group(own::API_VERSION): ShuntConfiguration::from(self),
        });
        Ok(documents.to_string())
    }
}
