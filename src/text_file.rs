//! Text that users write: configurations, captions, prompts. Whatever can be read only once, or never ends, is refused,
//! since it would be waited for, or be empty for the next reader: a launcher and each of its ranks read the same files.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;

/// The text of a regular file in UTF-8, without the byte-order mark that some editors begin with.
///
/// # Errors
/// Those of reading a file; of kind `IsADirectory` for a folder, and of kind `InvalidInput` for a pipe or a device, in
/// words that end with the remedy.
pub fn read(path: &Path) -> Result<String> {
    let found = std::fs::metadata(path)?;
    if found.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "this is a folder"));
    }
    if !found.is_file() {
        let what = "this is no file but a pipe or a device, which cannot be read more than once: write what comes from it \
                    into a file, and name that";
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    let mut text = std::fs::read_to_string(path)?;
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
        assert_eq!(read(&path).unwrap(), "a \u{feff}b");
        let kind = |path: &Path| read(path).unwrap_err().kind();
        assert_eq!(kind(dir.path()), ErrorKind::IsADirectory);
        assert_eq!(kind(&dir.path().join("b.txt")), ErrorKind::NotFound);
        assert_eq!(kind(Path::new("/dev/null")), ErrorKind::InvalidInput);
        std::fs::write(&path, [b'a', 0xe4]).unwrap();
        assert_eq!(kind(&path), ErrorKind::InvalidData);
    }
}
