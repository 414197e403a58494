//! A configuration file and its `--set` overrides as located entries: section and key -> value, with where it was
//! written. Knows TOML, not which keys exist (keys.rs) nor what they mean (one file per section).

use std::collections::BTreeMap;

use anyhow::Result;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::Refusal;

/// A value as it was written, without TOML's spans.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    List(Vec<Value>),
    /// Something no key wants; the words name it.
    Other(&'static str),
}

impl Value {
    fn of(value: &DeValue) -> Value {
        match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map_or(Value::Other("an integer beyond 64 bits"), Value::Integer),
            DeValue::Float(number) => number.as_str().parse().map_or(Value::Other("a float"), Value::Float),
            DeValue::Boolean(flag) => Value::Boolean(*flag),
            DeValue::Array(items) => Value::List(items.iter().map(|item| Value::of(item.get_ref())).collect()),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Table(_) => Value::Other("a table"),
        }
    }

    /// What kind of value this is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Boolean(_) => "a boolean",
            Value::List(_) => "a list",
            Value::Other(kind) => kind,
        }
    }
}

/// One key's value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub value: Value,
    /// The value as written, for messages.
    pub shown: String,
    /// `train.toml:12`, or `--set`.
    pub place: String,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Section {
    /// Where the section begins.
    pub place: String,
    pub entries: BTreeMap<String, Entry>,
}

/// All that was said, by section and key.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// The file's name, as it was given.
    pub file: String,
    pub sections: BTreeMap<String, Section>,
    /// Keys written outside any section.
    pub homeless: Vec<(String, Entry)>,
    /// What is wrong with the overrides' form, and with sections that are not tables.
    pub problems: Vec<String>,
}

impl Document {
    /// Reads `text`, then lays the overrides (`section.key=value`) over it. Text that is not TOML is a [`Refusal`]
    /// with the first places where it is not; nothing else can be said about such a file.
    pub fn parse(file: &str, text: &str, overrides: &[String]) -> Result<Document> {
        let (table, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            return Err(Refusal { problems: syntax_problems(file, text, &errors) }.into());
        }
        let mut document =
            Document { file: file.to_string(), sections: BTreeMap::new(), homeless: Vec::new(), problems: Vec::new() };
        for (name, value) in table.get_ref().iter() {
            let place = format!("{file}:{}", line_of(text, name.span().start));
            match value.get_ref() {
                DeValue::Table(keys) => document.add_section(text, name.get_ref(), place, keys),
                DeValue::Array(items) if items.iter().any(|item| matches!(item.get_ref(), DeValue::Table(_))) => {
                    document.problems.push(format!(
                        "{place}: [[{name}]] is a list of sections, and a section may be there once: write [{name}]",
                        name = name.get_ref()
                    ));
                }
                _ => document.homeless.push((name.get_ref().to_string(), entry(text, value, place))),
            }
        }
        for item in overrides {
            document.set(item);
        }
        Ok(document)
    }

    fn add_section(&mut self, text: &str, name: &str, place: String, keys: &DeTable) {
        let section = self.sections.entry(name.to_string()).or_insert(Section { place, ..Section::default() });
        for (key, value) in keys.iter() {
            let place = format!("{}:{}", self.file, line_of(text, key.span().start));
            section.entries.insert(key.get_ref().to_string(), entry(text, value, place));
        }
    }

    /// Lays one `section.key=value` over what the file said. A value that is not TOML is taken as a string, so
    /// that `--set model.path=models/sd15` needs no quotes within quotes.
    fn set(&mut self, item: &str) {
        let Some((name, value)) = item.split_once('=') else {
            self.problems
                .push(format!("--set {item}: no `=` in it: write --set section.key=value, as in --set train.seed=7"));
            return;
        };
        let Some((section, key)) = name.trim().split_once('.') else {
            self.problems.push(format!(
                "--set {item}: `{}` names no section: write --set section.key=value, as in --set train.seed=7",
                name.trim()
            ));
            return;
        };
        let entry = match DeValue::parse(value.trim()) {
            Ok(parsed) => {
                Entry { value: Value::of(parsed.get_ref()), shown: value.trim().into(), place: "--set".into() }
            }
            Err(_) => Entry { value: Value::Text(value.into()), shown: format!("{value:?}"), place: "--set".into() },
        };
        let place = "--set".to_string();
        let section = self.sections.entry(section.to_string()).or_insert(Section { place, ..Section::default() });
        section.entries.insert(key.to_string(), entry);
    }

    pub fn entry(&self, section: &str, key: &str) -> Option<&Entry> {
        self.sections.get(section)?.entries.get(key)
    }

