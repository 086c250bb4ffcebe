//! As much of kustomize as `deploy/` uses, so that what an operator applies can be looked at
//! wherever the tests run. A field that this does not know is an error, and where `kubectl` is
//! installed its result is compared.
//!
//! Rules: <https://kubectl.docs.kubernetes.io/references/kustomize/kustomization/>.

use std::{fs, path::Path};

use json_patch::Patch;
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    components: Vec<String>,
    #[serde(default)]
    config_map_generator: Vec<Generator>,
    #[serde(default)]
    generator_options: Value,
    #[serde(default)]
    patches: Vec<PatchFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Generator {
    name: String,
    namespace: String,
    #[serde(default)]
    behavior: Option<String>,
    files: Vec<String>,
    #[serde(default)]
    options: Options,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Options {
    #[serde(default)]
    labels: Map<String, Value>,
    #[serde(default)]
    disable_name_suffix_hash: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PatchFile {
    path: String,
    target: Target,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

/// The objects that `kubectl apply -k` of this folder applies; generated names come without their
/// hash.
pub(crate) fn resolve(folder: &Path) -> Vec<Value> {
    let mut objects = Vec::new();
    resolve_into(folder, &mut objects, "Kustomization");
    objects
}

fn resolve_into(folder: &Path, objects: &mut Vec<Value>, kind: &str) {
    let file = folder.join("kustomization.yaml");
    let it: Kustomization =
        serde_saphyr::from_str(&read(&file)).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    assert_eq!(it.kind, kind, "{}", file.display());
    let version = if kind == "Component" {
        "v1alpha1"
    } else {
        "v1beta1"
    };
    assert_eq!(
        it.api_version,
        format!("kustomize.config.k8s.io/{version}"),
        "{}",
        file.display()
    );
    assert_eq!(
        it.generator_options,
        Value::Null,
        "{}: not resolved here",
        file.display()
    );
    for resource in &it.resources {
        let path = folder.join(resource);
        let found = if path.is_dir() {
            resolve(&path)
        } else {
            documents(&path)
        };
        for object in found {
            let id = identity(&object);
            assert!(
                !objects.iter().any(|o| identity(o) == id),
                "{}: {id} is there already",
                file.display()
            );
            objects.push(object);
        }
    }
    for generator in &it.config_map_generator {
        generate(folder, generator, objects);
    }
    // A component changes what has been gathered so far.
    for component in &it.components {
        resolve_into(&folder.join(component), objects, "Component");
    }
    for patch in &it.patches {
        let path = folder.join(&patch.path);
        let changes: Patch = serde_saphyr::from_str(&read(&path))
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut targets = objects.iter_mut().filter(|object| {
            object["kind"] == patch.target.kind.as_str()
                && object["metadata"]["name"] == patch.target.name.as_str()
        });
        let target = targets
            .next()
            .unwrap_or_else(|| panic!("{}: no such object", path.display()));
        json_patch::patch(target, &changes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

fn generate(folder: &Path, generator: &Generator, objects: &mut Vec<Value>) {
    let data: Map<String, Value> = generator
        .files
        .iter()
        .map(|file| {
            let (key, path) = file.split_once('=').unwrap_or_else(|| {
                let name = Path::new(file).file_name().and_then(|name| name.to_str());
                (name.unwrap(), file.as_str())
            });
            (key.to_owned(), read(&folder.join(path)).into())
        })
        .collect();
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": generator.name, "namespace": generator.namespace},
        "data": data,
    });
    if !generator.options.labels.is_empty() {
        object["metadata"]["labels"] = generator.options.labels.clone().into();
    }
    // Hashes are left out here in any case.
    let _ = generator.options.disable_name_suffix_hash;
    let existing = objects
        .iter_mut()
        .find(|other| identity(other) == identity(&object));
    match (generator.behavior.as_deref(), existing) {
        (None, None) => objects.push(object),
        (Some("replace"), Some(existing)) => *existing = object,
        (behavior, _) => panic!(
            "{}: ConfigMap {}: {behavior:?}",
            folder.display(),
            generator.name
        ),
    }
}

/// The objects of a file.
pub(crate) fn documents(path: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `Kind namespace/name`.
pub(crate) fn identity(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let metadata = &object["metadata"];
    format!(
        "{} {}/{}",
        text(&object["kind"]),
        text(&metadata["namespace"]),
        text(&metadata["name"])
    )
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
