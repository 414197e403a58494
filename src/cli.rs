//! The command line's types, as typed: no checks beyond each option's own form, and nothing is done here. A wrong
//! command line ends with clap's message and exit status 2.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

/// Fine-tunes diffusion models, over one device or many.
///
/// `dblaunch train.toml` runs what the configuration says; `dblaunch check train.toml` says beforehand what is wrong
/// with it and what would run.
#[derive(Debug, Parser)]
#[command(name = "dblaunch", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub train: TrainArgs,
}

/// Training, when there is no sub-command.
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    /// Start everything again from the newest checkpoint when a rank dies, at most K times
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub max_restarts: u32,
    /// Compute threads of all ranks on this machine together [default: one per core that may be used]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    #[command(flatten)]
    pub request: RequestArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Find everything that is wrong with a configuration, and say what would run; nothing is started
    Check(CheckArgs),
    /// Show runs as one HTML file that needs no network and no other file
    Report(ReportArgs),
    /// Show a run live in the browser, to this machine alone
    Watch(WatchArgs),
    /// Measure memory or speed on networks of published shapes with made-up weights; nothing is written
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Print a completion script for a shell
    Completions { shell: Shell },
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum BenchCommand {
    /// What each rank holds while SD 1.5's UNet trains
    Memory {
        /// Ranks on this machine
        #[arg(long, default_value = "1")]
        nproc: NonZeroUsize,
        /// ZeRO stage
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
        stage: u8,
        /// Side of the latents; 64 for pictures of 512 pixels
        #[arg(long, default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..))]
        latent: usize,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
        steps: u64,
    },
    /// How long forward, backward and update of one level of SD 1.5's UNet take
    Layers {
        #[arg(long, default_value = "1")]
        batch: NonZeroUsize,
        /// Side of the latents; 64 for pictures of 512 pixels
        #[arg(long, default_value_t = 64, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(8..))]
        latent: usize,
        #[arg(long, default_value = "3")]
        repeats: NonZeroUsize,
        #[arg(long, value_enum, default_value_t = BenchDtype::F32)]
        dtype: BenchDtype,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum BenchDtype {
    F32,
    Bf16,
}

#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    pub request: RequestArgs,
}

#[derive(Args, Clone, Debug)]
pub struct ReportArgs {
    /// Output folders of runs
    #[arg(value_name = "OUTPUT_DIR", required = true)]
    pub dirs: Vec<PathBuf>,
    /// Where the report goes [default: report.html in the first folder]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct WatchArgs {
    /// Output folder of a run
    #[arg(value_name = "OUTPUT_DIR")]
    pub dir: PathBuf,
    /// Port of 127.0.0.1; 0 for any that is free
    #[arg(long, value_name = "N", default_value_t = crate::report::DEFAULT_PORT)]
    pub port: u16,
}

/// A configuration, and how many ranks are to run it.
#[derive(Args, Clone, Debug)]
pub struct RequestArgs {
    /// Ranks on this machine [default: one per GPU, or one]
    #[arg(long, value_name = "N")]
    pub nproc: Option<NonZeroUsize>,
    /// Override a value of the configuration, as in --set train.seed=7 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The configuration
    #[arg(value_name = "train.toml", required = true)]
    pub config: Option<PathBuf>,
}

/// Commands that are known and cannot be run yet, with what to do meanwhile. They are not offered: a first argument
/// of this name that is no file ends the program with this message and exit status 2.
const NOT_YET: [(&str, &str); 2] = [
    ("plan", "`dblaunch plan` is not there yet; `dblaunch check train.toml` says what a run needs on disk"),
    ("sample", "`dblaunch sample` is not there yet; make pictures from the output folder with diffusers"),
];

/// The message for a command that is not there yet, if `arguments` (without the program's name) begin with one.
pub fn not_there_yet<'a>(mut arguments: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    let first = arguments.next()?;
    let (_, message) = NOT_YET.iter().find(|(name, _)| *name == first)?;
    (!std::path::Path::new(first).exists()).then_some(message)
}

/// Writes the completion script of `shell`.
pub fn write_completions(shell: Shell, out: &mut impl Write) {
    clap_complete::generate(shell, &mut Cli::command(), "dblaunch", out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("dblaunch").chain(line.split_whitespace()))
    }

    #[test]
    fn without_a_command_it_trains() {
        Cli::command().debug_assert();
        let cli = parse("--nproc 2 --max-restarts 3 --threads 5 --set train.seed=7 --set a.b=c train.toml").unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.train.max_restarts, 3);
        assert_eq!(cli.train.threads.unwrap().get(), 5);
        assert_eq!(cli.train.request.nproc.unwrap().get(), 2);
        assert_eq!(cli.train.request.overrides, ["train.seed=7", "a.b=c"]);
        assert_eq!(cli.train.request.config.unwrap(), PathBuf::from("train.toml"));
    }

    #[test]
    fn check_takes_the_same_request() {
        let Some(Command::Check(check)) = parse("check --nproc 4 --set train.seed=7 train.toml").unwrap().command
        else {
            panic!("not a check");
        };
        assert_eq!(check.request.nproc.unwrap().get(), 4);
        assert_eq!(check.request.config.unwrap(), PathBuf::from("train.toml"));
    }

    #[test]
    fn runs_are_shown_from_their_folders() {
        let Some(Command::Report(report)) = parse("report a b --out c.html").unwrap().command else {
            panic!("not a report");
        };
        assert_eq!((report.dirs.len(), report.out), (2, Some(PathBuf::from("c.html"))));
        let Some(Command::Watch(watch)) = parse("watch a").unwrap().command else { panic!("not a watch") };
        assert_eq!((watch.dir, watch.port), (PathBuf::from("a"), crate::report::DEFAULT_PORT));
        assert_eq!(parse("report").unwrap_err().exit_code(), 2);
        assert_eq!(parse("watch a --port 70000").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_wrong_line_is_status_2_and_what_is_not_there_is_not_offered() {
        for line in
            ["", "--nproc 0 t.toml", "--nproc 2", "t.toml u.toml", "check", "--profile 3 t.toml", "completions sh"]
        {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        for line in ["--version", "help", "--help", "help check"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 0, "{line}");
        }
        let mut script = Vec::new();
        write_completions(Shell::Bash, &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("max-restarts") && !script.contains("rdzv") && !script.contains("sample"));
        assert!(not_there_yet(["sample", "model", "--prompt", "x"].into_iter()).unwrap().contains("not there yet"));
        assert!(not_there_yet(["train.toml"].into_iter()).is_none());
    }
}
