//! `dblaunch watch`: the page of one run, served to this machine alone, as the run is at each request. Reads the run's
//! files and nothing else; what is not the page or one of its pictures is not there.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tiny_http::{Header, Request, Response, Server};
use twox_hash::XxHash3_64;

use super::page::Page;
use super::pictures::{Shots, media_type};
use super::run::Run;
use crate::Refusal;

/// TensorBoard's is 6006.
pub const DEFAULT_PORT: u16 = 6060;
/// So many requests are answered at once: a browser that does not read its answer holds up none of the others.
const WORKERS: usize = 4;
/// How long a signal may go unnoticed.
const PAUSE: Duration = Duration::from_millis(100);
/// The page is made anew after so long even where no file seems to have changed.
const STALE: Duration = Duration::from_secs(10);

/// Serves the run in `dir` on 127.0.0.1 until the user interrupts. Port 0 is any free one. A folder that holds no run, and
/// a port that is taken, is a [`Refusal`].
pub fn watch(dir: &Path, port: u16) -> Result<()> {
    let run = Run::open(dir)?;
    let server = Server::http((Ipv4Addr::LOCALHOST, port)).map_err(|error| cannot_listen(port, &*error))?;
    let port = server.server_addr().to_ip().context("the server has no address")?.port();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag still down, the second ends the process at once.
        flag::register_conditional_shutdown(signal, 0, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .context("cannot listen for signals")?;
    }
    // The address may be read by a program; one that has gone away is no reason to stop.
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{} at http://127.0.0.1:{port}/ (Ctrl-C ends it)", dir.display()).and_then(|()| out.flush());
    let (server, site) = (Arc::new(server), Arc::new(Site::new(run, port)));
    for _ in 0..WORKERS {
        let (server, site) = (server.clone(), site.clone());
        std::thread::spawn(move || {
            while let Ok(request) = server.recv() {
                // A browser that has gone away needs no answer.
                let _ = respond(request, &site);
            }
        });
    }
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn cannot_listen(port: u16, error: &(dyn std::error::Error + Send + Sync + 'static)) -> anyhow::Error {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    match kind {
        Some(std::io::ErrorKind::AddrInUse) => Refusal::error(format!(
            "port {port} of 127.0.0.1 is taken: name another with --port, or --port 0 for any that is free"
        )),
        Some(std::io::ErrorKind::PermissionDenied) => {
            Refusal::error(format!("port {port} may not be listened on: name one from 1024 on with --port"))
        }
        _ => anyhow!("cannot listen on port {port} of 127.0.0.1: {error}"),
    }
}

fn respond(request: Request, site: &Site) -> std::io::Result<()> {
    let header = |name: &'static str| {
        let found = request.headers().iter().find(|header| header.field.equiv(name));
        found.map(|header| header.value.as_str().to_string())
    };
    let asked = Asked {
        method: request.method().as_str(),
        host: header("Host"),
        path: request.url(),
        known: header("If-None-Match"),
    };
    let answer = site.answer(&asked);
    let mut response = Response::from_data(answer.body).with_status_code(answer.status);
    for (name, value) in answer.headers {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    request.respond(response)
}

/// A request, as far as it matters.
struct Asked<'a> {
    method: &'a str,
    host: Option<String>,
    path: &'a str,
    /// The version of the page that the browser has.
    known: Option<String>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16, kind: &str, body: impl Into<Vec<u8>>) -> Answer {
        let headers = vec![
            ("Content-Type", kind.to_string()),
            ("X-Content-Type-Options", "nosniff".to_string()),
            ("Cross-Origin-Resource-Policy", "same-origin".to_string()),
            ("Referrer-Policy", "no-referrer".to_string()),
            ("X-Frame-Options", "DENY".to_string()),
        ];
        Answer { status, headers, body: body.into() }
    }

    fn words(status: u16, words: impl Into<String>) -> Answer {
        Answer::new(status, "text/plain; charset=utf-8", words.into() + "\n")
    }

    fn with(mut self, name: &'static str, value: &str) -> Answer {
        self.headers.push((name, value.to_string()));
        self
    }
}

/// What is served.
struct Site {
    /// Names by which this machine's own browser asks for it. Any other is a foreign page whose name was pointed here.
    hosts: [String; 2],
    state: Mutex<State>,
}

struct State {
    runs: [Run; 1],
    page: Arc<str>,
    version: String,
    /// Of the files when the page was made.
    seen: Vec<Option<(u64, u64, i64, i64)>>,
    made: Option<Instant>,
}

impl Site {
    fn new(run: Run, port: u16) -> Site {
        let state = State { runs: [run], page: Arc::from(""), version: String::new(), seen: Vec::new(), made: None };
        Site { hosts: ["127.0.0.1", "localhost"].map(|name| format!("{name}:{port}")), state: Mutex::new(state) }
    }

    fn answer(&self, asked: &Asked) -> Answer {
        let is_own = |host: &str| self.hosts.iter().any(|own| own.eq_ignore_ascii_case(host));
        if !asked.host.as_deref().is_some_and(is_own) {
            return Answer::words(403, "this server answers to its own address only");
        }
        if !["GET", "HEAD"].contains(&asked.method) {
            return Answer::words(405, "only GET and HEAD").with("Allow", "GET, HEAD");
        }
        let path = asked.path.split('?').next().unwrap_or_default();
        if path == "/" {
            return self.page(asked.known.as_deref());
        }
        let numbers = path.strip_prefix("/pictures/").and_then(|path| path.split_once('/'));
        let numbers = numbers.and_then(|(step, number)| Some((step.parse().ok()?, number.parse().ok()?)));
        numbers.and_then(|(step, number)| self.picture(step, number)).unwrap_or_else(|| Answer::words(404, "not here"))
    }

