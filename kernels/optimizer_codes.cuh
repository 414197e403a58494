// Blockwise 8-bit numbers as bitsandbytes defines them, and AdamW with moments of that kind: bit for bit what
// src/optim/blockwise.rs and kernel8.rs compute. No kernels.
//
// The tables (src/kernels/optimizer.rs writes them) are 25 KB: the 256 numbers of both books, and for each book the table that
// finds a magnitude's code in one look. They are looked up at random, four times an element, so they lie in shared memory:
// there a warp's look-up takes three or four cycles, in the first cache level one for each line it touches.
#pragma once
#include "optimizer_step.cuh"

constexpr unsigned BLOCK = 256, ONE = 0x3f800000u;
constexpr int ZERO_OF_M = 127;

// A code book: its table's length and the bits of the smallest magnitude that it knows.
struct Book {
    unsigned runs;
    int lowest;
};

struct Tables {
    const float *m_values, *v_values;
    const unsigned *m_borders, *v_borders;
    int m_lowest, v_lowest;
};

// Copies the tables to shared memory, whose address as theirs is a multiple of 16; needs a barrier afterwards. Two reads of
// four words are on their way at a time: one word at a time a block would wait for memory seven times.
__device__ __forceinline__ Tables bring_tables(const unsigned* from, Book m, Book v, unsigned* shared) {
    constexpr unsigned N = 4;
    const unsigned words = 2 * BLOCK + m.runs + v.runs, packs = words / N, last = packs * N + threadIdx.x;
    for (unsigned i = threadIdx.x; i < packs; i += 2 * blockDim.x) {
        const unsigned other = i + blockDim.x;
        const Elements<unsigned, N> first = load<unsigned, N>(from + i * N);
        Elements<unsigned, N> second;
        if (other < packs) second = load<unsigned, N>(from + other * N);
        store<unsigned, N>(shared + i * N, first);
        if (other < packs) store<unsigned, N>(shared + other * N, second);
    }
    if (last < words) shared[last] = from[last];
    const float* values = reinterpret_cast<const float*>(shared);
    return {values, values + BLOCK, shared + 2 * BLOCK, shared + 2 * BLOCK + m.runs, m.lowest, v.lowest};
}

// What a block is multiplied with before its codes are looked up. Blocks of less than 1e-38 are not scaled up to 1.
__device__ __forceinline__ float block_scale(float absmax) { return __fdiv_rn(1.0f, fmaxf(absmax, 1e-38f)); }

// How many borders lie below a magnitude, given by its bits, which are at most those of 1.0 and one more.
__device__ __forceinline__ int borders_below(const unsigned* table, int lowest, int magnitude) {
    magnitude = max(magnitude, lowest);
    const unsigned entry = table[(magnitude - lowest) >> 16];
    return int(entry & 0xffu) + ((magnitude & 0xffff) > int(entry >> 8) ? 1 : 0);
}

__device__ __forceinline__ int unsigned_code(const Tables& tables, float x) {
    return borders_below(tables.v_borders, tables.v_lowest, min(int(__float_as_uint(x) & MAGNITUDE), int(ONE)));
}

__device__ __forceinline__ int signed_code(const Tables& tables, float x) {
    const int negative = int(__float_as_uint(x) >> 31);
    // A tie goes to the smaller number, for a negative one to the larger magnitude: as if it were a little larger.
    const int magnitude = min(int(__float_as_uint(x) & MAGNITUDE), int(ONE)) + negative;
    const int steps = borders_below(tables.m_borders, tables.m_lowest, magnitude);
    // There is no number below the smallest one, but one more above zero.
    return max(ZERO_OF_M + (negative ? -steps : steps), 0);
}

// The largest magnitude of a warp's numbers, by their bits.
__device__ __forceinline__ int warp_most(int x) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, with));
    return x;
}

// A lane's elements of a block are four from 4 * lane and four from 128 + 4 * lane, so that a warp reads and writes whole lines.
constexpr int PER_LANE = 4, HALVES = 2;
__device__ __forceinline__ unsigned place(int half) { return half * (BLOCK / 2) + (threadIdx.x & 31) * PER_LANE; }

