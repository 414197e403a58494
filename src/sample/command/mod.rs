//! `dblaunch sample`: a command line -> what is to be done, checked as a whole before anything is started or written
//! ([`Plan::check`]), and one rank's part of doing it ([`run`]). This part of `sample` stands in row 5: it reads the
//! command line, a run's configuration and the Hub.

mod latents;
mod model;
mod output;
mod plan;
mod prompts;
mod run;

pub use plan::Plan;
pub use run::run;

/// `1 picture`, `2 pictures`.
fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
