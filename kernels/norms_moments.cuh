// Mean and 1/sqrt(variance + eps) of a run of numbers, by a block. No kernels.
#pragma once
#include "glue_packs.cuh"

// Packs that a thread keeps in registers between measuring and normalising.
constexpr int HELD = 6;

// What a thread, a block or several blocks know of their numbers: how many, their mean, and the sum of squares about it.
// About its own mean, so that nothing cancels where the mean is large.
struct Moments {
    float count, mean, squares;
};

// The union of two sets of numbers (Chan, Golub and LeVeque, 1979). `b` is not empty.
__device__ __forceinline__ Moments join(const Moments& a, const Moments& b) {
    const float count = a.count + b.count, difference = b.mean - a.mean, share = b.count / count;
    return {count, fmaf(difference, share, a.mean), a.squares + fmaf(difference * difference * a.count, share, b.squares)};
}

// Packs first + thread, first + thread + threads, ... of a run of `packs`, at most H of them.
template <class T, int N, int H>
__device__ __forceinline__ void hold(Elements<T, N> (&held)[H], const T* x, unsigned first, unsigned packs) {
#pragma unroll
    for (int k = 0; k < H; k++) {
        const unsigned at = first + k * blockDim.x + threadIdx.x;
        if (at < packs) held[k] = load<T, N>(x + size_t(at) * N);
    }
}

// Makes the compiler take held halves for changed. It would otherwise keep them widened, from one use to the next, in twice the
// registers.
template <class T, int N, int H>
__device__ __forceinline__ void keep_packed([[maybe_unused]] Elements<T, N> (&held)[H]) {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2 && N == 8) {
#pragma unroll
        for (int k = 0; k < H; k++) {
            unsigned* words = reinterpret_cast<unsigned*>(&held[k]);
            asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
        }
    }
#endif
}

// The moments of what `hold` has loaded; of no numbers at all count is 0.
template <class T, int N, int H>
__device__ __forceinline__ Moments measure_held(Elements<T, N> (&held)[H], unsigned first, unsigned packs) {
    float sum = 0.0f, count = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < H; k++) {
        if (first + k * blockDim.x + threadIdx.x < packs) {
            float part = 0.0f;
#pragma unroll
            for (int i = 0; i < N; i++) part += to_float(held[k].at[i]);
            sum += part;
            count += N;
        }
    }
    const float mean = sum / fmaxf(count, 1.0f);
    keep_packed<T, N, H>(held);
#pragma unroll
    for (int k = 0; k < H; k++) {
        if (first + k * blockDim.x + threadIdx.x < packs) {
            float part = 0.0f;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float d = to_float(held[k].at[i]) - mean;
                part = fmaf(d, d, part);
            }
            squares += part;
        }
    }
    keep_packed<T, N, H>(held);
    return {count, mean, squares};
}

// The thread's share of a run; afterwards `held` has the last of it, from `first` on.
template <class T, int N, int H>
__device__ __forceinline__ Moments measure_share(Elements<T, N> (&held)[H], const T* x, unsigned packs, unsigned& first) {
    const unsigned step = H * blockDim.x;
    first = 0;
    hold<T, N, H>(held, x, 0, packs);
    Moments mine = measure_held<T, N, H>(held, 0, packs);
    while (packs - first > step) {
        first += step;
        hold<T, N, H>(held, x, first, packs);
        const Moments next = measure_held<T, N, H>(held, first, packs);
        if (next.count > 0.0f) mine = join(mine, next);
    }
    return mine;
}

// 1/sqrt(variance + eps) from the sum of squares. In f32: the last bit of an f64 would be lost in what it scales, and f64 takes
// long on most GPUs.
__device__ __forceinline__ float scale_of(double squares, double count, float eps) {
    return 1.0f / sqrtf(float(squares) / float(count) + eps);
}

// The block's mean and sum of squares about it from its threads' shares; known to thread 0 alone. `shared` holds 33 floats.
__device__ __forceinline__ void join_block(const Moments& mine, double count, double& mean, double& squares, float* shared) {
    float sums[1] = {mine.count * mine.mean};
    double totals[1];
    block_sums<1>(sums, totals, shared);
    if (threadIdx.x == 0) {
        mean = totals[0] / count;
        shared[32] = float(mean);
    }
    __syncthreads();
    const float off = mine.mean - shared[32];
    sums[0] = fmaf(mine.count * off, off, mine.squares);
    block_sums<1>(sums, totals, shared);
    if (threadIdx.x == 0) squares = totals[0];
}
