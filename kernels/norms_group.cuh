// Group normalisation, forward: x (batch, channels, pixels) over channels / groups channels and all pixels, times gamma plus
// beta, then SiLU if wanted. A group's numbers lie one after the other, so it is one run of memory.
//
// Passes over memory. What counts is bytes that come from memory; a copy reads and writes each number once.
// - Up to 43,008 halves or 21,504 floats (in halves every group of SD at 512 x 512 but some joined ones): one block of up to
//   448 threads reads the group once, keeps it in registers, measures it (about the mean) and writes: a copy's bytes.
// - Somewhat larger ones, if there are enough to fill the device: the same block keeps the end and reads the rest again,
//   backwards, so that what was read last, and is still in a cache, comes first. All blocks that run together have less than
//   20 MB in flight.
// - Large groups (the VAE's) are split: blocks measure pieces of 6 packs a thread and leave their moments, and a second launch
//   joins them and normalises, going through memory from its end for the sake of the second-level cache.
#pragma once
#include "norms_moments.cuh"

// Packs that a thread of a group's block keeps and the most threads of the block: two such blocks take all registers of a
// multiprocessor, 72 a thread of which 48 are kept, and one reads while the other writes.
constexpr int GROUP_HELD = 12, GROUP_THREADS = 448;

struct GroupShape {
    unsigned channels, groups, group_channels, pixels;

    __device__ __forceinline__ unsigned count() const { return group_channels * pixels; }
    // The first channel of the group that is the `index`th over the batch.
    __device__ __forceinline__ unsigned first_channel(unsigned index) const { return index % groups * group_channels; }
};

// Normalises a pack that begins at number `at` of its group. Packs do not straddle channels.
template <class T, int N, bool SILU>
__device__ __forceinline__ void normalise_pack(Elements<T, N> pack, T* y, unsigned at, const Divisor& pixels, const T* gamma,
                                               const T* beta, float mean, float scale) {
    const unsigned channel = pixels.quotient(at);
    const float a = scale * to_float(gamma[channel]), b = fmaf(-mean, a, to_float(beta[channel]));
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float u = fmaf(to_float(pack.at[i]), a, b);
        pack.at[i] = from_float<T>(SILU ? u * sigmoid<T>(u) : u);
    }
    store<T, N>(y + at, pack);
}

template <class T, int N, bool SILU, int H>
__device__ __forceinline__ void normalise_held(const Elements<T, N> (&held)[H], T* y, unsigned first, unsigned packs,
                                               const Divisor& pixels, const T* gamma, const T* beta, float2 moments) {
#pragma unroll
    for (int k = 0; k < H; k++) {
        const unsigned at = first + k * blockDim.x + threadIdx.x;
        if (at < packs) normalise_pack<T, N, SILU>(held[k], y, at * N, pixels, gamma, beta, moments.x, moments.y);
    }
}

// One block a group. moments[group] = (mean, scale), for the backward.
template <class T, int N>
__device__ __forceinline__ void group_forward(const T* x, const T* gamma, const T* beta, T* y, float2* moments,
                                              GroupShape shape, float eps, int silu) {
    __shared__ float shared[33];
    __shared__ float2 known;
    const unsigned group = blockIdx.x, packs = shape.count() / N;
    x += size_t(group) * shape.count();
    y += size_t(group) * shape.count();
    gamma += shape.first_channel(group);
    beta += shape.first_channel(group);
    Elements<T, N> held[GROUP_HELD];
    unsigned first;
    const Moments mine = measure_share<T, N, GROUP_HELD>(held, x, packs, first);
    double mean = 0.0, squares = 0.0;
    join_block(mine, double(shape.count()), mean, squares, shared);
    if (threadIdx.x == 0) {
        known = make_float2(float(mean), scale_of(squares, double(shape.count()), eps));
        moments[group] = known;
    }
    __syncthreads();
    const Divisor pixels(shape.pixels);
    while (true) {
        if (silu) normalise_held<T, N, true, GROUP_HELD>(held, y, first, packs, pixels, gamma, beta, known);
        else normalise_held<T, N, false, GROUP_HELD>(held, y, first, packs, pixels, gamma, beta, known);
        if (first == 0) break;
        first -= GROUP_HELD * blockDim.x;
        hold<T, N, GROUP_HELD>(held, x, first, packs);
    }
}

// One block a piece of HELD packs a thread, blockIdx.x of the group blockIdx.y: pieces[group][piece] = (mean, squares).
template <class T, int N>
__device__ __forceinline__ void group_measure(const T* x, float2* pieces, GroupShape shape) {
    __shared__ float shared[33];
    const unsigned packs = shape.count() / N, piece = HELD * blockDim.x, start = blockIdx.x * piece;
    const unsigned mine = min(piece, packs - start);
    x += size_t(blockIdx.y) * shape.count() + size_t(start) * N;
    Elements<T, N> held[HELD];
    hold<T, N, HELD>(held, x, 0, mine);
    double mean = 0.0, squares = 0.0;
    join_block(measure_held<T, N, HELD>(held, 0, mine), double(mine) * N, mean, squares, shared);
    if (threadIdx.x == 0) pieces[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = make_float2(float(mean), float(squares));
}

// The moments of a group from those of its pieces, by one warp, in a fixed order; known to lane 0.
__device__ __forceinline__ float2 join_pieces(const float2* pieces, unsigned count, unsigned piece, unsigned total, float eps) {
    double sum = 0.0, squares = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += 32) sum += double(pieces[i].x) * min(piece, total - i * piece);
    const double mean = warp_sum(sum) / double(total);
    for (unsigned i = threadIdx.x; i < count; i += 32) {
        const double off = double(pieces[i].x) - mean;
        squares += double(pieces[i].y) + off * off * min(piece, total - i * piece);
    }
    return make_float2(float(mean), scale_of(warp_sum(squares), double(total), eps));
}

// The second launch, with the same grid and block.
template <class T, int N>
__device__ __forceinline__ void group_normalise(const T* x, const float2* pieces, const T* gamma, const T* beta, T* y,
                                                float2* moments, GroupShape shape, float eps, int silu) {
    __shared__ float2 known;
    // From the end: what the first launch read last is still in the second-level cache.
    const unsigned group = gridDim.y - 1 - blockIdx.y, part = gridDim.x - 1 - blockIdx.x;
    const unsigned packs = shape.count() / N, piece = HELD * blockDim.x, start = part * piece;
    const unsigned end = min(packs, start + piece);
    x += size_t(group) * shape.count();
    y += size_t(group) * shape.count();
    gamma += shape.first_channel(group);
    beta += shape.first_channel(group);
    Elements<T, N> held[HELD];
    hold<T, N, HELD>(held, x, start, end);
    if (threadIdx.x < 32) {
        const float2 joined =
            join_pieces(pieces + size_t(group) * gridDim.x, gridDim.x, piece * N, shape.count(), eps);
        if (threadIdx.x == 0) {
            known = joined;
            if (part == 0) moments[group] = joined;
        }
    }
    __syncthreads();
    const Divisor pixels(shape.pixels);
    if (silu) normalise_held<T, N, true, HELD>(held, y, start, end, pixels, gamma, beta, known);
    else normalise_held<T, N, false, HELD>(held, y, start, end, pixels, gamma, beta, known);
}
