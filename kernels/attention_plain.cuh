// Attention in float without tensor cores: exact for f32, and for heads that are too wide for attention_forward.cuh.
// Blocks of 128 threads, tiles in float with rows of DP + 4 (four floats of eight rows that follow each other lie on
// all banks). For masks and sums see attention_forward.cuh and attention_backward.cuh, whose results these give.
#pragma once

#include "attention_tiles.cuh"

constexpr int PLAIN_THREADS = 128;

template <class T, int DP, int ROWS>
__device__ __forceinline__ void load_plain(float* tile, const T* from, int token, int rows, int d) {
    for (int i = threadIdx.x; i < ROWS * DP; i += PLAIN_THREADS) {
        const int row = i / DP, column = i % DP;
        const bool there = row < rows && column < d;
        tile[row * (DP + 4) + column] = there ? to_float(from[(long long)row * token + column]) : 0.0f;
    }
}

__device__ __forceinline__ float4 quad(const float* at) { return *reinterpret_cast<const float4*>(at); }

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ __forceinline__ void add_scaled(float (&sum)[4], float factor, float4 x) {
    sum[0] = fmaf(factor, x.x, sum[0]);
    sum[1] = fmaf(factor, x.y, sum[1]);
    sum[2] = fmaf(factor, x.z, sum[2]);
    sum[3] = fmaf(factor, x.w, sum[3]);
}

// How 128 threads share a block of R x C scores: thread (y, x) has rows y * ROWS.. and columns x + TX * i.
template <int R, int C> struct Share {
    static constexpr int TY = R < 16 ? R : 16, TX = PLAIN_THREADS / TY, ROWS = R / TY, COLUMNS = C / TX;
    static_assert(R % TY == 0 && C % TX == 0, "whole shares");
};

// x = the products of rows of a and rows of b.
template <int DP, int R, int C>
__device__ __forceinline__ void dots(float (&x)[Share<R, C>::ROWS][Share<R, C>::COLUMNS], const float* a,
                                     const float* b, int d) {
    using S = Share<R, C>;
    const int y = threadIdx.x / S::TX * S::ROWS, column = threadIdx.x % S::TX;
#pragma unroll
    for (int i = 0; i < S::ROWS; i++) {
#pragma unroll
        for (int j = 0; j < S::COLUMNS; j++) {
            x[i][j] = 0.0f;
        }
    }
#pragma unroll 4
    for (int c = 0; c < d; c += 4) {
        float4 rows[S::ROWS];
#pragma unroll
        for (int i = 0; i < S::ROWS; i++) {
            rows[i] = quad(a + (y + i) * (DP + 4) + c);
        }
#pragma unroll
        for (int j = 0; j < S::COLUMNS; j++) {
            const float4 other = quad(b + (column + S::TX * j) * (DP + 4) + c);
#pragma unroll
            for (int i = 0; i < S::ROWS; i++) {
                x[i][j] = dot(rows[i], other, x[i][j]);
            }
        }
    }
}

// Where a thread's part of a result lies: ROWS rows from y * ROWS on, columns 4 x + 32 j and the next three.
template <int R, int DP> struct Part {
    static constexpr int ROWS = R / 16, QUADS = DP / 32;
    float sum[ROWS][QUADS][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS * QUADS * 4; i++) {
            (&sum[0][0][0])[i] = 0.0f;
        }
    }

    // += weights (rows of the result by K, at weights[row * row_step + k * k_step]) times the K rows of a tile.
    template <int K>
    __device__ __forceinline__ void add(const float* weights, int row_step, int k_step, const float* tile, int d) {
        const int y = threadIdx.x / 8 * ROWS, column = threadIdx.x % 8 * 4;
        for (int k = 0; k < K; k++) {
            float weight[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                weight[i] = weights[(y + i) * row_step + k * k_step];
            }
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                if (32 * j < d) {
                    const float4 x = quad(tile + k * (DP + 4) + column + 32 * j);
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        add_scaled(sum[i][j], weight[i], x);
                    }
                }
            }
        }
    }

    template <class T>
    __device__ __forceinline__ void write(T* to, int token, int rows, int d, const float (&factor)[ROWS]) const {
        const int y = threadIdx.x / 8 * ROWS, column = threadIdx.x % 8 * 4;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (y + i < rows && column + 32 * j + k < d) {
                        to[(long long)(y + i) * token + column + 32 * j + k] = from_float<T>(sum[i][j][k] * factor[i]);
                    }
                }
            }
        }
    }
};

