// What joins the large ops: activations, gates, sums, conversions, concatenation, transposes, resampling, biases, embedding,
// and the objective's gradient. Formulas and orders of sums are in the headers.
//
// Names: `_loose` takes any alignment and size, one element at a time; where it is not there, an argument `aligned` says
// whether whole packs may be moved. Kernels that only move numbers are named by the bytes of what they move.
#include "glue_moves.cuh"
#include "glue_objective.cuh"
#include "glue_sums.cuh"

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(256) name
using Bytes16 = uint4;

#define ACTIVATION(T, dtype, F, name)                                                                                        \
    KERNEL(name##_##dtype)(const T* x, T* y, uint64_t count, int aligned) { activate<T, F>(x, y, count, aligned); }          \
    EXPORT(name##_##dtype)                                                                                                   \
    KERNEL(name##_backward_##dtype)(const T* x, const T* dy, T* dx, uint64_t count, int aligned) {                           \
        activate_backward<T, F>(x, dy, dx, count, aligned);                                                                  \
    }                                                                                                                        \
    EXPORT(name##_backward_##dtype)

#define POINTWISE(T, dtype)                                                                                                  \
    ACTIVATION(T, dtype, Silu, silu)                                                                                         \
    ACTIVATION(T, dtype, Gelu, gelu)                                                                                         \
    ACTIVATION(T, dtype, QuickGelu, quick_gelu)                                                                              \
    KERNEL(geglu_##dtype)(const T* x, T* y, unsigned rows, unsigned width, int aligned) {                                    \
        gate<T>(x, y, rows, width, aligned);                                                                                 \
    }                                                                                                                        \
    EXPORT(geglu_##dtype)                                                                                                    \
    KERNEL(geglu_backward_##dtype)(const T* x, const T* dy, T* dx, unsigned rows, unsigned width, int aligned) {             \
        gate_backward<T>(x, dy, dx, rows, width, aligned);                                                                   \
    }                                                                                                                        \
    EXPORT(geglu_backward_##dtype)                                                                                           \
    KERNEL(add_##dtype)(const T* a, const T* b, T* y, uint64_t count, int aligned) { add<T>(a, b, y, count, aligned); }      \
    EXPORT(add_##dtype)                                                                                                      \
    KERNEL(affine_##dtype)(const T* x, T* y, uint64_t count, float factor, float offset, int aligned) {                      \
        affine<T>(x, y, count, factor, offset, aligned);                                                                     \
    }                                                                                                                        \
    EXPORT(affine_##dtype)                                                                                                   \
    KERNEL(fill_##dtype)(T* y, uint64_t count, float value, int aligned) { fill<T>(y, count, value, aligned); }              \
    EXPORT(fill_##dtype)

FOR_DTYPES(POINTWISE)

// cast_FROM_TO writes, accumulate_FROM_TO adds.
#define CONVERT(S, from, D, to)                                                                                              \
    KERNEL(cast_##from##_##to)(const S* x, D* y, uint64_t count, float factor, int aligned) {                                \
        convert<S, D, false>(x, y, count, factor, aligned);                                                                  \
    }                                                                                                                        \
    EXPORT(cast_##from##_##to)                                                                                               \
    KERNEL(accumulate_##from##_##to)(const S* x, D* y, uint64_t count, float factor, int aligned) {                          \
        convert<S, D, true>(x, y, count, factor, aligned);                                                                   \
    }                                                                                                                        \
    EXPORT(accumulate_##from##_##to)
#define CONVERT_FROM(S, from) CONVERT(S, from, float, f32) CONVERT(S, from, f16, f16) CONVERT(S, from, bf16, bf16)

FOR_DTYPES(CONVERT_FROM)

#define PLANES(T, dtype, name, N)                                                                                            \
    KERNEL(add_planes_##name)(const T* x, const T* t, T* y, unsigned count, unsigned pixels, unsigned channels) {            \
        add_planes<T, N>(x, t, y, count, pixels, channels);                                                                  \
    }                                                                                                                        \
    EXPORT(add_planes_##name)                                                                                                \
    KERNEL(sum_planes_##name)(const T* x, T* sums, unsigned pixels) { sum_planes<T, T, N>(x, sums, pixels); }                \
    EXPORT(sum_planes_##name)                                                                                                \
    KERNEL(sum_planes_wide_##name)(const T* x, float* sums, unsigned pixels) { sum_planes<T, float, N>(x, sums, pixels); }   \
    EXPORT(sum_planes_wide_##name)

#define SUMS(T, dtype)                                                                                                       \
    PLANES(T, dtype, dtype, WIDTH<T>)                                                                                        \
    PLANES(T, dtype, loose_##dtype, 1)                                                                                       \
    KERNEL(add_bias_##dtype)                                                                                                 \
    (const T* x, const T* bias, const T* residual, T* y, unsigned rows, unsigned width, int aligned) {                       \
        add_bias<T>(x, bias, residual, y, rows, width, aligned);                                                             \
    }                                                                                                                        \
    EXPORT(add_bias_##dtype)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(COLUMNS* LADDERS)                                                           \
        sum_columns_##dtype(const T* x, float* parts, unsigned rows, unsigned width) {                                       \
        sum_columns<T>(x, parts, rows, width);                                                                               \
    }                                                                                                                        \
    EXPORT(sum_columns_##dtype)                                                                                              \
    KERNEL(embedding_##dtype)                                                                                                \
    (const unsigned* ids, const T* table, const T* positions, T* y, unsigned rows, unsigned length, unsigned width,          \
     int aligned, unsigned* wrong) {                                                                                         \
        look_up<T>(ids, table, positions, y, rows, length, width, aligned, wrong);                                           \
    }                                                                                                                        \
    EXPORT(embedding_##dtype)                                                                                                \
    KERNEL(embedding_backward_##dtype)                                                                                       \
    (const unsigned* ids, const T* dy, float* grad, unsigned tokens, unsigned rows, unsigned width) {                        \
        look_up_backward<T>(ids, dy, grad, tokens, rows, width);                                                             \
    }                                                                                                                        \
    EXPORT(embedding_backward_##dtype)                                                                                       \
    KERNEL(positions_backward_##dtype)(const T* dy, float* grad, unsigned batch, uint64_t row) {                             \
        positions_backward<T>(dy, grad, batch, row);                                                                         \
    }                                                                                                                        \
    EXPORT(positions_backward_##dtype)                                                                                       \
    KERNEL(upsample_double_##dtype)(const T* x, T* y, unsigned count, unsigned w) { upsample_double<T>(x, y, count, w); }    \
    EXPORT(upsample_double_##dtype)                                                                                          \
    KERNEL(upsample_double_backward_##dtype)(const T* dy, T* dx, unsigned count, unsigned w) {                               \
        upsample_double_backward<T>(dy, dx, count, w);                                                                       \
    }                                                                                                                        \
    EXPORT(upsample_double_backward_##dtype)                                                                                 \
    KERNEL(upsample_backward_##dtype)                                                                                        \
    (const T* dy, T* dx, unsigned count, unsigned h, unsigned w, unsigned height, unsigned width, float rows_scale,          \
     float columns_scale) {                                                                                                  \
        upsample_backward<T>(dy, dx, count, h, w, height, width, rows_scale, columns_scale);                                 \
    }                                                                                                                        \
    EXPORT(upsample_backward_##dtype)                                                                                        \
    KERNEL(loss_gradient_##dtype)                                                                                            \
    (const T* prediction, const float* target, const double* factors, float scale, T* gradient, double* row_mse,             \
     unsigned used, unsigned predicted) {                                                                                    \
        loss_gradient<T>(prediction, target, factors, scale, gradient, row_mse, used, predicted);                            \
    }                                                                                                                        \
    EXPORT(loss_gradient_##dtype)

FOR_DTYPES(SUMS)

KERNEL(add_rows_f32)(const float* x, float* to, unsigned rows, unsigned columns) { add_rows(x, to, rows, columns); }
EXPORT(add_rows_f32)

#define MOVE_ROWS(U, bytes)                                                                                                  \
    KERNEL(join_rows_##bytes)(const U* a, const U* b, U* y, unsigned rows, unsigned a_width, unsigned b_width) {             \
        join_rows<U>(a, b, y, rows, a_width, b_width);                                                                       \
    }                                                                                                                        \
    EXPORT(join_rows_##bytes)                                                                                                \
    KERNEL(split_rows_##bytes)(const U* x, U* a, U* b, unsigned rows, unsigned a_width, unsigned b_width) {                  \
        split_rows<U>(x, a, b, rows, a_width, b_width);                                                                      \
    }                                                                                                                        \
    EXPORT(split_rows_##bytes)

MOVE_ROWS(Bytes16, 16)
MOVE_ROWS(uint32_t, 4)
MOVE_ROWS(uint16_t, 2)

#define TRANSPOSE(U, PER, name)                                                                                              \
    KERNEL(transpose_##name)(const U* x, U* y, unsigned rows, unsigned columns) { transpose<U, PER>(x, y, rows, columns); }  \
    EXPORT(transpose_##name)

TRANSPOSE(uint32_t, 1, 4)
TRANSPOSE(uint16_t, 2, 2)
TRANSPOSE(uint16_t, 1, loose_2)

#define UPSAMPLE(U, bytes)                                                                                                   \
    KERNEL(upsample_##bytes)                                                                                                 \
    (const U* x, U* y, unsigned count, unsigned h, unsigned w, unsigned height, unsigned width, float rows_scale,            \
     float columns_scale) {                                                                                                  \
        upsample<U>(x, y, count, h, w, height, width, rows_scale, columns_scale);                                            \
    }                                                                                                                        \
    EXPORT(upsample_##bytes)

UPSAMPLE(uint32_t, 4)
UPSAMPLE(uint16_t, 2)
