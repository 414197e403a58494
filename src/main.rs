//! The program: parse, check, start ranks or be one, leave with the right exit status.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use candle_core::DType;
use clap::Parser;
use dblaunch::cli::{
    self, BenchCommand, BenchDevice, BenchDtype, BenchKeep, BenchPlace, Cli, Command, MemoryArgs, PlanArgs,
    RequestArgs, SampleArgs, TrainArgs,
};
use dblaunch::config::{self, DeviceKind, Resume};
use dblaunch::device::{Hardware, Keeping, Place};
use dblaunch::launch::{self, LaunchRequest, Output, Rank, World, status};
use dblaunch::optim::StateKind;
use dblaunch::sample::{self, command as sampling};
use dblaunch::segment::Keep;
use dblaunch::train::arrange::Formats;
use dblaunch::zero::{Placement, Stage};
use dblaunch::{bench, checkpoint, hub, plan, report, train};

/// Activations come and go by the megabyte; the same pages are handed out again instead of asking the system.
#[global_allocator]
static ALLOCATOR: Keeping<mimalloc::MiMalloc> = Keeping::over(mimalloc::MiMalloc);

/// How long a rank that makes pictures waits for another one.
const TIMEOUT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    if let Err(error) = launch::prepare() {
        return ExitCode::from(launch::report_failure(&error));
    }
    let world = World::from_environment();
    if matches!(world, Ok(Some(_)))
        && let Err(error) = launch::Interrupt::install()
    {
        return ExitCode::from(launch::report_failure(&error));
    }
    let cli = Cli::parse();
    let result = match &cli.command {
        Some(Command::Check(check)) => self::check(&check.request).map(|()| status::DONE),
        Some(Command::Plan(args)) => self::plan(args).map(|()| status::DONE),
        Some(Command::Sample(args)) => self::sample(args),
        Some(Command::Report(args)) => report::write(&args.dirs, args.out.as_deref()).map(|path| {
            say(&path.display());
            status::DONE
        }),
        Some(Command::Watch(args)) => report::watch(&args.dir, args.port).map(|()| status::DONE),
        Some(Command::Bench(command)) => self::bench(command),
        Some(Command::Completions { shell }) => {
            cli::write_completions(*shell, &mut std::io::stdout()).map(|()| status::DONE)
        }
        None => match world {
            Ok(Some(world)) => be_a_rank(&cli.train, &world),
            Ok(None) => start_ranks(&cli.train),
            Err(error) => Err(error),
        },
    };
    ExitCode::from(result.unwrap_or_else(|error| launch::report_failure(&error)))
}

/// A line on standard output. Whoever read it may have gone, as `head` does, which is no failure.
fn say(what: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{what}");
}

/// Without --nproc: one rank for each GPU that this process sees, or one where the run computes on the CPU.
fn ranks(request: &RequestArgs) -> usize {
    let on_gpus = || {
        // What is wrong with the configuration is told by who checks it.
        let plan = config::load(config_path(request), &request.overrides, 1).ok()?;
        (plan.model.device == config::DeviceKind::Cuda).then(dblaunch::device::gpus)
    };
    request.nproc.map(NonZeroUsize::get).or_else(on_gpus).unwrap_or(1).max(1)
}

fn config_path(request: &RequestArgs) -> &std::path::Path {
    // clap has made sure that there is one.
    request.config.as_deref().unwrap_or_else(|| std::path::Path::new("train.toml"))
}

/// `dblaunch check`: what is wrong, or what would run.
fn check(request: &RequestArgs) -> Result<()> {
    let report = config::check(config_path(request), &request.overrides, ranks(request))?;
    say(&report);
    Ok(())
}

/// `dblaunch plan`: what a run would take, or the smallest changes with which it would fit.
fn plan(args: &PlanArgs) -> Result<()> {
    let table = plan::command::plan(&plan::command::Asked {
        config: config_path(&args.request),
        overrides: &args.request.overrides,
        world_size: ranks(&args.request),
        vram: args.vram.as_deref(),
        ram: args.ram.as_deref(),
        card: args.card.as_deref(),
    })?;
    say(&table.trim_end());
    Ok(())
}

