//! Objects as API servers store them.

use serde_json::{Value, json};

use super::*;
use crate::{
    object::{self, Problem},
    source::convert,
};

/// Objects in which everything that is used has a value, and everything else is as odd as it can
/// be.
fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "web", "namespace": "shop", "uid": null, "creationTimestamp": "2026-01-02T03:04:05Z",
            "labels": { "app": "web" }, "annotations": { "shunt.dev/retry": "false", "note": "n".repeat(200_000) },
            "managedFields": [{ "time": null, "fieldsV1": { "f:spec": { "f:ports": { "k:{\"port\":80}": {} } } } }, null, 7],
            "finalizers": null, "ownerReferences": [{ "controller": "perhaps" }], "generation": "many",
        },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
            "ports": [{ "name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP", "targetPort": "http",
                        "appProtocol": { "of": "another release" } }],
            "selector": { "app": "web" }, "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 60, "jitter": null }, "cookie": [] },
            "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Cluster", "healthCheckNodePort": 32000,
            "loadBalancerSourceRanges": ["10.0.0.0/8"], "externalIPs": ["192.0.2.1"], "publishNotReadyAddresses": false,
            "externalName": "", "trafficDistribution": null, "loadBalancerClass": null, "ofTheFuture": { "deep": [[{}]] },
        },
        "status": {
            "conditions": [{ "type": "Ready", "status": "Maybe", "lastTransitionTime": null, "observedGeneration": -1 }],
            "loadBalancer": { "ingress": [{ "ip": "198.51.100.1", "ipMode": "VIP", "ports": [{ "port": "x", "error": 1 }] }] },
        },
    })
}

fn slice() -> Value {
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" },
            "creationTimestamp": null, "managedFields": "none",
        },
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP", "appProtocol": 1 }],
        "endpoints": [{
            "addresses": ["10.0.0.1"], "conditions": { "ready": true, "serving": true, "terminating": false, "ripe": "yes" },
            "nodeName": "node-a", "zone": 7, "hostname": null, "targetRef": { "kind": null, "uid": 5 },
            "deprecatedTopology": ["?"], "hints": { "forZones": [{ "name": "zone-a", "weight": 1 }], "forMoons": null },
        }],
    })
}

fn read<T: DeserializeOwned>(object: &Value) -> T {
    serde_json::from_str(&object.to_string()).unwrap_or_else(|error| panic!("{error}: {object}"))
}

fn read_service(object: &Value) -> (Option<object::Service>, Vec<Problem>) {
    let mut problems = Vec::new();
    (convert::service(&read(object), &mut problems), problems)
}

/// SPEC S3: what is not used is not read, whatever it is.
#[test]
fn fields_without_use_may_be_anything() {
    let (found, problems) = read_service(&service());
    assert_eq!(problems, []);
    let found = found.unwrap();
    assert_eq!(
        (found.created, found.affinity_secs),
        (Some(1_767_323_045), Some(60))
    );
    assert_eq!(
        (found.health_check_node_port, found.ports[0].node_port),
        (Some(32_000), Some(30_080))
    );
    assert_eq!(
        found.load_balancer_ips.len() + found.external_ips.len() + found.source_ranges.len(),
        3
    );
    assert_eq!(found.retry, object::Retry::Off);

    let mut problems = Vec::new();
    let found = convert::slice(&read(&slice()), &mut problems).unwrap();
    assert_eq!(
        (found.endpoints.len(), found.ports.len(), problems),
        (1, 1, Vec::new())
    );
    assert!(found.endpoints[0].zones.contains("zone-a"));

    let node: Node = read(&json!({
        "metadata": { "name": "node-a", "creationTimestamp": null, "labels": { "topology.kubernetes.io/zone": "z" } },
        "spec": { "taints": [{ "key": "k", "effect": "NoThanks", "timeAdded": "then" }], "podCIDRs": "all" },
        "status": {
            "conditions": [{ "lastHeartbeatTime": null, "lastTransitionTime": "long ago" }],
            "addresses": [{ "type": "Strange", "address": "192.0.2.1" }, { "address": "010.0.0.01" }, { "address": "node-a" }],
            "capacity": { "cpu": 4 }, "images": [{ "names": null }], "nodeInfo": null,
        },
    }));
    let facts = convert::node(&node);
    let addresses: Vec<String> = facts.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(
        (addresses.join(" ").as_str(), facts.leaves),
        ("10.0.0.1 192.0.2.1", false)
    );

    let pod: Pod = read(&json!({
        "metadata": { "name": "web-0", "deletionTimestamp": "soon" },
        "spec": { "containers": [{ "name": null, "ports": [{ "containerPort": 80, "hostPort": "x" }], "command": 7 }], "volumes": "?" },
        "status": {
            "podIPs": [{ "ip": "10.0.0.1" }], "startTime": "?", "containerStatuses": [{ "state": { "running": { "startedAt": 0 } } }],
            "conditions": [{ "type": "Ready", "status": "True", "lastProbeTime": null, "lastTransitionTime": 1 }],
        },
    }));
    let facts = convert::pod(&pod, &mut Vec::new()).unwrap();
    assert_eq!(
        (facts.ready, facts.terminating, facts.addresses.len()),
        (true, true, 1)
    );
}

