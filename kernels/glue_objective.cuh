// The objective's gradient in closed form (src/diffusion/objective.rs). No kernels.
#pragma once
#include "glue_pointwise.cuh"

constexpr unsigned ROW_THREADS = 256;

// A block a row: gradient = factor (prediction - target) in f64, rounded to f32, times scale; what of the prediction has no
// target gets zero. row_mse = the mean of the squared differences. The gradient is the CPU's to the bit; the mean is summed in
// another order, in f64.
template <class T>
__device__ __forceinline__ void loss_gradient(const T* prediction, const float* target, const double* factors, float scale,
                                              T* gradient, double* row_mse, unsigned used, unsigned predicted) {
    __shared__ double shared[ROW_THREADS / 32];
    const unsigned row = blockIdx.x;
    const double factor = factors[row];
    prediction += size_t(row) * predicted;
    gradient += size_t(row) * predicted;
    target += size_t(row) * used;
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < predicted; i += ROW_THREADS) {
        float slope = 0.0f;
        if (i < used) {
            const double difference = double(__fsub_rn(to_float(prediction[i]), target[i]));
            sum += difference * difference;
            slope = __fmul_rn(float(factor * difference), scale);
        }
        gradient[i] = from_float<T>(slope);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (unsigned w = 0; w < ROW_THREADS / 32; w++) total += shared[w];
        row_mse[row] = total / double(used);
    }
}
