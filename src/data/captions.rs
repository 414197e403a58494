//! Captions of a folder's pictures, in the two ways that data sets for text-to-image training have them: one
//! `metadata.jsonl` for all (the image-folder convention of Hugging Face's `datasets`: `file_name` and a column of
//! text), or beside each picture a text file of its name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::input_file;

/// How captions are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionOptions {
    /// The column of `metadata.jsonl` that holds them.
    pub column: String,
    /// The caption of pictures that have none; without it, such a picture is a problem.
    pub fallback: Option<String>,
}

/// The name of the file that describes a folder's pictures.
const METADATA: &str = "metadata.jsonl";

/// Whether `path` belongs to the captions and is no picture.
pub fn is_caption_file(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "txt") || path.file_name().is_some_and(|name| name == METADATA)
}

/// The caption of each of `pictures`, files in `folder`; None for those that have the fallback instead. Problems are for a
/// refusal.
pub fn captions(
    folder: &Path,
    pictures: &[PathBuf],
    options: &CaptionOptions,
) -> std::result::Result<Vec<Option<String>>, Vec<String>> {
    let metadata = folder.join(METADATA);
    // Whatever is there, be it no file: that is told, and not passed over.
    let listed = if std::fs::symlink_metadata(&metadata).is_ok() {
        Some(read_metadata(&metadata, &options.column)?)
    } else {
        None
    };
    let mut problems = Vec::new();
    let mut found = Vec::with_capacity(pictures.len());
    let mut without: Vec<&Path> = Vec::new();
    for picture in pictures {
        let caption = match &listed {
            Some(listed) => picture.file_name().and_then(|name| listed.get(&*name.to_string_lossy()).cloned()),
            None => beside(picture).unwrap_or_else(|problem| {
                problems.push(problem);
                Some(String::new())
            }),
        };
        if caption.is_none() && options.fallback.is_none() {
            without.push(picture);
        }
        found.push(caption);
    }
    if let Some(first) = without.first() {
        let more = match without.len() {
            1 => String::new(),
            n => format!(" (and {} other pictures have none)", n - 1),
        };
        let remedy = match listed {
            Some(_) => format!("Add a line for it to {METADATA}"),
            None => "Write it into a .txt file of the same name beside the picture".to_string(),
        };
        problems.push(format!(
            "{} has no caption{more}, and data.captions = true. {remedy}, or set data.instance_prompt, which is then used.",
            first.display()
        ));
    }
    if let Some(listed) = &listed {
        let there: std::collections::HashSet<_> =
            pictures.iter().filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned())).collect();
        let mut absent: Vec<&String> = listed.keys().filter(|name| !there.contains(*name)).collect();
        absent.sort();
        if let Some(first) = absent.first() {
            problems.push(format!(
                "{} names {first}, which is not in the folder{}. Take the line out, or put the picture there (sub-folders are not looked into).",
                metadata.display(),
                if absent.len() > 1 { format!(", nor are {} others", absent.len() - 1) } else { String::new() }
            ));
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// The text file beside a picture, its line breaks as spaces; None where there is none.
fn beside(picture: &Path) -> std::result::Result<Option<String>, String> {
    let path = picture.with_extension("txt");
    match input_file::text(&path) {
        Ok(text) => Ok(Some(text.split_whitespace().collect::<Vec<_>>().join(" "))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("the caption {} cannot be read: {e}. It must be a text file in UTF-8.", path.display())),
    }
}

/// File name -> caption.
fn read_metadata(path: &Path, column: &str) -> std::result::Result<HashMap<String, String>, Vec<String>> {
    let text = input_file::text(path).map_err(|e| {
        vec![format!("the captions {} cannot be read: {e}. It must be a text file in UTF-8.", path.display())]
    })?;
    let mut captions = HashMap::new();
    let mut problems = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = format!("{}, line {}", path.display(), number + 1);
        match read_line(line, column) {
            Ok((file, caption)) => {
                if captions.insert(file.clone(), caption).is_some() {
                    problems.push(format!("{at}: {file} was described before. Keep one line for each picture."));
                }
            }
            Err(what) => problems.push(format!("{at}: {what}")),
        }
        if problems.len() == 5 {
            problems.push(format!("{}: the lines after this one were not read.", path.display()));
            break;
        }
    }
    if problems.is_empty() { Ok(captions) } else { Err(problems) }
}

