// 2-D convolution: pixels (forward, data gradient), weights' gradients, and what goes with them. Launch configurations
// are in src/kernels/conv2d.rs.

#include "conv2d_products.cuh"

#define SHAPE                                                                                                          \
    int images, int channels, int height, int width, int out_height, int out_width, int kh, int kw, int stride,        \
        int top, int left
#define GIVEN(backward, by_tap)                                                                                        \
    {images, channels, height, width, out_height, out_width, kh, kw, stride, top, left, backward, by_tap}

// Pixels: y = weight (rows, channels * kh * kw) times the patches of the source, plus bias.
#define PIXELS_ARGUMENTS(T)                                                                                            \
    const T *weight, const T *source, const T *bias, T *y, float *parts, int rows, int part, int whole, int backward,  \
        int by_tap, SHAPE
#define PIXELS_GIVEN(T)                                                                                                \
    const Rows<T> a{weight, rows, channels * kh * kw, channels * kh * kw, whole != 0};                                 \
    const Shape shape GIVEN(backward, by_tap);                                                                         \
    const Out<T> out{y, nullptr, bias, parts, rows, images * out_height * out_width, out_height * out_width};

// Gradients of weights: (rows, channels * kh * kw) += dy times the patches of x turned. The depth is all pixels of dy.
#define WEIGHTS_ARGUMENTS(T)                                                                                           \
    const T *dy, const T *x, float *gradient, float *parts, int rows, int part, int whole, SHAPE
#define WEIGHTS_GIVEN(T)                                                                                               \
    const Rows<T> a{dy, rows, out_height * out_width, images * out_height * out_width, whole != 0};                    \
    const Shape shape GIVEN(0, 0);                                                                                     \
    const Out<T> out{nullptr, gradient, nullptr, parts, rows, channels * kh * kw, 1};

#define HALVES(T, NAME, BM, BN, WM, WN)                                                                                \
    extern "C" __global__ void __launch_bounds__(32 * WM * WN) conv2d_pixels_##NAME##_##T(PIXELS_ARGUMENTS(T)) {       \
        PIXELS_GIVEN(T)                                                                                                \
        product<T, BM, BN, WM, WN, Pixels<T, BN, DEPTH, 32 * WM * WN>>(a, source, shape, out, part);                   \
    }                                                                                                                  \
    EXPORT(conv2d_pixels_##NAME##_##T)                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WM * WN) conv2d_weights_##NAME##_##T(WEIGHTS_ARGUMENTS(T)) {     \
        WEIGHTS_GIVEN(T)                                                                                               \
        product<T, BM, BN, WM, WN, Taps<T, BN, DEPTH, 32 * WM * WN>>(a, x, shape, out, part);                          \
    }                                                                                                                  \
    EXPORT(conv2d_weights_##NAME##_##T)
HALVES(f16, large, 128, 128, 2, 4)
HALVES(f16, small, 64, 64, 2, 2)
HALVES(bf16, large, 128, 128, 2, 4)
HALVES(bf16, small, 64, 64, 2, 2)

#define WHOLES(NAME, TF32)                                                                                             \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS) conv2d_pixels_small_##NAME(PIXELS_ARGUMENTS(float)) {  \
        PIXELS_GIVEN(float)                                                                                            \
        exact_product<ExactPixels, TF32>(a, source, shape, out, part);                                                 \
    }                                                                                                                  \
    EXPORT(conv2d_pixels_small_##NAME)                                                                                 \
    extern "C" __global__ void __launch_bounds__(EXACT_THREADS)                                                        \
        conv2d_weights_small_##NAME(WEIGHTS_ARGUMENTS(float)) {                                                        \
        WEIGHTS_GIVEN(float)                                                                                           \
        exact_product<ExactTaps, TF32>(a, x, shape, out, part);                                                        \
    }                                                                                                                  \
    EXPORT(conv2d_weights_small_##NAME)
WHOLES(f32, false)
WHOLES(tf32, true)

// y (images, rows, plane) = the sum of the parts, in their order, plus bias.
template <class T>
__device__ __forceinline__ void sum_pixels(const float* parts, int count, const T* bias, T* y, long long size, int rows,
                                           int plane) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size;
         i += (long long)gridDim.x * blockDim.x) {
        float sum = bias ? to_float(bias[i / plane % rows]) : 0.0f;
        for (int part = 0; part < count; part++) {
            sum += parts[part * size + i];
        }
        y[i] = from_float<T>(sum);
    }
}