// Rounds a block of a lane's numbers; gives the block's scale. Elements from `count` on are zero and are not written.
template <bool SIGNED>
__device__ __forceinline__ float put_codes(const Tables& tables, const float (&x)[HALVES][PER_LANE], unsigned char* codes,
                                           unsigned count, bool keep_sign) {
    int most = 0;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) most = max(most, int(__float_as_uint(x[h][i]) & MAGNITUDE));
    }
    const float absmax = __uint_as_float(unsigned(warp_most(most))), scale = block_scale(absmax);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        Elements<unsigned char, PER_LANE> found;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float scaled = __fmul_rn(x[h][i], scale);
            int code = SIGNED ? signed_code(tables, scaled) : unsigned_code(tables, scaled);
            // Negative numbers but zero itself stay below zero's code.
            const int bits = int(__float_as_uint(x[h][i]));
            if (SIGNED && keep_sign && bits < 0 && (bits & int(MAGNITUDE)) != 0) code = min(code, ZERO_OF_M - 1);
            found.at[i] = static_cast<unsigned char>(code);
        }
        // Records are aligned, and so are blocks in them.
        write<unsigned char, PER_LANE>(codes, place(h), found, count, place(h) + PER_LANE <= count);
    }
    return absmax;
}

// Where 8-bit moments rest.
struct Codes {
    unsigned char *m, *v;
    float *m_absmax, *v_absmax;
};

// One block, by a warp: `first` is its first element and `count` how many it has. Gives whether all gradients were finite.
template <class M, class C, class G>
__device__ __forceinline__ bool adamw_block(const Tables& tables, const Coefficients& c, const Codes& codes, M* weights, C* copy,
                                            const G* grads, unsigned first, unsigned count, float scale, const Draws& draws,
                                            bool aligned) {
    const unsigned block = first / BLOCK;
    const float m_scale = codes.m_absmax[block], v_scale = codes.v_absmax[block];
    float m[HALVES][PER_LANE], v[HALVES][PER_LANE];
    bool finite = true;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const unsigned at = place(h);
        const bool whole = aligned && at + PER_LANE <= count;
        Elements<G, PER_LANE> g;
        Elements<M, PER_LANE> w;
        Elements<C, PER_LANE> copied;
        Elements<unsigned char, PER_LANE> m8, v8;
        read<G, PER_LANE>(g, grads + first, at, count, whole);
        read<M, PER_LANE>(w, weights + first, at, count, whole);
        read<unsigned char, PER_LANE>(m8, codes.m + first, at, count, at + PER_LANE <= count);
        read<unsigned char, PER_LANE>(v8, codes.v + first, at, count, at + PER_LANE <= count);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            m[h][i] = v[h][i] = 0.0f;
            if (at + i >= count) continue;
            const float grad = __fmul_rn(to_float(g.at[i]), scale);
            float x = to_float(w.at[i]);
            // An element whose gradient is not finite gets zero moments and keeps its weight.
            if (is_finite(grad)) {
                const float m_old = __fmul_rn(tables.m_values[m8.at[i]], m_scale);
                const float v_old = __fmul_rn(tables.v_values[v8.at[i]], v_scale);
                m[h][i] = __fadd_rn(__fmul_rn(m_old, c.beta1), __fmul_rn(c.one_minus_beta1, grad));
                v[h][i] = second_moment(c, v_old, grad);
                x = adamw_step(c, x, m[h][i], v[h][i]);
            } else {
                finite = false;
            }
            put_master(w.at[i], x, draws, draws.element + first + at + i);
            put_copy(copied.at[i], x);
        }
        write(weights + first, at, w, count, whole);
        write(copy + first, at, copied, count, whole);
    }
    const float m_absmax = put_codes<true>(tables, m, codes.m + first, count, true);
    const float v_absmax = put_codes<false>(tables, v, codes.v + first, count, false);
    if ((threadIdx.x & 31) == 0) {
        codes.m_absmax[block] = m_absmax;
        codes.v_absmax[block] = v_absmax;
    }
    return finite;
}