// Shared memory: BR rows of queries, BC of keys and then values, BR x (BC + 1) probabilities.
template <class T, int DP, int BR, int BC>
__device__ __forceinline__ void plain_forward(const T* q, const T* k, const T* v, T* o, float* log_sums,
                                              const int* lengths, const Sizes sizes) {
    using S = Share<BR, BC>;
    static_assert(S::TX == 8, "a row's threads are lanes that follow each other");
    DYNAMIC_SHARED(float, q_tile);
    float* const tile = q_tile + BR * (DP + 4);
    float* const p = tile + BC * (DP + 4);
    const int first = blockIdx.x * BR, rows = min(BR, sizes.queries - first), d = sizes.d;
    const int length = key_length(lengths, sizes), seen = sizes.causal ? min(length, first + rows) : length;
    const long long q_start = query_at(sizes, first);
    const long long k_start = key_at(sizes, 0);
    const int y = threadIdx.x / 8 * S::ROWS, x = threadIdx.x % 8;

    load_plain<T, DP, BR>(q_tile, q + q_start, sizes.q_token, rows, d);
    Part<BR, DP> sum;
    sum.clear();
    float top[S::ROWS], total[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; i++) {
        top[i] = -INFINITY;
        total[i] = 0.0f;
    }
    for (int at = 0; at < seen; at += BC) {
        load_plain<T, DP, BC>(tile, k + k_start + (long long)at * sizes.k_token, sizes.k_token, seen - at, d);
        __syncthreads();
        float s[S::ROWS][S::COLUMNS];
        dots<DP, BR, BC>(s, q_tile, tile, d);
#pragma unroll
        for (int i = 0; i < S::ROWS; i++) {
            float most = top[i];
#pragma unroll
            for (int j = 0; j < S::COLUMNS; j++) {
                const int key = at + x + 8 * j;
                const bool hidden = key >= length || (sizes.causal && key > first + y + i);
                s[i][j] = hidden ? -INFINITY : s[i][j] * sizes.scale;
                most = fmaxf(most, s[i][j]);
            }
#pragma unroll
            for (int with = 4; with > 0; with >>= 1) {
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, with));
            }
            const float base = most == -INFINITY ? 0.0f : most, factor = exp2f(top[i] - base);
            top[i] = most;
            total[i] *= factor;
#pragma unroll
            for (int j = 0; j < S::COLUMNS; j++) {
                const float power = exp2f(s[i][j] - base);
                total[i] += power;
                p[(y + i) * (BC + 1) + x + 8 * j] = power;
            }
#pragma unroll
            for (int j = 0; j < DP / 32 * 4; j++) {
                (&sum.sum[i][0][0])[j] *= factor;
            }
        }
        __syncthreads();
        load_plain<T, DP, BC>(tile, v + k_start + (long long)at * sizes.k_token, sizes.k_token, seen - at, d);
        __syncthreads();
        sum.template add<BC>(p, BC + 1, 1, tile, d);
        __syncthreads();
    }
    log_sums += sum_at(sizes, first);
    float factor[S::ROWS];
#pragma unroll
    for (int i = 0; i < S::ROWS; i++) {
#pragma unroll
        for (int with = 4; with > 0; with >>= 1) {
            total[i] += __shfl_xor_sync(ALL_LANES, total[i], with);
        }
        factor[i] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        if (x == 0 && y + i < rows) {
            log_sums[y + i] = total[i] > 0.0f ? top[i] + log2f(total[i]) : INFINITY;
        }
    }
    sum.write(o + q_start, sizes.q_token, rows, d, factor);
}

// Probabilities and slopes of a block of queries (from `query` on) and keys (from `key` on), to shared memory (R, C +
// 1).
template <int DP, int R, int C>
__device__ __forceinline__ void plain_slopes(const float* q_tile, const float* dy_tile, const float* k_tile,
                                             const float* v_tile, float* p, float* slopes, const float* log_sums,
                                             const float* delta, int query, int key, int length, const Sizes& sizes) {
    using S = Share<R, C>;
    const int y = threadIdx.x / S::TX * S::ROWS, x = threadIdx.x % S::TX;
    float s[S::ROWS][S::COLUMNS], slope[S::ROWS][S::COLUMNS];
    dots<DP, R, C>(s, q_tile, k_tile, sizes.d);
    dots<DP, R, C>(slope, dy_tile, v_tile, sizes.d);
#pragma unroll
    for (int i = 0; i < S::ROWS; i++) {
        const int row = query + y + i;
        const float log_sum = row < sizes.queries ? log_sums[row] : INFINITY;
        const float mean = row < sizes.queries ? delta[row] : 0.0f;
#pragma unroll
        for (int j = 0; j < S::COLUMNS; j++) {
            const int column = key + x + S::TX * j, at = (y + i) * (C + 1) + x + S::TX * j;
            const bool hidden = column >= length || (sizes.causal && column > row);
            const float power = hidden ? 0.0f : exp2f(fmaf(s[i][j], sizes.scale, -log_sum));
            if (p) {
                p[at] = power;
            }
            slopes[at] = power * (slope[i][j] - mean);
        }
    }
}

