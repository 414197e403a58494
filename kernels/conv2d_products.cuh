// The products themselves: on tensor cores for halves, in exact f32 otherwise, or in tf32 if that is allowed. The grid is (tiles of columns, tiles of
// rows, parts of the depth).
#pragma once

#include "conv2d_taps.cuh"

// A block of BM x BN by WM x WN warps. Shared memory: twice (BM + BN) x DEPTH halves, then what the right operand
// needs.
template <class T, int BM, int BN, int WM, int WN, class Right>
__device__ __forceinline__ void product(const Rows<T>& a, const T* images, const Shape& shape, const Out<T>& out,
                                        int part) {
    constexpr int THREADS = 32 * WM * WN, M = BM / WM / 16, N = BN / WN / 16, STAGE = (BM + BN) * DEPTH;
    DYNAMIC_SHARED(T, tiles);
    const int m = blockIdx.y * BM, n = blockIdx.x * BN, warp = threadIdx.x / 32;
    const int own_m = warp / WN * 16 * M, own_n = warp % WN * 16 * N;
    const int from = blockIdx.z * part, until = min(from + part, a.depth);
    Right right;
    right.start(images, shape, reinterpret_cast<int*>(tiles + 2 * STAGE), n, from);
    a.template load<BM, DEPTH, THREADS>(tiles, m, from, until);
    copy_commit();
    __syncthreads();
    right.gather();
    right.put(tiles + BM * DEPTH);
    copy_wait<0>();
    __syncthreads();
    float sum[M][2 * N][4] = {};
    for (int k = from, stage = 0; k < until; k += DEPTH, stage ^= 1) {
        const T* tile = tiles + stage * STAGE;
        T* const next = tiles + (stage ^ 1) * STAGE;
        const bool more = k + DEPTH < until;
        if (more) {
            a.template load<BM, DEPTH, THREADS>(next, m, k + DEPTH, until);
            copy_commit();
            right.gather();
        }
#pragma unroll
        for (int c = 0; c < DEPTH / 16; c++) {
            unsigned rows[M][4];
#pragma unroll
            for (int i = 0; i < M; i++) {
                left<DEPTH>(rows[i], tile, own_m + 16 * i, c);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                unsigned columns[4];
                right_of_rows<DEPTH>(columns, tile + BM * DEPTH, own_n + 16 * j, c);
#pragma unroll
                for (int i = 0; i < M; i++) {
                    mma_two<T>(sum[i][2 * j], sum[i][2 * j + 1], rows[i], columns);
                }
            }
        }
        if (more) {
            right.put(next + BM * DEPTH);
            copy_wait<0>();
        }
        __syncthreads();
    }
    put_sums<T, M, N>(sum, out, m + own_m, n + own_n);
}

// The same in f32: blocks of 64 x 64 by 256 threads, each with 4 x 4. In tf32 (from 8.0): 2 x 4 warps, each with 32 x 16.
constexpr int EXACT = 64, EXACT_DEPTH = 16, EXACT_THREADS = 256;

// Columns of either kind, an element at a time.
struct ExactPixels {
    const int* table;
    const float* image;
    int plane, channels, taps, column;
    Step steps[4];

    __device__ __forceinline__ void start(const float* from, const Shape& s, int* to, int first, int k) {
        Pixels<float, EXACT, EXACT_DEPTH * 8, EXACT_THREADS> pixels;
        pixels.start(from, s, to, first, k);
        table = pixels.table;
        image = pixels.image;
        plane = pixels.plane;
        channels = pixels.channels;
        taps = pixels.taps;
        column = pixels.column;
        for (int i = 0; i < 4; i++) {
            steps[i].start(k + threadIdx.x / EXACT + 4 * i, taps);
        }
    }
    __device__ __forceinline__ void gather(float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int pixel = table[steps[i].tap * EXACT + column];
            x[i] = pixel >= 0 && steps[i].channel < channels ? image[(long long)steps[i].channel * plane + pixel]
                                                             : 0.0f;
            steps[i].on(EXACT_DEPTH / taps, EXACT_DEPTH % taps, taps);
        }
    }
    // Rows of a tile are depths.
    template <int WIDTH> __device__ __forceinline__ void put(float (*tile)[WIDTH], const float (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tile[threadIdx.x / EXACT + 4 * i][column] = x[i];
        }
    }
};

struct ExactTaps {
    const float* from;
    Shape s;
    int depth;
    int channel[4], ky[4], kx[4];

