//! The manifests of `deploy/`, as an operator applies them: resolved, checked against the types of
//! the Kubernetes API and against the agent that they start.

mod kustomize;
mod strict;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, NodeAffinity, NodeSelectorRequirement, PodSpec},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// What `kubectl apply -k` takes.
const APPLIED: [&str; 4] = [
    ".",
    "overlays/instead-of-kube-proxy",
    "overlays/beside-kube-proxy",
    "overlays/node-by-node",
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn objects(folder: &str) -> Vec<Value> {
    kustomize::resolve(&deploy().join(folder))
}

fn object<T: DeserializeOwned>(folder: &str, kind: &str) -> T {
    let mut found: Vec<Value> = objects(folder)
        .into_iter()
        .filter(|object| object["kind"] == kind)
        .collect();
    assert_eq!(found.len(), 1, "{folder}: {kind}");
    serde_json::from_value(found.remove(0)).unwrap()
}

fn pod(folder: &str) -> PodSpec {
    object::<DaemonSet>(folder, "DaemonSet")
        .spec
        .unwrap()
        .template
        .spec
        .unwrap()
}

/// The YAML files below a folder.
fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(yaml_files(&path));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            files.push(path);
        }
    }
    files
}

#[test]
fn every_object_is_what_the_api_has() {
    let mut count = 0;
    for folder in APPLIED {
        for object in objects(folder) {
            let found = strict::mistakes(&object);
            assert!(
                found.is_empty(),
                "{folder}: {}: {found:#?}",
                kustomize::identity(&object)
            );
            count += 1;
        }
    }
    assert_eq!(count, 5 * APPLIED.len());
    for file in yaml_files(&deploy().join("dev")) {
        for object in kustomize::documents(&file) {
            let found = strict::mistakes(&object);
            assert!(
                found.is_empty(),
                "{}: {}: {found:#?}",
                file.display(),
                kustomize::identity(&object)
            );
        }
    }
}

/// The check itself: what `kubectl` would only warn about, or drop.
#[test]
fn mistakes_are_found() {
    let mut daemonset = objects(".")
        .into_iter()
        .find(|object| object["kind"] == "DaemonSet")
        .unwrap();
    let container = "/spec/template/spec/containers/0";
    let mut at = |path: &str, value: Value| {
        let before = daemonset.clone();
        *daemonset.pointer_mut(path).unwrap() = value;
        let found = strict::mistakes(&daemonset);
        daemonset = before;
        found.join("; ")
    };
    assert_eq!(
        at(
            "/spec/template/spec/containers/0/securityContext",
            json!({"capabilites": {}})
        ),
        ".spec.template.spec.containers[0].securityContext.capabilites: no such field"
    );
    assert!(at(&format!("{container}/args"), json!("run")).contains("invalid type"));
    assert!(at("/kind", json!("Daemonset")).contains("no type is known for apps/v1 Daemonset"));
}

