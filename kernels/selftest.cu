// What a device must get right before it is trusted: launching, indexing, shared memory, a barrier, arithmetic.
//
// Its counterpart is `src/device/cuda/selftest.rs`.

#include "common.cuh"

// Block b of 256 threads writes to out[b] the exact sum of b * 256 + t over its threads t, by a tree.
extern "C" __global__ void selftest_sums(unsigned *out, unsigned blocks) {
    __shared__ unsigned partial[256];
    partial[threadIdx.x] = blockIdx.x * 256 + threadIdx.x;
    __syncthreads();
    for (unsigned width = 128; width > 0; width >>= 1) {
        if (threadIdx.x < width) {
            partial[threadIdx.x] += partial[threadIdx.x + width];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0 && blockIdx.x < blocks) {
        out[blockIdx.x] = partial[0];
    }
}

EXPORT(selftest_sums)
