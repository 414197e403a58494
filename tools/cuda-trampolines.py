"""Static libraries that stand for NVIDIA's shared ones: each function, called for the first time, loads the real library
and jumps into it; where there is none it returns that library's own status for "not there".

    usage: python3 cuda-trampolines.py BINDINGS SCRATCH OUT

BINDINGS is the source folder of the crate cudarc, whose declarations say which functions there are, so no library need be
at hand. Writes OUT/lib{cuda,cublas,...}.a. Run by cuda-toolchain.sh. Linux on x86-64, gcc.
"""

import pathlib
import re
import subprocess
import sys

# Library: cudarc's module, names under which it is loaded in this order, the status where it cannot be.
LIBRARIES = {
    "cuda": ("driver", ["libcuda.so.1"], 100),  # CUDA_ERROR_NO_DEVICE
    "cublas": ("cublas", ["libcublas.so.13", "libcublas.so.12"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": ("cublaslt", ["libcublasLt.so.13", "libcublasLt.so.12"], 1),
    "curand": ("curand", ["libcurand.so.10"], 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "nvrtc": ("nvrtc", ["libnvrtc.so.13", "libnvrtc.so.12"], 11),  # NVRTC_ERROR_INTERNAL_ERROR
    "cudnn": ("cudnn", ["libcudnn.so.9"], 1001),  # CUDNN_STATUS_NOT_INITIALIZED
    "nccl": ("nccl", ["libnccl.so.2"], 2),  # ncclSystemError
}

LOADER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>

extern void *{table}[];
static void *library;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static const char *const sonames[] = {{{sonames}}};
static const char *const names[] = {{{names}}};
static const unsigned char returns_text[] = {{{returns_text}}};

static long no_status(void) {{ return {status}; }}
static const char *no_text(void) {{ return "lib{name} cannot be loaded"; }}

static void load(void) {{
    for (unsigned i = 0; !library && i < sizeof sonames / sizeof *sonames; i++)
        library = dlopen(sonames[i], RTLD_NOW | RTLD_GLOBAL);
}}

__attribute__((visibility("hidden"))) void *{resolve}(unsigned long i) {{
    pthread_once(&once, load);
    void *function = library ? dlsym(library, names[i]) : 0;
    if (!function) function = returns_text[i] ? (void *)no_text : (void *)no_status;
    __atomic_store_n(&{table}[i], function, __ATOMIC_RELEASE);
    return function;
}}
"""

# What a C function may take its arguments in; r10 and rax ride along (static chain, number of vector registers).
REGISTERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax", "r10"]
VECTORS = range(8)


def functions(module):
    """Names of the C functions that `module` declares, and those among them that return text instead of a status."""
    text = (module / "sys" / "mod.rs").read_text()
    names = sorted(set(re.findall(r"pub unsafe fn (\w+)\s*\(", text)) - {"culib", "is_culib_present"})
    texts = {name for name in names if re.search(rf"pub unsafe fn {name}\s*\([^)]*\)\s*->\s*\*const", text)}
    return names, texts


def jumps(names, table, resolve):
    """Every function is a jump through its place in a table, which at first leads to the common way: keep all
    arguments, find the function, put it into the table, restore the arguments, jump."""
    common = f"{table}_first"
    lines = [".text", f"{common}:"]
    lines += [f" push %{register}" for register in REGISTERS]
    lines += [f" sub ${16 * len(VECTORS)}, %rsp"]
    lines += [f" movups %xmm{i}, {16 * i}(%rsp)" for i in VECTORS]
    # Above what was just saved lies the number of the function.
    lines += [f" mov {16 * len(VECTORS) + 8 * len(REGISTERS)}(%rsp), %rdi", f" call {resolve}", " mov %rax, %r11"]
    lines += [f" movups {16 * i}(%rsp), %xmm{i}" for i in VECTORS]
    lines += [f" add ${16 * len(VECTORS)}, %rsp"]
    lines += [f" pop %{register}" for register in reversed(REGISTERS)]
    lines += [" add $8, %rsp", " jmp *%r11"]
    for i, name in enumerate(names):
        lines += [f".globl {name}", f".type {name}, @function", f"{name}: jmp *{table}+{8 * i}(%rip)"]
        lines += [f"{table}_{i}: push ${i}", f" jmp {common}", f".size {name}, .-{name}"]
    lines += [".data", ".balign 8", f".globl {table}", f".hidden {table}", f"{table}:"]
    lines += [f" .quad {table}_{i}" for i in range(len(names))]
    lines += ['.section .note.GNU-stack, "", @progbits']
    return "\n".join(lines) + "\n"


def write(name, bindings, scratch, out):
    module, sonames, status = LIBRARIES[name]
    names, texts = functions(bindings / module)
    table, resolve = f"trampolines_of_{name}", f"resolve_in_{name}"
    loader = LOADER.format(
        name=name,
        table=table,
        resolve=resolve,
        status=status,
        sonames=", ".join(f'"{soname}"' for soname in sonames),
        names=", ".join(f'"{function}"' for function in names),
        returns_text=", ".join("1" if function in texts else "0" for function in names),
    )
    sources = {f"{name}_loader.c": loader, f"{name}_jumps.s": jumps(names, table, resolve)}
    objects = []
    for file, text in sources.items():
        (scratch / file).write_text(text)
        objects.append(str(scratch / file) + ".o")
        subprocess.check_call(["gcc", "-O2", "-fPIC", "-c", str(scratch / file), "-o", objects[-1]])
    archive = out / f"lib{name}.a"
    archive.unlink(missing_ok=True)
    subprocess.check_call(["ar", "rcs", str(archive), *objects])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    for library in LIBRARIES:
        write(library, *map(pathlib.Path, sys.argv[1:]))
