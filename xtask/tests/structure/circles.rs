//! No circles: a module that needs another is never needed by it, however long the way.
//!
//! A module is a file. An arrow goes from the module that names something to the module that
//! *defines* it, so a parent that only passes names on (`pub use`) is no stop on the way.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use syn::{Item, UseTree, Visibility, visit::Visit};

/// The crates' roots.
const CRATES: [&str; 7] = [
    "proxy-common/src/lib.rs",
    "proxy-ebpf/src/main.rs",
    "proxy-userspace/src/lib.rs",
    "xtask/src/main.rs",
    "xtask/apiserver/src/lib.rs",
    "xtask/bench/src/main.rs",
    "xtask/lab/src/lib.rs",
];

#[test]
fn modules_depend_downwards_only() {
    let mut found = Vec::new();
    for crate_root in CRATES {
        let circles = Graph::read(&super::root().join(crate_root)).circles();
        found.extend(
            circles
                .iter()
                .map(|circle| format!("{crate_root}: {}", circle.join(" / "))),
        );
    }
    assert!(
        found.is_empty(),
        "modules need each other in a circle; move what both need into one that needs neither:\n{}",
        found.join("\n")
    );
}

/// A module's path from its crate's root.
type Name = Vec<String>;

/// What a module says.
#[derive(Default)]
struct Module {
    /// Names that it defines.
    items: BTreeSet<String>,
    children: BTreeSet<String>,
    /// Names that it passes on, and where they come from.
    passed_on: BTreeMap<String, Name>,
    passed_on_whole: Vec<Name>,
    /// Paths that it uses, from the crate's root.
    uses: BTreeSet<Name>,
}

struct Graph(BTreeMap<Name, Module>);

impl Graph {
    fn read(root: &Path) -> Self {
        let mut graph = Self(BTreeMap::new());
        let folder = root.parent().expect("a file stands in a folder");
        graph.add(Vec::new(), root, folder);
        graph
    }

    /// Reads a module and those in it. `folder`: where the files of its children stand.
    fn add(&mut self, name: Name, file: &Path, folder: &Path) {
        let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let mut module = Module::default();
        for item in &parsed.items {
            if let Item::Mod(item) = item
                && item.content.is_none()
                && !is_test(&item.attrs)
            {
                module.children.insert(item.ident.to_string());
            }
        }
        module.read(&name, &parsed.items);
        for child in module.children.clone() {
            let (file, folder) = place(folder, &child);
            self.add([name.clone(), vec![child]].concat(), &file, &folder);
        }
        self.0.insert(name, module);
    }

    /// The module that defines what `path` names; `None` if that is in another crate.
    fn definer(&self, path: &[String], depth: u32) -> Option<Name> {
        let mut at = Name::new();
        for (i, segment) in path.iter().enumerate() {
            let module = &self.0[&at];
            if module.children.contains(segment) {
                at.push(segment.clone());
                continue;
            }
            if module.items.contains(segment) || depth == 0 {
                return Some(at);
            }
            let rest = &path[i + 1..];
            if let Some(source) = module.passed_on.get(segment) {
                return self.definer(&[source, rest].concat(), depth - 1);
            }
            for source in &module.passed_on_whole {
                let whole = [source, &path[i..]].concat();
                if let Some(definer) = self.definer(&whole, depth - 1)
                    && self.0[&definer].items.contains(segment)
                {
                    return Some(definer);
                }
            }
            return Some(at);
        }
        Some(at)
    }

    fn arrows(&self) -> BTreeMap<&Name, BTreeSet<Name>> {
        let arrows = |(name, module): (_, &Module)| {
            let mut to: BTreeSet<Name> = module
                .uses
                .iter()
                .filter_map(|path| self.definer(path, 8))
                .collect();
            to.remove(name);
            (name, to)
        };
        self.0.iter().map(arrows).collect()
    }

    /// Sets of modules that all reach each other.
    fn circles(&self) -> Vec<Vec<String>> {
        let arrows = self.arrows();
        let reach: BTreeMap<&Name, BTreeSet<&Name>> = arrows
            .keys()
            .map(|&from| {
                let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
                while let Some(at) = next.pop() {
                    next.extend(arrows[at].iter().filter(|&to| seen.insert(to)));
                }
                (from, seen)
            })
            .collect();
        let mut circles = BTreeSet::new();
        for (from, seen) in &reach {
            if seen.contains(from) {
                let both = seen.iter().filter(|to| reach[*to].contains(from));
                circles.insert(both.map(|name| shown(name)).collect::<Vec<_>>());
            }
        }
        circles.into_iter().collect()
    }
}

fn shown(name: &Name) -> String {
    if name.is_empty() {
        "crate".to_owned()
    } else {
        name.join("::")
    }
}

