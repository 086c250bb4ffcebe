//! Files of Kubernetes YAML: documents apart from each other, objects with the lines they stand on.
//!
//! Every document is parsed by itself, so that a mistake in one takes nothing from the others. A
//! `List` counts as so many documents. Types are the schema: `version: 1.2` is a string where
//! Kubernetes wants one.

use std::{cell::Cell, fmt, panic::resume_unwind, thread};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

use super::kinds::{EndpointSlice, Endpoints, Meta, Namespace, Node, Pod, Service};
use crate::yaml::{Document, Mistake, documents, join, mistake, options};

/// An object as the manifest has it.
#[derive(Clone, Debug)]
pub(super) enum Object {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Endpoints(Box<Endpoints>),
    Pod(Box<Pod>),
    Node(Box<Node>),
    Namespace(Box<Namespace>),
    /// A kind that does not matter here.
    Other,
}

impl Object {
    /// `metadata`; `None` where the kind does not matter.
    fn meta(&self) -> Option<&Meta> {
        Some(match self {
            Self::Service(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::Endpoints(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::Namespace(object) => &object.metadata,
            Self::Other => return None,
        })
    }
}

/// What a document, or one item of a list in it, turned out to be.
#[derive(Debug)]
pub(super) struct Parsed<'a> {
    /// The object, or what is wrong.
    pub object: Result<Object, Mistake>,
    /// `kind`, as far as it could be read.
    pub kind: String,
    /// `metadata.namespace` and `metadata.name`, as far as they could be read.
    pub name: Option<(String, String)>,
    /// The line in the file on which the object begins.
    pub line: Option<u64>,
    document: Document<'a>,
    /// Path of the object in the document: empty, or `items[n]`.
    prefix: String,
}

impl<'a> Parsed<'a> {
    fn new(
        document: Document<'a>,
        head: Option<&Spanned<Head>>,
        object: Result<Object, Mistake>,
    ) -> Self {
        Self {
            object,
            kind: head
                .and_then(|head| head.value.kind.clone())
                .unwrap_or_default(),
            name: head.and_then(|head| head.value.name()),
            line: head.map(|head| head.referenced.line() + document.lines_before),
            document,
            prefix: String::new(),
        }
    }

    /// The line in the file on which a field stands, or the nearest thing around it that is there.
    pub(super) fn line_of(&self, field: &str) -> Option<u64> {
        self.document.line_of(&join(&self.prefix, field))
    }
}

/// Documents of a file from which on several threads share it.
const SHARED_FROM: usize = 64;
/// Threads that do.
const MAX_THREADS: usize = 4;

/// All objects of a file.
pub(super) fn parse(text: &str) -> Vec<Parsed<'_>> {
    let documents = documents(text);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    if documents.len() < SHARED_FROM || threads == 1 {
        return parse_all(&documents);
    }
    let part = documents.len().div_ceil(threads.min(MAX_THREADS));
    thread::scope(|scope| {
        let parts: Vec<_> = documents
            .chunks(part)
            .map(|part| scope.spawn(|| parse_all(part)))
            .collect();
        parts
            .into_iter()
            .flat_map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    })
}

fn parse_all<'a>(documents: &[Document<'a>]) -> Vec<Parsed<'a>> {
    let parse = |&document: &Document<'a>| match parse_plain(document) {
        Some(parsed) => vec![parsed],
        None => parse_document(document),
    };
    documents.iter().flat_map(parse).collect()
}

/// The one object of a document that says its kind where everybody writes it, read in one pass
/// (JSON by a parser of its own, which is ten times as fast). `None`: it is not as plain as that,
/// or something is wrong with it, which [`parse_document`] finds and explains.
fn parse_plain(document: Document<'_>) -> Option<Parsed<'_>> {
    let text = document.text;
    let is_content = |line: &str| {
        let line = line.trim();
        !(line.is_empty() || line == "---" || line.starts_with('#'))
    };
    let (first, line) = text
        .lines()
        .enumerate()
        .find(|(_, line)| is_content(line))?;
    if line.starts_with("---") || line.starts_with('%') {
        return None;
    }
    let marked = text.strip_prefix("---\n").unwrap_or(text);
    let (kind, object) = if marked.trim_start().starts_with('{') {
        let kind = serde_json::from_str::<Head>(marked).ok()?.kind?;
        let mut json = serde_json::Deserializer::from_str(marked);
        let object = ObjectSeed(&kind).deserialize(&mut json).ok()?;
        json.end().ok()?;
        (kind, object)
    } else {
        let mut kinds = text.lines().filter_map(|line| line.strip_prefix("kind:"));
        let kind = kinds.next()?.trim();
        if kinds.next().is_some() || !kind.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return None;
        }
        (kind.to_owned(), parse_object(document, kind).ok()?)
    };
    let meta = object.meta()?;
    let head = HeadMeta {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
    };
    Some(Parsed {
        name: head.full_name(),
        kind,
        object: Ok(object),
        line: Some(document.lines_before + first as u64 + 1),
        document,
        prefix: String::new(),
    })
}

/// The head of every object.
#[derive(Debug, Default, Deserialize)]
struct Head {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    metadata: Option<HeadMeta>,
}

#[derive(Debug, Default, Deserialize)]
struct HeadMeta {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
}

/// The heads of the objects of a `List`.
#[derive(Debug, Default, Deserialize)]
struct ListHeads {
    #[serde(default)]
    items: Option<Vec<Spanned<Head>>>,
}