    /// How a message about `section.key` begins: `train.toml:12: train.batch_size = 0`, or without the value and
    /// the line where the key is not written.
    pub fn at(&self, section: &str, key: &str) -> String {
        match (self.entry(section, key), self.sections.get(section)) {
            (Some(entry), _) => format!("{}: {section}.{key} = {}", entry.place, entry.shown),
            (None, Some(found)) => format!("{}: {section}.{key}", found.place),
            (None, None) => format!("{}: {section}.{key}", self.file),
        }
    }
}

/// The first places where a text is no TOML, and how many more there are. What is something else altogether is wrong in
/// every line.
fn syntax_problems(file: &str, text: &str, errors: &[toml::de::Error]) -> Vec<String> {
    const TOLD: usize = 5;
    let mut problems: Vec<String> = Vec::new();
    let mut told = 0;
    for error in errors {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        let what = format!(
            "{file}:{line}: not valid TOML: {}; strings stand in quotes, a section is a line like [train]",
            error.message()
        );
        if !problems.contains(&what) {
            if problems.len() == TOLD {
                break;
            }
            problems.push(what);
        }
        told += 1;
    }
    if told < errors.len() {
        problems.push(format!(
            "{file}: not valid TOML in {} more places: name a TOML file such as those in configs/",
            errors.len() - told
        ));
    }
    problems
}

fn entry(text: &str, value: &Spanned<DeValue>, place: String) -> Entry {
    let written = text.get(value.span()).unwrap_or_default();
    let first = written.lines().next().unwrap_or_default();
    let shown = if first.len() == written.len() { first.to_string() } else { format!("{first} …") };
    Entry { value: Value::of(value.get_ref()), shown, place }
}

/// The line, counted from 1, of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_know_their_line_and_overrides_win() {
        let text = "[train]\nseed = 3\nbatch_size = 2 # two\n\n[model]\npath = \"a b\"\n";
        let overrides =
            ["train.seed=0x10".to_string(), "model.path=x/y z".to_string(), "zero.stage = \"auto\"".to_string()];
        let document = Document::parse("t.toml", text, &overrides).unwrap();
        assert!(document.problems.is_empty());
        assert_eq!(document.at("train", "batch_size"), "t.toml:3: train.batch_size = 2");
        assert_eq!(document.at("train", "seed"), "--set: train.seed = 0x10");
        assert_eq!(document.entry("train", "seed").unwrap().value, Value::Integer(16));
        assert_eq!(document.entry("model", "path").unwrap().value, Value::Text("x/y z".to_string()));
        assert_eq!(document.entry("zero", "stage").unwrap().value, Value::Text("auto".to_string()));
        assert_eq!(document.at("model", "device"), "t.toml:5: model.device");
        assert_eq!(document.at("data", "x"), "t.toml: data.x");
    }

    #[test]
    fn every_syntax_error_is_told_with_its_line() {
        let error = Document::parse("t.toml", "[train]\nseed = \nx = y\n", &[]).unwrap_err();
        let refusal = error.downcast_ref::<Refusal>().unwrap();
        assert!(refusal.problems.iter().any(|p| p.starts_with("t.toml:2: not valid TOML")), "{refusal}");
        assert!(refusal.problems.iter().any(|p| p.starts_with("t.toml:3: not valid TOML")), "{refusal}");
    }

    #[test]
    fn what_is_no_toml_at_all_is_told_in_few_words() {
        let told = |text: &str| {
            let error = Document::parse("t.toml", text, &[]).unwrap_err();
            error.downcast::<Refusal>().unwrap().problems
        };
        let lines = told(&"{\"file_name\": \"a.png\", \"text\": \"a cat\"}\n".repeat(2000));
        assert_eq!(lines.len(), 6, "{lines:#?}");
        assert!(
            lines[0].starts_with("t.toml:1: ") && lines[5].contains(" more places: name a TOML file"),
            "{lines:#?}"
        );
        let one_line = told(&"[train]\rseed = 3\r".repeat(100));
        let distinct: std::collections::HashSet<&String> = one_line.iter().collect();
        assert!(one_line.len() <= 6 && distinct.len() == one_line.len(), "{one_line:#?}");
    }

    #[test]
    fn malformed_overrides_and_repeated_sections_are_told() {
        let overrides = ["seed".to_string(), "seed=3".to_string()];
        let document = Document::parse("t.toml", "[[train]]\nseed = 1\n", &overrides).unwrap();
        assert_eq!(document.problems.len(), 3);
        assert!(document.problems[0].contains("write [train]"));
        assert!(document.problems[1].contains("no `=`"));
        assert!(document.problems[2].contains("names no section"));
    }
}
