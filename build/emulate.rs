//! The kernels for the host: one shared library for each generation of GPUs whose code differs (before 8.0, from 8.0
//! on), of all families and of the emulator that runs them. Shared libraries, opened when wanted, because both have
//! functions of the same names.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use std::{env, fs};

use super::sources;

const GENERATIONS: [u32; 2] = [75, 80];

/// Compiles what is older than its sources, and tells the crate where the libraries are.
pub fn compile(families: &[PathBuf]) {
    let kernels = Path::new("kernels");
    let emulator = ["cpp", "cu"].iter().flat_map(|e| sources(&kernels.join("emulate"), e)).collect::<Vec<_>>();
    let headers = [sources(kernels, "cuh"), sources(&kernels.join("emulate"), "h")].concat();
    let newest = headers.iter().map(|path| changed(path)).max().flatten();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let compiler = cc::Build::new().cpp(true).opt_level(2).cargo_metadata(false).get_compiler();
    for generation in GENERATIONS {
        let mut objects = Vec::new();
        for source in families.iter().chain(&emulator) {
            let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let object = out.join(format!("{name}.{generation}.o"));
            if changed(&object) < changed(source).max(newest) {
                compile_one(compiler.to_command(), source, kernels, generation, &object);
            }
            objects.push(object);
        }
        let library = out.join(format!("libemulated{generation}.so"));
        run(compiler.to_command().arg("-shared").arg("-o").arg(&library).args(&objects).arg("-lpthread"));
        println!("cargo::rustc-env=EMULATED_KERNELS_{generation}={}", library.display());
    }
}

fn compile_one(mut command: Command, source: &Path, kernels: &Path, generation: u32, object: &Path) {
    command.args(["-std=c++20", "-O2", "-g", "-fPIC", "-march=native", "-fvisibility=hidden", "-fno-strict-aliasing"]);
    // Products and sums stay apart unless a kernel asks for a fused one, on every machine alike.
    command.args(["-ffp-contract=off", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]);
    if source.extension().is_some_and(|e| e == "cu") {
        // What these call is in kernels/emulate/faults.cpp.
        command.args(["-fsanitize=bounds,alignment", "-fno-sanitize-recover=all"]);
        command.arg(format!("-D__CUDA_ARCH__={generation}0")).args(["-x", "c++"]);
    }
    run(command.arg("-I").arg(kernels).arg("-c").arg(source).arg("-o").arg(object));
}

fn run(command: &mut Command) {
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => return println!("cargo::error=the feature `emulate` needs g++: {error}"),
    };
    let kind = if output.status.success() { "warning" } else { "error" };
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        println!("cargo::{kind}={line}");
    }
}

/// When it was written; none if it is not there.
fn changed(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}
