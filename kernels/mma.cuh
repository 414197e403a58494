// Tensor cores and asynchronous copies as functions: PTX under nvcc, loops in emulate/mma.h otherwise.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"), with g = lane / 4 and t = lane % 4, two halves a register:
//   A 16x16  a[0]: row g, columns 2t 2t+1;  a[1]: row g+8;  a[2]: row g, columns 2t+8 2t+9;  a[3]: row g+8, the same
//   B 16x8   b[0]: rows 2t 2t+1, column g;  b[1]: rows 2t+8 2t+9
//   D 16x8   d[0] d[1]: row g, columns 2t 2t+1;  d[2] d[3]: row g+8
// ldmatrix reads 8x8 blocks of halves: lanes 8i..8i+7 bring the addresses of the rows of block i (16 bytes each,
// aligned so); a lane gets of block i in r[i] row g, columns 2t 2t+1 (transposed: rows 2t 2t+1 of column g).
#pragma once

#include "common.cuh"

#ifndef __CUDACC__
#include "emulate/mma.h"
#endif

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void ldmatrix(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// Lanes 16..31 bring no addresses that count (but must come, and on 7.5 with valid ones).
__device__ __forceinline__ void ldmatrix(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// d += a b with a 16x8 and b 8x8 in f16: Turing's instruction.
__device__ __forceinline__ void mma_k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// d += a b with a 16x16 and b 16x8 in T; before 8.0 in f16 only, as two products of half the depth.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) = delete;
template <> __device__ __forceinline__ void mma<f16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_k8(d, a[0], a[1], b[0]);
    mma_k8(d, a[2], a[3], b[1]);
#endif
}
template <> __device__ __forceinline__ void mma<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// x with tf32's ten bits after the point, ties away from zero; from 8.0, as is the product.
__device__ __forceinline__ unsigned tf32(float x) {
    unsigned bits = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    __trap();
#endif
    return bits;
}
// d += a b with a 16x8 and b 8x8 in tf32. A number a register:
//   A a[0]: row g, column t;  a[1]: row g+8;  a[2]: row g, column t+4;  a[3]: row g+8, the same
//   B b[0]: row t, column g;  b[1]: row t+4
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// Copies 16 bytes to shared memory in the background, from 8.0; `valid` of them (0 to 16), the rest are zeros. Both
// addresses are multiples of 16, also that of a source that is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int valid = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (valid == 16) {
        value = *reinterpret_cast<const uint4*>(from);
    } else if (valid > 0) {
        for (int i = 0; i < valid; i++) {
            reinterpret_cast<unsigned char*>(&value)[i] = reinterpret_cast<const unsigned char*>(from)[i];
        }
    }
    *reinterpret_cast<uint4*>(to) = value;
#endif
}
// The same with 4 bytes.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, int valid = 4) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
#else
    *reinterpret_cast<unsigned*>(to) = valid == 4 ? *reinterpret_cast<const unsigned*>(from) : 0u;
#endif
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most LEFT of this thread's latest groups are on their way. Others see them after a barrier.
template <int LEFT> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

#endif
