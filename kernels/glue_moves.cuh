// Numbers that change their places only: concatenation, transposes, nearest-neighbour resampling and its backward. No kernels.
#pragma once
#include "glue_pointwise.cuh"

// y (rows, a + b) = a beside b, in units of U: 16 bytes if everything is a multiple of it, else an element.
template <class U>
__device__ __forceinline__ void join_rows(const U* a, const U* b, U* y, unsigned rows, unsigned a_width, unsigned b_width) {
    const unsigned at = place_of<1>(), width = a_width + b_width;
    if (at >= rows * width) return;
    const unsigned row = at / width, column = at - row * width;
    y[at] = column < a_width ? a[row * a_width + column] : b[row * b_width + column - a_width];
}

// The way back: x (rows, a + b) to a and b.
template <class U>
__device__ __forceinline__ void split_rows(const U* x, U* a, U* b, unsigned rows, unsigned a_width, unsigned b_width) {
    const unsigned at = place_of<1>(), width = a_width + b_width;
    if (at >= rows * width) return;
    const unsigned row = at / width, column = at - row * width;
    if (column < a_width) a[row * a_width + column] = x[at];
    else b[row * b_width + column - a_width] = x[at];
}

// (batch, rows, columns) -> (batch, columns, rows), a square of shared memory at a time, so that both reading and writing go
// along lines. Squares of TILE x TILE elements, of which a thread moves `per` neighbours at once, 4 bytes in all; a block of 32
// x 8 threads. blockIdx: square of columns, square of rows, batch.
template <class U, int PER>
__device__ __forceinline__ void transpose(const U* x, U* y, unsigned rows, unsigned columns) {
    constexpr unsigned TILE = 32 * PER;
    // A row is one word longer than needed, which spreads a column over the banks.
    alignas(8) __shared__ U tile[TILE][TILE + 4 / sizeof(U)];
    constexpr unsigned WARPS = 8, STEPS = TILE / WARPS;
    const unsigned at = threadIdx.x % 32 * PER, warp = threadIdx.x / 32;
    const unsigned row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    x += size_t(blockIdx.z) * rows * columns;
    y += size_t(blockIdx.z) * rows * columns;
    // All reads are on their way before the first one is waited for.
    Elements<U, PER> held[STEPS];
#pragma unroll
    for (unsigned s = 0; s < STEPS; s++) {
        const unsigned row = row0 + warp + s * WARPS;
        if (row < rows && column0 + at < columns) held[s] = load<U, PER>(x + size_t(row) * columns + column0 + at);
    }
#pragma unroll
    for (unsigned s = 0; s < STEPS; s++) {
        if (row0 + warp + s * WARPS < rows && column0 + at < columns) store<U, PER>(&tile[warp + s * WARPS][at], held[s]);
    }
    __syncthreads();
#pragma unroll
    for (unsigned s = 0; s < STEPS; s++) {
        const unsigned c = warp + s * WARPS;
        if (column0 + c < columns && row0 + at < rows) {
            Elements<U, PER> run;
#pragma unroll
            for (int i = 0; i < PER; i++) run.at[i] = tile[at + i][c];
            store<U, PER>(y + size_t(column0 + c) * rows + row0 + at, run);
        }
    }
}

// The source of a position among `from` (src/ops/upsample.rs): torch's, which rounds the scale to f32 first.
__device__ __forceinline__ unsigned source(unsigned position, float scale, unsigned from) {
    return min(unsigned(__fmul_rn(float(position), scale)), from - 1);
}

// (planes, h, w) -> (planes, height, width), a thread an element.
template <class U>
__device__ __forceinline__ void upsample(const U* x, U* y, unsigned count, unsigned h, unsigned w, unsigned height,
                                         unsigned width, float rows_scale, float columns_scale) {
    const unsigned at = place_of<1>();
    if (at >= count) return;
    const unsigned line = at / width, plane = line / height, row = line - plane * height, column = at - line * width;
    y[at] = x[(plane * h + source(row, rows_scale, h)) * w + source(column, columns_scale, w)];
}

// The same to exactly twice the size, a thread N source pixels of a row: two stores of 16 bytes in each of two rows.
template <class T>
__device__ __forceinline__ void upsample_double(const T* x, T* y, unsigned count, unsigned w) {
    constexpr int N = WIDTH<T>;
    const unsigned at = place_of<N>();
    if (at >= count) return;
    const Elements<T, N> run = load<T, N>(x + at);
    const unsigned row = at / w;
    T* to = y + size_t(row) * 4 * w + (at - row * w) * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Elements<T, N> pairs;
#pragma unroll
        for (int i = 0; i < N; i++) pairs.at[i] = run.at[half * (N / 2) + i / 2];
        store<T, N>(to + half * N, pairs);
        store<T, N>(to + 2 * w + half * N, pairs);
    }
}

// The first position of `to` whose source is `wanted` or comes after it.
__device__ __forceinline__ unsigned first_from(unsigned wanted, float scale, unsigned from, unsigned to) {
    unsigned at = unsigned(fminf(float(wanted) / scale, float(to)));
    while (at > 0 && source(at - 1, scale, from) >= wanted) at--;
    while (at < to && source(at, scale, from) < wanted) at++;
    return at;
}

// dx (planes, h, w): the sum over the pixels that each pixel was the source of, a thread a pixel, row by row.
template <class T>
__device__ __forceinline__ void upsample_backward(const T* dy, T* dx, unsigned count, unsigned h, unsigned w, unsigned height,
                                                  unsigned width, float rows_scale, float columns_scale) {
    const unsigned at = place_of<1>();
    if (at >= count) return;
    const unsigned line = at / w, plane = line / h, row = line - plane * h, column = at - line * w;
    const unsigned top = first_from(row, rows_scale, h, height), bottom = first_from(row + 1, rows_scale, h, height);
    const unsigned left = first_from(column, columns_scale, w, width), right = first_from(column + 1, columns_scale, w, width);
    float sum = 0.0f;
    for (unsigned r = top; r < bottom; r++) {
        for (unsigned c = left; c < right; c++) sum += to_float(dy[(size_t(plane) * height + r) * width + c]);
    }
    dx[at] = from_float<T>(sum);
}

// The same from exactly twice the size, a thread N pixels of a row.
template <class T>
__device__ __forceinline__ void upsample_double_backward(const T* dy, T* dx, unsigned count, unsigned w) {
    constexpr int N = WIDTH<T>;
    const unsigned at = place_of<N>();
    if (at >= count) return;
    const unsigned row = at / w;
    const T* from = dy + size_t(row) * 4 * w + (at - row * w) * 2;
    Elements<T, N> sums;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Elements<T, N> above = load<T, N>(from + half * N), below = load<T, N>(from + 2 * w + half * N);
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float upper = to_float(above.at[2 * i]) + to_float(above.at[2 * i + 1]);
            const float lower = to_float(below.at[2 * i]) + to_float(below.at[2 * i + 1]);
            sums.at[half * (N / 2) + i] = from_float<T>(upper + lower);
        }
    }
    store<T, N>(dx + at, sums);
}
