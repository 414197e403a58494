// Attention's backward on tensor cores: probabilities again from scores and the saved denominators, once by blocks of
// queries for dq, once by blocks of keys for dk and dv, so that every sum has one place and one order.
//
// With P the probabilities, dP = dO V^T and D the row sums of dO * O: dS = P * (dP - D), dQ = dS K / sqrt(d),
// dK = dS^T Q / sqrt(d), dV = P^T dO. What a block keeps are the rows of its warps' left operands (16 a warp), what it
// goes over are tiles of the other side, the next one travelling meanwhile if STAGES is 2.
#pragma once

#include "attention_forward.cuh"

// Goes over tiles of two arrays (a, b): `use(a_tile, b_tile, at)`. They lie in `tiles`, STAGES times (a, b).
template <class T, int DP, int ROWS, int THREADS, int STAGES, class Use>
__device__ __forceinline__ void over_tiles(T* tiles, const T* a, const T* b, int token, int from, int until,
                                           const Sizes& sizes, Use use) {
    auto load = [&](int at, int stage) {
        T* to = tiles + stage * 2 * ROWS * DP;
        load_tile<T, DP, ROWS, THREADS>(to, a + (long long)at * token, token, until - at, sizes);
        load_tile<T, DP, ROWS, THREADS>(to + ROWS * DP, b + (long long)at * token, token, until - at, sizes);
    };
    if (from < until) {
        load(from, 0);
    }
    copy_commit();
    int stage = 0;
    for (int at = from; at < until; at += ROWS) {
        if (STAGES == 2) {
            if (at + ROWS < until) {
                load(at + ROWS, stage ^ 1);
            }
            copy_commit();
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        const T* tile = tiles + stage * 2 * ROWS * DP;
        use(tile, tile + ROWS * DP, at);
        __syncthreads();
        if (STAGES == 2) {
            stage ^= 1;
        } else if (at + ROWS < until) {
            load(at + ROWS, 0);
            copy_commit();
        }
    }
    copy_wait<0>();
    __syncthreads();
}

// delta (B, heads, S): sums of dO * O, a warp each; the grid is (queries / warps, heads, B).
template <class T>
__device__ __forceinline__ void attention_delta(const T* o, const T* dy, float* delta, const Sizes sizes) {
    const int query = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (query >= sizes.queries) {
        return;
    }
    const long long at = query_at(sizes, query);
    float sum = 0.0f;
    if (sizes.whole) {
        constexpr int N = 16 / sizeof(T);
        for (int i = threadIdx.x % 32 * N; i < sizes.d; i += 32 * N) {
            const Elements<T, N> a = load<T, N>(o + at + i), b = load<T, N>(dy + at + i);
#pragma unroll
            for (int k = 0; k < N; k++) {
                sum = fmaf(to_float(a.at[k]), to_float(b.at[k]), sum);
            }
        }
    } else {
        for (int i = threadIdx.x % 32; i < sizes.d; i += 32) {
            sum = fmaf(to_float(o[at + i]), to_float(dy[at + i]), sum);
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        delta[sum_at(sizes, query)] = sum;
    }
}

template <class T, int DP, int WARPS, int BC, int STAGES>
__device__ __forceinline__ void attention_queries(const T* q, const T* k, const T* v, const T* dy,
                                                  const float* log_sums, const float* delta, const int* lengths, T* dq,
                                                  const Sizes sizes) {
    constexpr int THREADS = 32 * WARPS, BR = 16 * WARPS;
    DYNAMIC_SHARED(T, q_tile);
    T* const dy_tile = q_tile + BR * DP;
    const int first = blockIdx.x * BR, rows = min(BR, sizes.queries - first);
    const int length = key_length(lengths, sizes), seen = sizes.causal ? min(length, first + rows) : length;
    const long long q_start = query_at(sizes, first);
    const long long k_start = key_at(sizes, 0);
    const long long sums = sum_at(sizes, first);
    const int own = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;

    load_tile<T, DP, BR, THREADS>(q_tile, q + q_start, sizes.q_token, rows, sizes);
    load_tile<T, DP, BR, THREADS>(dy_tile, dy + q_start, sizes.q_token, rows, sizes);
    float log_sum[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = own + g + 8 * half;
        log_sum[half] = row < rows ? log_sums[sums + row] : INFINITY;
        mean[half] = row < rows ? delta[sums + row] : 0.0f;
    }
    float y[DP / 8][4] = {};
    auto use = [&](const T* k_tile, const T* v_tile, int at) {
        float s[BC / 8][4] = {}, slope[BC / 8][4] = {};
        add_scores<T, DP, BC>(s, q_tile, own, k_tile);
        add_scores<T, DP, BC>(slope, dy_tile, own, v_tile);
        const bool hidden = at + BC > length || (sizes.causal && at + BC > first + own + 1);
#pragma unroll
        for (int n = 0; n < BC / 8; n++) {
            if (hidden) {
                hide(s[n], first + own + g, at + 8 * n, length, sizes.causal);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = power_of_two(fmaf(s[n][i], sizes.scale, -log_sum[i / 2])) * (slope[n][i] - mean[i / 2]);
            }
        }
        add_product<T, DP, BC>(y, s, k_tile);
    };
    over_tiles<T, DP, BC, THREADS, STAGES>(dy_tile + BR * DP, k + k_start, v + k_start, sizes.k_token, 0, seen, sizes,
                                           use);
    const float factor = rsqrtf(float(sizes.d));
    put_rows<T, DP>(q_tile, own, y, factor, factor);
    store_rows<T, DP, 16>(q_tile, own, dq + q_start, sizes.q_token, rows, sizes);
}

// DK and DV: which of the two are computed; one at a time where both would not fit into registers.
template <class T, int DP, int WARPS, int BQ, int STAGES, bool DK, bool DV>
__device__ __forceinline__ void attention_keys(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,
                                               const float* delta, const int* lengths, T* dk, T* dv, const Sizes sizes,
                                               int block) {
    constexpr int THREADS = 32 * WARPS, BK = 16 * WARPS;
    DYNAMIC_SHARED(T, k_tile);
    T* const v_tile = k_tile + BK * DP;
    const int first = block * BK, rows = min(BK, sizes.keys - first);
    const int length = key_length(lengths, sizes);
    const long long q_start = query_at(sizes, 0);
    const long long k_start = key_at(sizes, first);
    const long long sums = sum_at(sizes, 0);
    const int own = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    // The first queries that see a key of this block.
    const int from = first >= length ? sizes.queries : sizes.causal ? first / BQ * BQ : 0;

    load_tile<T, DP, BK, THREADS>(k_tile, k + k_start, sizes.k_token, rows, sizes);
    load_tile<T, DP, BK, THREADS>(v_tile, v + k_start, sizes.k_token, rows, sizes);
    float key_sum[DK ? DP / 8 : 1][4] = {}, value_sum[DV ? DP / 8 : 1][4] = {};
    auto use = [&](const T* q_tile, const T* dy_tile, int at) {
        float log_sum[BQ / 8][2], mean[BQ / 8][2];
#pragma unroll
        for (int n = 0; n < BQ / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int query = at + 8 * n + 2 * t + i;
                log_sum[n][i] = query < sizes.queries ? log_sums[sums + query] : INFINITY;
                mean[n][i] = DK && query < sizes.queries ? delta[sums + query] : 0.0f;
            }
        }
        float p[BQ / 8][4] = {};
        add_scores<T, DP, BQ>(p, k_tile, own, q_tile);
#pragma unroll
        for (int n = 0; n < BQ / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = first + own + g + i / 2 * 8, query = at + 8 * n + 2 * t + i % 2;
                const bool hidden = key >= length || (sizes.causal && key > query);
                p[n][i] = hidden ? 0.0f : power_of_two(fmaf(p[n][i], sizes.scale, -log_sum[n][i % 2]));
            }
        }
        if constexpr (DV) {
            add_product<T, DP, BQ>(value_sum, p, dy_tile);
        }
        if constexpr (DK) {
            float slope[BQ / 8][4] = {};
            add_scores<T, DP, BQ>(slope, v_tile, own, dy_tile);
#pragma unroll
            for (int n = 0; n < BQ / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[n][i] *= slope[n][i] - mean[n][i % 2];
                }
            }
            add_product<T, DP, BQ>(key_sum, p, q_tile);
        }
    };
    over_tiles<T, DP, BQ, THREADS, STAGES>(v_tile + BK * DP, q + q_start, dy + q_start, sizes.q_token, from,
                                           sizes.queries, sizes, use);
    if constexpr (DK) {
        const float factor = rsqrtf(float(sizes.d));
        put_rows<T, DP>(k_tile, own, key_sum, factor, factor);
        store_rows<T, DP, 16>(k_tile, own, dk + k_start, sizes.k_token, rows, sizes);
    }
    if constexpr (DV) {
        put_rows<T, DP>(v_tile, own, value_sum, 1.0f, 1.0f);
        store_rows<T, DP, 16>(v_tile, own, dv + k_start, sizes.k_token, rows, sizes);
    }
}
