// Sums over a bucket: of squares, and whether all numbers are finite.
//
// The sum of squares is the CPU's (src/zero/reduce.rs) to the bit, so that the norm of the gradients, and with it every bit of
// a run, does not depend on where they rest: pieces of 2^14 numbers, in each eight running sums in f64 of every eighth number,
// which are added in order; then the pieces in order. A square of an f32 is exact in f64, so fusing it with the sum changes
// nothing. A thread has one running sum. A thread asks for many numbers before it adds the first, and neighbouring eight
// threads read whole sectors of 32 bytes: memory keeps most of its speed though there are only eight threads for 2^14 numbers.
#include "glue_packs.cuh"

constexpr unsigned PIECE = 1 << 14, RUNS = 8, AHEAD = 32;

template <class T>
__device__ __forceinline__ double square_of(T x) {
    return double(to_float(x)) * double(to_float(x));
}

template <class T>
__device__ __forceinline__ void squares(const T* values, double* pieces, size_t count) {
    const size_t piece = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / RUNS;
    const unsigned run = threadIdx.x % RUNS;
    const size_t start = piece * PIECE;
    const unsigned len = start < count ? unsigned(min(size_t(PIECE), count - start)) : 0;
    const unsigned rounds = len / RUNS;
    values += start;
    double sum = 0.0;
    unsigned i = 0;
    for (; i + AHEAD <= rounds; i += AHEAD) {
        float x[AHEAD];
#pragma unroll
        for (unsigned k = 0; k < AHEAD; k++) x[k] = to_float(values[(i + k) * RUNS + run]);
#pragma unroll
        for (unsigned k = 0; k < AHEAD; k++) sum += double(x[k]) * double(x[k]);
    }
    for (; i < rounds; i++) sum += square_of(values[i * RUNS + run]);
    double total = 0.0;
#pragma unroll
    for (unsigned r = 0; r < RUNS; r++) total += __shfl_sync(ALL_LANES, sum, r, RUNS);
    if (run == 0 && len > 0) {
        double tail = 0.0;
        for (unsigned k = rounds * RUNS; k < len; k++) tail += square_of(values[k]);
        pieces[piece] = total + tail;
    }
}

// One block: *total = the sum of the pieces, in order. Threads bring them, one adds.
__device__ __forceinline__ void add_pieces(const double* pieces, double* total, unsigned count) {
    __shared__ double shared[256];
    double sum = 0.0;
    for (unsigned from = 0; from < count; from += blockDim.x) {
        if (from + threadIdx.x < count) shared[threadIdx.x] = pieces[from + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (unsigned k = 0; k < min(blockDim.x, count - from); k++) sum += shared[k];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) *total = sum;
}

// *found becomes 1 if a number is infinite or none; it is left alone otherwise.
template <class T>
__device__ __forceinline__ void not_finite(const T* values, size_t count, int aligned, unsigned* found) {
    constexpr int N = WIDTH<T>;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= count) return;
    bool bad = false;
    if (aligned && at + N <= count) {
        const Elements<T, N> x = load<T, N>(values + at);
#pragma unroll
        for (int i = 0; i < N; i++) bad |= !(fabsf(to_float(x.at[i])) < INFINITY);
    } else {
        for (int i = 0; i < N && at + i < count; i++) bad |= !(fabsf(to_float(values[at + i])) < INFINITY);
    }
    if (bad) atomicOr(found, 1u);
}

#define REDUCE(T, dtype)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128)                                                                        \
        sum_of_squares_##dtype(const T* values, double* pieces, uint64_t count) {                                            \
        squares<T>(values, pieces, count);                                                                                   \
    }                                                                                                                        \
    EXPORT(sum_of_squares_##dtype)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        not_finite_##dtype(const T* values, uint64_t count, int aligned, unsigned* found) {                                  \
        not_finite<T>(values, count, aligned, found);                                                                        \
    }                                                                                                                        \
    EXPORT(not_finite_##dtype)

FOR_DTYPES(REDUCE)

extern "C" __global__ void __launch_bounds__(256) sum_of_pieces_f64(const double* pieces, double* total, unsigned count) {
    add_pieces(pieces, total, count);
}
EXPORT(sum_of_pieces_f64)