// Shared memory: BR rows of q and dy, BC of k and v, BR x (BC + 1) slopes.
template <class T, int DP, int BR, int BC>
__device__ __forceinline__ void plain_queries(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,
                                              const float* delta, const int* lengths, T* dq, const Sizes sizes) {
    DYNAMIC_SHARED(float, q_tile);
    float* const dy_tile = q_tile + BR * (DP + 4);
    float* const k_tile = dy_tile + BR * (DP + 4);
    float* const v_tile = k_tile + BC * (DP + 4);
    float* const slopes = v_tile + BC * (DP + 4);
    const int first = blockIdx.x * BR, rows = min(BR, sizes.queries - first), d = sizes.d;
    const int length = key_length(lengths, sizes), seen = sizes.causal ? min(length, first + rows) : length;
    const long long q_start = query_at(sizes, first);
    const long long k_start = key_at(sizes, 0);
    const long long sums = sum_at(sizes, 0);

    load_plain<T, DP, BR>(q_tile, q + q_start, sizes.q_token, rows, d);
    load_plain<T, DP, BR>(dy_tile, dy + q_start, sizes.q_token, rows, d);
    Part<BR, DP> sum;
    sum.clear();
    for (int at = 0; at < seen; at += BC) {
        const long long start = k_start + (long long)at * sizes.k_token;
        load_plain<T, DP, BC>(k_tile, k + start, sizes.k_token, seen - at, d);
        load_plain<T, DP, BC>(v_tile, v + start, sizes.k_token, seen - at, d);
        __syncthreads();
        plain_slopes<DP, BR, BC>(q_tile, dy_tile, k_tile, v_tile, nullptr, slopes, log_sums + sums, delta + sums, first,
                                 at, length, sizes);
        __syncthreads();
        sum.template add<BC>(slopes, BC + 1, 1, k_tile, d);
        __syncthreads();
    }
    float factor[BR / 16];
#pragma unroll
    for (int i = 0; i < BR / 16; i++) {
        factor[i] = 1.0f / sqrtf(float(d));
    }
    sum.write(dq + q_start, sizes.q_token, rows, d, factor);
}

// Shared memory: BK rows of k and v, BQ of q and dy, twice BQ x (BK + 1) probabilities and slopes.
template <class T, int DP, int BK, int BQ>
__device__ __forceinline__ void plain_keys(const T* q, const T* k, const T* v, const T* dy, const float* log_sums,
                                           const float* delta, const int* lengths, T* dk, T* dv, const Sizes sizes) {
    DYNAMIC_SHARED(float, k_tile);
    float* const v_tile = k_tile + BK * (DP + 4);
    float* const q_tile = v_tile + BK * (DP + 4);
    float* const dy_tile = q_tile + BQ * (DP + 4);
    float* const p = dy_tile + BQ * (DP + 4);
    float* const slopes = p + BQ * (BK + 1);
    const int first = blockIdx.x * BK, rows = min(BK, sizes.keys - first), d = sizes.d;
    const int length = key_length(lengths, sizes);
    const long long q_start = query_at(sizes, 0);
    const long long k_start = key_at(sizes, first);
    const long long sums = sum_at(sizes, 0);
    const int from = first >= length ? sizes.queries : sizes.causal ? first / BQ * BQ : 0;

    load_plain<T, DP, BK>(k_tile, k + k_start, sizes.k_token, rows, d);
    load_plain<T, DP, BK>(v_tile, v + k_start, sizes.k_token, rows, d);
    Part<BK, DP> key_sum, value_sum;
    key_sum.clear();
    value_sum.clear();
    for (int at = from; at < sizes.queries; at += BQ) {
        const long long start = q_start + (long long)at * sizes.q_token;
        load_plain<T, DP, BQ>(q_tile, q + start, sizes.q_token, sizes.queries - at, d);
        load_plain<T, DP, BQ>(dy_tile, dy + start, sizes.q_token, sizes.queries - at, d);
        __syncthreads();
        plain_slopes<DP, BQ, BK>(q_tile, dy_tile, k_tile, v_tile, p, slopes, log_sums + sums, delta + sums, at, first,
                                 length, sizes);
        __syncthreads();
        value_sum.template add<BQ>(p, 1, BK + 1, dy_tile, d);
        key_sum.template add<BQ>(slopes, 1, BK + 1, q_tile, d);
        __syncthreads();
    }
    float factor[BK / 16], one[BK / 16];
#pragma unroll
    for (int i = 0; i < BK / 16; i++) {
        factor[i] = 1.0f / sqrtf(float(d));
        one[i] = 1.0f;
    }
    key_sum.write(dk + k_start, sizes.k_token, rows, d, factor);
    value_sum.write(dv + k_start, sizes.k_token, rows, d, one);
}
