//! What the user sees: the ranks' lines, each whole and with its rank, and one progress bar, or plain lines where there
//! is no terminal. A thread of its own writes, so that a terminal that is held up holds up nothing else.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::event::Event;

/// Between two plain lines about progress.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// Lines waiting to be shown before those who print them have to wait.
const QUEUE: usize = 4096;

/// Where the launcher writes.
pub struct Output {
    pub stdout: Box<dyn Write + Send>,
    pub stderr: Box<dyn Write + Send>,
    /// Whether to draw a bar on the terminal's standard error; else plain lines go to `stderr`.
    pub bar: bool,
}

impl Output {
    /// The process's own streams.
    pub fn standard() -> Output {
        Output { stdout: Box::new(io::stdout()), stderr: Box::new(io::stderr()), bar: io::stderr().is_terminal() }
    }
}

/// One thing to show.
pub(super) enum Show {
    Stdout(String),
    Stderr(String),
    Event(Event),
    /// The ranks start (again).
    Begin,
    End,
}

/// The thread that shows things.
pub(super) struct Display {
    sender: SyncSender<Show>,
    thread: JoinHandle<()>,
}

impl Display {
    pub fn start(output: Output) -> Display {
        let (sender, receiver) = mpsc::sync_channel(QUEUE);
        let thread = std::thread::spawn(move || Screen::new(output).show_all(&receiver));
        Display { sender, thread }
    }

    pub fn sender(&self) -> SyncSender<Show> {
        self.sender.clone()
    }

    pub fn begin(&self) {
        let _ = self.sender.send(Show::Begin);
    }

    /// A paragraph from the launcher itself.
    pub fn say(&self, text: &str) {
        for line in text.lines() {
            let _ = self.sender.send(Show::Stderr(format!("dblaunch: {line}")));
        }
    }

    /// Shows what is left, and ends the bar.
    pub fn finish(self) {
        let _ = self.sender.send(Show::End);
        let _ = self.thread.join();
    }
}

struct Screen {
    output: Output,
    bar: Option<ProgressBar>,
    /// The bar counts pictures, not steps.
    of_pictures: bool,
    begun: Instant,
    done_before: u64,
    /// Attempts at steps that were skipped.
    skipped: u64,
    last_plain: Option<Instant>,
}

impl Screen {
    fn new(output: Output) -> Screen {
        Screen {
            output,
            bar: None,
            of_pictures: false,
            begun: Instant::now(),
            done_before: 0,
            skipped: 0,
            last_plain: None,
        }
    }

    fn show_all(&mut self, receiver: &Receiver<Show>) {
        for show in receiver {
            match show {
                Show::Stdout(line) => self.line(&line, true),
                Show::Stderr(line) => self.line(&line, false),
                Show::Event(event) => self.event(event),
                Show::Begin => self.end_bar(),
                Show::End => break,
            }
        }
        self.end_bar();
    }

    /// Writes above the bar, in one piece. A reader that has gone is no reason to stop the run.
    fn line(&mut self, text: &str, stdout: bool) {
        let stream = if stdout { &mut self.output.stdout } else { &mut self.output.stderr };
        let mut write = || {
            let _ = stream.write_all(format!("{text}\n").as_bytes()).and_then(|()| stream.flush());
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Start { total_steps, done_steps } => self.start(total_steps, done_steps),
            Event::Step { step, total, skipped, .. } => {
                self.skipped += u64::from(skipped);
                let text = describe(&event, self.remaining(step, total), self.skipped);
                match &self.bar {
                    Some(bar) => {
                        bar.set_length(total);
                        bar.set_message(text);
                        bar.set_position(step);
                    }
                    None => self.plain(step, total, &text),
                }
            }
            Event::Pictures { done, total, call, calls } => self.pictures(done, total, call, calls),
            Event::Message(text) => self.line(&text, false),
            Event::CheckpointWritten { step, path } => {
                self.line(&format!("checkpoint of step {step} written to {}", path.display()), false);
            }
            Event::Done => self.end_bar(),
            Event::Failed(_) => {}
        }
    }

