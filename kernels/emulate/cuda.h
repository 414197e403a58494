// CUDA's words for a C++20 compiler: qualifiers, built-in variables, and the intrinsics that our kernels use.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Filled with NaNs before each block.
#define __shared__ static thread_local

#define threadIdx (emulator::own.current->thread)
#define blockIdx (emulator::own.current->block->index)
#define blockDim (emulator::own.current->block->threads)
#define gridDim (emulator::own.current->block->blocks)
constexpr int warpSize = 32;

#define __syncthreads() ((void)emulator::barrier(__FILE__, __LINE__, false))
#define __syncthreads_count(predicate) ((int)emulator::barrier(__FILE__, __LINE__, (predicate) != 0))
#define __syncthreads_or(predicate) ((int)(emulator::barrier(__FILE__, __LINE__, (predicate) != 0) != 0))
#define __syncthreads_and(predicate) ((int)(emulator::barrier(__FILE__, __LINE__, (predicate) == 0) == 0))

// ---- Warps ----

inline void __syncwarp(unsigned mask = ~0u) {
    emulator::meet(mask, [](unsigned, void* const*) {}, nullptr, "__syncwarp");
}

namespace emulator {

template <class T> struct Exchange {
    T value;
    T result;
    unsigned from;
};

// Every lane gets the value of the lane `from`; nonsense from one that is not there.
template <class T> T exchange(unsigned mask, T value, unsigned from) {
    Exchange<T> mine{value, value, from};
    auto all = [](unsigned lanes, void* const* arguments) {
        for (unsigned lane = 0; lane < 32; lane++) {
            if (!(lanes >> lane & 1)) {
                continue;
            }
            auto* to = static_cast<Exchange<T>*>(arguments[lane]);
            if (lanes >> to->from & 1) {
                to->result = static_cast<Exchange<T>*>(arguments[to->from])->value;
            } else {
                memset(&to->result, 0xff, sizeof(T));
            }
        }
    };
    meet(mask, all, &mine, "a shuffle");
    return mine.result;
}

} // namespace emulator

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    unsigned lane = emulator::own.current->lane;
    return emulator::exchange(mask, value, (lane & ~(width - 1u)) + (from & (width - 1)));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = emulator::own.current->lane;
    return emulator::exchange(mask, value, (lane & (width - 1u)) < by ? lane : lane - by);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = emulator::own.current->lane;
    return emulator::exchange(mask, value, (lane & (width - 1u)) + by >= unsigned(width) ? lane : lane + by);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    unsigned lane = emulator::own.current->lane, from = lane ^ with;
    return emulator::exchange(mask, value, from > (lane | (width - 1u)) ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Vote {
        bool mine;
        unsigned all;
    } vote{predicate != 0, 0};
    auto count = [](unsigned lanes, void* const* arguments) {
        unsigned all = 0;
        for (unsigned lane = 0; lane < 32; lane++) {
            all |= unsigned((lanes >> lane & 1) && static_cast<Vote*>(arguments[lane])->mine) << lane;
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            if (lanes >> lane & 1) {
                static_cast<Vote*>(arguments[lane])->all = all;
            }
        }
    };
    emulator::meet(mask, count, &vote, "a ballot");
    return vote.all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// ---- Memory ----

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldca(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }
template <class T> void __stcg(T* to, T value) { *to = value; }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}

template <class T> T atomicAdd(T* to, T value) { return std::atomic_ref<T>(*to).fetch_add(value); }
template <class T> T atomicOr(T* to, T value) { return std::atomic_ref<T>(*to).fetch_or(value); }
template <class T> T atomicAnd(T* to, T value) { return std::atomic_ref<T>(*to).fetch_and(value); }
template <class T> T atomicExch(T* to, T value) { return std::atomic_ref<T>(*to).exchange(value); }
template <class T> T atomicCAS(T* to, T expected, T value) {
    std::atomic_ref<T>(*to).compare_exchange_strong(expected, value);
    return expected;
}
template <class T> T atomicMax(T* to, T value) {
    std::atomic_ref<T> at(*to);
    T old = at.load();
    while (old < value && !at.compare_exchange_weak(old, value)) {
    }
    return old;
}
template <class T> T atomicMin(T* to, T value) {
    std::atomic_ref<T> at(*to);
    T old = at.load();
    while (value < old && !at.compare_exchange_weak(old, value)) {
    }
    return old;
}

// ---- Vectors: one load or store each, aligned as on the device ----

#define EMULATOR_VECTORS(type, name)                                                                                   \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                           \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };                        \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                                   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(unsigned char, uchar)
#undef EMULATOR_VECTORS
struct alignas(16) double2 {
    double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
using dim3 = emulator::Index;
using uint3 = emulator::Index;

// ---- Arithmetic: rounded as on the device; the fast variants are exact here ----

using std::max;
using std::min;
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
using std::isfinite;
using std::isinf;
using std::isnan;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline float rsqrtf(float a) { return float(1.0 / sqrt(double(a))); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }

inline unsigned __float_as_uint(float a) { return __builtin_bit_cast(unsigned, a); }
inline int __float_as_int(float a) { return __builtin_bit_cast(int, a); }
inline float __uint_as_float(unsigned a) { return __builtin_bit_cast(float, a); }
inline float __int_as_float(int a) { return __builtin_bit_cast(float, a); }
inline int __float2int_rn(float a) { return int(nearbyintf(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __double2float_rn(double a) { return float(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(unsigned(a)); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
[[noreturn]] inline void __trap() { emulator::fail("__trap"); }

// ---- Halves: storage and conversions; arithmetic is in float ----

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __half2float(__half a) { return static_cast<float>(__builtin_bit_cast(_Float16, a.bits)); }
inline __half __float2half_rn(float a) { return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(a))}; }
inline __half __float2half(float a) { return __float2half_rn(a); }
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(unsigned(a.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
    unsigned bits = __float_as_uint(a);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return {0x7fff};
    }
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float a) { return __float2bfloat16_rn(a); }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short a) { return {a}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return {a}; }