/// The file of a child module, and the folder of its own children.
fn place(folder: &Path, child: &str) -> (PathBuf, PathBuf) {
    let inner = folder.join(child);
    let file = folder.join(format!("{child}.rs"));
    if file.is_file() {
        (file, inner)
    } else {
        (inner.join("mod.rs"), inner)
    }
}

fn is_test(attrs: &[syn::Attribute]) -> bool {
    attrs.iter().any(|attr| {
        attr.path().is_ident("cfg")
            && attr
                .parse_args::<syn::Ident>()
                .is_ok_and(|ident| ident == "test")
    })
}

impl Module {
    fn read(&mut self, name: &[String], items: &[Item]) {
        for item in items {
            let ident = match item {
                Item::Const(item) => Some(&item.ident),
                Item::Enum(item) => Some(&item.ident),
                Item::Fn(item) => Some(&item.sig.ident),
                Item::Static(item) => Some(&item.ident),
                Item::Struct(item) => Some(&item.ident),
                Item::Trait(item) => Some(&item.ident),
                Item::Type(item) => Some(&item.ident),
                Item::Union(item) => Some(&item.ident),
                Item::Macro(item) => item.ident.as_ref(),
                _ => None,
            };
            self.items.extend(ident.map(ToString::to_string));
            match item {
                Item::Mod(item) if is_test(&item.attrs) => {}
                Item::Mod(_) => {}
                Item::Use(item) => {
                    let passes_on = !matches!(item.vis, Visibility::Inherited);
                    let mut paths = Vec::new();
                    flatten(&item.tree, &mut Vec::new(), &mut paths);
                    for (path, as_name) in paths {
                        self.use_path(name, path, as_name, passes_on);
                    }
                }
                item => {
                    if !item_attrs(item).is_some_and(is_test) {
                        let mut paths = Paths(Vec::new());
                        paths.visit_item(item);
                        for path in paths.0 {
                            self.use_path(name, path, None, false);
                        }
                    }
                }
            }
        }
    }

    /// Notes a path if it is in this crate.
    fn use_path(&mut self, name: &[String], path: Name, as_name: Option<String>, passes_on: bool) {
        let Some(path) = self.absolute(name, path) else {
            return;
        };
        if !passes_on {
            self.uses.insert(path);
            return;
        }
        match as_name.as_deref() {
            Some("*") => self.passed_on_whole.push(path),
            Some(as_name) => {
                self.passed_on.insert(as_name.to_owned(), path);
            }
            None => {}
        }
    }

    fn absolute(&self, name: &[String], path: Name) -> Option<Name> {
        let first = path.first()?.as_str();
        let (mut at, mut rest) = match first {
            "crate" => (Vec::new(), &path[1..]),
            "self" => (name.to_vec(), &path[1..]),
            "super" => (name.to_vec(), &path[..]),
            first if self.children.contains(first) => (name.to_vec(), &path[..]),
            _ => return None,
        };
        while let Some((first, others)) = rest.split_first().filter(|(first, _)| *first == "super")
        {
            debug_assert_eq!(first, "super");
            at.pop()?;
            rest = others;
        }
        at.extend_from_slice(rest);
        Some(at)
    }
}

fn item_attrs(item: &Item) -> Option<&[syn::Attribute]> {
    match item {
        Item::Fn(item) => Some(&item.attrs),
        Item::Impl(item) => Some(&item.attrs),
        Item::Struct(item) => Some(&item.attrs),
        _ => None,
    }
}

/// Every path of a `use` with the name that it gives; `*` for all names.
fn flatten(tree: &UseTree, so_far: &mut Name, paths: &mut Vec<(Name, Option<String>)>) {
    match tree {
        UseTree::Path(path) => {
            so_far.push(path.ident.to_string());
            flatten(&path.tree, so_far, paths);
            so_far.pop();
        }
        UseTree::Name(name) if name.ident == "self" => {
            paths.push((so_far.clone(), so_far.last().cloned()));
        }
        UseTree::Name(name) => {
            let ident = name.ident.to_string();
            paths.push((
                [&so_far[..], std::slice::from_ref(&ident)].concat(),
                Some(ident),
            ));
        }
        UseTree::Rename(rename) => {
            let path = [&so_far[..], &[rename.ident.to_string()]].concat();
            paths.push((path, Some(rename.rename.to_string())));
        }
        UseTree::Glob(_) => paths.push((so_far.clone(), Some("*".to_owned()))),
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, so_far, paths);
            }
        }
    }
}

/// The paths in code that name a module on their way.
struct Paths(Vec<Name>);

impl Visit<'_> for Paths {
    fn visit_path(&mut self, path: &syn::Path) {
        if path.segments.len() > 1 {
            let segments = path
                .segments
                .iter()
                .map(|segment| segment.ident.to_string());
            self.0.push(segments.collect());
        }
        syn::visit::visit_path(self, path);
    }
}
