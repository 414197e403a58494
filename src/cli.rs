//! The command line's types, as typed: no checks beyond each option's own form, and nothing is done here. A wrong
//! command line ends with clap's message and exit status 2.

mod bench;

use std::io::Write;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::builder::TypedValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

pub use bench::{BenchCommand, BenchDevice, BenchDtype, BenchKeep, BenchPlace, MemoryArgs};

use crate::comm::MAX_RANKS;

/// Most compute threads: more than any machine has cores for, and less than what a system cannot start.
const MOST_THREADS: usize = 1024;
/// Most steps of a recording.
const MOST_PROFILED: usize = 1_000_000;
/// Most of what is repeated, or made or measured at a time; what a machine holds of it is for others to say.
const MOST_COUNT: usize = 1_000_000_000_000;

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
    #[arg(long, value_name = "N", value_parser = count(MOST_THREADS))]
    pub threads: Option<NonZeroUsize>,
    /// Write a trace of N steps (from the second one on) and a table of where the time went
    #[arg(long, value_name = "N", value_parser = count(MOST_PROFILED).try_map(NonZeroU32::try_from))]
    pub profile: Option<NonZeroU32>,
    #[command(flatten)]
    pub request: RequestArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Find everything that is wrong with a configuration, and say what would run; nothing is started
    Check(CheckArgs),
    /// Say what a run would take, per rank and tier, and how it would run best; needs neither weights nor a GPU
    Plan(PlanArgs),
    /// Make pictures with a trained model: a finished pipeline, one on the Hub, or a run's checkpoint
    Sample(Box<SampleArgs>),
    /// Show runs as one HTML file that needs no network and no other file
    Report(ReportArgs),
    /// Show a run live in the browser, to this machine alone
    Watch(WatchArgs),
    /// Measure memory or speed on networks of published shapes with made-up weights, or a drive; nothing stays written
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Print a completion script for a shell
    Completions { shell: Shell },
}

#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    pub request: RequestArgs,
}

#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// Budget of a rank's device memory, such as 8GiB, instead of memory.vram
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<String>,
    /// Budget of the machine's memory for all ranks, instead of memory.ram
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<String>,
    /// Plan for this card instead of this machine, such as rtx3060-12gb
    #[arg(long, value_name = "NAME")]
    pub card: Option<String>,
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
    #[arg(long, value_name = "N", value_parser = count(MAX_RANKS))]
    pub nproc: Option<NonZeroUsize>,
    /// Override a value of the configuration, as in --set train.seed=7 (repeatable)
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The configuration
    #[arg(value_name = "train.toml", required = true)]
    pub config: Option<PathBuf>,
}

/// What pictures to make, with what, and where they go.
#[derive(Args, Clone, Debug)]
pub struct SampleArgs {
    /// A pipeline's folder in diffusers' layout, a model's id on the Hub, or a checkpoint-N folder of a run
    #[arg(value_name = "MODEL_DIR")]
    pub model: PathBuf,
    /// What the pictures are to show (repeatable)
    #[arg(long = "prompt", value_name = "TEXT", required_unless_present = "prompt_file")]
    pub prompts: Vec<String>,
    /// More prompts, one a line
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// What the pictures are not to show: once for all prompts, or once for each
    #[arg(long = "negative-prompt", value_name = "TEXT")]
    pub negative_prompts: Vec<String>,
    /// Cut prompts that are longer than the tokenizer allows, as diffusers does, instead of refusing them
    #[arg(long)]
    pub cut_prompts: bool,
    /// Pictures for each prompt
    #[arg(long, value_name = "N", default_value = "1", value_parser = count(MOST_COUNT))]
    pub num: NonZeroUsize,
    /// The same seed makes the same pictures, for any number of ranks [default: a fresh one, which is told]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value = "50", value_parser = count(MOST_COUNT))]
    pub steps: NonZeroUsize,
    /// How much the prompt is insisted on; 1 and less: the network is asked once a step, without a negative prompt
    #[arg(long, value_name = "SCALE", default_value_t = 7.5, allow_negative_numbers = true)]
    pub guidance: f64,
    /// Brings the guided prediction's contrast back to the unguided one's: 0 not at all, 1 fully
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub guidance_rescale: f64,
    /// ddpm, ddim, pndm, euler, euler-a, dpm++2m, dpm++2m-sde or unipc [default: the model's own]
    #[arg(long, value_name = "NAME")]
    pub sampler: Option<String>,
    /// In pixels, a multiple of 8 [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<usize>,
    /// In pixels, a multiple of 8 [default: the model's own]
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<usize>,
    /// What the network computes in
    #[arg(long, value_enum, default_value_t = SampleDtype::Fp32)]
    pub dtype: SampleDtype,
    /// Where it computes
    #[arg(long, value_enum, default_value_t = SampleDevice::Auto)]
    pub device: SampleDevice,
    /// A LoRA to add to the model, and with what weight (not there yet)
    #[arg(long, value_name = "FILE[:SCALE]")]
    pub lora: Option<String>,
    /// The folder that the pictures go to, as 00000.png and so on
    #[arg(long, value_name = "DIR", default_value = "samples")]
    pub out: PathBuf,
    /// Replace pictures that are in the folder
    #[arg(long)]
    pub overwrite: bool,
    /// Also write all pictures as one, grid.png
    #[arg(long)]
    pub grid: bool,
    /// Start from these numbers instead of drawn ones: a safetensors file with `latents` (pictures, C, h, w), standard
    /// normal, and `noise.K` for the K-th step that takes noise
    #[arg(long, value_name = "FILE")]
    pub latents: Option<PathBuf>,
    /// Also write the final latents, latents.safetensors
    #[arg(long)]
    pub save_latents: bool,
    /// Decode large pictures in tiles: takes less memory and changes them a little
    #[arg(long, value_enum, default_value_t = VaeTiling::Auto, default_missing_value = "on", num_args = 0..=1, require_equals = true)]
    pub vae_tiling: VaeTiling,
    /// Pictures that a rank makes at a time
    #[arg(long, value_name = "N", default_value = "1", value_parser = count(MOST_COUNT))]
    pub batch_size: NonZeroUsize,
    /// Ranks on this machine, which share the pictures [default: one per GPU, or one]
    #[arg(long, value_name = "N", value_parser = count(MAX_RANKS))]
    pub nproc: Option<NonZeroUsize>,
    /// ZeRO stage: 3 shares the denoising network's parameters over the ranks, 0 gives each all of them [default: 3 for
    /// several ranks, 0 for one]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub stage: Option<u8>,
    /// Compute threads of all ranks on this machine together [default: one per core that may be used]
    #[arg(long, value_name = "N", value_parser = count(MOST_THREADS))]
    pub threads: Option<NonZeroUsize>,
    /// Weight files of this variant, such as fp16
    #[arg(long, value_name = "NAME")]
    pub variant: Option<String>,
    /// Branch, tag or commit of a model on the Hub
    #[arg(long, value_name = "NAME")]
    pub revision: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SampleDtype {
    Fp32,
    Bf16,
    Fp16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SampleDevice {
    /// A GPU if this build can use one and one is there, else the CPU
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum VaeTiling {
    /// Beyond a megapixel
    Auto,
    On,
    Off,
}

/// A whole number from 1 to `most`.
fn count(most: usize) -> impl Fn(&str) -> Result<NonZeroUsize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|number: &NonZeroUsize| number.get() <= most);
        number.ok_or_else(|| format!("it must be a whole number of at least 1 and at most {most}"))
    }
}