    fn start(&mut self, total: u64, done: u64) {
        self.end_bar();
        (self.begun, self.done_before, self.last_plain) = (Instant::now(), done, None);
        (self.of_pictures, self.skipped) = (false, 0);
        if self.output.bar {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            // A template that does not parse would only cost its looks.
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len}  {msg}") {
                bar.set_style(style);
            }
            bar.set_position(done);
            self.bar = Some(bar);
        }
    }

    /// Pictures have a bar of their own where they are all that is made; a training run's bar says so beside its steps.
    fn pictures(&mut self, done: u64, total: u64, call: u64, calls: u64) {
        let text = match calls {
            0 => format!("picture {done}/{total}"),
            _ => format!("picture {done}/{total}, denoising {call}/{calls}"),
        };
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            if self.of_pictures {
                bar.set_length(total);
                bar.set_position(done);
            }
        } else if self.output.bar {
            self.start(total, done);
            self.of_pictures = true;
        } else if done >= total || self.last_plain.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) {
            self.last_plain = Some(Instant::now());
            self.line(&text, false);
        }
    }

    fn plain(&mut self, step: u64, total: u64, text: &str) {
        if step >= total || self.last_plain.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) {
            self.last_plain = Some(Instant::now());
            self.line(&format!("step {step}/{total}  {text}"), false);
        }
    }

    /// Time left at this run's pace so far.
    fn remaining(&self, step: u64, total: u64) -> Duration {
        let done = step.saturating_sub(self.done_before).max(1);
        self.begun.elapsed().mul_f64(total.saturating_sub(step) as f64 / done as f64)
    }

    fn end_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
            // It leaves the cursor behind itself.
            let _ = writeln!(self.output.stderr);
        }
    }
}

/// A step, in words; `skips`: attempts that were skipped so far.
fn describe(event: &Event, remaining: Duration, skips: u64) -> String {
    let Event::Step { loss, lr, images_per_second, skipped, .. } = event else { return String::new() };
    let skipped = match (*skipped, skips) {
        (true, _) => "  (skipped)".to_string(),
        (false, 0) => String::new(),
        (false, skips) => format!("  {skips} skipped"),
    };
    format!("loss {loss:.4}  lr {lr:.3e}  {images_per_second:.2} images/s  ETA {}{skipped}", span(remaining))
}

/// `1:02:03`, `2:03`.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn step(step: u64, total: u64) -> Show {
        Show::Event(Event::Step { step, total, loss: 0.125, lr: 5e-6, images_per_second: 2.5, skipped: step == 3 })
    }

    #[test]
    fn without_a_terminal_the_first_and_the_last_step_have_a_line() {
        let (out, err) = (Paper::default(), Paper::default());
        let output = Output { stdout: Box::new(out.clone()), stderr: Box::new(err.clone()), bar: false };
        let display = Display::start(output);
        let show = display.sender();
        show.send(Show::Event(Event::Start { total_steps: 3, done_steps: 0 })).unwrap();
        show.send(Show::Stdout("[rank 1] hello".into())).unwrap();
        (1..=3).for_each(|i| show.send(step(i, 3)).unwrap());
        display.say("all is well");
        display.finish();
        let text = |paper: Paper| String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text(out), "[rank 1] hello\n");
        let err = text(err);
        let lines: Vec<_> = err.lines().collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].starts_with("step 1/3  loss 0.1250  lr 5.000e-6  2.50 images/s  ETA "), "{}", lines[0]);
        assert!(lines[1].starts_with("step 3/3") && lines[1].ends_with("(skipped)"), "{}", lines[1]);
        assert_eq!(lines[2], "dblaunch: all is well");
    }

    #[test]
    fn spans_are_short() {
        assert_eq!(span(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(span(Duration::from_secs(63)), "1:03");
    }
}
