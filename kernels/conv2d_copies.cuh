// Products of convolutions in halves whose tiles are copied 16 bytes at a time in the background, steps ahead of the tensor
// cores. From 8.0, for channels that are multiples of 8; what is left over is gathered (conv2d_tiles.cuh).
//
// Images are taken with channels last, (images, pixels, channels): a copy in scratch, one pass over the image where the
// product reads it nine times. Then eight channels of a pixel, which are eight depths of one tap, are one copy. Kernels of
// one tap need no such copy: their tiles are planes as they lie.
//
// Each step's tiles are DEPTH deep; STAGES of them are in shared memory: one is multiplied and the others are on their way.
#pragma once

#include "conv2d_results.cuh"
#include "conv2d_tiles.cuh"

constexpr int DEPTH = 32, STAGES = 3;

// Addresses are kept as what is added to them at every step: beside the tensor cores of the fastest cards there is little time
// for arithmetic. Sources of copies that bring nothing but zeros are not read, and may lie anywhere.

// Where a warp finds its operands in a tile whose rows are rows, or columns, of the product: sixteen rows on is 16 * DEPTH on.
struct RowReader {
    // By the sixteen depths.
    int at[DEPTH / 16];

    // As the left operand.
    __device__ __forceinline__ void start_left(int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < DEPTH / 16; c++) {
            at[c] = place<DEPTH>(first + lane % 16, 2 * c + lane / 16);
        }
    }
    // As two right operands at a time.
    __device__ __forceinline__ void start_right(int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < DEPTH / 16; c++) {
            at[c] = place<DEPTH>(first + lane / 16 * 8 + lane % 8, 2 * c + lane / 8 % 2);
        }
    }
    template <class T> __device__ __forceinline__ void read(unsigned (&x)[4], const T* tile, int i, int c) const {
        ldmatrix(x, tile + at[c] + i * 16 * DEPTH);
    }
};

// A matrix as `Rows` is, of whole chunks: the next DEPTH depths of SIZE rows at every load. Also as a right operand, whose
// columns the rows are.
template <class T, int SIZE, int THREADS> struct CopiedRows {
    static constexpr int ELEMENTS = SIZE * DEPTH, COPIES = SIZE * DEPTH / 8 / THREADS, APART = THREADS / (DEPTH / 8);
    // Of this thread's first chunk; the others are APART rows on.
    const T* next;
    long long apart, wrap;
    int to, left, inside, span, depths;
    RowReader reader;

    __device__ __forceinline__ void start(const Rows<T>& of, int first, int depth, int end) {
        const int row = first + threadIdx.x / (DEPTH / 8), k = depth + threadIdx.x % (DEPTH / 8) * 8;
        span = of.span;
        inside = k % span;
        next = of.from + (((long long)(k / span) * of.rows + row) * span + inside);
        apart = (long long)APART * span;
        wrap = (long long)(of.rows - 1) * span;
        // Copies of rows that are there.
        left = of.rows > row ? ceil_div(of.rows - row, APART) : 0;
        depths = end - k;
        to = place<DEPTH>(threadIdx.x / (DEPTH / 8), threadIdx.x % (DEPTH / 8));
    }
    __device__ __forceinline__ void start_right(int first) { reader.start_right(first); }

    __device__ __forceinline__ void load(T* tile) {
        const T* from = next;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            copy_async_16(tile + to + i * APART * DEPTH, from, depths > 0 && i < left ? 16 : 0);
            from += apart;
        }
        depths -= DEPTH;
        next += DEPTH;
        for (inside += DEPTH; inside >= span; inside -= span) {
            next += wrap;
        }
    }

    __device__ __forceinline__ void right(unsigned (&b)[4], const T* tile, int j, int c) const {
        reader.read(b, tile, j, c);
    }
};

