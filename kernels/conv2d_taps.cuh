// The weight gradient of convolutions of nine taps, whose tiles are copied. A block has sixteen input channels with all their
// taps, so that what it adds to lies together in the result.
#pragma once

#include "conv2d_copies.cuh"

// Right operand of the weight gradient of kernels of nine taps, from an image with channels last: rows of a tile are
// depths, which are pixels of dy; columns are nine taps of the first eight of sixteen channels, then of the others. A
// row's nineteenth chunk is empty, so that what is read at once lies on all banks.
template <class T> struct CopiedTaps {
    static constexpr int TAPS = 9, CHUNKS = 2 * TAPS, PITCH = (CHUNKS + 1) * 8, ELEMENTS = DEPTH * PITCH;
    static constexpr int THREADS = 128, TURNS = (TAPS + 1) / 2;
    const T* image;
    Shape s;
    // The pixel of dy of this thread's row.
    int at_image, y, x, k, until;
    // The first of this thread's eight channels.
    int channel;

    __device__ __forceinline__ void start(const T* from, const Shape& shape, int first, int depth, int end) {
        image = from;
        s = shape;
        k = depth + threadIdx.x / 2 % DEPTH;
        const int target = s.out_height * s.out_width, pixel = k % target;
        at_image = k / target;
        y = pixel / s.out_width;
        x = pixel % s.out_width;
        channel = first + threadIdx.x % 2 * 8;
        until = channel < s.channels ? end : 0;
    }

    __device__ __forceinline__ void load(T* tile) {
        const int sy = y * s.stride - s.top, sx = x * s.stride - s.left;
        const int corner = ((at_image * s.height + sy) * s.width + sx) * s.channels + channel;
        T* const to = tile + threadIdx.x / 2 % DEPTH * PITCH + threadIdx.x % 2 * TAPS * 8;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            // Every other tap is another thread's.
            const int tap = threadIdx.x / 64 + 2 * i, ky = tap / 3, kx = tap % 3;
            const bool there = k < until && unsigned(sy + ky) < unsigned(s.height) &&
                               unsigned(sx + kx) < unsigned(s.width);
            if (tap < TAPS) {
                copy_async_16(to + tap * 8, image + (corner + (ky * s.width + kx) * s.channels), there ? 16 : 0);
            }
        }
        k += DEPTH;
        for (x += DEPTH; x >= s.out_width; x -= s.out_width) {
            if (++y == s.out_height) {
                y = 0;
                at_image++;
            }
        }
    }

    // Operands of all taps of eight channels, of depths 16 c and the next 15.
    static __device__ __forceinline__ void right(unsigned (&b)[TAPS][2], const T* tile, int eight, int c) {
        const int lane = threadIdx.x % 32;
        const T* from = tile + (16 * c + lane % 16) * PITCH + eight * TAPS * 8;
#pragma unroll
        for (int j = 0; j + 1 < TAPS; j += 2) {
            unsigned two[4];
            ldmatrix_transposed(two, from + (j + lane / 16) * 8);
            b[j][0] = two[0];
            b[j][1] = two[1];
            b[j + 1][0] = two[2];
            b[j + 1][1] = two[3];
        }
        ldmatrix_transposed(b[TAPS - 1], from + (TAPS - 1) * 8);
    }
};

// Writes sixteen rows of WIDTH numbers, or adds them to what is there.
template <int WIDTH>
__device__ __forceinline__ void put_runs(const float* from, float* to, int row, int rows, int pitch, bool add) {
    constexpr int PACKS = WIDTH / 4, EACH = 16 * PACKS / 32;
    static_assert(16 * PACKS % 32 == 0, "whole turns of a warp");
    const int lane = threadIdx.x % 32;
    Elements<float, 4> there[EACH];
    // All reads before the first write, which could be of the same place for all the compiler knows.
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = lane + 32 * i, own = row + at / PACKS;
        there[i] = {};
        if (add && own < rows) {
            there[i] = load<float, 4>(to + (long long)own * pitch + at % PACKS * 4);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = lane + 32 * i, own = row + at / PACKS;
        const Elements<float, 4> sum = load<float, 4>(from + at * 4);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            there[i].at[k] += sum.at[k];
        }
        if (own < rows) {
            store<float, 4>(to + (long long)own * pitch + at % PACKS * 4, there[i]);
        }
    }
}

// The weight gradient of kernels of nine taps: a block has BM output channels and sixteen input channels.
template <class T, int BM>
__device__ __forceinline__ void copied_taps(const Rows<T>& a, const T* image, const Shape& shape, const Out<T>& out,
                                            int part) {
    constexpr int TAPS = CopiedTaps<T>::TAPS, THREADS = CopiedTaps<T>::THREADS, M = BM / 2 / 16, ROW = 8 * TAPS;
    DYNAMIC_SHARED(T, tiles);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, eight = warp % 2;
    const int own_m = warp / 2 * 16 * M, m = blockIdx.y * BM + own_m;
    const int from = blockIdx.z * part, until = min(from + part, a.depth);
    CopiedRows<T, BM, THREADS> rows;
    rows.start(a, blockIdx.y * BM, from, until);
    rows.reader.start_left(own_m);
    CopiedTaps<T> right;
    right.start(image, shape, blockIdx.x * 16, from, until);
    float sum[M][TAPS][4] = {};
    walk(rows, right, tiles, ceil_div(until - from, DEPTH), [&](const T* row_tile, const T* column_tile) {
#pragma unroll
        for (int c = 0; c < DEPTH / 16; c++) {
            unsigned held[M][4], taps[TAPS][2];
#pragma unroll
            for (int i = 0; i < M; i++) {
                rows.reader.read(held[i], row_tile, i, c);
            }
            CopiedTaps<T>::right(taps, column_tile, eight, c);
#pragma unroll
            for (int j = 0; j < TAPS; j++) {
#pragma unroll
                for (int i = 0; i < M; i++) {
                    mma<T>(sum[i][j], held[i], taps[j]);
                }
            }
        }
    });
    // Eight channels' taps follow each other in the result: each warp brings sixteen rows at a time into that order.
    __syncthreads();
    float* const turned = reinterpret_cast<float*>(tiles) + warp * 16 * ROW;
    const int channel = blockIdx.x * 16 + eight * 8, g = lane / 4, t = lane % 4;
    float* const to = out.parts ? out.parts + (long long)blockIdx.z * out.rows * out.columns : out.gradient;
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int j = 0; j < TAPS; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                turned[(g + k / 2 * 8) * ROW + (2 * t + k % 2) * TAPS + j] = sum[i][j][k];
            }
        }
        __syncwarp();
        if (channel < shape.channels) {
            put_runs<ROW>(turned, to + (long long)channel * TAPS, m + 16 * i, out.rows, out.columns, out.parts == nullptr);
        }
        __syncwarp();
    }
}
