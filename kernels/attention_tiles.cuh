// Tiles of halves in shared memory as tensor cores read them, for attention.
//
// A tile is rows of WIDTH halves (a multiple of 16) in chunks of 8. Chunks of a row are permuted so that the same chunk
// of eight rows that follow each other, which is what ldmatrix reads at once, lies on all banks.
#pragma once

#include "mma.cuh"

// What all kernels of attention are told. Strides are in elements. q, o and their gradients lie alike; so do k and v.
struct Sizes {
    int queries, keys, d;
    int q_token, q_head;
    long long q_batch;
    int k_token, k_head;
    long long k_batch;
    // Of the scores, for powers of two: log2(e) / sqrt(d).
    float scale;
    int causal;
    // Rows are multiples of 16 bytes at such addresses.
    int whole;
};

// Where query or key `token` of this block's head begins, and the query's log sum.
__device__ __forceinline__ long long query_at(const Sizes& sizes, int token) {
    return blockIdx.z * sizes.q_batch + (long long)blockIdx.y * sizes.q_head + (long long)token * sizes.q_token;
}
__device__ __forceinline__ long long key_at(const Sizes& sizes, int token) {
    return blockIdx.z * sizes.k_batch + (long long)blockIdx.y * sizes.k_head + (long long)token * sizes.k_token;
}
__device__ __forceinline__ long long sum_at(const Sizes& sizes, int token) {
    return ((long long)blockIdx.z * gridDim.y + blockIdx.y) * sizes.queries + token;
}

// Keys of this batch row that exist.
__device__ __forceinline__ int key_length(const int* lengths, const Sizes& sizes) {
    return lengths ? lengths[blockIdx.z] : sizes.keys;
}

template <int WIDTH> __device__ __forceinline__ int place(int row, int chunk) {
    constexpr int CHUNKS = WIDTH / 8;
    constexpr int BITS = CHUNKS % 8 == 0 ? 3 : CHUNKS % 4 == 0 ? 2 : 1;
    return (row * CHUNKS + (chunk ^ ((row >> (3 - BITS)) & ((1 << BITS) - 1)))) * 8;
}

// Begins to copy ROWS rows of `from`; what is beyond `rows` or `d` is zero.
template <class T, int WIDTH, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int token, int rows, const Sizes& sizes) {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        T* to = tile + place<WIDTH>(row, chunk);
        if (sizes.whole) {
            const bool there = row < rows && chunk * 8 < sizes.d;
            copy_async_16(to, there ? from + (long long)row * token + chunk * 8 : from, there ? 16 : 0);
        } else {
            for (int k = 0; k < 8; k++) {
                const bool there = row < rows && chunk * 8 + k < sizes.d;
                to[k] = there ? from[(long long)row * token + chunk * 8 + k] : from_float<T>(0.0f);
            }
        }
    }
}

// Writes ROWS rows of a tile that this warp has written, as far as they exist.
template <class T, int WIDTH, int ROWS>
__device__ __forceinline__ void store_rows(const T* tile, int first, T* to, int token, int rows, const Sizes& sizes) {
    constexpr int CHUNKS = WIDTH / 8;
    __syncwarp();
    for (int i = threadIdx.x % 32; i < ROWS * CHUNKS; i += 32) {
        const int row = first + i / CHUNKS, chunk = i % CHUNKS;
        if (row >= rows || chunk * 8 >= sizes.d) {
            continue;
        }
        const T* from = tile + place<WIDTH>(row, chunk);
        T* at = to + (long long)row * token + chunk * 8;
        if (sizes.whole) {
            *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
        } else {
            for (int k = 0; k < 8 && chunk * 8 + k < sizes.d; k++) {
                at[k] = from[k];
            }
        }
    }
}

// Accumulators of 16 rows, times a factor for each half of them, into the rows of a tile from `first` on.
template <class T, int WIDTH>
__device__ __forceinline__ void put_rows(T* tile, int first, const float (&x)[WIDTH / 8][4], float upper, float lower) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
        unsigned* top = reinterpret_cast<unsigned*>(tile + place<WIDTH>(first + g, n) + 2 * t);
        unsigned* bottom = reinterpret_cast<unsigned*>(tile + place<WIDTH>(first + g + 8, n) + 2 * t);
        *top = pack<T>(x[n][0] * upper, x[n][1] * upper);
        *bottom = pack<T>(x[n][2] * lower, x[n][3] * lower);
    }
}

// The left operand of a product: rows first..first+16, columns 16 k and the next 15.
template <int WIDTH, class T> __device__ __forceinline__ void left(unsigned (&a)[4], const T* tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(a, tile + place<WIDTH>(first + lane % 16, 2 * k + lane / 16));
}

// Two right operands whose columns are the rows of a tile from `first` on: b[0] b[1] of the first eight, b[2] b[3].
template <int WIDTH, class T>
__device__ __forceinline__ void right_of_rows(unsigned (&b)[4], const T* tile, int first, int k) {
    const int lane = threadIdx.x % 32;
    ldmatrix(b, tile + place<WIDTH>(first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// Two right operands whose rows are the rows of a tile from `first` on, columns 16 n and the next 15.
template <int WIDTH, class T>
__device__ __forceinline__ void right_of_columns(unsigned (&b)[4], const T* tile, int first, int n) {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(b, tile + place<WIDTH>(first + lane % 16, 2 * n + lane / 16));
}

// d[2 n] and d[2 n + 1] += a times the two right operands.
template <class T>
__device__ __forceinline__ void mma_two(float (&low)[4], float (&high)[4], const unsigned (&a)[4],
                                        const unsigned (&b)[4]) {
    const unsigned first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma<T>(low, a, first);
    mma<T>(high, a, second);
}

// x (16, N) += rows first..first+16 of `rows` times the transposed N rows of `columns`, over WIDTH.
template <class T, int WIDTH, int N>
__device__ __forceinline__ void add_scores(float (&x)[N / 8][4], const T* rows, int first, const T* columns) {
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
        unsigned a[4];
        left<WIDTH>(a, rows, first, k);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned b[4];
            right_of_rows<WIDTH>(b, columns, 16 * n, k);
            mma_two<T>(x[2 * n], x[2 * n + 1], a, b);
        }
    }
}

// Accumulators of 16 columns as a left operand.
template <class T> __device__ __forceinline__ void as_left(unsigned (&a)[4], const float (&x)[4], const float (&y)[4]) {
    a[0] = pack<T>(x[0], x[1]);
    a[1] = pack<T>(x[2], x[3]);
    a[2] = pack<T>(y[0], y[1]);
    a[3] = pack<T>(y[2], y[3]);
}

// y (16, WIDTH) += x (16, K) times the K rows of a tile.
template <class T, int WIDTH, int K>
__device__ __forceinline__ void add_product(float (&y)[WIDTH / 8][4], const float (&x)[K / 8][4], const T* tile) {
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        unsigned a[4];
        as_left<T>(a, x[2 * k], x[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            unsigned b[4];
            right_of_columns<WIDTH>(b, tile, 16 * k, n);
            mma_two<T>(y[2 * n], y[2 * n + 1], a, b);
        }
    }
}
