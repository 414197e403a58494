//! Compiles the kernels of `kernels/`: under the feature `cuda` by nvcc into code for GPUs, which is embedded in the
//! program; under the feature `emulate` by the C++ compiler for the host, so that tests run the same sources without a
//! GPU. Does nothing without these features.
//!
//! What it looks at: `kernels/*.cu` are families of kernels, one module each; whatever lies in folders below is included by
//! them. `DBLAUNCH_NVCC`, `CUDA_HOME`, `CUDA_PATH` and `PATH` say where nvcc is, in this order. (`NVCC` is not asked: it may
//! be the wrapper that makes intermediate code alone, for candle.)

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    let cuda = std::env::var_os("CARGO_FEATURE_CUDA").is_some();
    let emulate = std::env::var_os("CARGO_FEATURE_EMULATE").is_some();
    if !cuda && !emulate {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    let families = families();
    if cuda && let Err(message) = gpu::compile(&families) {
        // cargo shows these lines as the reason and no backtrace.
        message.lines().for_each(|line| println!("cargo::error={line}"));
    }
    #[cfg(feature = "emulate")]
    host::compile(&families);
}

/// The sources with kernels, in the order of their names.
fn families() -> Vec<PathBuf> {
    sources(Path::new("kernels"), "cu")
}

