// Ops on one number at a time: activations and their slopes, gates, sums, conversions. No kernels.
#pragma once
#include "glue_packs.cuh"

// The normal distribution's integral up to x and its density at x, as src/ops/vector.rs computes them: a small relative error
// in both tails. The tail is erfc(z)/2 with z = |x|/sqrt(2), and erfc(z) = e^(-z^2) t P(t) with t = 1/(1 + 0.35 z).
template <class T>
__device__ __forceinline__ float2 normal(float x) {
    // Beyond, both are zero in f32; the bound keeps the square finite.
    const float a = fminf(fabsf(x), 15.0f), square = a * a, lost = fmaf(a, a, -square);
    float e = exponential<T>(-0.5f * square);
    e = fmaf(e, -0.5f * lost, e);
    const float t = reciprocal<T>(fmaf(0.35f * 0.70710678f, a, 1.0f));
    float p = 0.038401056f;
    p = fmaf(p, t, -0.15892829f);
    p = fmaf(p, t, 0.18146122f);
    p = fmaf(p, t, -0.027705591f);
    p = fmaf(p, t, 0.08701867f);
    p = fmaf(p, t, 0.14604226f);
    p = fmaf(p, t, 0.15118615f);
    p = fmaf(p, t, 0.1879024f);
    p = fmaf(p, t, 0.19713835f);
    p = fmaf(p, t, 0.19748378f);
    const float tail = 0.5f * e * (p * t);
    return make_float2(x < 0.0f ? tail : 1.0f - tail, e * 0.3989423f);
}

constexpr float QUICK = 1.702f;

// The activations: y of x, and dx of x and dy.
struct Silu {
    template <class T>
    static __device__ __forceinline__ float forward(float x) { return x * sigmoid<T>(x); }
    template <class T>
    static __device__ __forceinline__ float backward(float x, float dy) { return dy * silu_slope<T>(x); }
};
struct Gelu {
    template <class T>
    static __device__ __forceinline__ float forward(float x) { return x * normal<T>(x).x; }
    template <class T>
    static __device__ __forceinline__ float backward(float x, float dy) {
        const float2 n = normal<T>(x);
        return dy * fmaf(x, n.y, n.x);
    }
};
struct QuickGelu {
    template <class T>
    static __device__ __forceinline__ float forward(float x) { return x * sigmoid<T>(QUICK * x); }
    template <class T>
    static __device__ __forceinline__ float backward(float x, float dy) { return dy * silu_slope<T>(QUICK * x); }
};

// A thread's elements of a tensor of `count`: N at once if `aligned`, the last ones and otherwise one by one.
template <class T, int N>
__device__ __forceinline__ Elements<T, N> some(const T* from, size_t at, size_t count, int aligned) {
    if (aligned && at + N <= count) return load<T, N>(from + at);
    Elements<T, N> x;
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] = at + i < count ? from[at + i] : from_float<T>(0.0f);
    return x;
}

template <class T, int N>
__device__ __forceinline__ void put(T* to, size_t at, size_t count, int aligned, const Elements<T, N>& x) {
    if (aligned && at + N <= count) {
        store<T, N>(to + at, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (at + i < count) to[at + i] = x.at[i];
    }
}

// The first of this thread's N elements in a grid that covers a tensor.
template <int N>
__device__ __forceinline__ size_t place() {
    return (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
}

// The same for kernels that divide it by something: in 32 bits that takes twenty instructions and not a hundred. Wrappers see to
// it that counts fit.
template <int N>
__device__ __forceinline__ unsigned place_of() {
    return (blockIdx.x * blockDim.x + threadIdx.x) * N;
}

template <class T, class F>
__device__ __forceinline__ void activate(const T* x, T* y, size_t count, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= count) return;
    Elements<T, N> run = some<T, N>(x, at, count, aligned);
#pragma unroll
    for (int i = 0; i < N; i++) run.at[i] = from_float<T>(F::template forward<T>(to_float(run.at[i])));
    put<T, N>(y, at, count, aligned, run);
}

template <class T, class F>
__device__ __forceinline__ void activate_backward(const T* x, const T* dy, T* dx, size_t count, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= count) return;
    const Elements<T, N> run = some<T, N>(x, at, count, aligned);
    Elements<T, N> slope = some<T, N>(dy, at, count, aligned);
#pragma unroll
    for (int i = 0; i < N; i++)
        slope.at[i] = from_float<T>(F::template backward<T>(to_float(run.at[i]), to_float(slope.at[i])));
    put<T, N>(dx, at, count, aligned, slope);
}

