// Group normalisation (with SiLU) and layer normalisation, forward and backward. What each launch computes and why there are so
// many is in the headers; src/kernels/norms*.rs chooses among them and knows grids and scratch.
//
// Names: `_loose` takes any alignment and any number of pixels or columns, one number at a time.
#include "norms_group_backward.cuh"
#include "norms_rows.cuh"

// No operand of a norm overlaps a result.
#define IN(T) const T* __restrict__
#define OUT(T) T* __restrict__

#define GROUP_FORWARD(T, dtype)                                                                                              \
    extern "C" __global__ void __launch_bounds__(GROUP_THREADS, 2) group_norm_forward_##dtype(                               \
        IN(T) x, IN(T) gamma, IN(T) beta, OUT(T) y, OUT(float2) moments, unsigned channels, unsigned groups,                 \
        unsigned pixels, float eps, int silu) {                                                                              \
        group_forward<T, WIDTH<T>>(x, gamma, beta, y, moments, {channels, groups, channels / groups, pixels}, eps, silu);    \
    }                                                                                                                        \
    EXPORT(group_norm_forward_##dtype)

#define GROUP_SPLIT(T, dtype, N)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) group_norm_measure_##dtype(                                            \
        IN(T) x, OUT(float2) pieces, unsigned channels, unsigned groups, unsigned pixels) {                                  \
        group_measure<T, N>(x, pieces, {channels, groups, channels / groups, pixels});                                       \
    }                                                                                                                        \
    EXPORT(group_norm_measure_##dtype)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) group_norm_normalise_##dtype(                                          \
        IN(T) x, IN(float2) pieces, IN(T) gamma, IN(T) beta, OUT(T) y, OUT(float2) moments, unsigned channels,               \
        unsigned groups, unsigned pixels, float eps, int silu) {                                                             \
        group_normalise<T, N>(x, pieces, gamma, beta, y, moments, {channels, groups, channels / groups, pixels}, eps, silu); \
    }                                                                                                                        \
    EXPORT(group_norm_normalise_##dtype)

#define GROUP_BACKWARD(T, dtype)                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) group_norm_backward_##dtype(                                           \
        IN(T) x, IN(T) dy, IN(T) gamma, IN(T) beta, IN(float2) moments, OUT(T) dx, float2* sums,                             \
        unsigned channels, unsigned groups, unsigned pixels, unsigned team, int silu) {                                      \
        DYNAMIC_SHARED(float2, parts);                                                                                       \
        const GroupShape shape = {channels, groups, channels / groups, pixels};                                              \
        if (silu) group_backward<T, WIDTH<T>, true>(x, dy, gamma, beta, moments, dx, sums, shape, team, parts);              \
        else group_backward<T, WIDTH<T>, false>(x, dy, gamma, beta, moments, dx, sums, shape, team, parts);                  \
    }                                                                                                                        \
    EXPORT(group_norm_backward_##dtype)

#define GROUP_BACKWARD_SPLIT(T, dtype, N)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) group_norm_sums_##dtype(                                               \
        IN(T) x, IN(T) dy, IN(T) gamma, IN(T) beta, IN(float2) moments, OUT(float2) sums, unsigned channels,                 \
        unsigned groups, unsigned pixels, int silu) {                                                                        \
        const GroupShape shape = {channels, groups, channels / groups, pixels};                                              \
        if (silu) group_sums<T, N, true>(x, dy, gamma, beta, moments, sums, shape);                                          \
        else group_sums<T, N, false>(x, dy, gamma, beta, moments, sums, shape);                                              \
    }                                                                                                                        \
    EXPORT(group_norm_sums_##dtype)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) group_norm_gradients_##dtype(                                          \
        IN(T) x, IN(T) dy, IN(T) gamma, IN(T) beta, IN(float2) moments, IN(float2) sums, OUT(T) dx,                          \
        unsigned channels, unsigned groups, unsigned pixels, unsigned pieces, unsigned piece, int silu) {                    \
        const GroupShape shape = {channels, groups, channels / groups, pixels};                                              \
        if (silu) group_gradients<T, N, true>(x, dy, gamma, beta, moments, sums, dx, shape, pieces, piece);                  \
        else group_gradients<T, N, false>(x, dy, gamma, beta, moments, sums, dx, shape, pieces, piece);                      \
    }                                                                                                                        \
    EXPORT(group_norm_gradients_##dtype)

#define LAYER(T, dtype, size, PACKS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(LAYER_THREADS) layer_norm_forward_##size##_##dtype(                         \
        IN(T) x, IN(T) gamma, IN(T) beta, OUT(T) y, OUT(float2) moments, unsigned rows, unsigned width, float eps) {         \
        layer_forward<T, PACKS>(x, gamma, beta, y, moments, rows, width, eps);                                               \
    }                                                                                                                        \
    EXPORT(layer_norm_forward_##size##_##dtype)                                                                              \
    extern "C" __global__ void __launch_bounds__(LAYER_THREADS, (AT_ONCE<T, PACKS>)) layer_norm_backward_##size##_##dtype(   \
        IN(T) x, IN(T) dy, IN(T) gamma, IN(float2) moments, OUT(T) dx, OUT(float) parts, unsigned rows,                      \
        unsigned width) {                                                                                                    \
        DYNAMIC_SHARED(float, shared);                                                                                       \
        layer_backward<T, PACKS>(x, dy, gamma, moments, dx, parts, rows, width, shared);                                     \
    }                                                                                                                        \
    EXPORT(layer_norm_backward_##size##_##dtype)

#define ROWS(T, dtype, N)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) layer_norm_forward_##dtype(                                            \
        IN(T) x, IN(T) gamma, IN(T) beta, OUT(T) y, OUT(float2) moments, unsigned width, float eps) {                        \
        row_forward<T, N>(x, gamma, beta, y, moments, width, eps);                                                           \
    }                                                                                                                        \
    EXPORT(layer_norm_forward_##dtype)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) layer_norm_backward_##dtype(                                           \
        IN(T) x, IN(T) dy, IN(T) gamma, IN(float2) moments, OUT(T) dx, unsigned width) {                                     \
        row_backward<T, N>(x, dy, gamma, moments, dx, width);                                                                \
    }                                                                                                                        \
    EXPORT(layer_norm_backward_##dtype)

#define NORMS(T, dtype)                                                                                                      \
    GROUP_FORWARD(T, dtype)                                                                                                  \
    GROUP_SPLIT(T, dtype, WIDTH<T>)                                                                                          \
    GROUP_SPLIT(T, loose_##dtype, 1)                                                                                         \
    GROUP_BACKWARD(T, dtype)                                                                                                 \
    GROUP_BACKWARD_SPLIT(T, dtype, WIDTH<T>)                                                                                 \
    GROUP_BACKWARD_SPLIT(T, loose_##dtype, 1)                                                                                \
    LAYER(T, dtype, narrow, NARROW<T>)                                                                                       \
    LAYER(T, dtype, medium, MEDIUM<T>)                                                                                       \
    ROWS(T, wide_##dtype, WIDTH<T>)                                                                                          \
    ROWS(T, loose_##dtype, 1)                                                                                                \
    extern "C" __global__ void __launch_bounds__(COLUMNS* LADDERS)                                                           \
        layer_norm_columns_##dtype(IN(T) x, IN(T) dy, IN(float2) moments, OUT(float) parts, unsigned rows,                   \
                                   unsigned width) {                                                                         \
        row_columns<T>(x, dy, moments, parts, rows, width);                                                                  \
    }                                                                                                                        \
    EXPORT(layer_norm_columns_##dtype)

FOR_DTYPES(NORMS)

extern "C" __global__ void __launch_bounds__(256)
    group_norm_weights_f32(IN(float2) sums, OUT(float) dgamma, OUT(float) dbeta, unsigned batch, unsigned channels) {
    group_weights(sums, dgamma, dbeta, batch, channels);
}
EXPORT(group_norm_weights_f32)

extern "C" __global__ void __launch_bounds__(COLUMNS* LADDERS)
    layer_norm_weights_f32(IN(float) parts, OUT(float) dgamma, OUT(float) dbeta, unsigned count, unsigned width) {
    layer_weights(parts, dgamma, dbeta, count, width);
}
EXPORT(layer_norm_weights_f32)
