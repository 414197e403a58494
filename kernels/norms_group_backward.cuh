// Group normalisation, backward. With u the value before SiLU, h = (x - mean) * scale and du the gradient of u:
// dbeta = sum(du), dgamma = sum(du h), dx = scale * (gamma du - mean(gamma du) - h mean(gamma du h)), means over the group.
//
// Passes over memory: the least is to read x and dy and to write dx once each. Both are needed twice, before and after the two
// means are known. One block a group reads them twice in a row; what the blocks that run together hold (160 KB each for the
// largest plain groups of SD in halves, at most three on a multiprocessor) is in the first- or second-level cache the second
// time, and a thread reads the same packs both times, the second time from the end: what was read last is nearest. Very large groups (and unaligned ones) take two launches.
// dgamma and dbeta need each channel's sums over its pixels, which both ways leave in sums (batch, channels); a small last
// launch adds them over the batch, in its order.
#pragma once
#include "norms_group.cuh"

// The backward of one channel of one batch row.
template <class T, bool SILU>
struct Slope {
    float mean, scale, gamma, beta;

    // (h, du).
    __device__ __forceinline__ float2 slope(float x, float dy) const {
        const float h = (x - mean) * scale;
        return make_float2(h, SILU ? dy * silu_slope<T>(fmaf(h, gamma, beta)) : dy);
    }

    template <int N>
    __device__ __forceinline__ void add(const Elements<T, N>& x, const Elements<T, N>& dy, float (&sums)[2]) const {
        float du_sum = 0.0f, duh_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float2 hdu = slope(to_float(x.at[i]), to_float(dy.at[i]));
            du_sum += hdu.y;
            duh_sum = fmaf(hdu.x, hdu.y, duh_sum);
        }
        sums[0] += du_sum;
        sums[1] += duh_sum;
    }

    __device__ __forceinline__ T dx(float2 means, T x, T dy) const {
        const float2 hdu = slope(to_float(x), to_float(dy));
        return from_float<T>(scale * fmaf(hdu.x, -means.y, fmaf(hdu.y, gamma, -means.x)));
    }
};

// The group's means of gamma du and gamma du h from its channels' sums, by the first warp; known to its lane 0.
template <class T>
__device__ __forceinline__ float2 group_means(const float2* sums, const T* gamma, const GroupShape& shape) {
    double du = 0.0, duh = 0.0;
    for (unsigned c = threadIdx.x; c < shape.group_channels; c += 32) {
        du += double(to_float(gamma[c])) * double(sums[c].x);
        duh += double(to_float(gamma[c])) * double(sums[c].y);
    }
    du = warp_sum(du);
    duh = warp_sum(duh);
    return make_float2(float(du / double(shape.count())), float(duh / double(shape.count())));
}

// Packs of x and of dy that a thread asks for before it waits for the first of them: with one of each, memory waits for threads.
constexpr int AT_A_TIME = 2;

// Up to AT_A_TIME packs of x and dy, `step` packs apart; `left` is how many there are from the first on, in the same step.
template <class T, int N>
struct Pair {
    Elements<T, N> x[AT_A_TIME], dy[AT_A_TIME];

    __device__ __forceinline__ void load_from(const T* x_from, const T* dy_from, unsigned step, unsigned left) {
#pragma unroll
        for (int k = 0; k < AT_A_TIME; k++) {
            if (k * step < left) {
                x[k] = load<T, N>(x_from + size_t(k * step) * N);
                dy[k] = load<T, N>(dy_from + size_t(k * step) * N);
            }
        }
    }
};

// A channel is the work of a team of `team` threads (a power of two), of whole packs. Sums of what the block's teams see, into
// totals[channel]. `parts` holds a number for each channel and warp of a team.
template <class T, int N, bool SILU>
__device__ __forceinline__ void channel_sums(const T* x, const T* dy, const T* gamma, const T* beta, float2 moments,
                                             unsigned channels, unsigned pixels, unsigned team, float2* parts) {
    const unsigned teams = blockDim.x / team, mine = threadIdx.x / team, member = threadIdx.x % team;
    const unsigned packs = pixels / N, warps = max(team / 32, 1u);
    for (unsigned base = 0; base < channels; base += teams) {
        const unsigned c = base + mine;
        float sums[2] = {0.0f, 0.0f};
        if (c < channels) {
            const Slope<T, SILU> slope = {moments.x, moments.y, to_float(gamma[c]), to_float(beta[c])};
            for (unsigned at = member; at < packs; at += AT_A_TIME * team) {
                const size_t from = size_t(c) * pixels + at * N;
                Pair<T, N> here;
                here.load_from(x + from, dy + from, team, packs - at);
#pragma unroll
                for (int k = 0; k < AT_A_TIME; k++) {
                    if (k * team < packs - at) slope.add(here.x[k], here.dy[k], sums);
                }
            }
        }
        const int lanes = min(team, 32u);
        const float du = lanes_sum(sums[0], lanes), duh = lanes_sum(sums[1], lanes);
        if (c < channels && member % 32 == 0) parts[c * warps + member / 32] = make_float2(du, duh);
    }
}

