// Layer normalisation of rows of any width and alignment: a block a row. See norms_layer.cuh for the usual ones.
#pragma once
#include "norms_layer.cuh"

template <class T, int N>
__device__ __forceinline__ void row_normalise(Elements<T, N> (&held)[HELD], const T* gamma, const T* beta, T* y, unsigned first,
                                              unsigned packs, float2 moments) {
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const unsigned at = first + k * blockDim.x + threadIdx.x;
        if (at < packs) {
            const Elements<T, N> g = load<T, N>(gamma + at * N), b = load<T, N>(beta + at * N);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float h = (to_float(held[k].at[i]) - moments.x) * moments.y;
                held[k].at[i] = from_float<T>(fmaf(h, to_float(g.at[i]), to_float(b.at[i])));
            }
            store<T, N>(y + at * N, held[k]);
        }
    }
}

template <class T, int N>
__device__ __forceinline__ void row_forward(const T* x, const T* gamma, const T* beta, T* y, float2* moments, unsigned width,
                                            float eps) {
    __shared__ float shared[33];
    __shared__ float2 known;
    const unsigned packs = width / N;
    x += size_t(blockIdx.x) * width;
    y += size_t(blockIdx.x) * width;
    Elements<T, N> held[HELD];
    unsigned first;
    const Moments mine = measure_share<T, N, HELD>(held, x, packs, first);
    double mean = 0.0, squares = 0.0;
    join_block(mine, double(width), mean, squares, shared);
    if (threadIdx.x == 0) {
        known = make_float2(float(mean), scale_of(squares, double(width), eps));
        moments[blockIdx.x] = known;
    }
    __syncthreads();
    while (true) {
        row_normalise<T, N>(held, gamma, beta, y, first, packs, known);
        if (first == 0) break;
        first -= HELD * blockDim.x;
        hold<T, N, HELD>(held, x, first, packs);
    }
}

// dx alone.
template <class T, int N>
__device__ __forceinline__ void row_backward(const T* x, const T* dy, const T* gamma, const float2* moments, T* dx,
                                             unsigned width) {
    __shared__ float shared[64];
    __shared__ float2 means;
    const size_t start = size_t(blockIdx.x) * width;
    const float2 known = moments[blockIdx.x];
    float sums[2] = {0.0f, 0.0f};
    double totals[2];
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        const Elements<T, N> a = load<T, N>(x + start + at), d = load<T, N>(dy + start + at);
        const Elements<T, N> g = load<T, N>(gamma + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float gd = to_float(g.at[i]) * to_float(d.at[i]);
            sums[0] += gd;
            sums[1] = fmaf(gd, (to_float(a.at[i]) - known.x) * known.y, sums[1]);
        }
    }
    block_sums<2>(sums, totals, shared);
    if (threadIdx.x == 0) means = make_float2(float(totals[0] / double(width)), float(totals[1] / double(width)));
    __syncthreads();
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        const Elements<T, N> a = load<T, N>(x + start + at), g = load<T, N>(gamma + at);
        Elements<T, N> d = load<T, N>(dy + start + at);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float h = (to_float(a.at[i]) - known.x) * known.y;
            d.at[i] = from_float<T>(known.y * fmaf(h, -means.y, fmaf(to_float(d.at[i]), to_float(g.at[i]), -means.x)));
        }
        store<T, N>(dx + start + at, d);
    }
}

// The columns' sums over the blockIdx.y-th of gridDim.y equal runs of rows, as the parts that layer_weights adds. A block of
// COLUMNS x LADDERS threads.
template <class T>
__device__ __forceinline__ void row_columns(const T* x, const T* dy, const float2* moments, float* parts, unsigned rows,
                                            unsigned width) {
    __shared__ float sums[2][LADDERS][COLUMNS];
    const unsigned place = threadIdx.x % COLUMNS, ladder = threadIdx.x / COLUMNS, column = blockIdx.x * COLUMNS + place;
    const unsigned from = unsigned(size_t(rows) * blockIdx.y / gridDim.y);
    const unsigned to = unsigned(size_t(rows) * (blockIdx.y + 1) / gridDim.y);
    float dy_sum = 0.0f, dyh_sum = 0.0f;
    if (column < width) {
        for (unsigned row = from + ladder; row < to; row += LADDERS) {
            const size_t at = size_t(row) * width + column;
            const float2 known = moments[row];
            const float d = to_float(dy[at]);
            dy_sum += d;
            dyh_sum = fmaf(d, (to_float(x[at]) - known.x) * known.y, dyh_sum);
        }
    }
    sums[0][ladder][place] = dy_sum;
    sums[1][ladder][place] = dyh_sum;
    __syncthreads();
    if (ladder < 2 && column < width) {
        float total = 0.0f;
        for (int i = 0; i < LADDERS; i++) total += sums[ladder][i][place];
        parts[(size_t(blockIdx.y) * 2 + ladder) * width + column] = total;
    }
}
