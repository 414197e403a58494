// What is added to whole planes and columns, and the sums over them that are its backward; the embedding. No kernels.
//
// Sums are taken in a fixed order: within a thread in f32, over the threads of a block in a tree, over blocks in f64.
#pragma once
#include "glue_pointwise.cuh"

// y (planes, pixels) = x + t (planes), one number a plane, or t (channels), the same for every batch row. In place if y is x.
template <class T, int N>
__device__ __forceinline__ void add_planes(const T* x, const T* t, T* y, unsigned count, unsigned pixels, unsigned channels) {
    const unsigned at = place_of<N>();
    if (at >= count) return;
    const float value = to_float(t[at / pixels % channels]);
    Elements<T, N> run = load<T, N>(x + at);
#pragma unroll
    for (int i = 0; i < N; i++) run.at[i] = from_float<T>(to_float(run.at[i]) + value);
    store<T, N>(y + at, run);
}

// The sum over each plane, by a block: rounded to D, or as f32 for the sum over the batch that follows.
template <class T, class D, int N>
__device__ __forceinline__ void sum_planes(const T* x, D* sums, unsigned pixels) {
    __shared__ float shared[32];
    float sum[1] = {0.0f};
    double total[1];
    x += size_t(blockIdx.x) * pixels;
    for (unsigned at = threadIdx.x * N; at < pixels; at += blockDim.x * N) {
        const Elements<T, N> run = load<T, N>(x + at);
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) part += to_float(run.at[i]);
        sum[0] += part;
    }
    block_sums<1>(sum, total, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = from_float<D>(float(total[0]));
}

// to[column] += the sum over `rows` of x (rows, columns), in f64.
__device__ __forceinline__ void add_rows(const float* x, float* to, unsigned rows, unsigned columns) {
    const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    double sum = 0.0;
    for (unsigned row = 0; row < rows; row++) sum += double(x[size_t(row) * columns + column]);
    to[column] += float(sum);
}

// y (rows, width) = x + bias (width), plus residual (rows, width) if there is one, rounded after each sum. Without x, the bias
// in every row, for a matrix product to add to. In place if y is x or the residual. blockIdx.y counts rows.
template <class T>
__device__ __forceinline__ void add_bias(const T* x, const T* bias, const T* residual, T* y, unsigned rows, unsigned width,
                                         int aligned) {
    constexpr int N = WIDTH<T>;
    const size_t at = place<N>();
    if (at >= width) return;
    const Elements<T, N> b = some<T, N>(bias, at, width, aligned);
    for (unsigned row = blockIdx.y; row < rows; row += gridDim.y) {
        const size_t start = size_t(row) * width;
        Elements<T, N> run = b;
        if (x) {
            run = some<T, N>(x + start, at, width, aligned);
#pragma unroll
            for (int i = 0; i < N; i++) run.at[i] = from_float<T>(to_float(run.at[i]) + to_float(b.at[i]));
        }
        if (residual) {
            const Elements<T, N> other = some<T, N>(residual + start, at, width, aligned);
#pragma unroll
            for (int i = 0; i < N; i++) run.at[i] = from_float<T>(to_float(run.at[i]) + to_float(other.at[i]));
        }
        put<T, N>(y + start, at, width, aligned, run);
    }
}

constexpr unsigned COLUMNS = 32, LADDERS = 16;

// parts[part][column]: the columns' sums over the blockIdx.y-th of gridDim.y equal runs of rows. A block of COLUMNS x LADDERS
// threads; a ladder takes every LADDERS-th row.
template <class T>
__device__ __forceinline__ void sum_columns(const T* x, float* parts, unsigned rows, unsigned width) {
    __shared__ float sums[LADDERS][COLUMNS];
    const unsigned step = threadIdx.x / COLUMNS, column = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    const unsigned from = unsigned(size_t(rows) * blockIdx.y / gridDim.y);
    const unsigned to = unsigned(size_t(rows) * (blockIdx.y + 1) / gridDim.y);
    float sum = 0.0f;
    if (column < width) {
        for (unsigned row = from + step; row < to; row += LADDERS) sum += to_float(x[size_t(row) * width + column]);
    }
    sums[step][threadIdx.x % COLUMNS] = sum;
    __syncthreads();
    if (step == 0 && column < width) {
        float total = 0.0f;
        for (unsigned i = 0; i < LADDERS; i++) total += sums[i][threadIdx.x];
        parts[size_t(blockIdx.y) * width + column] = total;
    }
}

// y (tokens, width) = table[id] + positions[token % length] if there are any. An id that is none leaves 1 in *wrong and zeros.
template <class T>
__device__ __forceinline__ void look_up(const unsigned* ids, const T* table, const T* positions, T* y, unsigned rows,
                                        unsigned length, unsigned width, int aligned, unsigned* wrong) {
    constexpr int N = WIDTH<T>;
    const unsigned token = blockIdx.x, id = ids[token];
    for (unsigned at = threadIdx.x * N; at < width; at += blockDim.x * N) {
        Elements<T, N> run;
        if (id < rows) {
            run = some<T, N>(table + size_t(id) * width, at, width, aligned);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) run.at[i] = from_float<T>(0.0f);
            if (at == 0) atomicOr(wrong, 1u);
        }
        if (positions) {
            const Elements<T, N> place = some<T, N>(positions + size_t(token % length) * width, at, width, aligned);
#pragma unroll
            for (int i = 0; i < N; i++) run.at[i] = from_float<T>(to_float(run.at[i]) + to_float(place.at[i]));
        }
        put<T, N>(y + size_t(token) * width, at, width, aligned, run);
    }
}

// grad (rows, width) += dy of the tokens with each id. The block of an id's first token adds all of them, in order, as the CPU
// does; the other blocks of the id have nothing to do. A batch of prompts is some hundreds of tokens.
template <class T>
__device__ __forceinline__ void look_up_backward(const unsigned* ids, const T* dy, float* grad, unsigned tokens, unsigned rows,
                                                 unsigned width) {
    const unsigned token = blockIdx.x, id = ids[token];
    bool earlier = id >= rows;
    for (unsigned i = threadIdx.x; i < token; i += blockDim.x) earlier |= ids[i] == id;
    if (__syncthreads_or(earlier)) return;
    for (unsigned at = threadIdx.x; at < width; at += blockDim.x) {
        float sum = grad[size_t(id) * width + at];
        for (unsigned i = token; i < tokens; i++) {
            if (ids[i] == id) sum += to_float(dy[size_t(i) * width + at]);
        }
        grad[size_t(id) * width + at] = sum;
    }
}

// grad (length, width) += dy (batch, length, width) over the batch, in order.
template <class T>
__device__ __forceinline__ void positions_backward(const T* dy, float* grad, unsigned batch, size_t row) {
    const size_t at = place<1>();
    if (at >= row) return;
    float sum = grad[at];
    for (unsigned b = 0; b < batch; b++) sum += to_float(dy[b * row + at]);
    grad[at] = sum;
}
