// Layer normalisation of rows (rows, width): a warp a row, which is read once and kept in registers, forward and backward. So
// the forward moves a copy's bytes, and the backward three times the tensor, which is the least. Rows that are wider than
// 1,280 numbers or not aligned are in norms_rows.cuh.
//
// The backward's blocks stay: each takes an equal run of rows, keeps the columns' sums of dy and dy h in registers and leaves
// them as one part; a small second launch adds the parts in their order. The grid is as many blocks as run at once, so that no
// block waits for another to end.
#pragma once
#include "norms_moments.cuh"

constexpr int ROWS_AT_ONCE = 4;
constexpr int LAYER_THREADS = 32 * ROWS_AT_ONCE;

// Packs of a lane: for rows of up to 384 f32 or 512 halves, and of up to 1,280 of either.
template <class T>
constexpr int NARROW = sizeof(T) == 4 ? 3 : 2;
template <class T>
constexpr int MEDIUM = sizeof(T) == 4 ? 10 : 5;

// Blocks of the backward on one multiprocessor, as registers allow.
template <class T, int PACKS>
constexpr int AT_ONCE = PACKS == NARROW<T> ? 5 : sizeof(T) == 4 ? 2 : 3;

template <class T, int PACKS>
__device__ __forceinline__ void load_row(Elements<T, WIDTH<T>> (&row)[PACKS], const T* from, unsigned packs) {
    const unsigned lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (lane + 32 * k < packs) row[k] = load<T, WIDTH<T>>(from + (lane + 32 * k) * WIDTH<T>);
    }
}

template <class T, int PACKS>
__device__ __forceinline__ void layer_forward(const T* x, const T* gamma, const T* beta, T* y, float2* moments, unsigned rows,
                                              unsigned width, float eps) {
    constexpr int N = WIDTH<T>;
    const unsigned row = blockIdx.x * ROWS_AT_ONCE + threadIdx.x / 32, lane = threadIdx.x & 31, packs = width / N;
    if (row >= rows) return;
    Elements<T, N> held[PACKS];
    load_row<T, PACKS>(held, x + size_t(row) * width, packs);
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (lane + 32 * k < packs) {
#pragma unroll
            for (int i = 0; i < N; i++) sum += to_float(held[k].at[i]);
        }
    }
    const float mean = warp_sum(sum) / float(width);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (lane + 32 * k < packs) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float d = to_float(held[k].at[i]) - mean;
                squares = fmaf(d, d, squares);
            }
        }
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / float(width) + eps);
    if (lane == 0) moments[row] = make_float2(mean, scale);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const unsigned at = (lane + 32 * k) * N;
        if (at < width) {
            const Elements<T, N> g = load<T, N>(gamma + at), b = load<T, N>(beta + at);
#pragma unroll
            for (int i = 0; i < N; i++)
                held[k].at[i] =
                    from_float<T>(fmaf((to_float(held[k].at[i]) - mean) * scale, to_float(g.at[i]), to_float(b.at[i])));
            store<T, N>(y + size_t(row) * width + at, held[k]);
        }
    }
}

