//! Forged run folders, and a check that markup is whole.

use std::fs;
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};

/// A run's folder that no run wrote.
pub struct Forged {
    _home: tempfile::TempDir,
    dir: PathBuf,
}

impl Forged {
    /// In a folder `name` (which may have parts), with `steps` steps of half a second.
    pub fn new(name: &str, steps: u64) -> Forged {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        let row = |step: u64| {
            let loss = 0.5 + 1.0 / step as f64 + (step as f64 * 1.7).sin() * 0.1;
            format!(
                "{{\"micro_step\":{},\"step\":{step},\"loss\":{loss},\"lr\":1e-5}}\n{{\"step\":{step},\"loss\":{loss},\
                 \"grad_norm\":1.5,\"lr\":1e-5,\"seconds\":0.5,\"images_per_second\":8.0,\"peak_vram_bytes\":0,\
                 \"peak_rss_bytes\":3221225472,\"skipped\":false}}\n",
                step - 1
            )
        };
        fs::write(dir.join("metrics.jsonl"), (1..=steps).map(row).collect::<String>()).unwrap();
        let config = format!("[train]\nmax_steps = {steps}\nseed = 7\n[output]\ndir = \"runs/it\"\n");
        fs::write(dir.join("config.toml"), config).unwrap();
        Forged { _home: home, dir }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `count` square pictures of `side` pixels at each of `steps`; their prompts are unfriendly.
    pub fn pictures(&self, steps: &[u64], count: u64, side: u32) {
        let samples = self.dir.join("samples");
        let mut index = String::new();
        for step in steps {
            let folder = format!("step-{step:06}");
            fs::create_dir_all(samples.join(&folder)).unwrap();
            for number in 0..count {
                let file = format!("{folder}/{number:05}.png");
                let colour = Rgb([(*step % 256) as u8, (number * 80 % 256) as u8, 120]);
                RgbImage::from_pixel(side, side, colour).save(samples.join(&file)).unwrap();
                let picture = serde_json::json!({
                    "step": step,
                    "number": number,
                    "prompt": format!("a \"sks\" dog & <script>alert({number})</script> 'x'"),
                    "negative_prompt": "</p><b>",
                    "seed": 7,
                    "file": file,
                });
                index += &format!("{picture}\n");
            }
        }
        fs::write(samples.join("index.jsonl"), index).unwrap();
    }

    /// Before, in the middle, at the end; the middle has no drift.
    pub fn scores(&self) {
        let samples = self.dir.join("samples");
        fs::create_dir_all(&samples).unwrap();
        let lines = "{\"step\":0,\"likeness\":0.3,\"drift\":0}\n{\"step\":15,\"likeness\":0.6,\"drift\":null}\n\
                     {\"step\":30,\"likeness\":0.8,\"drift\":2.5}\n";
        fs::write(samples.join("scores.jsonl"), lines).unwrap();
    }
}

/// Elements that have no end.
const VOID: [&str; 5] = ["meta", "link", "img", "br", "input"];

/// Every element that begins ends, in order; every attribute is quoted.
#[track_caller]
pub fn well_formed(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html;
    while let Some(at) = rest.find('<') {
        rest = &rest[at + 1..];
        if rest.starts_with("!DOCTYPE") {
            continue;
        }
        let end = tag_end(rest);
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "before {}", &rest[..rest.len().min(200)]);
            continue;
        }
        let name = tag.split(|c: char| !c.is_alphanumeric()).next().unwrap();
        assert!(!name.is_empty(), "a bare < before {}", &rest[..rest.len().min(200)]);
        if ["script", "style"].contains(&name) {
            rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
        }
        if !VOID.contains(&name) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

/// Where a tag ends: at the first > outside quotes.
fn tag_end(tag: &str) -> usize {
    let mut quoted = false;
    for (at, c) in tag.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '>' if !quoted => return at,
            '<' if !quoted => break,
            _ => {}
        }
    }
    panic!("a tag without end: {}", &tag[..tag.len().min(200)]);
}