/// The launcher: checks the request, then starts the ranks and stays with them.
fn start_ranks(args: &TrainArgs) -> Result<u8> {
    let nproc = ranks(&args.request);
    let report = config::check(config_path(&args.request), &args.request.overrides, nproc)?;
    launch::tell(&report);
    let arguments = std::env::args_os().skip(1).collect();
    let mut request = LaunchRequest::this_program(nproc, arguments)?;
    request.environment.push((config::GIVEN.into(), config::text(config_path(&args.request))?.into()));
    request.max_restarts = args.max_restarts as usize;
    request.threads_total = args.threads.map(NonZeroUsize::get);
    launch::run(&request, Output::standard())
}

/// One rank of a run, whoever started it.
fn be_a_rank(args: &TrainArgs, world: &World) -> Result<u8> {
    let request = &args.request;
    let (path, overrides) = (config_path(request), &request.overrides);
    let mut plan = match (world.starter, std::env::var(config::GIVEN)) {
        (launch::Starter::Dblaunch, Ok(text)) => config::load_given(path, &text, overrides, world.world_size)?,
        _ => {
            // No launcher of ours has checked the request.
            config::check(path, overrides, world.world_size)?;
            config::load(path, overrides, world.world_size)?
        }
    };
    let model_dir = hub::resolve(&plan.model.source, plan.model.variant.as_deref())?;
    let timeout = Duration::from_secs_f64(plan.zero.timeout_seconds);
    let rank = Rank::start(timeout, args.threads.map(NonZeroUsize::get))?;
    // Without a checkpoint of its own, what is started again begins where it began before.
    if rank.goes_on && checkpoint::latest(&plan.output.dir)?.is_some() {
        plan.checkpoint.resume = Resume::Latest;
    }
    Ok(match train::run(&plan, &model_dir, &rank, args.profile) {
        Ok(train::Ending::Done) => status::DONE,
        Ok(train::Ending::Interrupted) => status::INTERRUPTED,
        // Told while the rank is still there, so that the others learn the cause and not that it left.
        Err(error) => launch::report_failure(&error),
    })
}

/// `dblaunch sample`: the launcher checks the request and starts the ranks; a rank makes its share of the pictures.
fn sample(args: &SampleArgs) -> Result<u8> {
    let Some(world) = World::from_environment()? else {
        let nproc = args.nproc.map_or(1, NonZeroUsize::get);
        let plan = sampling::Plan::check(args, nproc)?;
        plan.notes.iter().for_each(|note| launch::tell(&format_args!("dblaunch: {note}")));
        drop(plan);
        let mut request = LaunchRequest::this_program(nproc, std::env::args_os().skip(1).collect())?;
        request.threads_total = args.threads.map(NonZeroUsize::get);
        return launch::run(&request, Output::standard());
    };
    let plan = sampling::Plan::check(args, world.world_size)?;
    let rank = Rank::start(TIMEOUT, args.threads.map(NonZeroUsize::get))?;
    if world.starter != launch::Starter::Dblaunch {
        plan.notes.iter().for_each(|note| rank.say(note));
    }
    Ok(match sampling::run(&plan, &rank) {
        Ok(sample::Ending::Done) => status::DONE,
        Ok(sample::Ending::Interrupted) => status::INTERRUPTED,
        // Told while the rank is still there, so that the others learn the cause and not that it left.
        Err(error) => launch::report_failure(&error),
    })
}

/// `dblaunch bench`: memory is measured in ranks of its own.
fn bench(command: &BenchCommand) -> Result<u8> {
    match *command {
        BenchCommand::Adamw { elements, repeats } => bench::adamw(elements.get(), repeats.get())?,
        BenchCommand::Disk { ref dir, bytes, rounds, wait } => bench::disk(dir, bytes, rounds.get(), wait)?,
        BenchCommand::Gpu { nproc, limit, fail } => return bench_gpu(nproc.get(), limit, fail),
        BenchCommand::Hold { leave } => bench_hold(leave)?,
        BenchCommand::Kernels { limit } => bench_kernels(limit)?,
        BenchCommand::Offload { latent, steps, ref profile } => bench_offload(latent, steps, profile.clone())?,
        BenchCommand::Ops { ref from, ref into, device } => bench::ops(&bench_hardware(device)?, from, into)?,
        BenchCommand::Layers { batch, latent, repeats, dtype } => {
            bench::layers(batch.get(), latent, repeats.get(), bench_dtype(dtype))?;
        }
        BenchCommand::Memory(ref args) => match World::from_environment()? {
            None => {
                bench::check_rows(args.batch.get(), args.latent)?;
                let arguments = std::env::args_os().skip(1).collect();
                return launch::run(&LaunchRequest::this_program(args.nproc.get(), arguments)?, Output::standard());
            }
            Some(_) => {
                let rank = Rank::start(TIMEOUT, None)?;
                if let Err(error) = bench::memory(&rank, &memory_case(args)) {
                    return Ok(launch::report_failure(&error));
                }
            }
        },
    }
    Ok(status::DONE)
}

