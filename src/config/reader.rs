//! Reads one section key by key: type, range, choice and default. What is wrong is collected, and the default (or
//! an empty value) stands in, so that everything after it can still be checked.

use std::cell::RefCell;
use std::path::PathBuf;

use super::document::{Document, Entry, Value};
use super::keys;
use super::plan::Toggle;

/// What a choice's name means: a value, or why it cannot be had yet and what to use instead.
pub(super) type Choice<T> = (&'static str, Result<T, &'static str>);

pub(super) struct Reader<'a> {
    document: &'a Document,
    section: &'static str,
    problems: &'a RefCell<Vec<String>>,
}

impl<'a> Reader<'a> {
    pub fn new(document: &'a Document, section: &'static str, problems: &'a RefCell<Vec<String>>) -> Self {
        Self { document, section, problems }
    }

    /// Whether the section is written at all.
    pub fn present(&self) -> bool {
        self.document.sections.contains_key(self.section)
    }

    pub fn is_set(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// A problem with `key`: `what` follows the place, the key and its value, and ends with the remedy.
    pub fn reject(&self, key: &str, what: &str) {
        self.problems.borrow_mut().push(format!("{}: {what}", self.document.at(self.section, key)));
    }

    /// A problem with the section as a whole.
    pub fn reject_section(&self, what: &str) {
        let place = self.document.sections.get(self.section).map_or(&self.document.file, |section| &section.place);
        self.problems.borrow_mut().push(format!("{place}: [{}]: {what}", self.section));
    }

    fn entry(&self, key: &str) -> Option<&Entry> {
        debug_assert!(
            keys::SECTIONS.iter().any(|(section, known)| *section == self.section && known.contains(&key)),
            "{}.{key} is read but not in the table of keys",
            self.section
        );
        self.document.entry(self.section, key)
    }

    /// A value that must be `wanted`; `of` takes it, or leaves it when it is of another type.
    fn typed<T>(&self, key: &str, wanted: &str, of: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let entry = self.entry(key)?;
        let value = of(&entry.value);
        if value.is_none() {
            self.reject(key, &format!("this is {}, and {wanted} is wanted", entry.value.kind()));
        }
        value
    }

    pub fn text(&self, key: &str) -> Option<String> {
        self.typed(key, "a string in quotes", |value| match value {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        })
    }

    /// A string that has to be there; `remedy` says what to write.
    pub fn required_text(&self, key: &str, remedy: &str) -> String {
        if !self.is_set(key) {
            self.reject(key, &format!("this key is missing: {remedy}"));
        }
        self.text(key).unwrap_or_default()
    }

    /// A path; a leading `~/` is the home folder. The empty string is no path.
    pub fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).filter(|text| !text.is_empty()).and_then(|text| self.expanded(key, &text))
    }

    /// The path that `text`, the value of `key`, means; a problem if no system has such a path.
    pub fn expanded(&self, key: &str, text: &str) -> Option<PathBuf> {
        if text.contains('\0') {
            self.reject(key, "there is a NUL character (\\u0000) in it, which no path can have: take it out");
            return None;
        }
        Some(expand_home(text))
    }

    /// A path that has to be there; `remedy` says what to write. Empty when it is not.
    pub fn required_path(&self, key: &str, remedy: &str) -> PathBuf {
        let text = self.required_text(key, remedy);
        if text.is_empty() && self.entry(key).is_some_and(|entry| entry.value == Value::Text(String::new())) {
            self.reject(key, &format!("this is empty: {remedy}"));
        }
        self.expanded(key, &text).unwrap_or_default()
    }

    pub fn flag(&self, key: &str, default: bool) -> bool {
        let flag = self.typed(key, "true or false (without quotes)", |value| match value {
            Value::Boolean(flag) => Some(*flag),
            _ => None,
        });
        flag.unwrap_or(default)
    }

    /// "auto", true or false.
    pub fn toggle(&self, key: &str) -> Toggle {
        let toggle = self.typed(key, "\"auto\", true or false", |value| match value {
            Value::Boolean(true) => Some(Toggle::On),
            Value::Boolean(false) => Some(Toggle::Off),
            Value::Text(text) if text == "auto" => Some(Toggle::Auto),
            _ => None,
        });
        toggle.unwrap_or(Toggle::Auto)
    }

    /// A whole number of at least `least` (and at most 2^53, beyond which nothing here makes sense).
    pub fn count(&self, key: &str, least: usize) -> Option<usize> {
        self.count_within(key, least, 1 << 53)
    }

    /// A whole number from `least` to `most`.
    pub fn count_within(&self, key: &str, least: usize, most: usize) -> Option<usize> {
        let number = self.typed(key, "a whole number", |value| match value {
            Value::Integer(number) => Some(*number),
            _ => None,
        })?;
        let count = usize::try_from(number).ok().filter(|count| (least..=most).contains(count));
        if count.is_none() {
            let range = format!("a whole number of at least {least} and at most {most}");
            self.reject(key, &format!("this is out of range: it must be {range}"));
        }
        count
    }

    /// A whole number of at least 0, as a random seed.
    pub fn seed(&self, key: &str) -> Option<u64> {
        let number = self.typed(key, "a whole number", |value| match value {
            Value::Integer(number) => Some(*number),
            _ => None,
        })?;
        let seed = u64::try_from(number).ok();
        if seed.is_none() {
            self.reject(key, "this is out of range: a seed is a whole number of at least 0");
        }
        seed
    }

    /// A finite number for which `fits` holds; `range` says which ones do.
    pub fn number(&self, key: &str, range: &str, fits: impl Fn(f64) -> bool) -> Option<f64> {
        let number = self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            _ => None,
        })?;
        if number.is_finite() && fits(number) {
            return Some(number);
        }
        self.reject(key, &format!("this is out of range: it must be {range}"));
        None
    }

    /// A number of at least 0 that fp32 has as well, since kernels see it as such.
    pub fn at_least_zero(&self, key: &str) -> Option<f64> {
        let range = "a finite number of at least 0 (if it is not 0, from 1e-45 to 3.4e38, as fp32 has them)";
        self.number(key, range, |number| number == 0.0 || is_above_zero(number))
    }

    /// A number above 0 that fp32 has as well, since kernels see it as such.
    pub fn above_zero(&self, key: &str) -> Option<f64> {
        self.number(key, "a finite number above 0 (from 1e-45 to 3.4e38, as fp32 has them)", is_above_zero)
    }

    /// What a loss may be multiplied by. It and its inverse reach kernels as fp32, and beyond 2^100 nothing but overflow
    /// can come of it.
    pub fn factor(&self, key: &str) -> Option<f64> {
        let (least, most) = ((-100f64).exp2(), 100f64.exp2());
        self.number(key, "a number above 0, from 8e-31 to 1.2e30 (2 to the power of -100 and 100)", |number| {
            (least..=most).contains(&number)
        })
    }

    /// A loss scale: as [`Reader::factor`]; None for "dynamic", or 0 as DeepSpeed writes it.
    pub fn scale(&self, key: &str) -> Option<f64> {
        match self.entry(key)?.value {
            Value::Integer(0) => None,
            Value::Text(_) => self.pick(key, &self.text(key)?, &[("dynamic", Ok(None))]).flatten(),
            _ => self.factor(key),
        }
    }

    /// One of several names.
    pub fn choice<T: Copy>(&self, key: &str, default: T, choices: &[Choice<T>]) -> T {
        self.text(key).and_then(|name| self.pick(key, &name, choices)).unwrap_or(default)
    }

    /// What `name`, the value of `key`, means; a problem if it means nothing, or nothing yet.
    pub fn pick<T: Copy>(&self, key: &str, name: &str, choices: &[Choice<T>]) -> Option<T> {
        match choices.iter().find(|(known, _)| *known == name) {
            Some((_, Ok(value))) => Some(*value),
            Some((_, Err(why))) => {
                self.reject(key, why);
                None
            }
            None => {
                let there: Vec<&str> =
                    choices.iter().filter(|(_, meaning)| meaning.is_ok()).map(|(name, _)| *name).collect();
                let near = keys::nearest(name, there.iter().copied());
                let guess = near.map_or(String::new(), |near| format!("did you mean \"{near}\"? "));
                let names = there.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
                self.reject(key, &format!("there is no such choice: {guess}It is one of {names}"));
                None
            }
        }
    }

    /// An integer, or "auto" (`None`, as if it were not written); anything else is a problem that `wanted` explains.
    pub fn integer_or_auto(&self, key: &str, wanted: &str) -> Option<i64> {
        self.typed(key, wanted, |value| match value {
            Value::Integer(number) => Some(Some(*number)),
            Value::Text(text) if text == "auto" => Some(None),
            _ => None,
        })
        .flatten()
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Option<Vec<String>> {
        self.typed(key, "a list of strings, as in [\"a\", \"b\"]", |value| match value {
            Value::List(items) => items
                .iter()
                .map(|item| match item {
                    Value::Text(text) => Some(text.clone()),
                    _ => None,
                })
                .collect(),
            _ => None,
        })
    }

    /// A string, or a list of them.
    pub fn one_or_more(&self, key: &str) -> Option<Vec<String>> {
        match self.entry(key)?.value {
            Value::Text(_) => self.text(key).map(|text| vec![text]),
            _ => self.texts(key),
        }
    }

    /// Refuses `key` when it is written: its feature is not there yet.
    pub fn not_yet(&self, key: &str, why: &str) {
        if self.is_set(key) {
            self.reject(key, why);
        }
    }
}

/// Whether a number is above 0 and finite in fp32, too.
fn is_above_zero(number: f64) -> bool {
    let number = number as f32;
    number > 0.0 && number.is_finite()
}

/// A path as the user means it: `~` and `~/…` begin in the home folder, as a shell would have it.
fn expand_home(text: &str) -> PathBuf {
    let rest = if text == "~" { Some("") } else { text.strip_prefix("~/") };
    match (rest, std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(text),
    }
}