/// The resolver of these tests and kustomize itself agree.
#[test]
fn kubectl_resolves_the_same() {
    let by_identity = |objects: Vec<Value>| -> BTreeMap<String, Value> {
        objects
            .into_iter()
            .map(|object| (kustomize::identity(&object), object))
            .collect()
    };
    for folder in APPLIED {
        let output = match Command::new("kubectl")
            .arg("kustomize")
            .arg(deploy().join(folder))
            .output()
        {
            Ok(output) => output,
            Err(error) => shunt_lab::skip!("kubectl: {error}"),
        };
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut text = String::from_utf8(output.stdout).unwrap();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        // Generated names end with a hash of ten characters.
        for map in objects
            .iter()
            .filter(|object| object["kind"] == "ConfigMap")
        {
            let hashed = map["metadata"]["name"].as_str().unwrap();
            if let Some((name, hash)) = hashed.rsplit_once('-').filter(|(_, hash)| hash.len() == 10)
            {
                assert!(
                    text.matches(hashed).count() > 1,
                    "nobody uses {name}-{hash}"
                );
                text = text.replace(hashed, name);
            }
        }
        let theirs = by_identity(serde_saphyr::from_multiple(&text).unwrap());
        let ours = by_identity(self::objects(folder));
        assert_eq!(
            ours.keys().collect::<Vec<_>>(),
            theirs.keys().collect::<Vec<_>>(),
            "{folder}"
        );
        for (identity, object) in ours {
            assert_eq!(object, theirs[&identity], "{folder}: {identity}");
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    for folder in APPLIED {
        let daemonset: DaemonSet = object(folder, "DaemonSet");
        let account = &objects(folder)
            .into_iter()
            .find(|object| object["kind"] == "ServiceAccount")
            .unwrap()["metadata"];
        let role: ClusterRole = object(folder, "ClusterRole");
        let binding: ClusterRoleBinding = object(folder, "ClusterRoleBinding");
        assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
        let subject = &binding.subjects.unwrap()[0];
        assert_eq!(account["name"], subject.name.as_str());
        assert_eq!(account["namespace"], subject.namespace.as_deref().unwrap());
        assert_eq!(daemonset.metadata.namespace, subject.namespace);

        let spec = daemonset.spec.unwrap();
        assert_eq!(
            spec.selector.match_labels,
            spec.template.metadata.unwrap().labels,
            "{folder}"
        );
        let pod = spec.template.spec.unwrap();
        assert_eq!(
            pod.service_account_name.as_deref(),
            Some(subject.name.as_str())
        );
        let agent = &pod.containers[0];
        let volumes = pod.volumes.unwrap();
        for mount in agent.volume_mounts.as_ref().unwrap() {
            assert!(
                volumes.iter().any(|volume| volume.name == mount.name),
                "{}",
                mount.name
            );
        }
        for map in volumes
            .iter()
            .filter_map(|volume| volume.config_map.as_ref())
        {
            let is_it = |object: &Value| {
                object["kind"] == "ConfigMap"
                    && object["metadata"]["name"] == map.name
                    && object["metadata"]["namespace"] == subject.namespace.as_deref().unwrap()
            };
            let there = objects(folder).iter().any(is_it);
            assert!(
                there || map.optional == Some(true),
                "{folder}: ConfigMap {}",
                map.name
            );
        }
    }
}

/// The agent itself takes the arguments: those before `--help` are read first, and a wrong one is
/// an error.
#[test]
fn the_agent_takes_its_arguments() {
    let run = |args: &[String]| {
        let output = Command::new(env!("CARGO_BIN_EXE_shunt"))
            .args(args)
            .arg("--help")
            .output()
            .unwrap();
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    for folder in APPLIED {
        let agent = pod(folder).containers.remove(0);
        let args: Vec<String> = agent.args.unwrap();
        assert_eq!(run(&args), (true, String::new()), "{folder}: {args:?}");
        assert!(!run(&[args, vec!["--no-such-setting".to_owned()]].concat()).0);
        let root = agent
            .volume_mounts
            .iter()
            .flatten()
            .find(|mount| mount.name == "cgroup")
            .unwrap();
        let setting = format!("--cgroup-root={}", root.mount_path);
        assert!(
            pod(folder).containers[0]
                .args
                .as_ref()
                .unwrap()
                .contains(&setting),
            "{folder}: {setting}"
        );
    }
    let named = |folder: &str| {
        pod(folder).containers[0]
            .args
            .as_ref()
            .unwrap()
            .contains(&"--service-proxy-name=shunt".to_owned())
    };
    assert_eq!(
        APPLIED.map(named),
        [false, false, true, false],
        "beside kube-proxy, and only there"
    );
}

/// The agent takes the mounted configuration and kubeadm's in its place, and has nothing to say
/// about either.
#[test]
fn the_agent_takes_its_configuration() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let comes_to = |text: &str| {
        fs::write(file.path(), text).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_shunt"))
            .args(["run", "--dump-config", "--config"])
            .arg(file.path())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{text}");
        assert!(output.status.success());
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(std::str::from_utf8(&output.stdout).unwrap()).unwrap();
        let [theirs, ours] = &documents[..] else {
            panic!("{documents:?}")
        };
        (theirs.clone(), ours.clone())
    };
    let kubeadm = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/config/kubeadm.yaml"
    );
    let (kubeadms, defaults) = comes_to(&fs::read_to_string(kubeadm).unwrap());
    for folder in APPLIED {
        let map: ConfigMap = object(folder, "ConfigMap");
        let data = map.data.unwrap();
        let [(key, text)] = &data.iter().collect::<Vec<_>>()[..] else {
            panic!("{folder}: {data:?}")
        };
        let (theirs, ours) = comes_to(text);
        assert_eq!(ours, defaults, "{folder}: nothing but defaults");
        let ports = match folder {
            "overlays/beside-kube-proxy" => ("0.0.0.0:10356", "127.0.0.1:10349"),
            _ => ("0.0.0.0:10256", "127.0.0.1:10249"),
        };
        assert_eq!(
            (&theirs["healthzBindAddress"], &theirs["metricsBindAddress"]),
            (&json!(ports.0), &json!(ports.1)),
            "{folder}"
        );

        let agent = pod(folder).containers.remove(0);
        let mounted_at = |name: &str| {
            let mounts = agent.volume_mounts.iter().flatten();
            mounts
                .filter(|mount| mount.name == name)
                .map(|mount| mount.mount_path.clone())
                .next()
                .unwrap()
        };
        let flag = format!("--config={}/{key}", mounted_at("config"));
        assert!(
            agent.args.as_ref().unwrap().contains(&flag),
            "{folder}: {flag}"
        );
        // kubeadm's file is the key `kubeconfig.conf` of the ConfigMap that has the configuration.
        let kubeconfig = format!("{}/kubeconfig.conf", mounted_at("kube-proxy"));
        assert_eq!(
            kubeadms["clientConnection"]["kubeconfig"], kubeconfig,
            "{folder}"
        );
        // Beside kube-proxy the API server's cluster IP is served by that; elsewhere by nobody
        // else.
        let named = match folder {
            "overlays/beside-kube-proxy" => "",
            _ => &kubeconfig,
        };
        assert_eq!(theirs["clientConnection"]["kubeconfig"], named, "{folder}");
    }
}

/// Nothing but reading what the agent serves, and telling what it cannot.
#[test]
fn the_role_has_the_least_verbs() {
    let rules = object::<ClusterRole>(".", "ClusterRole").rules.unwrap();
    let mut allowed: Vec<String> = Vec::new();
    for rule in rules {
        assert_eq!(rule.non_resource_urls, None);
        for group in rule.api_groups.as_ref().unwrap() {
            for resource in rule.resources.as_ref().unwrap() {
                allowed.push(format!("{group}/{resource} {}", rule.verbs.join(" ")));
            }
        }
    }
    allowed.sort();
    assert_eq!(
        allowed,
        [
            "/nodes get list watch",
            "/services get list watch",
            "discovery.k8s.io/endpointslices get list watch",
            "events.k8s.io/events create",
        ]
    );
}

/// It gives the flag and the right to follow the labels, and nothing else.
#[test]
fn the_component_for_labels_of_the_socket_hook_lets_the_agent_see_them() {
    for folder in ["overlays/instead-of-kube-proxy", "overlays/node-by-node"] {
        let mut with = with_component(folder, "components/socket-lb-labels");
        for object in &mut with {
            let added = match object["kind"].as_str().unwrap() {
                "DaemonSet" => {
                    let spec = &mut object["spec"]["template"]["spec"];
                    let args = spec["containers"][0]["args"].as_array_mut();
                    args.unwrap().pop().unwrap() == "--socket-lb-labels=on"
                }
                "ClusterRole" => {
                    let rule = object["rules"].as_array_mut().unwrap().pop().unwrap();
                    let verbs = &rule["verbs"];
                    let resources = &rule["resources"];
                    *verbs == json!(["list", "watch"])
                        && *resources == json!(["pods", "namespaces"])
                }
                _ => true,
            };
            assert!(added, "{folder}: {object}");
        }
        assert_eq!(with, objects(folder));
    }
}

/// With node-by-node, every node has kube-proxy or shunt, and none has both.
#[test]
fn nodes_have_one_proxy_each() {
    let terms = |affinity: Option<NodeAffinity>| -> NodeSelectorRequirement {
        let required = affinity
            .unwrap()
            .required_during_scheduling_ignored_during_execution
            .unwrap();
        let [term] = &required.node_selector_terms[..] else {
            panic!("terms are alternatives: {required:?}")
        };
        let [requirement] = term.match_expressions.as_deref().unwrap() else {
            panic!("{term:?}")
        };
        requirement.clone()
    };
    let ours = terms(pod("overlays/node-by-node").affinity.unwrap().node_affinity);
    let patch =
        kustomize::documents(&deploy().join("overlays/node-by-node/kube-proxy.yaml")).remove(0);
    let found = strict::of::<DaemonSet>(&patch);
    assert!(
        found
            .iter()
            .all(|line| line.contains("apiVersion") || line.contains("kind")),
        "{found:?}"
    );
    let affinity = &patch["spec"]["template"]["spec"]["affinity"]["nodeAffinity"];
    let theirs = terms(serde_json::from_value(affinity.clone()).unwrap());
    assert_eq!((&ours.key, &ours.values), (&theirs.key, &theirs.values));
    assert_eq!(
        (ours.operator.as_str(), theirs.operator.as_str()),
        ("In", "NotIn")
    );
}

/// The image is the one that `cargo xtask image` makes of this version.
#[test]
fn the_image_is_of_this_version() {
    let image = pod(".").containers[0].image.clone();
    assert_eq!(
        image.as_deref(),
        Some(concat!("localhost/shunt:", env!("CARGO_PKG_VERSION")))
    );
}

/// The objects of an overlay with a component.
fn with_component(overlay: &str, component: &str) -> Vec<Value> {
    let folder = tempfile::TempDir::new().unwrap();
    let place = |path: &str| {
        deploy()
            .join(path)
            .canonicalize()
            .unwrap()
            .display()
            .to_string()
    };
    let text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [{}]\ncomponents: [{}]\n",
        place(overlay),
        place(component)
    );
    fs::write(folder.path().join("kustomization.yaml"), text).unwrap();
    let with = kustomize::resolve(folder.path());
    for object in &with {
        assert_eq!(strict::mistakes(object), Vec::<String>::new());
    }
    with
}