    fn page(&self, known: Option<&str>) -> Answer {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(error) = state.refresh() {
            return Answer::words(503, format!("{error:#}"));
        }
        let answer = match known == Some(&state.version) {
            true => Answer::new(304, "text/html; charset=utf-8", Vec::new()),
            false => Answer::new(200, "text/html; charset=utf-8", state.page.as_bytes()),
        };
        answer.with("ETag", &state.version).with("Cache-Control", "no-cache")
    }

    /// A picture of the run's index, by its step and number: no path comes from the request.
    fn picture(&self, step: u64, number: u64) -> Option<Answer> {
        let path = {
            let state = self.state.lock().unwrap_or_else(|e| e.into_inner());
            let [run] = &state.runs;
            let found = run.pictures.iter().find(|picture| (picture.step, picture.number) == (step, number))?;
            run.picture_path(found)
        };
        let bytes = fs::read(path).ok()?;
        let kind = media_type(image::guess_format(&bytes).ok()?)?;
        // The page's addresses change with the file.
        Some(Answer::new(200, kind, bytes).with("Cache-Control", "private, max-age=86400, immutable"))
    }
}

impl State {
    /// Makes the page anew if a file has changed.
    fn refresh(&mut self) -> Result<()> {
        let seen = self.signature();
        if self.made.is_some_and(|made| made.elapsed() < STALE) && seen == self.seen {
            return Ok(());
        }
        self.runs[0].refresh()?;
        let shots = Shots::linked(&self.runs);
        let page = Page { runs: &self.runs, shots: &shots, live: true }.html();
        self.version = format!("\"{:016x}\"", XxHash3_64::oneshot(page.as_bytes()));
        (self.page, self.seen, self.made) = (page.into(), seen, Some(Instant::now()));
        Ok(())
    }

    /// Which files there are, how long they are and when they were written.
    fn signature(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        let names = ["metrics.jsonl", "config.toml", "samples/index.jsonl", "samples/scores.jsonl"];
        let of = |name: &str| {
            let there = fs::metadata(self.runs[0].dir.join(name)).ok()?;
            Some((there.ino(), there.len(), there.mtime(), there.mtime_nsec()))
        };
        names.into_iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Forged;
    use super::*;

    fn ask(site: &Site, host: &str, path: &str, known: Option<&str>) -> Answer {
        let known = known.map(str::to_string);
        site.answer(&Asked { method: "GET", host: Some(host.to_string()), path, known })
    }

    fn site(forged: &Forged) -> Site {
        Site::new(Run::open(forged.dir()).unwrap(), 6060)
    }

    const HOST: &str = "127.0.0.1:6060";

    #[test]
    fn only_the_page_and_its_pictures_are_there() {
        let forged = Forged::new("run", 20);
        forged.pictures(&[0, 20], 1, 16);
        let site = site(&forged);
        assert_eq!(ask(&site, HOST, "/", None).status, 200);
        let picture = ask(&site, HOST, "/pictures/20/0?anything", None);
        assert_eq!(picture.body, fs::read(forged.dir().join("samples/step-000020/00000.png")).unwrap());
        assert!(picture.headers.contains(&("Content-Type", "image/png".to_string())));
        for path in [
            "/metrics.jsonl",
            "/config.toml",
            "/pictures/7/0",
            "/pictures/20/../../../config.toml",
            "/pictures/%2e%2e/config.toml",
            "/samples/step-000020/00000.png",
            "/../config.toml",
            "//",
            "",
        ] {
            assert_eq!(ask(&site, HOST, path, None).status, 404, "{path}");
        }
        let asked = Asked { method: "POST", host: Some(HOST.to_string()), path: "/", known: None };
        assert_eq!(site.answer(&asked).status, 405);
    }

    #[test]
    fn another_name_for_this_machine_is_not_answered() {
        let forged = Forged::new("run", 2);
        let site = site(&forged);
        for host in ["evil.example", "evil.example:6060", "127.0.0.1", "127.0.0.1:6061", "localhost.evil:6060", ""] {
            assert_eq!(ask(&site, host, "/", None).status, 403, "{host}");
        }
        assert_eq!(site.answer(&Asked { method: "GET", host: None, path: "/", known: None }).status, 403);
        assert_eq!(ask(&site, "LOCALHOST:6060", "/", None).status, 200);
    }

    #[test]
    fn the_page_follows_the_run_and_is_sent_when_it_changed() {
        let forged = Forged::new("run", 2);
        let site = site(&forged);
        let version = |answer: &Answer| answer.headers.iter().find(|(name, _)| *name == "ETag").unwrap().1.clone();
        let first = ask(&site, HOST, "/", None);
        let again = ask(&site, HOST, "/", Some(&version(&first)));
        assert!(again.status == 304 && again.body.is_empty());
        let path = forged.dir().join("metrics.jsonl");
        let more = fs::read_to_string(&path).unwrap() + "{\"step\":3,\"loss\":0.1}\n{\"step\":4";
        fs::write(&path, more).unwrap();
        let next = ask(&site, HOST, "/", Some(&version(&first)));
        assert_eq!(next.status, 200);
        assert!(String::from_utf8(next.body).unwrap().contains("step 3 of 2"));
        fs::remove_file(&path).unwrap();
        assert_eq!(ask(&site, HOST, "/", None).status, 503);
    }

    #[test]
    fn a_taken_port_is_refused() {
        let forged = Forged::new("run", 1);
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let error = watch(forged.dir(), taken.local_addr().unwrap().port()).unwrap_err();
        assert!(error.is::<Refusal>() && error.to_string().contains("--port 0"), "{error}");
    }
}
