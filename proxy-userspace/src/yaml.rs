//! YAML with positions: the documents of a file, and where in it a mistake stands.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{
    DuplicateKeyPolicy, Options, RenderOptions, SnippetMode, Spanned, UserMessageFormatter,
};

/// Why a document or object could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mistake {
    /// Line in the file, from 1.
    pub line: Option<u64>,
    /// Path of the field in the document or object; empty when there is none.
    pub field: String,
    /// The parser's words.
    pub message: String,
}

/// One document of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Document<'a> {
    pub text: &'a str,
    /// Lines of the file that come before it.
    pub lines_before: u64,
}

impl Document<'_> {
    /// The line in the file on which a field stands, or the nearest thing around it that is there.
    pub(crate) fn line_of(&self, path: &str) -> Option<u64> {
        let tree: Tree = serde_saphyr::from_str_with_options(self.text, options()).ok()?;
        Some(tree.find(path).line + self.lines_before)
    }
}

/// Cuts a file at its document markers. A line that begins with `---` or `...` is one wherever it
/// stands, in a block scalar too ([YAML 1.2.2, 9.1](https://yaml.org/spec/1.2.2/#91-documents)).
pub(crate) fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let (mut start, mut lines_before) = (0, 0);
    let (mut at, mut line) = (0, 0);
    for content in text.split_inclusive('\n') {
        let marker = ["---", "..."].iter().any(|marker| {
            content
                .strip_prefix(marker)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
        });
        if marker && at > start {
            documents.push(Document {
                text: &text[start..at],
                lines_before,
            });
        }
        if marker {
            (start, lines_before) = (at, line);
        }
        if marker && content.starts_with('.') {
            (start, lines_before) = (at + content.len(), line + 1);
        }
        at += content.len();
        line += 1;
    }
    if at > start {
        documents.push(Document {
            text: &text[start..at],
            lines_before,
        });
    }
    documents
}

/// How all documents are read.
pub(crate) fn options() -> Options {
    serde_saphyr::options! {
        // As the API server's parser is by default; a message about them is not worth a Service.
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        with_snippet: false,
    }
}

/// The same, but a field that stands in a mapping twice is a mistake.
pub(crate) fn strict() -> Options {
    serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        with_snippet: false,
    }
}

/// What the parser has to say, with line, and field below `prefix`.
pub(crate) fn mistake(
    error: &serde_saphyr::Error,
    document: Document<'_>,
    prefix: &str,
) -> Mistake {
    let mut render = RenderOptions::default();
    render.snippets = SnippetMode::Off;
    render.formatter = &UserMessageFormatter;
    let message = error.without_snippet().render_with_options(render);
    // The position comes with the file's name; the parser's counts from the document's beginning.
    let message = match message
        .rfind(" at line ")
        .or_else(|| message.rfind(" (line "))
    {
        Some(end) => message[..end].trim_end_matches([',', ':', ' ']),
        None => &message,
    };
    let message = match message {
        "invalid i32" | "invalid i64" => "wants a whole number".to_owned(),
        "invalid u32" => "wants a whole number from 0 on".to_owned(),
        "invalid bool" | "invalid boolean" => "wants true or false".to_owned(),
        "expected sequence start" => "wants a list".to_owned(),
        "expected mapping start" => "wants a mapping".to_owned(),
        "expected string scalar" => "wants a string".to_owned(),
        syntax if syntax.starts_with("while ") || syntax.starts_with("unclosed ") => {
            format!("no valid YAML: {syntax}")
        }
        other => other.to_owned(),
    };
    let location = error.location();
    let field = location.and_then(|location| {
        let tree: Tree = serde_saphyr::from_str_with_options(document.text, options()).ok()?;
        let path = tree.path_at((location.line(), location.column()));
        Some(
            path.strip_prefix(prefix)
                .unwrap_or(&path)
                .trim_start_matches('.')
                .to_owned(),
        )
    });
    Mistake {
        line: location.map(|location| location.line() + document.lines_before),
        field: field.unwrap_or_default(),
        message,
    }
}

pub(crate) fn join(prefix: &str, field: &str) -> String {
    match (prefix, field) {
        ("", field) => field.to_owned(),
        (prefix, "") => prefix.to_owned(),
        (prefix, field) => format!("{prefix}.{field}"),
    }
}

/// A document with positions; only built to say where something stands.
#[derive(Debug)]
struct Tree {
    line: u64,
    column: u64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Map(Vec<(String, Tree)>),
    List(Vec<Tree>),
    Scalar,
}

impl Tree {
    /// The node at a path, or the last one on the way that is there.
    fn find(&self, path: &str) -> &Self {
        let mut node = self;
        for step in path.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match (&node.value, step.strip_suffix(']')) {
                (Value::List(items), Some(index)) => {
                    index.parse().ok().and_then(|index: usize| items.get(index))
                }
                (Value::Map(fields), None) => fields
                    .iter()
                    .rev()
                    .find(|(key, _)| key == step)
                    .map(|(_, node)| node),
                _ => None,
            };
            let Some(next) = next else { break };
            node = next;
        }
        node
    }

    /// The path of the last node that begins at or before a position.
    fn path_at(&self, position: (u64, u64)) -> String {
        let mut path = String::new();
        let mut node = self;
        loop {
            let begins = |node: &Self| (node.line, node.column) <= position;
            match &node.value {
                Value::Map(fields) => {
                    let Some((key, next)) = fields
                        .iter()
                        .filter(|(_, node)| begins(node))
                        .max_by_key(|(_, node)| (node.line, node.column))
                    else {
                        return path;
                    };
                    path = join(&path, key);
                    node = next;
                }
                Value::List(items) => {
                    let Some(index) = items.iter().rposition(begins) else {
                        return path;
                    };
                    path = format!("{path}[{index}]");
                    node = &items[index];
                }
                Value::Scalar => return path,
            }
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self {
            line: spanned.referenced.line(),
            column: spanned.referenced.column(),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Value::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_i128<E>(self, _: i128) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_u128<E>(self, _: u128) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_str<E>(self, _: &str) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Scalar)
    }
}