fn read_line(line: &str, column: &str) -> std::result::Result<(String, String), String> {
    let value: Value =
        serde_json::from_str(line).map_err(|e| format!("this is no JSON ({e}). Write one object a line."))?;
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let file = text("file_name").ok_or("there is no \"file_name\", the picture's name as a string. Add it.")?;
    let caption = text(column).ok_or_else(|| {
        let others: Vec<&str> = value
            .as_object()
            .map(|object| {
                object.iter().filter(|(key, v)| v.is_string() && *key != "file_name").map(|(k, _)| &**k).collect()
            })
            .unwrap_or_default();
        let remedy = match others.is_empty() {
            true => format!("Add it (\"{column}\": \"…\")."),
            false => format!("Add it, or set data.caption_column to one of: {}.", others.join(", ")),
        };
        format!("there is no \"{column}\" with the caption of {file} as a string. {remedy}")
    })?;
    Ok((file.strip_prefix("./").unwrap_or(&file).to_string(), caption))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn read(dir: &tempfile::TempDir, fallback: Option<&str>) -> std::result::Result<Vec<Option<String>>, Vec<String>> {
        let pictures = ["a.png", "b.jpg"].map(|name| dir.path().join(name));
        let options = CaptionOptions { column: "text".into(), fallback: fallback.map(str::to_owned) };
        captions(dir.path(), &pictures, &options)
    }

    fn own(captions: [&str; 2]) -> [Option<String>; 2] {
        captions.map(|caption| Some(caption.to_string()))
    }

    #[test]
    fn captions_come_from_one_file_or_from_one_each() {
        let lines = "{\"file_name\": \"b.jpg\", \"text\": \"two\"}\n\n{\"text\": \"one\", \"file_name\": \"./a.png\", \"n\": 3}\n";
        assert_eq!(read(&folder(&[("metadata.jsonl", lines), ("a.txt", "no")]), None).unwrap(), own(["one", "two"]));
        assert_eq!(
            read(&folder(&[("a.txt", " a red\n circle "), ("b.txt", "")]), None).unwrap(),
            own(["a red circle", ""])
        );
        assert_eq!(read(&folder(&[("b.txt", "x")]), Some("sks")).unwrap(), [None, Some("x".to_string())]);
        assert!(is_caption_file(Path::new("x/a.txt")) && is_caption_file(Path::new("metadata.jsonl")));
        assert!(!is_caption_file(Path::new("a.png")));
    }

    #[test]
    fn byte_order_marks_are_no_part_of_a_caption() {
        let lines =
            "\u{feff}{\"file_name\": \"a.png\", \"text\": \"one\"}\n{\"file_name\": \"b.jpg\", \"text\": \"two\"}\n";
        assert_eq!(read(&folder(&[("metadata.jsonl", lines)]), None).unwrap(), own(["one", "two"]));
        assert_eq!(read(&folder(&[("a.txt", "\u{feff}one"), ("b.txt", "\u{feff}")]), None).unwrap(), own(["one", ""]));
    }

    #[test]
    fn captions_that_are_no_files_are_told() {
        for (name, link) in
            [("metadata.jsonl", None), ("metadata.jsonl", Some("/dev/null")), ("a.txt", Some("/dev/zero"))]
        {
            let dir = folder(&[("b.txt", "two")]);
            match link {
                Some(to) => std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap(),
                None => std::fs::create_dir(dir.path().join(name)).unwrap(),
            }
            let problems = read(&dir, Some("x")).unwrap_err().join("\n");
            let why = if link.is_some() { "a pipe or a device" } else { "a folder" };
            assert!(problems.contains(name) && problems.contains(why), "{problems}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let told = |files: &[(&str, &str)], parts: &[&str]| {
            let problems = read(&folder(files), None).unwrap_err().join("\n");
            parts.iter().for_each(|part| assert!(problems.contains(part), "{problems}\nlacks {part}"));
        };
        told(&[], &["a.png has no caption (and 1 other", "a .txt file", "instance_prompt"]);
        let one = "{\"file_name\": \"a.png\", \"text\": \"one\"}\n";
        told(&[("metadata.jsonl", one)], &["b.jpg has no caption,", "Add a line"]);
        told(&[("metadata.jsonl", &one.repeat(2))], &["line 2", "described before"]);
        told(
            &[("metadata.jsonl", "{\"file_name\": \"a.png\", \"caption\": \"x\"}")],
            &["line 1", "caption_column", "caption."],
        );
        told(&[("metadata.jsonl", "nonsense")], &["line 1", "no JSON"]);
        let both = format!("{one}{}", one.replace("a.png", "c.png"));
        told(&[("metadata.jsonl", &both)], &["names c.png, which is not in the folder"]);
    }
}
