// Small kernels, right and wrong ones, that src/kernels/emulated/tests.rs tries the emulator with. Not for GPUs.

#include "../mma.cuh"

// y[i] = the sum of the block's x, in two ways that must agree: -1 where they do not.
extern "C" __global__ void probe_sums(const float* x, float* y, int n) {
    DYNAMIC_SHARED(float, held);
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    held[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    float sum = block_sum<64>(held[(threadIdx.x + 1) % 64]), plain = 0;
    for (int k = 0; k < 64; k++) {
        plain += held[k];
    }
    if (i < n) {
        y[i] = fabsf(sum - plain) < 1e-4f ? sum : -1.0f;
    }
}
EXPORT(probe_sums)

// 0: right; 1: no barrier; 2: barriers in two places; 3: a lane that waits for others of its warp; 4: past the dynamic
// shared memory; 5: past an array; 6: a vector that is not aligned; 7: past the end of y; 8: asks for a lane's vote
// that left; 9: deep recursion.
__device__ float deep(volatile float* y, int n) {
    volatile float here[1000];
    here[n % 1000] = y[0];
    return n == 0 ? 0.0f : deep(here, n - 1) + here[1];
}
extern "C" __global__ void probe_faults(float* y, int fault) {
    DYNAMIC_SHARED(float, held);
    __shared__ float fixed[64];
    int t = threadIdx.x;
    held[t] = fixed[t] = float(t);
    if (fault != 1) {
        __syncthreads();
    }
    float got = held[(t + 1) % 64];
    if (fault == 2) {
        if (t < 32) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    } else if (fault == 3) {
        if (t == 5) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    } else if (fault == 4) {
        held[t + 1] = 1.0f;
    } else if (fault == 5) {
        got += fixed[t + 1];
    } else if (fault == 6) {
        got += reinterpret_cast<const float4*>(held + 1)->x;
    } else if (fault == 7) {
        got += y[4 * 64 + t];
    } else if (fault == 8) {
        got += __shfl_xor_sync(0x0f0f0f0fu, got, 4);
    } else if (fault == 9) {
        got += deep(y, 1000);
    }
    y[blockIdx.x * 64 + t] = got;
}
EXPORT(probe_faults)

// y = a b with a (16, 16) and b (16, 8) in halves; rows of shared memory are padded to `room` halves.
template <class T> __device__ void product(const T* a, const T* b, float* y, int room) {
    DYNAMIC_SHARED(T, held);
    T* right = held + 16 * room;
    int lane = threadIdx.x;
    if (lane < 32) {
        copy_async_16(held + lane / 2 * room + lane % 2 * 8, a + lane * 8);
        if (lane < 16) {
            copy_async_16(right + lane * room, b + lane * 8);
        }
        copy_commit();
        copy_wait<0>();
    }
    __syncthreads();
    if (lane < 32) {
        unsigned left[4], both[2];
        ldmatrix(left, held + (lane % 8 + lane / 8 % 2 * 8) * room + lane / 16 * 8);
        ldmatrix_transposed(both, right + lane % 16 * room);
        float d[4] = {};
        mma<T>(d, left, both);
        for (int i = 0; i < 4; i++) {
            y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
        }
    }
}
extern "C" __global__ void probe_product_f16(const f16* a, const f16* b, float* y, int room) { product(a, b, y, room); }
EXPORT(probe_product_f16)
extern "C" __global__ void probe_product_bf16(const bf16* a, const bf16* b, float* y, int room) {
    product(a, b, y, room);
}
EXPORT(probe_product_bf16)

// y[t] = x[t], copied in the background in two groups of which `waited` are waited for.
extern "C" __global__ void probe_copies(const float* x, float* y, int waited) {
    DYNAMIC_SHARED(float, held);
    int t = threadIdx.x;
    copy_async_4(held + t, x + t);
    copy_commit();
    copy_async_4(held + 64 + t, x + 64 + t, t % 2 * 4);
    copy_commit();
    if (waited == 2) {
        copy_wait<0>();
    } else if (waited == 1) {
        copy_wait<1>();
    }
    if (blockIdx.x == 0) {
        y[t] = held[t];
        y[64 + t] = held[64 + t];
    }
}
EXPORT(probe_copies)

// Of 40 threads: shuffles of parts of warps, votes.
extern "C" __global__ void probe_warps(int* y) {
    int t = threadIdx.x, lane = t % 32;
    unsigned all = t < 32 ? ALL_LANES : 0xffu;
    y[t] = __shfl_down_sync(all, lane, 2, 8);
    y[64 + t] = __shfl_up_sync(all, lane, 3, 8);
    y[128 + t] = __shfl_sync(all, lane, 1, 4);
    y[192 + t] = int(__ballot_sync(all, lane % 3 == 0));
    if (lane < 8) {
        y[t] += 1000 * __shfl_xor_sync(0xffu, lane, 4);
    }
}
EXPORT(probe_warps)