// dx of one row; adds what the row gives to the columns' sums of dy and of dy h.
template <class T, int PACKS>
__device__ __forceinline__ void layer_row_backward(const T* x, const T* dy, const T* gamma, T* dx, float2 moments,
                                                   unsigned width, float (&dy_sums)[PACKS][WIDTH<T>],
                                                   float (&dyh_sums)[PACKS][WIDTH<T>]) {
    constexpr int N = WIDTH<T>;
    const unsigned lane = threadIdx.x & 31, packs = width / N;
    Elements<T, N> x_row[PACKS], dy_row[PACKS];
    load_row<T, PACKS>(x_row, x, packs);
    load_row<T, PACKS>(dy_row, dy, packs);
    float means[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (lane + 32 * k < packs) {
            const Elements<T, N> g = load<T, N>(gamma + (lane + 32 * k) * N);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float h = (to_float(x_row[k].at[i]) - moments.x) * moments.y, d = to_float(dy_row[k].at[i]);
                const float gd = to_float(g.at[i]) * d;
                means[0] += gd;
                means[1] = fmaf(gd, h, means[1]);
                dy_sums[k][i] += d;
                dyh_sums[k][i] = fmaf(d, h, dyh_sums[k][i]);
            }
        }
    }
    const float dy_mean = warp_sum(means[0]) / float(width), dyh_mean = warp_sum(means[1]) / float(width);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        keep_packed(x_row[k]);
        keep_packed(dy_row[k]);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (lane + 32 * k < packs) {
            const unsigned at = (lane + 32 * k) * N;
            const Elements<T, N> g = load<T, N>(gamma + at);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float h = (to_float(x_row[k].at[i]) - moments.x) * moments.y;
                const float d = fmaf(to_float(dy_row[k].at[i]), to_float(g.at[i]), -dy_mean);
                dy_row[k].at[i] = from_float<T>(moments.y * fmaf(h, -dyh_mean, d));
            }
            store<T, N>(dx + at, dy_row[k]);
        }
    }
}

// Block i of the grid takes the i-th of equal runs of rows; parts[i] = (2, width): its sums of dy and of dy h. Dynamic shared
// memory: 2 * width floats.
template <class T, int PACKS>
__device__ __forceinline__ void layer_backward(const T* x, const T* dy, const T* gamma, const float2* moments, T* dx,
                                               float* parts, unsigned rows, unsigned width, float* shared) {
    constexpr int N = WIDTH<T>;
    const unsigned lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const unsigned from = unsigned(size_t(rows) * blockIdx.x / gridDim.x);
    const unsigned to = unsigned(size_t(rows) * (blockIdx.x + 1) / gridDim.x);
    float dy_sums[PACKS][N], dyh_sums[PACKS][N];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
#pragma unroll
        for (int i = 0; i < N; i++) dy_sums[k][i] = dyh_sums[k][i] = 0.0f;
    }
    for (unsigned row = from + warp; row < to; row += ROWS_AT_ONCE) {
        const size_t start = size_t(row) * width;
        layer_row_backward<T, PACKS>(x + start, dy + start, gamma, dx + start, moments[row], width, dy_sums, dyh_sums);
    }
    // One warp after the other, so that the order is fixed.
    for (unsigned turn = 0; turn < ROWS_AT_ONCE; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int k = 0; k < PACKS; k++) {
                const unsigned at = (lane + 32 * k) * N;
                if (at < width) {
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        shared[at + i] = dy_sums[k][i] + (turn == 0 ? 0.0f : shared[at + i]);
                        shared[width + at + i] = dyh_sums[k][i] + (turn == 0 ? 0.0f : shared[width + at + i]);
                    }
                }
            }
        }
        __syncthreads();
    }
    for (unsigned i = threadIdx.x; i < 2 * width; i += blockDim.x) parts[size_t(blockIdx.x) * 2 * width + i] = shared[i];
}

constexpr int COLUMNS = 32;
constexpr int LADDERS = 16;

// Adds column sums of the parts: blockIdx.y 0 to dbeta, 1 to dgamma; a block of COLUMNS x LADDERS threads for COLUMNS columns.
// Each ladder adds every LADDERS-th part in f32, the ladders are added in f64.
__device__ __forceinline__ void layer_weights(const float* parts, float* dgamma, float* dbeta, unsigned count,
                                              unsigned width) {
    __shared__ float sums[LADDERS][COLUMNS];
    const unsigned column = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, ladder = threadIdx.x / COLUMNS;
    float* grad = blockIdx.y == 0 ? dbeta : dgamma;
    float sum = 0.0f;
    if (column < width) {
        for (unsigned i = ladder; i < count; i += LADDERS) sum += parts[(size_t(i) * 2 + blockIdx.y) * width + column];
    }
    sums[ladder][threadIdx.x % COLUMNS] = sum;
    __syncthreads();
    if (ladder == 0 && column < width && grad) {
        double total = 0.0;
        for (int i = 0; i < LADDERS; i++) total += double(sums[i][threadIdx.x]);
        grad[column] += float(total);
    }
}