fn sources(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// One fat binary a family: machine code for the GPUs of today, intermediate code for those to come.
mod gpu {
    use std::collections::hash_map::DefaultHasher;
    use std::hash::{Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::{env, fs, thread};

    use super::{sources, stem};

    /// Turing to Hopper; the last as intermediate code, too, which the driver compiles for whatever is newer.
    /// `DBLAUNCH_CUDA_ARCHS` names others, or fewer, which takes less time.
    const ARCHITECTURES: &str = "75 80 86 89 90";
    /// No fast math: kernels give the CPU's numbers.
    const FLAGS: [&str; 4] = ["-fatbin", "-O3", "-std=c++17", "-Ikernels"];
    /// The first toolkit whose driver can limit a pool of memory; it knows all of the above.
    const OLDEST: (u32, u32) = (12, 2);

    pub fn compile(families: &[PathBuf]) -> Result<(), String> {
        for name in ["DBLAUNCH_NVCC", "DBLAUNCH_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let nvcc = find()?;
        let (version, banner) = version(&nvcc)?;
        if version < OLDEST {
            return Err(format!(
                "{} is of CUDA {}.{}; the kernels need {}.{} or newer",
                nvcc.display(),
                version.0,
                version.1,
                OLDEST.0,
                OLDEST.1
            ));
        }
        // As the driver numbers them: 13.0 is 13000.
        println!("cargo::rustc-env=DBLAUNCH_CUDA_VERSION={}", version.0 * 1000 + version.1 * 10);
        let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
        // A fifth of the size; drivers that know the toolkit's version can read it.
        let compression = if version >= (13, 0) { "--compress-mode=size" } else { "-Xfatbin=-compress-all" };
        let compiler = Compiler { nvcc, banner, compression, targets: targets()? };
        each(families, |source| compiler.fat_binary(source, &out))?;
        let entries: String = families
            .iter()
            .map(|source| {
                let name = stem(source);
                format!("    (\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),\n")
            })
            .collect();
        let table = format!("pub static FAT_BINARIES: &[(&str, &[u8])] = &[\n{entries}];\n");
        fs::write(out.join("fat_binaries.rs"), table).map_err(|error| format!("cannot write to OUT_DIR: {error}"))
    }

    struct Compiler {
        nvcc: PathBuf,
        /// What it says of itself.
        banner: String,
        compression: &'static str,
        /// One argument for each kind of GPU.
        targets: Vec<String>,
    }

    fn targets() -> Result<Vec<String>, String> {
        let asked = env::var("DBLAUNCH_CUDA_ARCHS").unwrap_or_else(|_| ARCHITECTURES.to_string());
        println!("cargo::rustc-env=DBLAUNCH_CUDA_ARCHS={asked}");
        let numbers: Vec<&str> = asked.split_whitespace().collect();
        if numbers.is_empty() || !numbers.iter().all(|number| number.parse::<u32>().is_ok_and(|number| number >= 75)) {
            return Err(format!("DBLAUNCH_CUDA_ARCHS is \"{asked}\" and not a list as \"{ARCHITECTURES}\""));
        }
        let target = |(i, number): (usize, &&str)| match i + 1 == numbers.len() {
            true => format!("arch=compute_{number},code=[sm_{number},compute_{number}]"),
            false => format!("arch=compute_{number},code=sm_{number}"),
        };
        Ok(numbers.iter().enumerate().map(target).collect())
    }

    fn find() -> Result<PathBuf, String> {
        if let Some(given) = env::var_os("DBLAUNCH_NVCC") {
            return Ok(given.into());
        }
        let homes =
            ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let usual = [PathBuf::from("/usr/local/cuda/bin"), PathBuf::from("/opt/cuda/bin")];
        let mut places = homes.chain(env::split_paths(&path)).chain(usual).map(|folder| folder.join("nvcc"));
        places.find(|place| place.is_file()).ok_or_else(|| {
            "the feature `cuda` needs NVIDIA's compiler nvcc, and there is none in CUDA_HOME, on the PATH or in \
             /usr/local/cuda.\nEither install the CUDA toolkit and set CUDA_HOME to its folder, or fetch what is needed \
             without installing it:\n    eval \"$(tools/cuda-toolchain.sh FOLDER)\""
                .to_string()
        })
    }

    /// Major and minor, and all that it says of itself.
    fn version(nvcc: &Path) -> Result<((u32, u32), String), String> {
        let output = Command::new(nvcc).arg("--version").output();
        let output = output.map_err(|error| format!("{} cannot be run: {error}", nvcc.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let number = text.split("release ").nth(1).and_then(|rest| rest.split([',', ' ', '\n']).next());
        let parsed = number.and_then(|number| {
            let (major, minor) = number.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        let version = parsed.ok_or_else(|| format!("{} does not say its version: {text}", nvcc.display()))?;
        Ok((version, text))
    }

    /// Does `work` for all families, several at a time; the first error of all.
    fn each(families: &[PathBuf], work: impl Fn(&Path) -> Result<(), String> + Sync) -> Result<(), String> {
        let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
        let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..jobs.clamp(1, families.len().max(1)) {
                scope.spawn(|| {
                    while let Some(family) = families.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = work(family) {
                            errors.lock().unwrap_or_else(|e| e.into_inner()).push(error);
                        }
                    }
                });
            }
        });
        let mut errors = errors.into_inner().unwrap_or_else(|e| e.into_inner());
        errors.sort();
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    impl Compiler {
        /// Compiles one family, unless what is there was made of the same sources with the same compiler.
        fn fat_binary(&self, source: &Path, out: &Path) -> Result<(), String> {
            let name = stem(source);
            let (target, stamp) = (out.join(format!("{name}.fatbin")), out.join(format!("{name}.made-of")));
            let digest = self.digest(source)?;
            if target.is_file() && fs::read_to_string(&stamp).is_ok_and(|made_of| made_of == digest) {
                return Ok(());
            }
            let mut command = Command::new(&self.nvcc);
            command.args(FLAGS).arg(self.compression);
            self.targets.iter().for_each(|target| {
                command.args(["-gencode", target]);
            });
            command.arg(source).arg("-o").arg(&target);
            let output = command.output();
            let output = output.map_err(|error| format!("{} cannot be run: {error}", self.nvcc.display()))?;
            let said = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                return Err(format!("nvcc does not compile {}:\n{}", source.display(), said.trim_end()));
            }
            said.lines().filter(|line| !line.trim().is_empty()).for_each(|line| println!("cargo::warning={line}"));
            fs::write(stamp, digest).map_err(|error| format!("cannot write to OUT_DIR: {error}"))
        }

        /// Of all that the result depends on.
        fn digest(&self, source: &Path) -> Result<String, String> {
            let mut hasher = DefaultHasher::new();
            (&self.banner, &self.targets, FLAGS, self.compression).hash(&mut hasher);
            let headers = ["cuh", "h"].iter().flat_map(|extension| sources(Path::new("kernels"), extension));
            for file in std::iter::once(source.to_path_buf()).chain(headers) {
                fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?.hash(&mut hasher);
            }
            Ok(format!("{:016x}", hasher.finish()))
        }
    }
}

#[cfg(feature = "emulate")]
#[path = "build/emulate.rs"]
mod host;