// x (rows, 2 width) -> y (rows, width): the first half times gelu of the second. blockIdx.y counts rows.
template <class T>
__device__ __forceinline__ void gate(const T* x, T* y, unsigned rows, unsigned width, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= width) return;
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        const T* from = x + size_t(row) * 2 * width;
        Elements<T, N> a = some<T, N>(from, at, width, aligned);
        const Elements<T, N> g = some<T, N>(from + width, at, width, aligned);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float gate = to_float(g.at[i]);
            a.at[i] = from_float<T>(to_float(a.at[i]) * (gate * normal<T>(gate).x));
        }
        put<T, N>(y + size_t(row) * width, at, width, aligned, a);
    }
}

template <class T>
__device__ __forceinline__ void gate_backward(const T* x, const T* dy, T* dx, unsigned rows, unsigned width, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= width) return;
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * 2 * width;
        Elements<T, N> a = some<T, N>(x + start, at, width, aligned), g = some<T, N>(x + start + width, at, width, aligned);
        const Elements<T, N> d = some<T, N>(dy + size_t(row) * width, at, width, aligned);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float gate = to_float(g.at[i]), slope = to_float(d.at[i]), value = to_float(a.at[i]);
            const float2 n = normal<T>(gate);
            a.at[i] = from_float<T>(slope * (gate * n.x));
            g.at[i] = from_float<T>(slope * value * fmaf(gate, n.y, n.x));
        }
        put<T, N>(dx + start, at, width, aligned, a);
        put<T, N>(dx + start + width, at, width, aligned, g);
    }
}

// y = a + b.
template <class T>
__device__ __forceinline__ void add(const T* a, const T* b, T* y, size_t count, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= count) return;
    Elements<T, N> run = some<T, N>(a, at, count, aligned);
    const Elements<T, N> other = some<T, N>(b, at, count, aligned);
#pragma unroll
    for (int i = 0; i < N; i++) run.at[i] = from_float<T>(to_float(run.at[i]) + to_float(other.at[i]));
    put<T, N>(y, at, count, aligned, run);
}

// y = x * factor + offset, rounded after the product and after the sum, as candle's affine does in f32.
template <class T>
__device__ __forceinline__ void affine(const T* x, T* y, size_t count, float factor, float offset, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= count) return;
    Elements<T, N> run = some<T, N>(x, at, count, aligned);
#pragma unroll
    for (int i = 0; i < N; i++)
        run.at[i] = from_float<T>(__fadd_rn(__fmul_rn(to_float(run.at[i]), factor), offset));
    put<T, N>(y, at, count, aligned, run);
}

// y = x * factor in another dtype, plus what was there if ADD; the sum is rounded once.
template <class S, class D, bool ADD>
__device__ __forceinline__ void convert(const S* x, D* y, size_t count, float factor, int aligned) {
    constexpr int N = WIDTH<D> < WIDTH<S> ? WIDTH<D> : WIDTH<S>;
    const size_t at = place<N>();
    if (at >= count) return;
    const Elements<S, N> run = some<S, N>(x, at, count, aligned);
    Elements<D, N> to;
    if (ADD) to = some<D, N>(y, at, count, aligned);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float value = __fmul_rn(to_float(run.at[i]), factor);
        to.at[i] = from_float<D>(ADD ? __fadd_rn(to_float(to.at[i]), value) : value);
    }
    put<D, N>(y, at, count, aligned, to);
}

template <class T>
__device__ __forceinline__ void fill(T* y, size_t count, float value, int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= count) return;
    Elements<T, N> run;
#pragma unroll
    for (int i = 0; i < N; i++) run.at[i] = from_float<T>(value);
    put<T, N>(y, at, count, aligned, run);
}
