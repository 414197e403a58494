//! `scheduler_config.json`: reading the file and the values of its keys, with refusals that name them. What the keys
//! mean is the business of the schedule and of the samplers.

use crate::Refusal;
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// Reads the file into a JSON value. Python writes infinities and NaN without quotes, which JSON does not know; they
/// become strings here, and [`limit`] understands them.
///
/// # Errors
/// A [`Refusal`] with the file's name if it cannot be read or is not JSON.
pub(super) fn read(path: &Path) -> Result<Value> {
    let text = crate::input_file::text(path).map_err(|e| {
        Refusal::error(format!(
            "the noise schedule cannot be read: {}: {e}. A pipeline folder in diffusers layout has it as scheduler/scheduler_config.json.",
            path.display()
        ))
    })?;
    serde_json::from_str(&quote_infinities(&text))
        .map_err(|e| Refusal::error(format!("{} is not valid JSON: {e}. Restore the file.", path.display())))
}

/// Puts quotes around `Infinity`, `-Infinity` and `NaN` outside of strings.
fn quote_infinities(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    for (i, part) in split_at_quotes(text).into_iter().enumerate() {
        if i % 2 == 1 {
            quoted.push_str(part);
        } else {
            // The sign is moved into the quotes.
            let part = part.replace("-Infinity", "\u{1}").replace("Infinity", "\"Infinity\"").replace("NaN", "\"NaN\"");
            quoted.push_str(&part.replace('\u{1}', "\"-Infinity\""));
        }
    }
    quoted
}

/// The pieces outside (even) and inside (odd) of JSON strings, each inner one with its quotes.
fn split_at_quotes(text: &str) -> Vec<&str> {
    let (mut pieces, mut start, mut inside, mut escaped) = (Vec::new(), 0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if inside => escaped = true,
            b'"' => {
                let end = if inside { at + 1 } else { at };
                pieces.push(&text[start..end]);
                start = end;
                inside = !inside;
            }
            _ => {}
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// A string, or `default` where the key is absent or null; so for the functions below.
pub(super) fn text(config: &Value, key: &str, default: &str) -> Result<String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(default.to_owned()),
        Some(Value::String(s)) => Ok(s.clone()),
        Some(other) => Err(Refusal::error(format!("{key} = {other} is not a string. Restore the file."))),
    }
}

/// A finite number.
pub(super) fn number(config: &Value, key: &str, default: f64) -> Result<f64> {
    Ok(optional_number(config, key)?.unwrap_or(default))
}

/// A finite number, if the key is there.
pub(super) fn optional_number(config: &Value, key: &str) -> Result<Option<f64>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_f64()
            .filter(|v| v.is_finite())
            .map(Some)
            .ok_or_else(|| Refusal::error(format!("{key} = {value} is not a number. Restore the file."))),
    }
}

/// A number that may be infinite.
pub(super) fn limit(config: &Value, key: &str, default: f64) -> Result<f64> {
    match config.get(key).and_then(Value::as_str) {
        Some("-Infinity" | "-inf") => Ok(f64::NEG_INFINITY),
        Some("Infinity" | "inf") => Ok(f64::INFINITY),
        _ => number(config, key, default),
    }
}

/// A whole number from 0.
pub(super) fn count(config: &Value, key: &str, default: usize) -> Result<usize> {
    let value = number(config, key, default as f64)?;
    if !(0.0..=1e6).contains(&value) || value.fract() != 0.0 {
        return Err(Refusal::error(format!(
            "{key} = {value} is not a whole number between 0 and 1000000. Restore the file."
        )));
    }
    Ok(value as usize)
}

/// True or false.
pub(super) fn flag(config: &Value, key: &str, default: bool) -> Result<bool> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => Err(Refusal::error(format!("{key} = {other} is not true or false. Restore the file."))),
    }
}

/// One of the named choices; `default` is the name that an absent key stands for.
pub(super) fn choice<T: Copy>(config: &Value, key: &str, default: &str, choices: &[(&str, T)]) -> Result<T> {
    let name = text(config, key, default)?;
    choices.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = choices.iter().map(|(known, _)| format!("\"{known}\"")).collect();
        Refusal::error(format!(
            "{key} = \"{name}\" is not possible with this sampler; it knows {}. Change the key, or choose another sampler.",
            known.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn infinities_as_python_writes_them_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scheduler_config.json");
        std::fs::write(&path, r#"{"a": -Infinity, "b": Infinity, "NaN \" Infinity": "-Infinity", "c": [NaN]}"#)
            .unwrap();
        let config = read(&path).unwrap();
        assert_eq!(limit(&config, "a", 0.0).unwrap(), f64::NEG_INFINITY);
        assert_eq!(limit(&config, "b", 0.0).unwrap(), f64::INFINITY);
        assert_eq!(limit(&config, "none", -1.5).unwrap(), -1.5);
        assert!(config.get("NaN \" Infinity").is_some());
        assert!(number(&config, "b", 0.0).is_err());
    }

    #[test]
    fn wrong_types_are_refused_by_key() {
        let config = json!({"s": 1, "n": "x", "f": 1, "c": 1.5, "o": "none", "null": null});
        let refusals = [
            text(&config, "s", "").map(drop),
            number(&config, "n", 0.0).map(drop),
            flag(&config, "f", true).map(drop),
            count(&config, "c", 0).map(drop),
            choice(&config, "o", "one", &[("one", 1), ("two", 2)]).map(drop),
        ];
        for (refusal, key) in refusals.into_iter().zip(["s", "n", "f", "c", "o"]) {
            let error = refusal.unwrap_err();
            assert!(error.is::<Refusal>() && error.to_string().starts_with(&format!("{key} = ")), "{error}");
        }
        assert!(flag(&config, "null", true).unwrap());
        assert_eq!(choice(&config, "null", "two", &[("one", 1), ("two", 2)]).unwrap(), 2);
    }
}
