//! NVIDIA's shared libraries, loaded before anything calls them, so that a missing one is a message that names it. Also
//! looks where Python environments keep them, which the system's loader does not know.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

/// One of NVIDIA's libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Library {
    /// What people call it.
    pub name: &'static str,
    /// File names in the order in which they are tried.
    files: &'static [&'static str],
    /// Where it comes from.
    remedy: &'static str,
}

pub const DRIVER: Library = Library {
    name: "the NVIDIA driver (libcuda.so.1)",
    files: &["libcuda.so.1"],
    remedy: "install NVIDIA's driver; in a container, start it with the GPUs (`docker run --gpus all …`)",
};
pub const CUBLAS: Library = Library {
    name: "cuBLAS (libcublas.so)",
    files: &["libcublas.so.13", "libcublas.so.12"],
    remedy: "it is part of the CUDA toolkit and of the Python package nvidia-cublas (13) or nvidia-cublas-cu12; put the \
             folder with the file into LD_LIBRARY_PATH",
};
pub const CURAND: Library = Library {
    name: "cuRAND (libcurand.so.10)",
    files: &["libcurand.so.10"],
    remedy: "it is part of the CUDA toolkit and of the Python package nvidia-curand (13) or nvidia-curand-cu12; put the \
             folder with the file into LD_LIBRARY_PATH",
};
pub const NCCL: Library = Library {
    name: "NCCL (libnccl.so.2)",
    files: &["libnccl.so.2"],
    remedy: "GPUs exchange through it: it is the package libnccl2 of NVIDIA's repositories and the Python package \
             nvidia-nccl-cu13 or nvidia-nccl-cu12; put the folder with the file into LD_LIBRARY_PATH",
};

/// Loads a library for the whole process. The problem and its remedy, if that cannot be.
pub fn load(library: Library) -> Result<(), String> {
    let mut why = String::new();
    for file in library.files {
        match open(Path::new(file)) {
            Ok(()) => return Ok(()),
            Err(reason) if why.is_empty() => why = reason,
            Err(_) => {}
        }
    }
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let elsewhere = places(&variable);
    for file in library.files {
        for folder in &elsewhere {
            let path = folder.join(file);
            if !path.is_file() {
                continue;
            }
            // What it needs of its neighbours is found by name once they are loaded.
            load_neighbours(folder, file);
            if open(&path).is_ok() {
                return Ok(());
            }
        }
    }
    Err(format!("{} cannot be loaded ({why}): {}", library.name, library.remedy))
}

/// cuBLAS needs cuBLASLt from the same folder.
fn load_neighbours(folder: &Path, file: &str) {
    if let Some(version) = file.strip_prefix("libcublas.so.") {
        // If it fails, so does the library itself, whose error is the one to tell.
        let _ = open(&folder.join(format!("libcublasLt.so.{version}")));
    }
}

/// Where libraries may be besides where the system's loader looks: what the environment names as CUDA's home, an active
/// Python environment's packages, and the usual folders of toolkits and of drivers that come from outside.
fn places(variable: &dyn Fn(&str) -> Option<std::ffi::OsString>) -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| variable(name)).map(PathBuf::from);
    let mut places: Vec<PathBuf> = homes
        .chain([PathBuf::from("/usr/local/cuda")])
        .flat_map(|home| [home.join("lib64"), home.join("lib")])
        .collect();
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| variable(name)) {
        let library = PathBuf::from(environment).join("lib");
        places.push(library.clone());
        for python in folders(&library).into_iter().filter(|path| starts_with(path, "python3")) {
            // nvidia/cublas/lib, nvidia/nccl/lib; since CUDA 13 nvidia/cu13/lib.
            places.extend(folders(&python.join("site-packages/nvidia")).into_iter().map(|package| package.join("lib")));
        }
    }
    places.extend(["/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/run/opengl-driver/lib"].map(PathBuf::from));
    places.retain(|place| place.is_dir());
    places
}

fn folders(of: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(of).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    found.sort();
    found
}

fn starts_with(path: &Path, prefix: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
}

/// Loads one file and never unloads it; the loader's own words if it cannot.
fn open(file: &Path) -> Result<(), String> {
    let name =
        CString::new(file.as_os_str().as_encoded_bytes()).map_err(|_| "its name has a zero in it".to_string())?;
    // SAFETY: a string that ends; the library's initialisers are NVIDIA's and made to be run by loading. Global, so that
    // whoever loads the same library by its name gets this one.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: `dlerror` returns null or a string that is valid until this thread's next call of the loader.
    let why = unsafe {
        let why = libc::dlerror();
        if why.is_null() { "no reason given".into() } else { CStr::from_ptr(why).to_string_lossy().into_owned() }
    };
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_python_environments_packages_are_looked_at() {
        let home = tempfile::tempdir().unwrap();
        let packages = home.path().join("lib/python3.12/site-packages/nvidia");
        for package in ["cu13/lib", "nccl/lib", "empty"] {
            std::fs::create_dir_all(packages.join(package)).unwrap();
        }
        let variable = |name: &str| (name == "VIRTUAL_ENV").then(|| home.path().as_os_str().to_owned());
        let places = places(&variable);
        assert!(
            places.contains(&packages.join("cu13/lib")) && places.contains(&packages.join("nccl/lib")),
            "{places:?}"
        );
        assert!(!places.contains(&packages.join("empty/lib")));
    }

    #[test]
    fn what_cannot_be_loaded_is_named_with_a_remedy() {
        let library = Library { name: "cuNothing", files: &["libcunothing.so.7"], remedy: "write it" };
        let message = load(library).unwrap_err();
        assert!(message.starts_with("cuNothing cannot be loaded (libcunothing.so.7"), "{message}");
        assert!(message.ends_with("write it"), "{message}");
        // Any library that every system has.
        assert_eq!(load(Library { name: "C", files: &["libcunothing.so.7", "libc.so.6"], remedy: "" }), Ok(()));
    }
}