#[cfg(feature = "cuda")]
fn bench_gpu(nproc: usize, limit: usize, fail: bool) -> Result<u8> {
    if World::from_environment()?.is_none() {
        let arguments = std::env::args_os().skip(1).collect();
        return launch::run(&LaunchRequest::this_program(nproc, arguments)?, Output::standard());
    }
    let rank = Rank::start(TIMEOUT, None)?;
    Ok(match bench::gpu(&rank, limit, launch::shares_gpu(), fail) {
        Ok(()) => status::DONE,
        Err(error) => launch::report_failure(&error),
    })
}

#[cfg(not(feature = "cuda"))]
fn bench_gpu(_nproc: usize, _limit: usize, _fail: bool) -> Result<u8> {
    Err(no_gpu_support())
}

#[cfg(feature = "cuda")]
fn bench_kernels(limit: usize) -> Result<()> {
    bench::kernels(limit)
}

#[cfg(feature = "cuda")]
fn bench_hold(leave: usize) -> Result<()> {
    bench::hold(leave)
}

#[cfg(not(feature = "cuda"))]
fn bench_hold(_leave: usize) -> Result<()> {
    Err(no_gpu_support())
}

#[cfg(feature = "cuda")]
fn bench_offload(latent: usize, steps: u64, profile: Option<PathBuf>) -> Result<()> {
    bench::offload(&Rank::start(TIMEOUT, None)?, latent, steps, profile)
}

#[cfg(not(feature = "cuda"))]
fn bench_offload(_latent: usize, _steps: u64, _profile: Option<PathBuf>) -> Result<()> {
    Err(no_gpu_support())
}

#[cfg(not(feature = "cuda"))]
fn bench_kernels(_limit: usize) -> Result<()> {
    Err(no_gpu_support())
}

#[cfg(not(feature = "cuda"))]
fn no_gpu_support() -> anyhow::Error {
    dblaunch::Refusal::error("this build of dblaunch has no GPU support: build it with `--features cuda`")
}

fn bench_hardware(device: BenchDevice) -> Result<Hardware> {
    match device {
        BenchDevice::Cpu => Ok(Hardware::cpu()),
        BenchDevice::Cuda => Hardware::gpu(0, None, 0),
    }
}

fn memory_case(args: &MemoryArgs) -> bench::MemoryCase {
    let place = |place: BenchPlace| match place {
        BenchPlace::Device => Place::Device,
        BenchPlace::Host => Place::Host,
        BenchPlace::Nvme => Place::Nvme,
    };
    let half = |half: bool| if half { DType::BF16 } else { DType::F32 };
    bench::MemoryCase {
        stage: Stage::from_number(args.stage).unwrap_or(Stage::Replicated),
        text_encoder: args.text_encoder,
        device: match args.device {
            BenchDevice::Cpu => DeviceKind::Cpu,
            BenchDevice::Cuda => DeviceKind::Cuda,
        },
        limits: [args.vram, args.ram],
        batch: args.batch.get(),
        latent: args.latent,
        steps: args.steps,
        keep: match args.keep {
            BenchKeep::Inputs => Keep::Inputs,
            BenchKeep::Graph => Keep::Graph,
            BenchKeep::Host => Keep::Host,
        },
        profile: args.profile.clone(),
        placement: Placement {
            parameters: place(args.parameters),
            gradients: place(args.gradients),
            optimizer: place(args.optimizer),
        },
        formats: Formats {
            compute: bench_dtype(args.dtype),
            master: half(args.master_bf16),
            gradients: half(args.gradients_bf16),
            state: if args.adam8bit { StateKind::Bits8 } else { StateKind::F32 },
        },
        nvme_dir: args.nvme_dir.clone(),
        max_grad_norm: args.max_grad_norm,
    }
}

fn bench_dtype(dtype: BenchDtype) -> DType {
    match dtype {
        BenchDtype::F32 => DType::F32,
        BenchDtype::Bf16 => DType::BF16,
    }
}