    __device__ __forceinline__ void start(const float* images, const Shape& shape, int*, int first, int k) {
        from = images;
        s = shape;
        depth = k + threadIdx.x % EXACT_DEPTH;
        for (int i = 0; i < 4; i++) {
            const int column = first + threadIdx.x / EXACT_DEPTH + 16 * i, taps = s.kh * s.kw;
            channel[i] = column / taps;
            ky[i] = column % taps / s.kw - s.top;
            kx[i] = column % taps % s.kw - s.left;
        }
    }
    __device__ __forceinline__ void gather(float (&to)[4]) {
        Pixel at;
        at.start(depth, s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int y = at.y * s.stride + ky[i], x = at.x * s.stride + kx[i];
            const bool there = at.image < s.images && channel[i] < s.channels && y >= 0 && y < s.height && x >= 0 &&
                               x < s.width;
            to[i] = there ? from[(((long long)at.image * s.channels + channel[i]) * s.height + y) * s.width + x] : 0.0f;
        }
        depth += EXACT_DEPTH;
    }
    template <int WIDTH> __device__ __forceinline__ void put(float (*tile)[WIDTH], const float (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            tile[threadIdx.x % EXACT_DEPTH][threadIdx.x / EXACT_DEPTH + 16 * i] = x[i];
        }
    }
};

// sum += rows turned times columns: each thread its 4 x 4 from (y, x) on.
template <int WIDTH>
__device__ __forceinline__ void multiply_exact(float (&sum)[4][4], const float (*rows)[WIDTH],
                                               const float (*columns)[WIDTH], int y, int x) {
#pragma unroll
    for (int c = 0; c < EXACT_DEPTH; c++) {
        const Elements<float, 4> a4 = load<float, 4>(&rows[c][y]), b4 = load<float, 4>(&columns[c][x]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sum[i][j] = fmaf(a4.at[i], b4.at[j], sum[i][j]);
            }
        }
    }
}

// The same on tensor cores: a warp its 32 x 16 from (y, x) on; sum[2 i + j] is the fragment of 16 x 8 that lies (i, j).
template <int WIDTH>
__device__ __forceinline__ void multiply_tf32(float (&sum)[4][4], const float (*rows)[WIDTH],
                                              const float (*columns)[WIDTH], int y, int x) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < EXACT_DEPTH; c += 8) {
        unsigned a[2][4], b[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* row = rows[c + t + i / 2 * 4];
            a[0][i] = tf32(row[y + g + i % 2 * 8]);
            a[1][i] = tf32(row[y + 16 + g + i % 2 * 8]);
            b[i / 2][i % 2] = tf32(columns[c + t + i % 2 * 4][x + i / 2 * 8 + g]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            mma_tf32(sum[i], a[i / 2], b[i % 2]);
        }
    }
}

template <class Right, bool TF32>
__device__ __forceinline__ void exact_product(const Rows<float>& a, const float* images, const Shape& shape,
                                              const Out<float>& out, int part) {
    // Rows lie apart so that what is read at once is on different banks: four rows on, or four numbers on.
    constexpr int WIDTH = EXACT + (TF32 ? 8 : 4);
    __shared__ __align__(16) float rows[EXACT_DEPTH][WIDTH];
    __shared__ __align__(16) float columns[EXACT_DEPTH][WIDTH];
    DYNAMIC_SHARED(int, table);
    const int m = blockIdx.y * EXACT, n = blockIdx.x * EXACT, depth = threadIdx.x % EXACT_DEPTH;
    const int from = blockIdx.z * part, until = min(from + part, a.depth);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int y = TF32 ? warp / 4 * 32 : threadIdx.x / 16 * 4, x = TF32 ? warp % 4 * 16 : threadIdx.x % 16 * 4;
    Right right;
    right.start(images, shape, table, n, from);
    __syncthreads();
    float sum[4][4] = {}, left_held[4], right_held[4];
    auto read = [&](int k) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = m + threadIdx.x / EXACT_DEPTH + 16 * i;
            left_held[i] = row < a.rows && k + depth < until ? *a.at(row, k + depth) : 0.0f;
        }
        right.gather(right_held);
    };
    read(from);
    for (int k = from; k < until; k += EXACT_DEPTH) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            rows[depth][threadIdx.x / EXACT_DEPTH + 16 * i] = left_held[i];
        }
        right.put(columns, right_held);
        __syncthreads();
        if (k + EXACT_DEPTH < until) {
            read(k + EXACT_DEPTH);
        }
        if constexpr (TF32) {
            multiply_tf32(sum, rows, columns, y, x);
        } else {
            multiply_exact(sum, rows, columns, y, x);
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int column = n + x + (TF32 ? j / 2 * 8 + lane % 4 * 2 + j % 2 : j);
        const long long at = out.column(column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = m + y + (TF32 ? i * 8 + lane / 4 : i);
            out.put(row, column, at, TF32 ? sum[i / 2 * 2 + j / 2][i % 2 * 2 + j % 2] : sum[i][j]);
        }
    }
}