// dx, by the same threads as the sums, in the opposite order.
template <class T, int N, bool SILU>
__device__ __forceinline__ void channel_gradients(const T* x, const T* dy, const T* gamma, const T* beta, T* dx,
                                                  float2 moments, float2 means, unsigned channels, unsigned pixels,
                                                  unsigned team) {
    const unsigned teams = blockDim.x / team, mine = threadIdx.x / team, member = threadIdx.x % team, packs = pixels / N;
    const unsigned turns = (channels + teams - 1) / teams, steps = (packs + AT_A_TIME * team - 1) / (AT_A_TIME * team);
    for (unsigned turn = turns; turn-- > 0;) {
        const unsigned c = turn * teams + mine;
        if (c >= channels) continue;
        const Slope<T, SILU> slope = {moments.x, moments.y, to_float(gamma[c]), to_float(beta[c])};
        for (unsigned step = steps; step-- > 0;) {
            const unsigned at = step * AT_A_TIME * team + member;
            if (at >= packs) continue;
            const size_t from = size_t(c) * pixels + at * N;
            Pair<T, N> here;
            here.load_from(x + from, dy + from, team, packs - at);
#pragma unroll
            for (int k = 0; k < AT_A_TIME; k++) {
                if (k * team < packs - at) {
#pragma unroll
                    for (int i = 0; i < N; i++)
                        here.dy[k].at[i] = slope.dx(means, here.x[k].at[i], here.dy[k].at[i]);
                    store<T, N>(dx + from + size_t(k * team) * N, here.dy[k]);
                }
            }
        }
    }
}

// One block a group. Dynamic shared memory: a float2 for each channel of the group and warp of a team.
template <class T, int N, bool SILU>
__device__ __forceinline__ void group_backward(const T* x, const T* dy, const T* gamma, const T* beta, const float2* moments,
                                               T* dx, float2* sums, GroupShape shape, unsigned team, float2* parts) {
    __shared__ float2 known;
    const unsigned group = blockIdx.x, warps = max(team / 32, 1u), channels = shape.group_channels;
    const size_t start = size_t(group) * shape.count();
    const float2 measured = moments[group];
    gamma += shape.first_channel(group);
    beta += shape.first_channel(group);
    channel_sums<T, N, SILU>(x + start, dy + start, gamma, beta, measured, channels, shape.pixels, team, parts);
    __syncthreads();
    for (unsigned c = threadIdx.x; c < channels; c += blockDim.x) {
        double du = 0.0, duh = 0.0;
        for (unsigned w = 0; w < warps; w++) {
            du += double(parts[c * warps + w].x);
            duh += double(parts[c * warps + w].y);
        }
        sums[size_t(group) * channels + c] = make_float2(float(du), float(duh));
    }
    // What a block has written to memory its own threads see after this.
    __syncthreads();
    if (threadIdx.x < 32) {
        const float2 means = group_means(sums + size_t(group) * channels, gamma, shape);
        if (threadIdx.x == 0) known = means;
    }
    __syncthreads();
    channel_gradients<T, N, SILU>(x + start, dy + start, gamma, beta, dx + start, measured, known, channels, shape.pixels,
                                  team);
}

// Two launches. The first one: one block, which is one team, for each channel of each batch row.
template <class T, int N, bool SILU>
__device__ __forceinline__ void group_sums(const T* x, const T* dy, const T* gamma, const T* beta, const float2* moments,
                                           float2* sums, GroupShape shape) {
    __shared__ float2 parts[32];
    const unsigned row = blockIdx.x, channel = row % shape.channels, group = row / shape.group_channels;
    const size_t start = size_t(row) * shape.pixels;
    channel_sums<T, N, SILU>(x + start, dy + start, gamma + channel, beta + channel, moments[group], 1, shape.pixels,
                             blockDim.x, parts);
    __syncthreads();
    if (threadIdx.x == 0) {
        double du = 0.0, duh = 0.0;
        for (unsigned w = 0; w < blockDim.x / 32; w++) {
            du += double(parts[w].x);
            duh += double(parts[w].y);
        }
        sums[row] = make_float2(float(du), float(duh));
    }
}

// The second one: one block for each of the `pieces` of each channel of each batch row, from the end, as in the forward.
template <class T, int N, bool SILU>
__device__ __forceinline__ void group_gradients(const T* x, const T* dy, const T* gamma, const T* beta,
                                                const float2* moments, const float2* sums, T* dx, GroupShape shape,
                                                unsigned pieces, unsigned piece) {
    __shared__ float2 known;
    const unsigned index = gridDim.x - 1 - blockIdx.x, row = index / pieces, group = row / shape.group_channels;
    if (threadIdx.x < 32) {
        const float2 means =
            group_means(sums + size_t(group) * shape.group_channels, gamma + shape.first_channel(group), shape);
        if (threadIdx.x == 0) known = means;
    }
    __syncthreads();
    const unsigned channel = row % shape.channels, first = index % pieces * piece;
    const size_t start = size_t(row) * shape.pixels + first;
    channel_gradients<T, N, SILU>(x + start, dy + start, gamma + channel, beta + channel, dx + start, moments[group], known,
                                  1, min(piece, shape.pixels - first), blockDim.x);
}

// dgamma and dbeta (channels) plus the sums over the batch.
__device__ __forceinline__ void group_weights(const float2* sums, float* dgamma, float* dbeta, unsigned batch,
                                              unsigned channels) {
    const unsigned c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    double du = 0.0, duh = 0.0;
    for (unsigned b = 0; b < batch; b++) {
        const float2 sum = sums[size_t(b) * channels + c];
        du += double(sum.x);
        duh += double(sum.y);
    }
    if (dbeta) dbeta[c] += float(du);
    if (dgamma) dgamma[c] += float(duh);
}
