// AdamW's arithmetic on one element, the same chain of rounded operations as src/optim's: every product, sum, quotient and root
// is an intrinsic that is rounded once, so that the compiler fuses nothing, and the bits are the CPU's. No kernels.
#pragma once
#include "glue_packs.cuh"

constexpr unsigned MAGNITUDE = 0x7fffffffu, INFINITY_BITS = 0x7f800000u;

// One update's numbers.
struct Coefficients {
    float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2_root, epsilon, step_size;
};

// The keys of stochastic rounding, and the element in the bucket of the first one.
struct Draws {
    unsigned first, second, element;
};

// No half-precision copy.
struct Nothing {};

// The weight after a step with these moments, in PyTorch's order of operations.
__device__ __forceinline__ float adamw_step(const Coefficients& c, float w, float m, float v) {
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), c.correction2_root), c.epsilon);
    const float change = __fmul_rn(c.step_size, __fdiv_rn(m, denominator));
    return __fsub_rn(__fmul_rn(w, c.decay), change);
}

// The second moment after a gradient.
__device__ __forceinline__ float second_moment(const Coefficients& c, float v, float g) {
    return __fadd_rn(__fmul_rn(v, c.beta2), __fmul_rn(__fmul_rn(c.one_minus_beta2, g), g));
}

// The bits of a bf16 as the upper half of an f32's: `bias` (below 2^16) is added before the lower half is cut off. What is no
// number stays none.
__device__ __forceinline__ unsigned upper_half(float x, unsigned bias) {
    const unsigned bits = __float_as_uint(x);
    return ((bits & MAGNITUDE) > INFINITY_BITS ? bits | 0x00400000u : bits + bias) & 0xffff0000u;
}

// 16 bits that belong to the element (src/optim/rounding.rs).
__device__ __forceinline__ unsigned draw(const Draws& draws, unsigned element) {
    unsigned x = element ^ draws.first;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15 ^ draws.second) * 0x846ca68bu;
    return x >> 16;
}

// Rounds the master weight to what it rests in; `x` becomes what rests there.
__device__ __forceinline__ void put_master(float& to, float& x, const Draws&, unsigned) { to = x; }
__device__ __forceinline__ void put_master(bf16& to, float& x, const Draws& draws, unsigned element) {
    const unsigned rounded = upper_half(x, draw(draws, element));
    to = __ushort_as_bfloat16(static_cast<unsigned short>(rounded >> 16));
    x = __uint_as_float(rounded);
}

// The half-precision copy.
__device__ __forceinline__ void put_copy(Nothing&, float) {}
__device__ __forceinline__ void put_copy(f16& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void put_copy(bf16& to, float x) {
    const unsigned odd = __float_as_uint(x) >> 16 & 1;
    to = __ushort_as_bfloat16(static_cast<unsigned short>(upper_half(x, 0x7fffu + odd) >> 16));
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & MAGNITUDE) < INFINITY_BITS; }

// N elements from `at`: at once if `whole`, else one by one as far as `count` goes.
template <class T, int N>
__device__ __forceinline__ void read(Elements<T, N>& to, const T* from, size_t at, size_t count, bool whole) {
    if (whole) {
        to = load<T, N>(from + at);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (at + i < count) to.at[i] = from[at + i];
    }
}

template <class T, int N>
__device__ __forceinline__ void write(T* to, size_t at, const Elements<T, N>& from, size_t count, bool whole) {
    if (whole) {
        store<T, N>(to + at, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (at + i < count) to[at + i] = from.at[i];
    }
}
template <int N>
__device__ __forceinline__ void write(Nothing*, size_t, const Elements<Nothing, N>&, size_t, bool) {}
