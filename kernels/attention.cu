// Attention without the score matrix: forward, and backward by queries (dq) and by keys (dk, dv). The grid is (blocks
// of queries or keys, heads, batch rows). Names: attention_WHAT_WIDTH_DTYPE, where a head is at most WIDTH wide. Launch
// configurations are in src/kernels/attention.rs and must agree with the sizes here.

#include "attention_backward.cuh"
#include "attention_plain.cuh"

#define SIZES                                                                                                          \
    int queries, int keys, int d, int q_token, int q_head, long long q_batch, int k_token, int k_head,                 \
        long long k_batch, float scale, int causal, int whole
#define GIVEN {queries, keys, d, q_token, q_head, q_batch, k_token, k_head, k_batch, scale, causal, whole}

// Forward: 16 MT WARPS queries a block, keys by BC. Backward: 16 BACK rows a block, the other side by ROWS.
#define HALVES(T, DP, MT, WARPS, BC, BACK, ROWS, STAGES)                                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_forward_##DP##_##T(                             \
        const T* q, const T* k, const T* v, T* y, float* log_sums, const int* lengths, SIZES) {                        \
        attention_forward<T, DP, MT, WARPS, BC>(q, k, v, y, log_sums, lengths, GIVEN);                                 \
    }                                                                                                                  \
    EXPORT(attention_forward_##DP##_##T)                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * BACK)                                                            \
        attention_queries_##DP##_##T(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,           \
                                     const float* delta, const int* lengths, T* dq, SIZES) {                           \
        attention_queries<T, DP, BACK, ROWS, STAGES>(q, k, v, dy, log_sums, delta, lengths, dq, GIVEN);                \
    }                                                                                                                  \
    EXPORT(attention_queries_##DP##_##T)                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * BACK)                                                            \
        attention_keys_##DP##_##T(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,              \
                                  const float* delta, const int* lengths, T* dk, T* dv, SIZES) {                       \
        if constexpr (DP <= 160) {                                                                                     \
            attention_keys<T, DP, BACK, ROWS, STAGES, true, true>(q, k, v, dy, log_sums, delta, lengths, dk, dv,       \
                                                                  GIVEN, blockIdx.x);                                  \
        } else if (blockIdx.x % 2 == 0) {                                                                              \
            attention_keys<T, DP, BACK, ROWS, STAGES, true, false>(q, k, v, dy, log_sums, delta, lengths, dk, dv,      \
                                                                   GIVEN, blockIdx.x / 2);                             \
        } else {                                                                                                       \
            attention_keys<T, DP, BACK, ROWS, STAGES, false, true>(q, k, v, dy, log_sums, delta, lengths, dk, dv,      \
                                                                   GIVEN, blockIdx.x / 2);                             \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT(attention_keys_##DP##_##T)

#define WIDTHS(T)                                                                                                      \
    HALVES(T, 48, 2, 4, 64, 4, 64, 2)                                                                                  \
    HALVES(T, 64, 2, 4, 64, 4, 64, 2)                                                                                  \
    HALVES(T, 80, 1, 4, 64, 4, 32, 2)                                                                                  \
    HALVES(T, 96, 1, 4, 64, 4, 32, 2)                                                                                  \
    HALVES(T, 128, 1, 4, 64, 4, 32, 2)                                                                                 \
    HALVES(T, 160, 1, 4, 32, 4, 32, 1)                                                                                 \
    HALVES(T, 256, 1, 4, 32, 2, 32, 1)
WIDTHS(f16)
WIDTHS(bf16)

#define PLAIN_FORWARD(T, DP, BR, BC)                                                                                   \
    extern "C" __global__ void __launch_bounds__(PLAIN_THREADS) attention_plain_forward_##DP##_##T(                    \
        const T* q, const T* k, const T* v, T* y, float* log_sums, const int* lengths, SIZES) {                        \
        plain_forward<T, DP, BR, BC>(q, k, v, y, log_sums, lengths, GIVEN);                                            \
    }                                                                                                                  \
    EXPORT(attention_plain_forward_##DP##_##T)

// In the backward blocks have BR queries by BC keys for dq, BK keys by BQ queries for dk and dv.
#define PLAIN_BACKWARD(T, DP, BR, BC, BK, BQ)                                                                          \
    extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)                                                        \
        attention_plain_queries_##DP##_##T(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,     \
                                           const float* delta, const int* lengths, T* dq, SIZES) {                     \
        plain_queries<T, DP, BR, BC>(q, k, v, dy, log_sums, delta, lengths, dq, GIVEN);                                \
    }                                                                                                                  \
    EXPORT(attention_plain_queries_##DP##_##T)                                                                         \
    extern "C" __global__ void __launch_bounds__(PLAIN_THREADS)                                                        \
        attention_plain_keys_##DP##_##T(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,        \
                                        const float* delta, const int* lengths, T* dk, T* dv, SIZES) {                 \
        plain_keys<T, DP, BK, BQ>(q, k, v, dy, log_sums, delta, lengths, dk, dv, GIVEN);                               \
    }                                                                                                                  \
    EXPORT(attention_plain_keys_##DP##_##T)

using f32 = float;
PLAIN_FORWARD(f32, 64, 32, 32)
PLAIN_FORWARD(f32, 128, 32, 32)
PLAIN_FORWARD(f32, 256, 32, 16)
PLAIN_FORWARD(f32, 512, 16, 8)
PLAIN_FORWARD(f16, 512, 16, 8)
PLAIN_FORWARD(bf16, 512, 16, 8)
PLAIN_BACKWARD(f32, 64, 32, 32, 32, 32)
PLAIN_BACKWARD(f32, 128, 32, 16, 32, 16)
PLAIN_BACKWARD(f32, 256, 16, 8, 16, 8)

#define DELTA(T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        attention_delta_##T(const T* y, const T* dy, float* delta, SIZES) {                                            \
        attention_delta<T>(y, dy, delta, GIVEN);                                                                       \
    }                                                                                                                  \
    EXPORT(attention_delta_##T)
DELTA(f32)
DELTA(f16)
DELTA(bf16)