// Right operand of forward and data gradient, from an image with channels last: columns are pixels, depths taps and then
// channels. A thread brings the same eight depths of COPIES columns.
template <class T, int SIZE, int THREADS> struct CopiedPixels {
    static constexpr int ELEMENTS = SIZE * DEPTH, COPIES = SIZE * DEPTH / 8 / THREADS, APART = THREADS / (DEPTH / 8);
    // The image, from the depths' channel and tap on.
    const T* next;
    const T* image;
    // Where the first tap of each column reaches, perhaps beyond the image, and a bit for each tap that does not; the tap
    // that is next is the lowest bit.
    int corner[COPIES];
    unsigned valid[COPIES];
    int to, width, kw, stride, backward;
    int channels, channel, ky, kx, depths;
    RowReader reader;

    __device__ __forceinline__ void start(const T* from, const Shape& s, int first, int depth, int end) {
        const int k = depth + threadIdx.x % (DEPTH / 8) * 8, tap = k / s.channels;
        image = from;
        width = s.width;
        kw = s.kw;
        stride = s.stride;
        backward = s.backward;
        channels = s.channels;
        depths = end - k;
        channel = k % channels;
        ky = tap / kw;
        kx = tap % kw;
        place_tap();
        to = place<DEPTH>(threadIdx.x / (DEPTH / 8), threadIdx.x % (DEPTH / 8));
        const int target = s.out_height * s.out_width, columns = s.images * target;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int column = first + threadIdx.x / (DEPTH / 8) + i * APART, pixel = column % target;
            const int y = pixel / s.out_width, x = pixel % s.out_width;
            const int sy = backward ? (y + s.top) / stride : y * stride - s.top;
            const int sx = backward ? (x + s.left) / stride : x * stride - s.left;
            corner[i] = ((column / target * s.height + sy) * width + sx) * channels;
            // A tap is valid where its row and its column are.
            unsigned along = 0, all = 0;
            for (int t = 0; t < kw; t++) {
                along |= unsigned(reaches(s, x, t, s.left, width)) << t;
            }
            for (int t = 0; t < s.kh; t++) {
                all |= reaches(s, y, t, s.top, s.height) ? along << t * kw : 0u;
            }
            valid[i] = column < columns && tap < 32 ? all >> tap : 0u;
        }
    }
    __device__ __forceinline__ void start_right(int first) { reader.start_right(first); }

    __device__ __forceinline__ void place_tap() {
        // Of the data gradient only taps with the remainder of the column's place are valid, so that both are rounded down.
        const int tap_at = backward ? -(ky / stride * width + kx / stride) : ky * width + kx;
        next = image + (tap_at * channels + channel);
    }

    __device__ __forceinline__ void load(T* tile) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            copy_async_16(tile + to + i * APART * DEPTH, next + corner[i], depths > 0 && (valid[i] & 1u) != 0 ? 16 : 0);
        }
        depths -= DEPTH;
        next += DEPTH;
        channel += DEPTH;
        if (channel >= channels) {
            do {
                channel -= channels;
                if (++kx == kw) {
                    kx = 0;
                    ky++;
                }
#pragma unroll
                for (int i = 0; i < COPIES; i++) {
                    valid[i] >>= 1;
                }
            } while (channel >= channels);
            place_tap();
        }
    }

    __device__ __forceinline__ void right(unsigned (&b)[4], const T* tile, int j, int c) const {
        reader.read(b, tile, j, c);
    }
};