#[test]
fn the_component_for_netfilters_table_adds_a_sight_of_its_files_and_nothing_else() {
    let with = with_component(
        "overlays/instead-of-kube-proxy",
        "components/netfilter-conntrack",
    );
    let daemonset = with
        .into_iter()
        .find(|object| object["kind"] == "DaemonSet")
        .unwrap();
    let daemonset: DaemonSet = serde_json::from_value(daemonset).unwrap();
    let mut with = daemonset.spec.unwrap().template.spec.unwrap();
    let mount = with.containers[0]
        .volume_mounts
        .as_mut()
        .unwrap()
        .pop()
        .unwrap();
    let volume = with.volumes.as_mut().unwrap().pop().unwrap();
    let files = shunt::datapath::netfilter::SYSCTLS;
    assert_eq!((&mount.name, mount.read_only), (&volume.name, None));
    // The same files, in another place.
    let below = |path: &str, folder: &str| path.strip_prefix(folder).map(str::to_owned);
    let place = below(files[1], &mount.mount_path);
    assert_eq!(place, below(files[0], &volume.host_path.unwrap().path));
    assert_eq!(place.as_deref(), Some("/netfilter"));
    assert_eq!(with, pod("overlays/instead-of-kube-proxy"));
}

/// Prometheus finds the agents' port, and the agents answer there; nothing else is changed.
#[test]
fn the_component_for_prometheus_leads_to_the_agents() {
    for folder in ["overlays/instead-of-kube-proxy", "overlays/node-by-node"] {
        let with = with_component(folder, "components/pod-monitor");
        assert_eq!(with.len(), objects(folder).len() + 1);
        let of_kind = |kind: &str| {
            with.iter()
                .find(|object| object["kind"] == kind)
                .unwrap()
                .clone()
        };
        let monitor: strict::PodMonitor = serde_json::from_value(of_kind("PodMonitor")).unwrap();
        let daemonset: DaemonSet = serde_json::from_value(of_kind("DaemonSet")).unwrap();
        assert_eq!(monitor.metadata.namespace, daemonset.metadata.namespace);
        let template = daemonset.spec.unwrap().template;
        assert_eq!(
            monitor.spec.selector.match_labels,
            template.metadata.unwrap().labels
        );
        let [endpoint] = &monitor.spec.pod_metrics_endpoints[..] else {
            panic!("one of each agent")
        };
        let mut with = template.spec.unwrap();
        let container = &mut with.containers[0];
        let port = container
            .ports
            .iter()
            .flatten()
            .find(|port| port.name.as_ref() == Some(&endpoint.port));
        let port = port.unwrap().container_port;
        let flag = format!("--metrics-bind-address=0.0.0.0:{port}");
        assert_eq!(
            container.args.as_mut().unwrap().pop(),
            Some(flag),
            "{folder}"
        );
        assert_eq!(endpoint.path, "/metrics");
        assert_eq!(
            endpoint.relabelings[0].target_label, "node",
            "what the dashboard asks for"
        );
        assert_eq!(with, pod(folder));
    }
}