/// Go writes nothing and `null` for the same: each field by itself, in every object.
#[test]
fn null_is_absent() {
    fn each(value: &Value, path: &str, all: &mut Vec<String>) {
        if let Value::Object(fields) = value {
            for (name, below) in fields {
                let path = format!("{path}/{}", name.replace('~', "~0").replace('/', "~1"));
                each(below, &path, all);
                all.push(path);
            }
        }
        if let Value::Array(items) = value {
            for (i, below) in items.iter().enumerate() {
                each(below, &format!("{path}/{i}"), all);
            }
        }
    }
    for (object, is_service) in [(service(), true), (slice(), false)] {
        let mut paths = Vec::new();
        each(&object, "", &mut paths);
        assert!(paths.len() > 30, "{paths:?}");
        for path in paths {
            let mut null = object.clone();
            *null.pointer_mut(&path).unwrap() = Value::Null;
            let mut absent = object.clone();
            let (parent, name) = path.rsplit_once('/').unwrap();
            absent
                .pointer_mut(parent)
                .unwrap()
                .as_object_mut()
                .unwrap()
                .remove(&name.replace("~1", "/").replace("~0", "~"));
            if is_service {
                assert_eq!(read_service(&null), read_service(&absent), "{path}");
            } else {
                let of = |object: &Value| convert::slice(&read(object), &mut Vec::new());
                assert_eq!(of(&null), of(&absent), "{path}");
            }
        }
    }
}

/// A time only orders objects: one that is none takes nothing away.
#[test]
fn a_time_that_is_none_is_no_reason() {
    for odd in [
        json!(null),
        json!("yesterday"),
        json!(""),
        json!(5),
        json!(-5),
        json!(0.5),
        json!(true),
        json!([1]),
        json!({ "s": 1 }),
    ] {
        let mut object = service();
        object["metadata"]["creationTimestamp"] = odd.clone();
        let (found, problems) = read_service(&object);
        assert_eq!(
            (found.unwrap().created, problems),
            (None, Vec::new()),
            "{odd}"
        );
    }
}

/// Values of later releases in fields that are used: one message that names the field, and the rest
/// is served.
#[test]
fn unknown_values_are_named_and_the_rest_is_served() {
    for (path, field) in [
        ("/spec/type", "spec.type"),
        ("/spec/sessionAffinity", "spec.sessionAffinity"),
        ("/spec/externalTrafficPolicy", "spec.externalTrafficPolicy"),
        ("/spec/internalTrafficPolicy", "spec.internalTrafficPolicy"),
        ("/spec/ports/0/protocol", "spec.ports[0].protocol"),
        (
            "/spec/loadBalancerSourceRanges/0",
            "spec.loadBalancerSourceRanges[0]",
        ),
        ("/spec/externalIPs/0", "spec.externalIPs[0]"),
        (
            "/status/loadBalancer/ingress/0/ip",
            "status.loadBalancer.ingress[0].ip",
        ),
        (
            "/status/loadBalancer/ingress/0/ipMode",
            "status.loadBalancer.ingress[0].ipMode",
        ),
    ] {
        let mut object = service();
        *object.pointer_mut(path).unwrap() = json!("Novel");
        let (found, problems) = read_service(&object);
        assert!(found.is_some(), "{path}");
        assert!(
            problems.iter().any(|problem| problem.field == field),
            "{path}: {problems:?}"
        );
    }
}
