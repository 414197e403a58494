// Attention's forward on tensor cores (Dao 2023, "FlashAttention-2"): a block has 16 MT WARPS queries, each warp 16 MT
// of them, and goes over the keys BC at a time with a running softmax.
//
// Shared memory: queries, one tile of keys, one of values. Values travel while scores are computed, the next keys while
// values are summed.
#pragma once

#include "attention_tiles.cuh"

// Scores that a query may not see become -inf. `column` is the first of eight keys, `row` the query of x[0] and x[1].
__device__ __forceinline__ void hide(float (&x)[4], int row, int column, int length, int causal) {
    column += threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = column + i % 2, query = row + i / 2 * 8;
        x[i] = key >= length || (causal && key > query) ? -INFINITY : x[i];
    }
}

// Turns scores into powers of two below the running maximum and corrects what was summed before.
template <int DP, int BC>
__device__ __forceinline__ void soften(float (&s)[BC / 8][4], float (&o)[DP / 8][4], float (&top)[2], float (&sum)[2],
                                       float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < BC / 8; n++) {
            most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        most = fmaxf(top[half], most * scale);
        // Nothing seen so far: everything is zero, and no -inf is taken from another.
        const float base = most == -INFINITY ? 0.0f : most, factor = power_of_two(top[half] - base);
        top[half] = most;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < BC / 8; n++) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                s[n][i] = power_of_two(fmaf(s[n][i], scale, -base));
                total += s[n][i];
            }
        }
        sum[half] = fmaf(sum[half], factor, total);
#pragma unroll
        for (int n = 0; n < DP / 8; n++) {
            o[n][2 * half] *= factor;
            o[n][2 * half + 1] *= factor;
        }
    }
}

// log_sums (B, heads, S): log2 of the softmax's denominator, +inf for a query that sees no key.
template <class T, int DP, int MT, int WARPS, int BC>
__device__ __forceinline__ void attention_forward(const T* q, const T* k, const T* v, T* o, float* log_sums,
                                                  const int* lengths, const Sizes sizes) {
    constexpr int THREADS = 32 * WARPS, BR = 16 * MT * WARPS;
    DYNAMIC_SHARED(T, q_tile);
    T* const k_tile = q_tile + BR * DP;
    T* const v_tile = k_tile + BC * DP;
    const int first = blockIdx.x * BR, rows = min(BR, sizes.queries - first);
    const int length = key_length(lengths, sizes), seen = sizes.causal ? min(length, first + rows) : length;
    const long long q_start = query_at(sizes, first);
    const long long k_start = key_at(sizes, 0);
    const int own = threadIdx.x / 32 * 16 * MT, g = threadIdx.x % 32 / 4;
    k += k_start;
    v += k_start;

    load_tile<T, DP, BR, THREADS>(q_tile, q + q_start, sizes.q_token, rows, sizes);
    load_tile<T, DP, BC, THREADS>(k_tile, k, sizes.k_token, seen, sizes);
    copy_commit();
    float y[MT][DP / 8][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; m++) {
        top[m][0] = top[m][1] = -INFINITY;
    }
    for (int at = 0; at < seen; at += BC) {
        copy_wait<0>();
        __syncthreads();
        load_tile<T, DP, BC, THREADS>(v_tile, v + (long long)at * sizes.k_token, sizes.k_token, seen - at, sizes);
        copy_commit();
        float s[MT][BC / 8][4] = {};
#pragma unroll
        for (int c = 0; c < DP / 16; c++) {
            unsigned a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                left<DP>(a[m], q_tile, own + 16 * m, c);
            }
#pragma unroll
            for (int n = 0; n < BC / 16; n++) {
                unsigned b[4];
                right_of_rows<DP>(b, k_tile, 16 * n, c);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma_two<T>(s[m][2 * n], s[m][2 * n + 1], a[m], b);
                }
            }
        }
        const bool hidden = at + BC > length || (sizes.causal && at + BC > first + own + 1);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (hidden) {
#pragma unroll
                for (int n = 0; n < BC / 8; n++) {
                    hide(s[m][n], first + own + 16 * m + g, at + 8 * n, length, sizes.causal);
                }
            }
            soften<DP, BC>(s[m], y[m], top[m], sum[m], sizes.scale);
        }
        copy_wait<0>();
        __syncthreads();
        if (at + BC < seen) {
            const T* next = k + (long long)(at + BC) * sizes.k_token;
            load_tile<T, DP, BC, THREADS>(k_tile, next, sizes.k_token, seen - at - BC, sizes);
            copy_commit();
        }
#pragma unroll
        for (int c = 0; c < BC / 16; c++) {
            unsigned a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                as_left<T>(a[m], s[m][2 * c], s[m][2 * c + 1]);
            }
#pragma unroll
            for (int n = 0; n < DP / 16; n++) {
                unsigned b[4];
                right_of_columns<DP>(b, v_tile, 16 * c, n);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma_two<T>(y[m][2 * n], y[m][2 * n + 1], a[m], b);
                }
            }
        }
    }
    // If there was no key, the queries are still on their way to where the result is put.
    copy_wait<0>();
    __syncthreads();
    log_sums += sum_at(sizes, first);
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            total += __shfl_xor_sync(ALL_LANES, total, 2);
            factor[half] = total > 0.0f ? 1.0f / total : 0.0f;
            const int row = own + 16 * m + g + 8 * half;
            if (row < rows && threadIdx.x % 4 == 0) {
                log_sums[row] = total > 0.0f ? top[m][half] + log2f(total) : INFINITY;
            }
        }
        put_rows<T, DP>(q_tile, own + 16 * m, y[m], factor[0], factor[1]);
    }
    store_rows<T, DP, 16 * MT>(q_tile, own, o + q_start, sizes.q_token, rows, sizes);
}