/// Each alert says what is wrong and what to do; nothing else is changed.
#[test]
fn the_component_for_alerts_says_what_to_do() {
    let with = with_component("overlays/instead-of-kube-proxy", "components/alerts");
    let without = objects("overlays/instead-of-kube-proxy");
    let (mut rules, rest): (Vec<Value>, Vec<Value>) = with
        .into_iter()
        .partition(|object| object["kind"] == "PrometheusRule");
    assert_eq!(rest, without);
    let rule: strict::PrometheusRule = serde_json::from_value(rules.remove(0)).unwrap();
    assert_eq!(rules, Vec::<Value>::new());
    for rule in rule.spec.groups.iter().flat_map(|group| &group.rules) {
        let said: Vec<&str> = rule.annotations.keys().map(String::as_str).collect();
        assert_eq!(said, ["description", "summary"], "{}", rule.alert);
        assert!(["critical", "warning"].contains(&&*rule.labels["severity"]));
    }
}

/// Probes and scrapes go where the configuration has the agent listen.
#[test]
fn probes_ask_where_the_agent_listens() {
    for folder in APPLIED {
        let map: ConfigMap = object(folder, "ConfigMap");
        let text = map.data.unwrap().into_values().next().unwrap();
        let configured = |field: &str| -> i32 {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(field))
                .unwrap();
            line.rsplit_once(':').unwrap().1.parse().unwrap()
        };
        let agent = pod(folder).containers.remove(0);
        let ports: BTreeMap<String, i32> = agent
            .ports
            .iter()
            .flatten()
            .map(|port| (port.name.clone().unwrap(), port.container_port))
            .collect();
        let expected = [
            ("healthz".to_owned(), configured("healthzBindAddress")),
            ("metrics".to_owned(), configured("metricsBindAddress")),
        ];
        assert_eq!(ports, BTreeMap::from(expected), "{folder}");
        for (probe, path) in [
            (agent.startup_probe, "/livez"),
            (agent.liveness_probe, "/livez"),
            (agent.readiness_probe, "/readyz"),
        ] {
            let get = probe.unwrap().http_get.unwrap();
            assert_eq!(get.path.as_deref(), Some(path));
            assert_eq!(get.port, IntOrString::String("healthz".to_owned()));
        }
    }
}

