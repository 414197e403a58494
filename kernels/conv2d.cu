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

// What is copied and not gathered: `whole` is true. Bodies are left out of Turing's code, where nobody asks.
#ifdef __CUDA_ARCH__
constexpr bool COPIES = __CUDA_ARCH__ >= 800;
#else
constexpr bool COPIES = false;
#endif

// Forward and data gradient, from an image with channels last or from planes as they are.
#define COPIED_PIXELS(T, NAME, BM, BN, AT_ONCE)                                                                        \
    extern "C" __global__ void __launch_bounds__(128, AT_ONCE)                                                               \
        conv2d_copied_pixels_##NAME##_##T(PIXELS_ARGUMENTS(T)) {                                                       \
        PIXELS_GIVEN(T)                                                                                                \
        if constexpr (COPIES) copied_product<T, BM, BN, 2, 2, CopiedPixels<T, BN, 128>>(a, source, shape, out, part);  \
    }                                                                                                                  \
    EXPORT(conv2d_copied_pixels_##NAME##_##T)                                                                          \
    extern "C" __global__ void __launch_bounds__(128, AT_ONCE)                                                               \
        conv2d_copied_planes_##NAME##_##T(PIXELS_ARGUMENTS(T)) {                                                       \
        PIXELS_GIVEN(T)                                                                                                \
        if constexpr (COPIES) copied_product<T, BM, BN, 2, 2, CopiedPlanes<T, BN, 128>>(a, source, shape, out, part);  \
    }                                                                                                                  \
    EXPORT(conv2d_copied_planes_##NAME##_##T)
#define COPIED_ALL_PIXELS(T)                                                                                           \
    COPIED_PIXELS(T, large, 128, 128, 2) COPIED_PIXELS(T, wide, 64, 128, 3) COPIED_PIXELS(T, small, 64, 64, 4)
COPIED_ALL_PIXELS(f16)
COPIED_ALL_PIXELS(bf16)

// Gradients of weights of nine taps, from an image with channels last.
#define COPIED_TAPS(T, NAME, BM)                                                                                       \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                               \
        conv2d_copied_taps_##NAME##_##T(WEIGHTS_ARGUMENTS(T)) {                                                        \
        WEIGHTS_GIVEN(T)                                                                                               \
        if constexpr (COPIES) copied_taps<T, BM>(a, x, shape, out, part);                                              \
    }                                                                                                                  \
    EXPORT(conv2d_copied_taps_##NAME##_##T)
// Of weights of one tap, with neither stride nor padding: columns are planes.
#define COPIED_COLUMNS(T, NAME, BM, BN)                                                                                \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                               \
        conv2d_copied_columns_##NAME##_##T(WEIGHTS_ARGUMENTS(T)) {                                                     \
        WEIGHTS_GIVEN(T)                                                                                               \
        const Rows<T> columns{x, channels, height * width, a.depth, true};                                             \
        if constexpr (COPIES) copied_product<T, BM, BN, 2, 2, CopiedRows<T, BN, 128>>(a, columns, shape, out, part);   \
    }                                                                                                                  \
    EXPORT(conv2d_copied_columns_##NAME##_##T)
#define COPIED_WEIGHTS(T)                                                                                              \
    COPIED_TAPS(T, large, 128) COPIED_TAPS(T, small, 64)                                                               \
    COPIED_COLUMNS(T, large, 128, 128) COPIED_COLUMNS(T, small, 64, 64)
COPIED_WEIGHTS(f16)
COPIED_WEIGHTS(bf16)

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

// The same for halves, nine taps, and orders 1 and 2, where inputs and outputs are multiples of 32 and addresses of 4: two
// numbers at a time, and all divisions by constants.
template <class T, bool BACKWARD> __device__ __forceinline__ void turn_nine(const T* from, T* to, int outputs, int inputs) {
    constexpr int SIDE = 32, TAPS = 9, ROW = SIDE * TAPS, PAIRS = SIDE / 2;
    // Two numbers more a row: then sixteen rows, and sixteen channels, lie on different banks.
    constexpr int PITCH = ROW + 2;
    __shared__ __align__(16) T held[SIDE * PITCH];
    const int output = blockIdx.y * SIDE, input = blockIdx.x * SIDE;
    for (int i = threadIdx.x; i < SIDE * ROW / 2; i += 256) {
        const int o = i / (ROW / 2), at = i % (ROW / 2) * 2;
        store<T, 2>(held + o * PITCH + at, load<T, 2>(from + ((long long)(output + o) * inputs + input) * TAPS + at));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SIDE * ROW / 2; i += 256) {
        const int two = i % PAIRS * 2, tap = i / PAIRS % TAPS, slow = i / PAIRS / TAPS;
        const int at = BACKWARD ? two * PITCH + slow * TAPS + tap : slow * PITCH + two * TAPS + tap;
        const long long place = BACKWARD ? ((long long)(input + slow) * TAPS + tap) * outputs + output + two
                                         : ((long long)(output + slow) * TAPS + tap) * inputs + input + two;
        store<T, 2>(to + place, {held[at], held[at + (BACKWARD ? PITCH : TAPS)]});
    }
}

#define TURN_NINE(T)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        conv2d_turn_nine_##T(const T* from, T* to, int outputs, int inputs, int order) {                               \
        if (order == 1) {                                                                                              \
            turn_nine<T, true>(from, to, outputs, inputs);                                                             \
        } else {                                                                                                       \
            turn_nine<T, false>(from, to, outputs, inputs);                                                            \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT(conv2d_turn_nine_##T)
TURN_NINE(f16)
TURN_NINE(bf16)

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
