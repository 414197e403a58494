//! Row 4: shows runs from the files they left: `dblaunch report` as one HTML file that needs nothing else, `dblaunch watch`
//! live on this machine. Reads `metrics.jsonl`, `config.toml` and `samples/`; knows nothing of how they came about.
//!
//! `run.rs` reads, `series.rs` and `axis.rs` turn numbers into what is drawn, the files that end in markup are
//! `chart.rs`, `curves.rs`, `gallery.rs`, `summary.rs`, `configuration.rs`, put together by `page.rs`.

mod axis;
mod chart;
mod configuration;
mod curves;
mod gallery;
mod number;
mod page;
mod pictures;
mod rows;
mod run;
mod series;
mod summary;
#[cfg(test)]
mod testing;
mod watch;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::Refusal;
use page::Page;
use pictures::Shots;
use run::Run;

pub use watch::{DEFAULT_PORT, watch};

/// What every page begins with, and by which an old report is known.
const BEGINNING: &str = "<!DOCTYPE html><html lang=\"en\" data-made-by=\"dblaunch\"";

/// Writes the report of the runs in `dirs`, the first of which is the standard place for it, and says where it is. A folder
/// that holds no run, and a place that cannot be written, is a [`Refusal`]; nothing is written then.
pub fn write(dirs: &[PathBuf], out: Option<&Path>) -> Result<PathBuf> {
    let mut runs = Vec::new();
    for dir in dirs {
        let run = Run::open(dir)?;
        if !runs.iter().any(|known: &Run| known.dir == run.dir) {
            runs.push(run);
        }
    }
    run::name_apart(&mut runs);
    let standard = dirs.first().map(|dir| dir.join("report.html")).unwrap_or_default();
    let out = out.map_or(standard, Path::to_path_buf);
    may_replace(&out)?;
    let shots = Shots::embedded(&runs);
    let html = Page { runs: &runs, shots: &shots, live: false }.html();
    let aside = out.with_extension(format!("html.{}", std::process::id()));
    let written = fs::write(&aside, html).and_then(|()| fs::rename(&aside, &out));
    written.map_err(|error| {
        // It may not even be there.
        let _ = fs::remove_file(&aside);
        Refusal::error(format!(
            "the report cannot be written to {} ({error}): name another file with --out",
            out.display()
        ))
    })?;
    Ok(out)
}

/// An old report is replaced; anything else that is there is somebody's own.
fn may_replace(out: &Path) -> Result<()> {
    if out.is_dir() {
        let file = out.join("report.html");
        return Err(Refusal::error(format!(
            "--out {} is a folder: name a file, such as {}",
            out.display(),
            file.display()
        )));
    }
    if !out.exists() {
        return Ok(());
    }
    let mut start = vec![0; BEGINNING.len()];
    // Opening a pipe would wait for someone to write into it.
    let is_read = out.is_file() && fs::File::open(out).and_then(|mut file| file.read_exact(&mut start)).is_ok();
    match is_read && start == BEGINNING.as_bytes() {
        true => Ok(()),
        false => Err(Refusal::error(format!(
            "{} is there and is no report of dblaunch's: name another file with --out",
            out.display()
        ))),
    }
}