/// The right to port 53, an address, and a Service that leads to it.
#[test]
fn the_component_for_dns_adds_what_it_takes_and_nothing_else() {
    for folder in [
        "overlays/instead-of-kube-proxy",
        "overlays/beside-kube-proxy",
    ] {
        let with = with_component(folder, "components/dns");
        assert_eq!(with.len(), objects(folder).len() + 1);
        let of_kind = |kind: &str| {
            with.iter()
                .find(|object| object["kind"] == kind)
                .unwrap()
                .clone()
        };
        let daemonset: DaemonSet = serde_json::from_value(of_kind("DaemonSet")).unwrap();
        let service: k8s_openapi::api::core::v1::Service =
            serde_json::from_value(of_kind("Service")).unwrap();
        let spec = service.spec.unwrap();
        assert_eq!(service.metadata.namespace, daemonset.metadata.namespace);
        let template = daemonset.spec.unwrap().template;
        assert_eq!(spec.selector, template.metadata.unwrap().labels);
        assert_eq!(spec.internal_traffic_policy.as_deref(), Some("Local"));
        let ports: Vec<_> = spec
            .ports
            .unwrap()
            .into_iter()
            .map(|port| (port.port, port.protocol.unwrap()))
            .collect();
        assert_eq!(ports, [(53, "UDP".to_owned()), (53, "TCP".to_owned())]);
        let mut with = template.spec.unwrap();
        let container = &mut with.containers[0];
        let capabilities = &mut container.security_context.as_mut().unwrap().capabilities;
        let added = capabilities.as_mut().unwrap().add.as_mut().unwrap();
        assert_eq!(added.pop().as_deref(), Some("NET_BIND_SERVICE"));
        assert_eq!(
            container.args.as_mut().unwrap().pop().as_deref(),
            Some("--dns=$(NODE_IP)")
        );
        let address = container.env.as_mut().unwrap().pop().unwrap();
        assert_eq!(address.name, "NODE_IP");
        assert_eq!(
            address.value_from.unwrap().field_ref.unwrap().field_path,
            "status.hostIP"
        );
        assert_eq!(with, pod(folder));
    }
}
