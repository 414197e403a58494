//! TensorBoard event files in `logs/`: a file a start, whole records only. The framing is TFRecord's: length, its
//! masked CRC-32C, the message, its masked CRC-32C, all little-endian. The messages are in `messages.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use prost::Message;

use super::Picture;
use super::messages::{
    Content, DT_STRING, Dim, Event, Image, Metadata, PluginData, SESSION_START, SessionLog, Shape, Summary, Tensor,
    Value, What,
};

/// TensorBoard takes every file with `tfevents` in its name, in the order of names; the end says that it is ours.
const BEGINNING: &str = "events.out.tfevents.";
const END: &str = ".dblaunch";

/// An event file that is being written. Every event is one write, so that a crash can tear the last one only.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `logs`, named to be read after those that are there. What they say of steps past `step` is void:
    /// TensorBoard drops it when it reads the session's start.
    pub fn create(logs: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("creating {}", logs.display()))?;
        let newest = ours(logs)?.into_iter().map(|(second, _)| second).max();
        let second = newest.map_or(0, |newest| newest + 1).max(seconds() as u64);
        let path = logs.join(format!("{BEGINNING}{second:010}{END}"));
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let mut file = EventFile { file: file.with_context(|| format!("creating {}", path.display()))?, path };
        // From version 2 on, TensorBoard goes by session starts and not by steps that come twice.
        file.write(0, What::FileVersion("brain.Event:2".to_string()))?;
        file.write(step + 1, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(file)
    }

    /// Numbers of one step, as one event.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let value = |&(tag, value): &(&str, f64)| Value {
            tag: tag.to_string(),
            metadata: None,
            content: Some(Content::SimpleValue(value as f32)),
        };
        self.write(step, What::Summary(Summary { value: values.iter().map(value).collect() }))
    }

    /// `validation/N`, with its prompt as the description.
    pub fn picture(&mut self, step: u64, picture: &Picture) -> Result<()> {
        let image = Image {
            height: picture.height as i32,
            width: picture.width as i32,
            colorspace: 3,
            encoded: picture.png.to_vec(),
        };
        let value = Value {
            tag: format!("validation/{}", picture.number),
            metadata: Some(metadata("images", picture.prompt)),
            content: Some(Content::Image(image)),
        };
        self.write(step, What::Summary(Summary { value: vec![value] }))
    }

    /// `text` as it is: TensorBoard shows Markdown, where indented lines are verbatim.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        let indented = text.lines().map(|line| format!("    {line}\n")).collect::<String>();
        let tensor = Tensor {
            dtype: DT_STRING,
            shape: Some(Shape { dim: vec![Dim { size: 1 }] }),
            string_val: vec![indented.into_bytes()],
        };
        let value = Value {
            tag: tag.to_string(),
            metadata: Some(metadata("text", "")),
            content: Some(Content::Tensor(tensor)),
        };
        self.write(step, What::Summary(Summary { value: vec![value] }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event { wall_time: seconds(), step: step as i64, what: Some(what) };
        let record = framed(&event.encode_to_vec());
        self.file.write_all(&record).with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Removes the event files of the run that was here before; another program's stay.
pub fn remove_old(logs: &Path) -> Result<()> {
    for (_, path) in ours(logs)? {
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Our files in `logs` with the seconds in their names; none if there is no such folder.
fn ours(logs: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !logs.is_dir() {
        return Ok(Vec::new());
    }
    let reading = || format!("reading {}", logs.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(logs).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let second = name.strip_prefix(BEGINNING).and_then(|name| name.strip_suffix(END));
        found.extend(second.and_then(|second| second.parse().ok()).map(|second| (second, path)));
    }
    Ok(found)
}

fn metadata(plugin: &str, description: &str) -> Metadata {
    let plugin_data = Some(PluginData { plugin_name: plugin.to_string() });
    Metadata { plugin_data, summary_description: description.to_string() }
}

/// Since 1970.
fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A TFRecord.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let checksums = [masked_crc(&length), masked_crc(message)].map(u32::to_le_bytes);
    [&length[..], &checksums[0], message, &checksums[1]].concat()
}

/// CRC-32C, turned and shifted so that a checksum of data that holds checksums is no weaker.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::super::reader::{Read, events};
    use super::super::{Kept, StepRow, Tracker, Trackers};
    use super::*;

    fn row(step: u64) -> StepRow {
        StepRow {
            step,
            loss: 0.5 / step as f64,
            grad_norm: f64::INFINITY,
            lr: 1e-6,
            seconds: 1.0,
            images_per_second: 4.0,
            peak_vram_bytes: 0,
            peak_rss_bytes: 1 << 30,
            skipped: false,
            loss_scale: None,
        }
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> =
            fs::read_dir(dir.join("logs")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    fn open(dir: &Path, step: u64) -> Trackers {
        let kept = Kept { step, micro_step: step };
        Trackers::open(dir, &[Tracker::Jsonl, Tracker::TensorBoard], kept, true).unwrap()
    }

    #[test]
    fn an_independent_reader_finds_numbers_pictures_and_text() {
        let dir = tempfile::tempdir().unwrap();
        let mut trackers = open(dir.path(), 0);
        trackers.config("[model]\npath = \"x\"\n").unwrap();
        trackers.step(&row(1)).unwrap();
        let (prompt, png) = ("a photo of \"sks\" café", [137, 80, 78, 71, 0, 255]);
        let picture = Picture { number: 3, prompt, png: &png, width: 640, height: 512 };
        trackers.pictures(100, &[picture]).unwrap();
        let [file] = &files(dir.path())[..] else { panic!("not one file") };
        let found = events(&fs::read(file).unwrap()).unwrap();
        assert_eq!(found[0], (0, Read::Version("brain.Event:2".to_string())));
        assert_eq!(found[1], (1, Read::Start));
        let text = "    [model]\n    path = \"x\"\n".to_string();
        assert_eq!(found[2], (0, Read::Text { tag: "config".to_string(), plugin: "text".to_string(), text }));
        let scalar = |tag: &str, value: f32| (1, Read::Scalar { tag: tag.to_string(), value });
        let scalars = [
            scalar("loss", 0.5),
            scalar("lr", 1e-6),
            scalar("grad_norm", f32::INFINITY),
            scalar("images_per_second", 4.0),
            scalar("peak_rss_bytes", (1u64 << 30) as f32),
        ];
        assert_eq!(found[3..8], scalars);
        let image = Read::Image {
            tag: "validation/3".to_string(),
            description: prompt.to_string(),
            size: (640, 512),
            bytes: png.to_vec(),
        };
        assert_eq!(found[8..], [(100, image)]);
    }

    #[test]
    fn a_resumed_run_marks_what_it_takes_back_in_a_file_that_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let mut trackers = open(dir.path(), 0);
        (1..=5).for_each(|step| trackers.step(&row(step)).unwrap());
        drop(trackers);
        let mut again = open(dir.path(), 3);
        again.config("x = 1\n").unwrap();
        again.step(&row(4)).unwrap();
        let [first, second] = &files(dir.path())[..] else { panic!("not two files") };
        let steps = |file| events(&fs::read(file).unwrap()).unwrap().into_iter().map(|(step, _)| step).max();
        assert_eq!((steps(first), steps(second)), (Some(5), Some(4)));
        let found = events(&fs::read(second).unwrap()).unwrap();
        assert_eq!(found[1], (4, Read::Start));
        assert!(matches!(&found[2], (3, Read::Text { .. })));
    }

    #[test]
    fn a_fresh_run_removes_our_files_alone_and_other_ranks_write_none() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), 0).step(&row(1)).unwrap();
        let foreign = dir.path().join("logs/events.out.tfevents.1700000000.host.7.0");
        fs::write(&foreign, "x").unwrap();
        Trackers::open(dir.path(), &[Tracker::TensorBoard], Kept::default(), false).unwrap().step(&row(1)).unwrap();
        assert_eq!(files(dir.path()).len(), 2);
        Trackers::open(dir.path(), &[], Kept::default(), true).unwrap().step(&row(1)).unwrap();
        assert_eq!(files(dir.path()), [foreign]);
    }

    #[test]
    fn a_crash_tears_one_record_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let mut trackers = open(dir.path(), 0);
        (1..=3).for_each(|step| trackers.step(&row(step)).unwrap());
        let bytes = fs::read(&files(dir.path())[0]).unwrap();
        let torn = events(&bytes[..bytes.len() - 3]).unwrap();
        assert_eq!(torn.last().unwrap().0, 2);
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        assert!(events(&flipped).is_err());
    }
}
