//! What stands where in a file, and what is said of mistakes.

use super::*;

/// One line per object: `line kind namespace/name`, or `line kind namespace/name: field: message`.
fn read(text: &str) -> Vec<String> {
    parse(text)
        .iter()
        .map(|parsed| {
            let name = match &parsed.name {
                Some((namespace, name)) => format!(" {namespace}/{name}"),
                None => String::new(),
            };
            match &parsed.object {
                Ok(_) => format!("{} {}{name}", parsed.line.unwrap(), parsed.kind),
                Err(Mistake {
                    line,
                    field,
                    message,
                }) => {
                    format!(
                        "{} {}{name}: {field}: {message}",
                        line.unwrap(),
                        parsed.kind
                    )
                }
            }
        })
        .collect()
}

/// What one pass and what several say of a document; `None` where one pass leaves it to the others.
fn both(document: Document<'_>) -> Option<[String; 2]> {
    let told = |parsed: &Parsed<'_>| {
        let Parsed {
            object,
            kind,
            name,
            line,
            prefix,
            ..
        } = parsed;
        format!("{object:?} {kind} {name:?} {line:?} {prefix:?}")
    };
    let plain = told(&parse_plain(document)?);
    let all: Vec<String> = parse_document(document).iter().map(told).collect();
    Some([plain, all.join("\n")])
}

#[test]
fn one_pass_reads_what_several_read() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let mut plain = 0;
    for file in ["dns-and-edge", "external", "kubia", "story", "whoami"] {
        let text = std::fs::read_to_string(format!("{folder}/{file}.yaml")).unwrap();
        for document in documents(&text) {
            if let Some([one, several]) = both(document) {
                assert_eq!(one, several, "{}", document.text);
                plain += 1;
            }
            // The same as JSON, behind a marker.
            let Ok(value) =
                serde_saphyr::from_str_with_options::<serde_json::Value>(document.text, options())
            else {
                continue;
            };
            let json = format!("---\n\n{value:#}");
            for document in documents(&json) {
                if let Some([one, several]) = both(document) {
                    assert_eq!(one, several, "{}", document.text);
                    plain += 1;
                }
            }
        }
    }
    assert!(plain > 40, "{plain} documents are read in one pass");
}

#[test]
fn what_is_not_plain_is_left_to_several_passes() {
    for text in [
        "kind: Service\nkind: Pod\nmetadata: { name: a }\n",
        "'kind': Service\nmetadata: { name: a }\n",
        "kind: &kind Service\nmetadata: { name: a }\n",
        "  kind: Service\n  metadata: { name: a }\n",
        "kind: ServiceList\nitems: []\n",
        "kind: ConfigMap\nmetadata: { name: a }\n",
        "kind: Service\nmetadata: { name: [] }\n",
        "--- # a comment\nkind: Service\nmetadata: { name: a }\n",
        "--- {kind: Service, metadata: {name: a}}\n",
        "{kind: Service, metadata: {name: a}}\n",
        "{\"kind\":\"Service\",\"metadata\":{\"name\":1}}\n",
        "{\"kind\":\"Service\",\"metadata\":{\"name\":\"a\"}} trailing\n",
        "# nothing\n",
    ] {
        for document in documents(text) {
            assert_eq!(both(document), None, "{text}");
        }
    }
    // Skipped, though it looks like a second kind.
    let text = "kind: Service\nmetadata: { name: a }\nextra: |\n  kind: Pod\n";
    for document in documents(text) {
        let [one, several] = both(document).unwrap();
        assert_eq!(one, several);
    }
}

#[test]
fn many_documents_keep_their_order() {
    let text: Vec<String> = (0..300)
        .map(|n| format!("kind: Service\nmetadata: {{ name: s{n} }}\n"))
        .collect();
    let read = read(&text.join("---\n"));
    let expected: Vec<String> = (0..300)
        .map(|n| format!("{} Service default/s{n}", 3 * n + 1))
        .collect();
    assert_eq!(read, expected);
}