// The same for kernels of one tap with neither stride nor padding, from the image as it is: rows of a tile are depths, which
// are channels, and columns pixels of a plane, which has a multiple of eight.
template <class T, int SIZE, int THREADS> struct CopiedPlanes {
    static constexpr int ELEMENTS = SIZE * DEPTH, COPIES = SIZE * DEPTH / 8 / THREADS, APART = THREADS / (SIZE / 8);
    // Chunks of a warp's columns that are read at once, two by two.
    static constexpr int PAIRS = SIZE / 2 / 16;
    const T* next;
    long long apart, on;
    int to, depths, at[PAIRS];

    __device__ __forceinline__ void start(const T* image, const Shape& s, int first, int depth, int end) {
        const int column = first + threadIdx.x % (SIZE / 8) * 8, k = depth + threadIdx.x / (SIZE / 8);
        const int plane = s.height * s.width;
        next = image + (((long long)(column / plane) * s.channels + k) * plane + column % plane);
        apart = (long long)APART * plane;
        on = (long long)DEPTH * plane;
        depths = column < s.images * plane ? end - k : 0;
        to = place<SIZE>(threadIdx.x / (SIZE / 8), threadIdx.x % (SIZE / 8));
    }
    __device__ __forceinline__ void start_right(int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            at[j] = place<SIZE>(lane % 16, first / 8 + 2 * j + lane / 16);
        }
    }

    __device__ __forceinline__ void load(T* tile) {
        const T* from = next;
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            copy_async_16(tile + to + i * APART * SIZE, from, i * APART < depths ? 16 : 0);
            from += apart;
        }
        depths -= DEPTH;
        next += on;
    }

    __device__ __forceinline__ void right(unsigned (&b)[4], const T* tile, int j, int c) const {
        ldmatrix_transposed(b, tile + at[j] + 16 * c * SIZE);
    }
};

// Walks through the depths: `multiply` is called with each step's two tiles. `tiles` has STAGES times both.
template <class T, class Left, class Right, class Multiply>
__device__ __forceinline__ void walk(Left& left, Right& right, T* tiles, int steps, Multiply multiply) {
    constexpr int STAGE = Left::ELEMENTS + Right::ELEMENTS;
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) {
            left.load(tiles + step * STAGE);
            right.load(tiles + step * STAGE + Left::ELEMENTS);
        }
        copy_commit();
    }
    int now = 0, next = STAGES - 1;
    for (int step = 0; step < steps; step++) {
        // The tiles of this step have come, and nobody reads those of the step before any longer.
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) {
            left.load(tiles + next * STAGE);
            right.load(tiles + next * STAGE + Left::ELEMENTS);
        }
        copy_commit();
        multiply(tiles + now * STAGE, tiles + now * STAGE + Left::ELEMENTS);
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
}

// A right operand begins with an image's columns or with a matrix.
template <class Right, class T>
__device__ __forceinline__ void start(Right& right, const T* image, const Shape& shape, int n, int from, int until) {
    right.start(image, shape, n, from, until);
}
template <class Right, class T>
__device__ __forceinline__ void start(Right& right, const Rows<T>& rows, const Shape&, int n, int from, int until) {
    right.start(rows, n, from, until);
}

// A block of BM x BN by WM x WN warps.
template <class T, int BM, int BN, int WM, int WN, class Right, class From>
__device__ __forceinline__ void copied_product(const Rows<T>& a, const From& columns, const Shape& shape,
                                               const Out<T>& out, int part) {
    constexpr int THREADS = 32 * WM * WN, M = BM / WM / 16, N = BN / WN / 16;
    DYNAMIC_SHARED(T, tiles);
    const int m = blockIdx.y * BM, n = blockIdx.x * BN, warp = threadIdx.x / 32;
    const int own_m = warp / WN * 16 * M, own_n = warp % WN * 16 * N;
    const int from = blockIdx.z * part, until = min(from + part, a.depth);
    CopiedRows<T, BM, THREADS> rows;
    rows.start(a, m, from, until);
    rows.reader.start_left(own_m);
    Right right;
    start(right, columns, shape, n, from, until);
    right.start_right(own_n);
    float sum[M][2 * N][4] = {};
    walk(rows, right, tiles, ceil_div(until - from, DEPTH), [&](const T* row_tile, const T* column_tile) {
#pragma unroll
        for (int c = 0; c < DEPTH / 16; c++) {
            unsigned held[M][4];
#pragma unroll
            for (int i = 0; i < M; i++) {
                rows.reader.read(held[i], row_tile, i, c);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                unsigned two[4];
                right.right(two, column_tile, j, c);
#pragma unroll
                for (int i = 0; i < M; i++) {
                    mma_two<T>(sum[i][2 * j], sum[i][2 * j + 1], held[i], two);
                }
            }
        }
    });
    put_sums<T, M, N>(sum, out, m + own_m, n + own_n);
}
