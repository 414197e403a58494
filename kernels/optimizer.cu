// AdamW over a run of elements in one pass: reads master weights, moments and gradients once, writes weights, moments and the
// half-precision copy once. `adamw` has 32-bit moments, `adamw8` blockwise 8-bit ones. The bits are those of src/optim on the
// CPU, so where the state rests does not show in a run's numbers.
//
// Names: adamw_MASTER_COPY_GRADIENTS, e.g. adamw_f32_bf16_f32; a copy of `none` is no copy. bf16 masters are rounded
// stochastically. Every gradient is multiplied by `scale`; *overflow becomes 1 if one is not finite after that.
//
// Arithmetic is far from being the limit: 28 bytes an element for f32 leave a hundred instructions and more.
#include "optimizer_codes.cuh"

template <class M, class C, class G>
__device__ __forceinline__ void adamw(const Coefficients& c, M* weights, C* copy, const G* grads, float* m, float* v,
                                      size_t count, float scale, const Draws& draws, int aligned,
                                      unsigned* overflow) {
    constexpr int N = 4;
    const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= count) return;
    const bool whole = aligned && at + N <= count;
    Elements<G, N> g;
    Elements<M, N> w;
    Elements<C, N> copied;
    Elements<float, N> m_run, v_run;
    read<G, N>(g, grads, at, count, whole);
    read<float, N>(m_run, m, at, count, whole);
    read<float, N>(v_run, v, at, count, whole);
    read<M, N>(w, weights, at, count, whole);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (at + i >= count) continue;
        const float grad = __fmul_rn(to_float(g.at[i]), scale);
        finite &= is_finite(grad);
        const float m_new = __fadd_rn(m_run.at[i], __fmul_rn(__fsub_rn(grad, m_run.at[i]), c.one_minus_beta1));
        const float v_new = second_moment(c, v_run.at[i], grad);
        float x = adamw_step(c, to_float(w.at[i]), m_new, v_new);
        m_run.at[i] = m_new;
        v_run.at[i] = v_new;
        put_master(w.at[i], x, draws, draws.element + unsigned(at) + i);
        put_copy(copied.at[i], x);
    }
    write(m, at, m_run, count, whole);
    write(v, at, v_run, count, whole);
    write(weights, at, w, count, whole);
    write(copy, at, copied, count, whole);
    if (!finite) atomicOr(overflow, 1u);
}

// A warp a block, the grid's warps taking blocks in turn: one block of 32 warps on each multiprocessor, so that each brings the
// tables once. Dynamic shared memory: the tables.
template <class M, class C, class G>
__device__ __forceinline__ void adamw8(const Coefficients& c, M* weights, C* copy, const G* grads, const Codes& codes,
                                       unsigned count, const unsigned* tables_from, Book m_book, Book v_book,
                                       float scale, const Draws& draws, int aligned, unsigned* overflow,
                                       unsigned* shared) {
    const Tables tables = bring_tables(tables_from, m_book, v_book, shared);
    __syncthreads();
    const unsigned warps = gridDim.x * (blockDim.x / 32), blocks = (count + BLOCK - 1) / BLOCK;
    bool finite = true;
    for (unsigned block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const unsigned first = block * BLOCK;
        finite &= adamw_block(tables, c, codes, weights, copy, grads, first, min(BLOCK, count - first), scale, draws,
                              aligned != 0);
    }
    if (!finite) atomicOr(overflow, 1u);
}

#define UPDATE_ARGUMENTS                                                                                                     \
    float decay, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, float correction2_root,             \
        float epsilon, float step_size, float scale, unsigned first_key, unsigned second_key,         \
        unsigned element, int aligned, unsigned *overflow
#define COEFFICIENTS                                                                                                         \
    { decay, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2_root, epsilon, step_size }
#define DRAWS                                                                                                                \
    { first_key, second_key, element }

#define ADAMW(M, C, G, name)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        adamw_##name(M* weights, C* copy, const G* grads, float* m, float* v, uint64_t count, UPDATE_ARGUMENTS) {            \
        adamw<M, C, G>(COEFFICIENTS, weights, copy, grads, m, v, count, scale, DRAWS, aligned, overflow);          \
    }                                                                                                                        \
    EXPORT(adamw_##name)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(1024)                                                                       \
        adamw8_##name(M* weights, C* copy, const G* grads, unsigned char* m8, unsigned char* v8, float* m_absmax,            \
                      float* v_absmax, unsigned count, const unsigned* tables, unsigned m_runs, unsigned m_lowest,           \
                      unsigned v_runs, unsigned v_lowest, UPDATE_ARGUMENTS) {                                                \
        DYNAMIC_SHARED(unsigned, shared);                                                                                    \
        adamw8<M, C, G>(COEFFICIENTS, weights, copy, grads, {m8, v8, m_absmax, v_absmax}, count, tables,                     \
                        {m_runs, int(m_lowest)}, {v_runs, int(v_lowest)}, scale, DRAWS, aligned, overflow, shared); \
    }                                                                                                                        \
    EXPORT(adamw8_##name)

#define ADAMW_GRADIENTS(M, C, name)                                                                                          \
    ADAMW(M, C, float, name##_f32)                                                                                           \
    ADAMW(M, C, bf16, name##_bf16)
#define ADAMW_COPIES(M, name)                                                                                                \
    ADAMW_GRADIENTS(M, Nothing, name##_none)                                                                                 \
    ADAMW_GRADIENTS(M, f16, name##_f16)                                                                                      \
    ADAMW_GRADIENTS(M, bf16, name##_bf16)

ADAMW_COPIES(float, f32)
ADAMW_COPIES(bf16, bf16)

// Codes and scales of f32 numbers, and back: a warp a block.
template <bool SIGNED>
__device__ __forceinline__ void quantize(const float* values, unsigned char* codes, float* absmax, unsigned count,
                                         const Tables& tables) {
    const unsigned block = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, first = block * BLOCK;
    if (first >= count) return;
    const unsigned here = min(BLOCK, count - first);
    float x[HALVES][PER_LANE];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) x[h][i] = place(h) + i < here ? values[first + place(h) + i] : 0.0f;
    }
    const float most = put_codes<SIGNED>(tables, x, codes + first, here, false);
    if ((threadIdx.x & 31) == 0) absmax[block] = most;
}

#define QUANTIZE(name, SIGNED)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                        \
        quantize_##name(const float* values, unsigned char* codes, float* absmax, unsigned count, const unsigned* tables,    \
                        unsigned m_runs, unsigned m_lowest, unsigned v_runs, unsigned v_lowest) {                            \
        DYNAMIC_SHARED(unsigned, shared);                                                                                    \
        const Tables here = bring_tables(tables, {m_runs, int(m_lowest)}, {v_runs, int(v_lowest)}, shared);                  \
        __syncthreads();                                                                                                     \
        quantize<SIGNED>(values, codes, absmax, count, here);                                                                \
    }                                                                                                                        \
    EXPORT(quantize_##name)

QUANTIZE(signed, true)
QUANTIZE(unsigned, false)

// `book`: the 256 numbers of the book.
extern "C" __global__ void __launch_bounds__(256)
    dequantize_f32(const unsigned char* codes, const float* absmax, float* values, unsigned count, const float* book) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) values[i] = __fmul_rn(book[codes[i]], absmax[i / BLOCK]);
}
EXPORT(dequantize_f32)
