//! What a run tells of itself, and the commands that show it: event files, `report`, `watch`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::{Home, PLAIN};

fn dblaunch(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dblaunch"));
    command.env_clear().args(words).stdin(Stdio::null());
    command
}

fn run(words: &[&str]) -> Output {
    dblaunch(words).output().unwrap()
}

/// A folder with a run of `steps` steps, as far as its rows go.
fn forged(dir: &Path, steps: u64) -> String {
    fs::create_dir_all(dir).unwrap();
    let rows = (1..=steps).map(|step| format!("{{\"step\":{step},\"loss\":0.5,\"grad_norm\":1.0,\"lr\":1e-5}}\n"));
    fs::write(dir.join("metrics.jsonl"), rows.collect::<String>()).unwrap();
    dir.display().to_string()
}

/// The messages of an event file, by its framing alone.
fn events(path: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        found.push(rest[12..12 + length].to_vec());
        rest = &rest[12 + length + 4..];
    }
    found
}

fn event_files(out: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(out.join("logs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// How many of `events` hold `words`.
fn holding(events: &[Vec<u8>], words: &str) -> usize {
    events.iter().filter(|event| event.windows(words.len()).any(|part| part == words.as_bytes())).count()
}

#[test]
fn a_run_and_its_resumption_leave_event_files() {
    let home = Home::new();
    let sets = ["output.trackers=[\"jsonl\", \"tensorboard\"]", "checkpoint.every=2"];
    home.job(PLAIN).ranks(2).sets(&sets).run().done();
    let first = event_files(&home.out());
    assert_eq!(first.len(), 1);
    let told = events(&first[0]);
    // The version, the start of the session, the configuration, four steps.
    assert_eq!(told.len(), 3 + 4);
    assert_eq!(
        (holding(&told, "images_per_second"), holding(&told, "instance_prompt = \"a photo of sks cat\"")),
        (4, 1)
    );
    home.job(PLAIN).sets(&sets).set("checkpoint.resume=checkpoint-2").run().done();
    let both = event_files(&home.out());
    assert!(both.len() == 2 && both[0] == first[0]);
    assert_eq!(holding(&events(&both[1]), "images_per_second"), 2);
    let config = fs::read_to_string(home.path("out/config.toml")).unwrap();
    assert!(config.contains("trackers = [\"jsonl\", \"tensorboard\"]"), "{config}");
}

#[test]
fn a_report_is_one_file_of_the_run_as_far_as_it_is() {
    let home = Home::new();
    let (one, two) = (forged(&home.path("one"), 40), forged(&home.path("two"), 30));
    let torn = fs::read_to_string(home.path("one/metrics.jsonl")).unwrap() + "{\"step\":41,\"lo";
    fs::write(home.path("one/metrics.jsonl"), torn).unwrap();
    let told = run(&["report", &one]);
    assert_eq!((told.status.code(), String::from_utf8_lossy(&told.stderr).as_ref()), (Some(0), ""));
    assert_eq!(String::from_utf8(told.stdout).unwrap(), format!("{one}/report.html\n"));
    let html = fs::read_to_string(home.path("one/report.html")).unwrap();
    assert!(html.contains("<h1>one</h1>") && html.contains("step 40") && html.ends_with("</html>"));
    // Several runs, elsewhere; an old report is replaced.
    fs::copy(home.path("one/report.html"), home.path("both.html")).unwrap();
    let both = home.path("both.html").display().to_string();
    assert_eq!(run(&["report", &one, &two, "--out", &both]).status.code(), Some(0));
    assert!(fs::read_to_string(&both).unwrap().contains("<h1>2 runs</h1>"));
    assert!(!home.path("two/report.html").exists());
}

#[test]
fn what_is_no_run_is_refused_and_nothing_is_written() {
    let home = Home::new();
    let good = forged(&home.path("good"), 3);
    fs::create_dir(home.path("empty")).unwrap();
    let (empty, none) = (home.path("empty").display().to_string(), home.path("none").display().to_string());
    let (notes, below) = (home.path("notes.txt"), home.path("none/report.html").display().to_string());
    fs::write(&notes, "mine").unwrap();
    let notes = notes.display().to_string();
    let cases: [(&[&str], &str); 6] = [
        (&["report", &empty], "holds no run"),
        (&["report", &good, &none], "does not exist"),
        (&["report", &good, "--out", &empty], "is a folder"),
        (&["report", &good, "--out", &notes], "is no report"),
        (&["report", &good, "--out", &below], "cannot be written"),
        (&["watch", &empty], "holds no run"),
    ];
    for (words, why) in cases {
        let told = run(words);
        let stderr = String::from_utf8(told.stderr).unwrap();
        assert_eq!(told.status.code(), Some(2), "{words:?}: {stderr}");
        assert!(
            stderr.starts_with("dblaunch: ") && stderr.contains(why) && told.stdout.is_empty(),
            "{words:?}: {stderr}"
        );
    }
    assert_eq!(fs::read_dir(home.path("good")).unwrap().count(), 1);
    assert!(fs::read_dir(home.path("empty")).unwrap().next().is_none() && !home.path("none").exists());
    assert_eq!(fs::read_to_string(notes).unwrap(), "mine");
}

/// The answer to a request for `path` under the name `host`.
fn answer(port: u16, host: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn a_run_is_watched_until_the_user_interrupts() {
    let home = Home::new();
    let dir = forged(&home.path("run"), 3);
    let mut child = dblaunch(&["watch", &dir, "--port", "0"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port: u16 = line.split("127.0.0.1:").nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let host = format!("127.0.0.1:{port}");
    let page = answer(port, &host, "/");
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("step 3"), "{page}");
    forged(&home.path("run"), 5);
    assert!(answer(port, &host, "/").contains("step 5"));
    assert!(answer(port, "elsewhere.example", "/").starts_with("HTTP/1.1 403"));
    assert!(answer(port, &host, "/../metrics.jsonl").starts_with("HTTP/1.1 404"));
    let taken = run(&["watch", &dir, "--port", &port.to_string()]);
    assert_eq!(taken.status.code(), Some(2));
    assert!(String::from_utf8(taken.stderr).unwrap().contains("is taken"));
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    // It has only looked.
    assert_eq!(fs::read_dir(home.path("run")).unwrap().count(), 1);
}
