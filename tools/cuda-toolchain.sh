#!/usr/bin/env bash
# A CUDA toolkit for building dblaunch where none is installed.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: eval "$(tools/cuda-toolchain.sh FOLDER)"
       cargo build --release --features cuda

For building with --features cuda where no CUDA toolkit is installed. Puts what is needed from NVIDIA's toolkit 13.0
(nvcc, headers, the runtime's static library) into FOLDER, from the Python package index: about 100 MB to fetch and
300 MB on disk; the second call finds everything there. Prints on standard output the environment that the build takes,
everything else on standard error. No GPU, no driver, no root.

Needed: Linux on x86-64, glibc 2.34 or newer, gcc and g++ (at most 15), python3 with pip, cargo.

The program built so names no NVIDIA library that must be there when it starts. What stands in the place of libcuda,
libcublas, libnccl and so on are small functions that load the real library when one of them is called first, and return
an error where there is none. So one file runs on machines with and without a GPU. With a toolkit of the system's
(CUDA_HOME or nvcc on the PATH) this script is not needed; the program is then bound to that machine's libraries.

candle's own kernels are made as intermediate code (PTX) for Turing, which any newer GPU's driver compiles for it, too.
NVCC_PTX_ARCH, when building, names another capability to begin with: 80 for Ampere.
TEXT
}

# Not newer than 13.0: a driver loads no intermediate code (PTX) of a newer compiler than its own version.
WHEELS=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96)

say() { echo "cuda-toolchain: $*" >&2; }

die() {
    say "$*"
    exit 1
}

# The sources of the bindings, whose function names the trampolines take.
bindings() {
    local version=$1 found
    found=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$version"/src 2> /dev/null | head -n 1 || true)
    if [ -z "$found" ]; then
        (cd "$repository" && cargo fetch --locked >&2)
        found=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-"$version"/src | head -n 1)
    fi
    echo "$found"
}

# What candle's build script calls as nvcc. It makes PTX alone: quick, and for any GPU from that capability on. candle
# compiles its bf16 kernels from 8.0 on only, but CUDA's headers have bf16 for all (in fp32, rounded to the same bits), so
# for 7.5 the condition is lifted in a copy. Its kernels for quantised weights, which dblaunch does not use and which take
# most of the time, are left out.
write_wrapper() {
    mkdir -p "$home/wrap"
    cat > "$home/wrap/nvcc" <<'WRAPPER'
#!/usr/bin/env bash
set -e
arch=${NVCC_PTX_ARCH:-75} output='' previous='' source=''
arguments=()
for argument in "$@"; do
    [ "$previous" = -o ] && output=$argument
    case $argument in
        -gencode=arch=compute_*) argument=-gencode=arch=compute_$arch,code=compute_$arch ;;
        *.cu) source=$argument ;;
    esac
    arguments+=("$argument")
    previous=$argument
done
case ${source##*/} in
    moe_*.cu | mmq_*.cu | mmvq_*.cu)
        # An empty object: whoever called these kernels would not link.
        [ -z "$output" ] || exec gcc -x c -c /dev/null -o "$output"
        ;;
esac
if [ "$arch" -lt 80 ] && [ -n "$source" ] && [ -f "$(dirname "$source")/compatibility.cuh" ]; then
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp "$(dirname "$source")"/*.cu "$(dirname "$source")"/*.cuh "$copy/"
    sed -i "s/__CUDA_ARCH__ >= 800/__CUDA_ARCH__ >= ${arch}0/; s/__CUDA_ARCH__ < 800/__CUDA_ARCH__ < ${arch}0/" "$copy"/*
    for i in "${!arguments[@]}"; do
        [ "${arguments[i]}" != "$source" ] || arguments[i]=$copy/${source##*/}
    done
fi
"$(dirname "$(dirname "$(readlink -f "$0")")")/bin/nvcc" "${arguments[@]}"
WRAPPER
    chmod +x "$home/wrap/nvcc"
}

assemble() {
    local raw=$folder/raw wheels=$folder/wheels wheel name
    rm -rf "$folder/.stamp" "$raw" "$home" "$wheels"
    mkdir -p "$raw" "$wheels"
    say "fetching ${#WHEELS[@]} packages into $folder"
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$wheels" "${WHEELS[@]}" >&2 ||
        die "the packages could not be fetched from the Python package index"
    for wheel in "${WHEELS[@]}"; do
        name=${wheel%%==*}
        python3 -m zipfile -e "$wheels/${name//-/_}-${wheel##*==}"-*.whl "$raw" >&2
    done
    mv "$raw/nvidia/cu13" "$home"
    # Unpacking keeps no modes.
    chmod +x "$home"/bin/* "$home"/nvvm/bin/*
    ln -sfn lib "$home/lib64"
    # Nothing may be linked against the shared runtime, or the program needs it to start.
    rm -f "$home"/lib/libcudart.so*
    ln -sfn libcudart_static.a "$home/lib/libcudart.a"
    python3 "$here/cuda-trampolines.py" "$(bindings "$cudarc")" "$raw" "$home/lib"
    write_wrapper
    printf 'extern "C" __global__ void add_one(float *y) { y[0] += 1; }\n' > "$raw/try.cu"
    "$home/bin/nvcc" -fatbin -gencode arch=compute_75,code=sm_75 -gencode arch=compute_90,code=[sm_90,compute_90] \
        "$raw/try.cu" -o "$raw/try.fatbin" >&2 || die "the toolkit was fetched but does not compile"
    rm -rf "$wheels" "$raw"
    printf '%s' "$stamp" > "$folder/.stamp"
    say "ready: $("$home/bin/nvcc" --version | tail -n 1)"
}

case ${1:-} in
    '' | -h | --help)
        usage >&2
        [ $# -gt 0 ] && exit 0 || exit 2
        ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
[ "$(uname -sm)" = "Linux x86_64" ] || die "the trampolines are written for Linux on x86-64; install NVIDIA's toolkit"
for tool in gcc g++ ar python3 cargo; do
    command -v "$tool" > /dev/null || die "$tool is missing"
done
python3 -m pip --version > /dev/null 2>&1 || die "python3 has no pip"
cudarc=$(sed -n '/^name = "cudarc"$/{n;s/^version = "\(.*\)"$/\1/p}' "$repository/Cargo.lock")
[ -n "$cudarc" ] || die "Cargo.lock names no cudarc"

mkdir -p "$1"
folder=$(cd "$1" && pwd)
home=$folder/cuda
stamp="1 cudarc=$cudarc ${WHEELS[*]} $(cat "$here/cuda-trampolines.py" "$here/cuda-toolchain.sh" | cksum)"
[ "$(cat "$folder/.stamp" 2> /dev/null || true)" = "$stamp" ] || assemble
cat <<ENVIRONMENT
export CUDA_HOME='$home' CUDA_PATH='$home'
export PATH='$home/bin':"\$PATH"
export NVCC='$home/wrap/nvcc'
export CUDA_COMPUTE_CAP=80
ENVIRONMENT
