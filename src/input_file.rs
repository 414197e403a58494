//! Files that a run is given: configurations, captions, prompts, models, checkpoints. What can be read only once, or never
//! ends, is refused, since it would be waited for, or be empty for the next reader: a launcher and each of its ranks read
//! the same files.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Opens a regular file.
///
/// # Errors
/// Those of opening a file; of kind `IsADirectory` for a folder, and of kind `InvalidInput` for a pipe or a device, in
/// words that end with the remedy.
pub fn open(path: &Path) -> Result<File> {
    // Before it is opened, which is what a pipe without a writer blocks.
    let found = std::fs::metadata(path)?;
    if found.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "this is a folder"));
    }
    if !found.is_file() {
        let what = "this is no file but a pipe or a device, which cannot be read more than once: write what comes from it \
                    into a file, and name that";
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    File::open(path)
}

/// All of a regular file. Errors as those of [`open`], and of reading.
pub fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a regular file in UTF-8, without the byte-order mark that some editors begin with. Errors as those of
/// [`open`], and of reading.
pub fn text(path: &Path) -> Result<String> {
    let mut text = std::io::read_to_string(open(path)?)?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_read_and_without_their_mark() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "\u{feff}a \u{feff}b").unwrap();
        assert_eq!(text(&path).unwrap(), "a \u{feff}b");
        let kind = |path: &Path| text(path).unwrap_err().kind();
        assert_eq!(kind(dir.path()), ErrorKind::IsADirectory);
        assert_eq!(kind(&dir.path().join("b.txt")), ErrorKind::NotFound);
        assert_eq!(kind(Path::new("/dev/null")), ErrorKind::InvalidInput);
        std::fs::write(&path, [b'a', 0xe4]).unwrap();
        assert_eq!(kind(&path), ErrorKind::InvalidData);
    }
}
