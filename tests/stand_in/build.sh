#!/usr/bin/env bash
# Compiles the stand-ins for NVIDIA's libraries into FOLDER and prints the environment in which a program built with
# `--features cuda` and tools/cuda-toolchain.sh takes them for a GPU. For tests of what is around kernels; see cuda.cpp.
#   usage: eval "$(tests/stand_in/build.sh FOLDER EMULATED_KERNELS.so)"
set -euo pipefail
[ $# = 2 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
# compile LIBRARY SOURCE...
compile() {
    local library=$1
    shift
    c++ -std=c++20 -O1 -g -Wall -Wextra -fPIC -shared -fvisibility=hidden "${@/#/$here/}" -o "$folder/$library" -ldl -lpthread -lrt
}
compile libcuda.so.1 cuda.cpp candle.cpp
compile libnccl.so.2 nccl.cpp
compile libcublas.so.13 libraries.cpp
cp "$folder/libcublas.so.13" "$folder/libcurand.so.10"
printf 'export LD_LIBRARY_PATH=%q STAND_IN_KERNELS=%q\n' "$folder" "$(realpath "$2")"
