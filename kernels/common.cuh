// What all kernels share: dtypes, vectors, sums over warps and blocks. Without nvcc it brings the emulator's words.
//
// Kernels are `extern "C" __global__ void name_dtype(...)`, with EXPORT(name_dtype) at the end of their file. They
// compute in float; totals of many partial sums go by fixed trees or in double. No atomics on floats.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define EXPORT(name)
// The block's dynamic shared memory, aligned to 128 bytes.
#define DYNAMIC_SHARED(type, name)                                                                                     \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];                                            \
    type* const name = reinterpret_cast<type*>(dynamic_shared_memory)

#else

#include "emulate/cuda.h"

#define DYNAMIC_SHARED(type, name)                                                                                     \
    type* const name = reinterpret_cast<type*>(emulator::own.current->block->dynamic_shared)

#endif

using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Numbers ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ unsigned bits_of(f16 x) { return __half_as_ushort(x); }
__device__ __forceinline__ unsigned bits_of(bf16 x) { return __bfloat16_as_ushort(x); }

// Two halves in a register, the first in the lower bits, as tensor cores take them.
template <class T> __device__ __forceinline__ unsigned pack(float low, float high) {
    return bits_of(from_float<T>(low)) | bits_of(from_float<T>(high)) << 16;
}
#ifdef __CUDACC__
template <> __device__ __forceinline__ unsigned pack<f16>(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&both);
}
template <> __device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&both);
}
#endif

// N elements that are read or written at once; addresses must be multiples of their size.
template <class T, int N> struct alignas(sizeof(T) * N) Elements {
    T at[N];
};

template <class T, int N> __device__ __forceinline__ Elements<T, N> load(const T* from) {
    return *reinterpret_cast<const Elements<T, N>*>(from);
}
template <class T, int N> __device__ __forceinline__ void store(T* to, const Elements<T, N>& elements) {
    *reinterpret_cast<Elements<T, N>*>(to) = elements;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// 2^x to two ulps; zero instead of what is too small for a normal number.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// ---- Sums and maxima: every lane or thread gets the result; the order is fixed ----

template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int with = 16; with > 0; with >>= 1) {
        x += __shfl_xor_sync(ALL_LANES, x, with);
    }
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int with = 16; with > 0; with >>= 1) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, with));
    }
    return x;
}

// Sum over a block of THREADS threads (a multiple of 32). Has barriers: all threads must come.
template <int THREADS, class T> __device__ __forceinline__ T block_sum(T x) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
    __shared__ T partial[THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    T sum = partial[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) {
        sum += partial[warp];
    }
    // The next sum may be written only when all have read this one.
    __syncthreads();
    return sum;
}

template <int THREADS> __device__ __forceinline__ float block_max(float x) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps");
    __shared__ float partial[THREADS / 32];
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float most = partial[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) {
        most = fmaxf(most, partial[warp]);
    }
    __syncthreads();
    return most;
}
