//! Label and field selectors as they stand in a query
//! (<https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>).

use std::collections::BTreeMap;

/// All of its requirements must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    /// `None`: whatever the value.
    values: Option<Vec<String>>,
    /// The opposite is asked for; an absent key is the opposite of any value.
    not: bool,
}

impl Selector {
    /// From `a,!b,c=d,e!=f,g in (h,i),j notin (k)`.
    ///
    /// # Errors
    /// The part that is none of these.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut requirements = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            // A comma between parentheses parts values, not requirements.
            let mut depth = 0;
            let end = rest
                .find(|c| {
                    match c {
                        '(' => depth += 1,
                        ')' => depth -= 1,
                        _ => {}
                    }
                    c == ',' && depth == 0
                })
                .unwrap_or(rest.len());
            requirements.push(Requirement::parse(rest[..end].trim())?);
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        Ok(Self(requirements))
    }

    /// Whether labels (or fields) are as asked for.
    pub(crate) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| {
            let holds = labels.get(&requirement.key).is_some_and(|value| {
                let values = requirement.values.as_ref();
                values.is_none_or(|values| values.contains(value))
            });
            holds != requirement.not
        })
    }
}

impl Requirement {
    fn parse(text: &str) -> Result<Self, String> {
        let one = |key: &str, value: &str, not| Self {
            key: key.trim().to_owned(),
            values: Some(vec![value.trim().to_owned()]),
            not,
        };
        let set = |key: &str, values: &str, not| {
            let values = values.trim().strip_prefix('(')?.strip_suffix(')')?;
            Some(Self {
                key: key.trim().to_owned(),
                values: Some(
                    values
                        .split(',')
                        .map(|value| value.trim().to_owned())
                        .collect(),
                ),
                not,
            })
        };
        let requirement = if let Some((key, value)) = text.split_once("!=") {
            Some(one(key, value, true))
        } else if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
            Some(one(key, value, false))
        } else if let Some((key, values)) = text.split_once(" notin ") {
            set(key, values, true)
        } else if let Some((key, values)) = text.split_once(" in ") {
            set(key, values, false)
        } else {
            let key = text.strip_prefix('!').unwrap_or(text);
            (!key.is_empty() && !key.contains(char::is_whitespace)).then(|| Self {
                key: key.to_owned(),
                values: None,
                not: text.starts_with('!'),
            })
        };
        requirement.ok_or_else(|| format!("unable to parse requirement: {text:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selects_as_the_documentation_says() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let web = labels(&[("app", "web"), ("tier", "front")]);
        for (selector, holds) in [
            ("", true),
            ("app", true),
            ("!app", false),
            ("!other", true),
            ("app=web", true),
            ("app==web,tier=back", false),
            ("app!=web", false),
            ("other!=x", true),
            ("app in (db, web),tier", true),
            ("app notin (db,web)", false),
            ("other notin (x)", true),
            ("!a/b,!c/d", true),
        ] {
            assert_eq!(
                Selector::parse(selector).unwrap().matches(&web),
                holds,
                "{selector}"
            );
        }
        for wrong in ["a b", "!", "a in b"] {
            assert!(Selector::parse(wrong).is_err(), "{wrong}");
        }
    }
}
