//! What `# Errors` sections say: which error, and what to do.

use std::fs;

use super::root;

/// Sources, from the workspace's folder.
const SOURCES: [&str; 3] = ["proxy-common/src", "proxy-ebpf/src", "proxy-userspace/src"];
/// What says nothing.
const EMPTY: [&str; 2] = ["The kernel's.", "The kernel's answer."];

#[test]
fn sections_of_errors_say_which() {
    let mut found = Vec::new();
    let mut folders: Vec<_> = SOURCES.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let lines: Vec<_> = text.lines().map(str::trim).collect();
                for (at, pair) in lines.windows(2).enumerate() {
                    let says_nothing =
                        |line: &str| EMPTY.iter().any(|text| line == format!("/// {text}"));
                    if pair[0] == "/// # Errors" && says_nothing(pair[1]) {
                        found.push(format!("{}:{}", path.display(), at + 2));
                    }
                }
            }
        }
    }
    assert!(
        found.is_empty(),
        "say which error it is, and what to do then:\n{}",
        found.join("\n")
    );
}
