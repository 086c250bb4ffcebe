use std::{fs, io::Write, path::Path, process::Command, sync::Arc};

use clap::Parser;

use super::*;
use crate::{
    datapath::maps::testing::{Capacities, Root},
    object::Protocol,
    plan::{Frontend, FrontendAddress, FrontendId, FrontendKind, Scope, ServicePlan, Table},
    sync::Syncer,
};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: EnvArgs,
}

fn args(line: &str, manifests: &Path) -> EnvArgs {
    let nowhere = ["--bpf-root", "/nonexistent", "--manifests"];
    let words = ["env"]
        .into_iter()
        .chain(line.split_whitespace())
        .chain(nowhere);
    let words = words
        .map(Into::into)
        .chain([manifests.as_os_str().to_owned()]);
    Line::try_parse_from(words)
        .unwrap_or_else(|error| panic!("{line}: {error}"))
        .args
}

/// What a person sees of a command: stdout, then stderr.
fn seen(args: &EnvArgs) -> String {
    let lines = match text(args) {
        Ok((text, warnings)) => {
            let warnings = warnings.iter().map(|warning| format!("shunt: {warning}"));
            [text]
                .into_iter()
                .filter(|text| !text.is_empty())
                .chain(warnings)
                .collect()
        }
        Err(error) => vec![format!("shunt: {error:#}")],
    };
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Plays the commands of a golden file on the manifests beside it.
fn golden(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/environment");
    let expected = fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap();
    let manifests = folder.join(format!("{name}.yaml"));
    let played: Vec<String> = expected
        .lines()
        .filter_map(|line| line.strip_prefix("$ shunt env"))
        .map(|line| format!("$ shunt env{line}\n{}", seen(&args(line, &manifests))))
        .collect();
    assert!(!played.is_empty(), "{name}: no commands");
    let played = played.join("\n");
    assert!(
        played == expected,
        "{name}: expected\n{expected}\nbut saw\n{played}"
    );
}

#[test]
fn variables_are_a_kubelets_for_every_type_of_service() {
    golden("services");
}

#[test]
fn a_pod_says_which_variables_it_gets() {
    golden("pods");
}

#[test]
fn a_shell_reads_what_export_prints() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/environment");
    let manifests = folder.join("services.yaml");
    let (export, _) = text(&args("-n shop -o export", &manifests)).unwrap();
    let (plain, _) = text(&args("-n shop", &manifests)).unwrap();
    let (json, _) = text(&args("-n shop -o json", &manifests)).unwrap();
    let output = Command::new("sh")
        .args(["-c", &format!("{export}\nenv")])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .output()
        .unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let read: BTreeSet<&str> = output
        .lines()
        .filter(|line| line.contains("_PORT") || line.contains("_HOST"))
        .collect();
    assert_eq!(read, plain.lines().collect());
    let json: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let json: BTreeSet<String> = json
        .iter()
        .map(|variable| {
            format!(
                "{}={}",
                variable["name"].as_str().unwrap(),
                variable["value"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(json, plain.lines().map(str::to_owned).collect());
}

#[test]
fn values_with_quotes_stay_one_word() {
    let odd = Variable {
        name: "A".to_owned(),
        value: "it's $(false)".to_owned(),
    };
    assert_eq!(
        format(&[odd], EnvOutput::Export).unwrap(),
        r"export A='it'\''s $(false)'"
    );
}

const NO_CLUSTER_IP: &str = r"
apiVersion: v1
kind: Service
metadata: { name: web, namespace: shop }
spec: { ports: [{ port: 80 }] }
";

fn manifest(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn host(args: &EnvArgs) -> String {
    let (text, _) = text(args).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("WEB_SERVICE_HOST="));
    line.unwrap_or_else(|| panic!("{text}")).to_owned()
}

#[test]
fn a_missing_cluster_ip_is_the_one_that_an_agent_gives() {
    let file = manifest(NO_CLUSTER_IP);
    let given = host(&args("-n shop --service-cidr 10.9.0.0/24", file.path()));
    assert!(given.starts_with("10.9.0."), "{given}");
    let given = host(&args("-n shop --service-cidr fd00:9::/112", file.path()));
    assert!(given.starts_with("fd00:9::"), "{given}");
}

#[test]
fn what_a_running_agent_gave_stands_over_what_is_computed() {
    let root = Root::new(Capacities::default());
    let mut syncer = Syncer::new(Arc::new(root.maps())).unwrap();
    let frontend = |address: &str| Frontend {
        id: FrontendId {
            address: FrontendAddress::Ip(address.parse().unwrap()),
            port: 80,
            protocol: Protocol::Tcp,
            scope: Scope::Internal,
        },
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        port_index: 0,
        backends: [].into(),
        table: Table::Direct,
        flags: 0,
        affinity_secs: 0,
        set: 0,
    };
    let plan = ServicePlan {
        frontends: vec![frontend("10.96.7.7"), frontend("fd00:10:96::7")],
        ..ServicePlan::empty(ObjectName::new("shop", "web"))
    };
    syncer.apply(&plan).unwrap();
    let file = manifest(NO_CLUSTER_IP);
    let mut args = args("-n shop", file.path());
    args.bpf_root = root.0.clone();
    assert_eq!(host(&args), "10.96.7.7");
    let written = manifest(&NO_CLUSTER_IP.replace("{ ports", "{ clusterIP: 10.96.1.1, ports"));
    args.manifests = vec![written.path().to_owned()];
    assert_eq!(host(&args), "10.96.1.1", "a manifest's own word stands");
}

#[test]
fn without_a_source_it_says_what_to_give() {
    let mut args = args("", Path::new("/nonexistent"));
    let error = text(&args).unwrap_err().to_string();
    assert!(
        error.contains("--manifests /nonexistent: give a file or folder"),
        "{error}"
    );
    args.manifests.clear();
    let error = text(&args).unwrap_err().to_string();
    assert!(
        error.contains("give --manifests PATH") && error.contains("--kubeconfig"),
        "{error}"
    );
}

#[test]
fn a_cluster_is_asked_for_the_namespace_and_for_default() {
    let server = shunt_apiserver::ApiServer::start().unwrap();
    let service = |namespace: &str, name: &str, ip: &str| {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": namespace, "name": name },
            "spec": { "clusterIP": ip, "ports": [{ "port": 80 }] },
        })
    };
    server.apply_all([
        service("default", "kubernetes", "10.96.0.1"),
        service("default", "elsewhere", "10.96.0.2"),
        service("shop", "web", "10.96.0.3"),
        service("shop", "headless", "None"),
    ]);
    let mut args = args("-n shop", Path::new("/nonexistent"));
    args.manifests.clear();
    args.kubeconfig = Some(server.kubeconfig());
    let (found, warnings) = text(&args).unwrap();
    let hosts: Vec<&str> = found
        .lines()
        .filter(|line| line.contains("_SERVICE_HOST="))
        .collect();
    assert_eq!(
        hosts,
        [
            "KUBERNETES_SERVICE_HOST=10.96.0.1",
            "WEB_SERVICE_HOST=10.96.0.3"
        ]
    );
    assert!(warnings.is_empty(), "{warnings:?}");

    args.pod = Some("nobody".to_owned());
    let error = text(&args).unwrap_err().to_string();
    assert!(
        error.contains("Pod shop/nobody") || error.contains("no such Pod in namespace shop"),
        "{error}"
    );
    args.pod = None;
    server.faults(|faults| faults.refuse = Some(shunt_apiserver::Refusal::status(403)));
    let error = text(&args).unwrap_err().to_string();
    assert!(
        error.contains("may not list the Services of shop") && error.contains("--kubeconfig"),
        "{error}"
    );
}