#[test]
fn documents_are_apart_and_know_their_lines() {
    let text = "\
# a comment is no document
---
kind: Service
metadata: { name: a }
---
---
kind: ConfigMap
metadata: { name: b, namespace: other }
data:
  text: |
    kind: Service
...
kind: Pod
metadata: { name: c }
";
    assert_eq!(
        read(text),
        [
            "3 Service default/a",
            "7 ConfigMap other/b",
            "13 Pod default/c"
        ]
    );
}

#[test]
fn a_mistake_takes_nothing_from_other_documents() {
    let text = "\
kind: Service
metadata: { name: a }
---
kind: Service
metadata:
  name: b
 namespace: c
---
kind: Service
metadata: { name: d }
spec: { ports: [{ port: http }] }
---
kind: Pod
metadata: { name: e }
";
    assert_eq!(
        read(text),
        [
            "1 Service default/a",
            "7 : : no valid YAML: while parsing a block mapping, did not find expected key",
            "11 Service default/d: spec.ports[0].port: wants a whole number",
            "13 Pod default/e",
        ]
    );
}

#[test]
fn a_list_is_so_many_documents() {
    let text = "\
kind: List
items:
- kind: Service
  metadata: { name: a }
- kind: Service
  metadata: { name: b }
  spec:
    ports:
    - port: x
- kind: Pod
  metadata: { name: c }
  spec: 7
- kind: Pod
  metadata: { name: d }
";
    assert_eq!(
        read(text),
        [
            "3 Service default/a",
            "9 Service default/b: spec.ports[0].port: wants a whole number",
            "12 Pod default/c: spec: wants a mapping",
            "13 Pod default/d",
        ]
    );
    let typed = "kind: ServiceList\nitems:\n- metadata: { name: a }\n- metadata: { name: b }\n";
    assert_eq!(read(typed), ["3 Service default/a", "4 Service default/b"]);
}

#[test]
fn a_kind_that_only_ends_like_a_list_is_somebody_elses() {
    assert_eq!(
        read("kind: AllowList\nmetadata: { name: a }\nitems: all\n"),
        ["1 AllowList default/a"]
    );
}

#[test]
fn json_is_yaml() {
    let text = "{\n\t\"kind\": \"Service\",\n\t\"metadata\": {\"name\": \"a\"},\n\t\"spec\": {\"ports\": [{\"port\": \"x\"}]}\n}\n";
    assert_eq!(
        read(text),
        ["4 Service default/a: spec.ports[0].port: wants a whole number"]
    );
}

#[test]
fn what_is_no_object_is_said_to_be_none() {
    for (text, want) in [
        ("- a\n- b\n", "1 : : wants a mapping"),
        ("just text\n", "1 : : wants a mapping"),
        (
            "a: b\n",
            "1 : kind: is missing; a Kubernetes object needs apiVersion and kind",
        ),
        (
            "kind: Service\nmetadata: [a]\n",
            "2 : metadata: wants a mapping",
        ),
        (
            "kind: Service\nmetadata: { name: a\nspec: {}\n",
            "3 : : no valid YAML: while parsing a flow mapping, did not find expected ',' or '}'",
        ),
    ] {
        assert_eq!(read(text), [want], "{text}");
    }
    assert_eq!(read(""), [""; 0]);
    assert_eq!(read("\n# nothing\n---\n"), [""; 0]);
}

#[test]
fn numbers_and_switches_are_strings_where_strings_are_wanted() {
    let text = "kind: Pod\nmetadata: { name: 7, labels: { version: 1.20, hex: 0x10, on: true, when: 2024-01-01 } }\n";
    let parsed = parse(text);
    let Ok(Object::Pod(pod)) = &parsed[0].object else {
        panic!("{:?}", parsed[0].object);
    };
    assert_eq!(pod.metadata.name.as_deref(), Some("7"));
    let labels = &pod.metadata.labels.0;
    assert_eq!(
        ["version", "hex", "on", "when"].map(|label| labels[label].as_str()),
        ["1.20", "0x10", "true", "2024-01-01"]
    );
}