fn parse_document(document: Document<'_>) -> Vec<Parsed<'_>> {
    let head = match serde_saphyr::from_str_with_options::<Option<Spanned<Head>>>(
        document.text,
        options(),
    ) {
        Ok(None) => return Vec::new(),
        Ok(Some(head)) => head,
        Err(error) => {
            return vec![Parsed::new(
                document,
                None,
                Err(mistake(&error, document, "")),
            )];
        }
    };
    let kind = head.value.kind.as_deref().unwrap_or_default();
    if kind.is_empty() {
        let missing = Mistake {
            line: Some(head.referenced.line() + document.lines_before),
            field: "kind".to_owned(),
            message: "is missing; a Kubernetes object needs apiVersion and kind".to_owned(),
        };
        return vec![Parsed::new(document, Some(&head), Err(missing))];
    }
    let known = |of: &&str| {
        matches!(
            *of,
            "" | "Service" | "EndpointSlice" | "Endpoints" | "Pod" | "Node" | "Namespace"
        )
    };
    let Some(list_of) = kind.strip_suffix("List").filter(known) else {
        let object = parse_object(document, kind).map_err(|error| mistake(&error, document, ""));
        return vec![Parsed::new(document, Some(&head), object)];
    };
    let heads = match serde_saphyr::from_str_with_options::<ListHeads>(document.text, options()) {
        Ok(heads) => heads.items.unwrap_or_default(),
        Err(error) => {
            return vec![Parsed::new(
                document,
                Some(&head),
                Err(mistake(&error, document, "")),
            )];
        }
    };
    let item = |(i, mut head): (usize, Spanned<Head>)| {
        head.value.kind.get_or_insert_with(|| list_of.to_owned());
        Parsed {
            prefix: format!("items[{i}]"),
            ..Parsed::new(document, Some(&head), Ok(Object::Other))
        }
    };
    let mut items: Vec<Parsed<'_>> = heads.into_iter().enumerate().map(item).collect();
    let kinds: Vec<String> = items.iter().map(|item| item.kind.clone()).collect();
    let mut broken = vec![false; kinds.len()];
    // A mistake ends the parser's run: it starts again without the item that has it.
    loop {
        let at = Cell::new(None);
        let items_seen = Items {
            kinds: &kinds,
            broken: &broken,
            at: &at,
        };
        match parse_items(document, items_seen) {
            Ok(objects) => {
                for (item, object) in items.iter_mut().zip(objects) {
                    if let Some(object) = object {
                        item.object = Ok(object);
                    }
                }
                return items;
            }
            Err(error) => {
                let Some(i) = at.get().filter(|i| !broken[*i]) else {
                    let found = mistake(&error, document, "");
                    items
                        .iter_mut()
                        .for_each(|item| item.object = Err(found.clone()));
                    return items;
                };
                broken[i] = true;
                items[i].object = Err(mistake(&error, document, &items[i].prefix));
            }
        }
    }
}

impl Head {
    fn name(&self) -> Option<(String, String)> {
        self.metadata.as_ref()?.full_name()
    }
}

impl HeadMeta {
    /// Namespace and name.
    fn full_name(&self) -> Option<(String, String)> {
        let namespace = self
            .namespace
            .clone()
            .filter(|namespace| !namespace.is_empty());
        Some((
            namespace.unwrap_or_else(|| "default".to_owned()),
            self.name.clone()?,
        ))
    }
}

/// What is known of a `List` before its items are read.
struct Items<'a> {
    kinds: &'a [String],
    broken: &'a [bool],
    /// The item that is being read.
    at: &'a Cell<Option<usize>>,
}

fn parse_object(document: Document<'_>, kind: &str) -> Result<Object, serde_saphyr::Error> {
    serde_saphyr::with_deserializer_from_str_with_options(
        document.text,
        options(),
        |deserializer| ObjectSeed(kind).deserialize(deserializer),
    )
}

fn parse_items(
    document: Document<'_>,
    items: Items<'_>,
) -> Result<Vec<Option<Object>>, serde_saphyr::Error> {
    serde_saphyr::with_deserializer_from_str_with_options(
        document.text,
        options(),
        |deserializer| ListSeed(items).deserialize(deserializer),
    )
}

/// Reads an object of a kind that is known.
struct ObjectSeed<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Object, D::Error> {
        Ok(match self.0 {
            "Service" => Object::Service(Deserialize::deserialize(deserializer)?),
            "EndpointSlice" => Object::EndpointSlice(Deserialize::deserialize(deserializer)?),
            "Endpoints" => Object::Endpoints(Deserialize::deserialize(deserializer)?),
            "Pod" => Object::Pod(Deserialize::deserialize(deserializer)?),
            "Node" => Object::Node(Deserialize::deserialize(deserializer)?),
            "Namespace" => Object::Namespace(Deserialize::deserialize(deserializer)?),
            _ => {
                IgnoredAny::deserialize(deserializer)?;
                Object::Other
            }
        })
    }
}

/// Reads the items of a `List`, each as its own kind.
struct ListSeed<'a>(Items<'a>);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = Vec<Option<Object>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = Vec<Option<Object>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a List")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "items" => items = map.next_value_seed(ItemsSeed(&self.0))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(items)
    }
}

struct ItemsSeed<'a>(&'a Items<'a>);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = Vec<Option<Object>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed<'_> {
    type Value = Vec<Option<Object>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the items of a List")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let Items { kinds, broken, at } = self.0;
        let mut items = Vec::with_capacity(kinds.len());
        for (i, kind) in kinds.iter().enumerate() {
            at.set(Some(i));
            let item = match broken[i] {
                true => seq.next_element::<IgnoredAny>()?.map(|_| None),
                false => seq.next_element_seed(ObjectSeed(kind))?.map(Some),
            };
            items.push(item.flatten());
        }
        at.set(None);
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(items)
    }
}

#[cfg(test)]
mod tests;
