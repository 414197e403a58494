// What the memory-bound kernels (norms, glue, optimizer, reduce) share: memory read and written 16 bytes at a time, sums over
// a warp and a block in a fixed tree, and the activations. No kernels.
#pragma once
#include "common.cuh"

// How many of T there are in 16 bytes, the most that one instruction moves. Halves are kept as they are between reading and
// computing: they need half the registers.
template <class T> constexpr int WIDTH = 16 / int(sizeof(T));

// Lets the compiler know nothing of a pack but its bits. Without it what was computed from halves once is kept as floats until it
// is needed again, in twice the registers, or on the stack.
template <class T, int N>
__device__ __forceinline__ void keep_packed(Elements<T, N>& pack) {
#ifdef __CUDACC__
    static_assert(sizeof(pack) % 4 == 0, "whole words");
    unsigned* words = reinterpret_cast<unsigned*>(&pack);
#pragma unroll
    for (int i = 0; i < int(sizeof(pack) / 4); i++) asm volatile("" : "+r"(words[i]));
#else
    (void)pack;
#endif
}

// Whole numbers divided by one that is the same for a whole launch: a product and a correction instead of some twenty
// instructions.
struct Divisor {
    unsigned by, reciprocal;

    __device__ __forceinline__ explicit Divisor(unsigned by) : by(by), reciprocal(0xffffffffu / by) {}

    // The product is at most one too small, as reciprocal > 2^32 / by - 1.
    __device__ __forceinline__ unsigned quotient(unsigned x) const {
        unsigned q = __umulhi(x, reciprocal);
        return q + (x - q * by >= by ? 1u : 0u);
    }
};

// The sum over neighbouring groups of `lanes` (a power of two up to 32) of a warp, given to all of them. A butterfly adds the
// same pairs in every lane, so all lanes hold the same bits.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
    for (int with = lanes / 2; with > 0; with /= 2) x += __shfl_xor_sync(ALL_LANES, x, with);
    return x;
}

// Sums of K numbers over a block of whole warps: f32 within a warp, f64 over the warps. (f64 is slow on many GPUs, so only one
// warp computes in it.) The result is in the first warp alone. `shared` holds K * 32 floats and may be used again after the
// next __syncthreads.
template <int K>
__device__ __forceinline__ void block_sums(float (&x)[K], double (&totals)[K], float* shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int k = 0; k < K; k++) {
        x[k] = warp_sum(x[k]);
        if (lane == 0) shared[k * 32 + warp] = x[k];
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int k = 0; k < K; k++) totals[k] = warp_sum(lane < warps ? double(shared[k * 32 + lane]) : 0.0);
    }
}

// e^x and 1 / x: to an ulp for f32, and for halves, whose kernels would otherwise wait for arithmetic and not for memory, to
// about 1e-6. (__expf takes instructions more for results below 1e-38, which no activation shows.)
template <class T>
__device__ __forceinline__ float exponential(float x) {
    return sizeof(T) == 4 ? expf(x) : power_of_two(x * 1.442695041f);
}

template <class T>
__device__ __forceinline__ float reciprocal(float x) {
    return sizeof(T) == 4 ? 1.0f / x : __fdividef(1.0f, x);
}

template <class T>
__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal<T>(1.0f + exponential<T>(-x));
}

// d/dx of x sigmoid(x). That of x sigmoid(a x) is the same function at a x.
template <class T>
__device__ __forceinline__ float silu_slope(float x) {
    const float s = sigmoid<T>(x);
    return s * fmaf(x, 1.0f - s, 1.0f);
}

// Runs the macro for each dtype: the type and its name in kernels' names.
#define FOR_DTYPES(KERNEL) KERNEL(float, f32) KERNEL(f16, f16) KERNEL(bf16, bf16)