/// Writes the completion script of `shell`. An error if `out` does not take it.
pub fn write_completions(shell: Shell, out: &mut impl Write) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dblaunch", &mut script);
    out.write_all(&script).and_then(|()| out.flush()).context("writing the script")
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
        let cli = parse("--nproc 2 --max-restarts 3 --threads 5 --profile 2 --set train.seed=7 --set a.b=c train.toml")
            .unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.train.max_restarts, 3);
        assert_eq!((cli.train.threads.unwrap().get(), cli.train.profile.unwrap().get()), (5, 2));
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
    fn pictures_have_options_of_their_own() {
        let line =
            "sample model --prompt a --prompt b --negative-prompt c --nproc 2 --vae-tiling --stage 3 --guidance -1";
        let Some(Command::Sample(args)) = parse(line).unwrap().command else { panic!("not a sample") };
        assert_eq!((args.prompts.len(), args.num.get(), args.steps.get(), args.stage), (2, 1, 50, Some(3)));
        assert_eq!((args.vae_tiling, args.guidance, args.out), (VaeTiling::On, -1.0, PathBuf::from("samples")));
        for line in ["sample", "sample model", "sample model --prompt a --num 0", "sample model --prompt a --stage 4"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
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
        for line in ["", "--nproc 2", "t.toml u.toml", "check", "completions sh"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        for (line, most) in [
            ("--nproc 0 t.toml", "256"),
            ("check --nproc 257 t.toml", "256"),
            ("plan --nproc 18446744073709551615 t.toml", "256"),
            ("--threads 20000 t.toml", "1024"),
            ("--profile 0 t.toml", "1000000"),
            ("sample m --prompt a --num 0", "1000000000000"),
            ("sample m --prompt a --steps 0", "1000000000000"),
            ("bench layers --batch 0", "1000000000000"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            let said = error.to_string();
            assert!(said.contains(&format!("at least 1 and at most {most}\n")), "{line}: {said}");
        }
        for line in ["bench layers --latent 1000000000", "bench memory --latent 7"] {
            assert!(parse(line).unwrap_err().to_string().contains("8..=2048"), "{line}");
        }
        for line in ["--version", "help", "--help", "help check"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 0, "{line}");
        }
        let mut script = Vec::new();
        write_completions(Shell::Bash, &mut script).unwrap();
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("max-restarts") && script.contains("sample") && !script.contains("rdzv"));
        let line = "plan --vram 8GiB --ram 24GiB --nproc 2 --card rtx3070-8gb t.toml";
        let Some(Command::Plan(plan)) = parse(line).unwrap().command else { panic!("not a plan") };
        assert_eq!((plan.vram.as_deref(), plan.card.as_deref()), (Some("8GiB"), Some("rtx3070-8gb")));
        assert_eq!(plan.request.nproc.unwrap().get(), 2);
    }
}