// gradient += the sum of the parts, in their order.
extern "C" __global__ void conv2d_sum_weights(const float* parts, int count, float* gradient, long long size) {
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size;
         i += (long long)gridDim.x * blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < count; part++) {
            sum += parts[part * size + i];
        }
        gradient[i] += sum;
    }
}
EXPORT(conv2d_sum_weights)

// gradient (rows) += the sums of dy (images, rows, plane), a block for each.
template <class T> __device__ __forceinline__ void sum_channel(const T* dy, float* gradient, int images, int plane) {
    float sum = 0.0f;
    for (int image = 0; image < images; image++) {
        const T* from = dy + ((long long)image * gridDim.x + blockIdx.x) * plane;
        for (int i = threadIdx.x; i < plane; i += 256) {
            sum += to_float(from[i]);
        }
    }
    const double total = block_sum<256>(double(sum));
    if (threadIdx.x == 0) {
        gradient[blockIdx.x] = float(gradient[blockIdx.x] + total);
    }
}

// A weight with its kernels elsewhere: from (outputs, inputs, taps) to 0: (inputs, outputs, taps), 1: (inputs, taps,
// outputs), both for the data gradient, or 2: (outputs, taps, inputs). A block turns side x side kernels, so that both
// are read and written in runs.
template <class T>
__device__ __forceinline__ void turn(const T* from, T* to, int outputs, int inputs, int taps, int side, int order) {
    DYNAMIC_SHARED(T, held);
    const int output = blockIdx.y * side, input = blockIdx.x * side, row = side * taps;
    for (int i = threadIdx.x; i < side * row; i += blockDim.x) {
        const int o = output + i / row, c = input + i % row / taps;
        if (o < outputs && c < inputs) {
            held[i] = from[((long long)o * inputs + input) * taps + i % row];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < side * row; i += blockDim.x) {
        const int slow = i / row, fast = order == 0 ? i % row / taps : i % side;
        const int tap = order == 0 ? i % taps : i % row / side;
        const int o = order == 2 ? slow : fast, c = order == 2 ? fast : slow;
        if (output + o >= outputs || input + c >= inputs) {
            continue;
        }
        const long long at = order == 0   ? ((long long)(input + c) * outputs + output + o) * taps + tap
                             : order == 1 ? ((long long)(input + c) * taps + tap) * outputs + output + o
                                          : ((long long)(output + o) * taps + tap) * inputs + input + c;
        to[at] = held[o * row + c * taps + tap];
    }
}

#define OTHERS(T, NAME)                                                                                                \
    extern "C" __global__ void conv2d_sum_pixels_##NAME(const float* parts, int count, const T* bias, T* y,            \
                                                        long long size, int rows, int plane) {                         \
        sum_pixels<T>(parts, count, bias, y, size, rows, plane);                                                       \
    }                                                                                                                  \
    EXPORT(conv2d_sum_pixels_##NAME)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv2d_bias_##NAME(const T* dy, float* gradient, int images, int plane) {                                      \
        sum_channel<T>(dy, gradient, images, plane);                                                                   \
    }                                                                                                                  \
    EXPORT(conv2d_bias_##NAME)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv2d_turn_##NAME(const T* from, T* to, int outputs, int inputs, int taps, int side, int order) {             \
        turn<T>(from, to, outputs, inputs, taps, side, order);                                                         \
    }                                                                                                                  \
    EXPORT(conv2d_turn_##NAME)
OTHERS(float, f32)
OTHERS(f16, f16)
OTHERS(bf16, bf16)
