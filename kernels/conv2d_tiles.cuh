// Operands of convolutions as matrix products. Images are (images, channels, height, width), weights (outputs, inputs,
// kh, kw), both as candle has them.
//
// Forward and data gradient: rows are output channels, columns are pixels of all images, the sum goes over channels of
// the source and taps. Weight gradient: rows are output channels, columns are input channels and taps, the sum goes
// over pixels of all images. What is summed over is called depth. The patches of an image are never written to memory:
// a block's threads gather the elements they stand for, into registers while the tile before is multiplied.
//
// What is gathered costs fewest instructions if depths go by taps and then channels: then the weight is turned first (a
// copy in scratch), which pays but for few pixels. An NHWC copy of the images would let tiles be copied 16 bytes at a
// time, but the weights would have to be turned as
// well at every call, or their gradients; for the deep layers (1280 channels, 8 x 8 pixels) that is most of the
// traffic. Gathering costs about as many instructions as an A100's tensor cores leave free, and a quarter of what those
// of consumer cards do.
#pragma once

#include "attention_tiles.cuh"

// A convolution's shape. The source is what is gathered from: x, or dy for the data gradient.
struct Shape {
    int images, channels;
    int height, width;
    // Of the result that pixels are computed of.
    int out_height, out_width;
    int kh, kw, stride, top, left;
    // Data gradient: the source's pixel of (y, tap) is (y + top - tap) / stride, if that is whole.
    int backward;
    // Depths are taps by channels (which are a multiple of 8), not channels by taps.
    int by_tap;
};

// The pixel of the source that a tap reaches, or -1.
__device__ __forceinline__ int reached(const Shape& s, int y, int x, int ky, int kx) {
    int sy, sx;
    if (s.backward) {
        sy = y + s.top - ky;
        sx = x + s.left - kx;
        if (sy < 0 || sx < 0 || sy % s.stride || sx % s.stride) {
            return -1;
        }
        sy /= s.stride;
        sx /= s.stride;
    } else {
        sy = y * s.stride - s.top + ky;
        sx = x * s.stride - s.left + kx;
    }
    return sy >= 0 && sy < s.height && sx >= 0 && sx < s.width ? sy * s.width + sx : -1;
}

// Left operand: element (m, k) lies at ((k / span) * rows + m) * span + k % span: a matrix whose rows follow each other
// (span is the depth), or images (span is a plane).
template <class T> struct Rows {
    const T* from;
    int rows, span, depth;
    // Eight elements from a multiple of eight on can be copied at once.
    bool whole;

    __device__ __forceinline__ const T* at(int m, int k) const {
        return from + ((long long)(k / span) * rows + m) * span + k % span;
    }

    // Begins to copy rows m.. and depths k.. into a tile of BM x BK.
    template <int BM, int BK, int THREADS>
    __device__ __forceinline__ void load(T* tile, int m, int k, int until) const {
        constexpr int CHUNKS = BK / 8;
#pragma unroll
        for (int i = threadIdx.x; i < BM * CHUNKS; i += THREADS) {
            const int row = m + i / CHUNKS, depth_at = k + i % CHUNKS * 8;
            T* to = tile + place<BK>(i / CHUNKS, i % CHUNKS);
            if (whole) {
                const bool there = row < rows && depth_at < until;
                copy_async_16(to, there ? at(row, depth_at) : from, there ? 16 : 0);
            } else {
                for (int j = 0; j < 8; j++) {
                    const bool there = row < rows && depth_at + j < until;
                    to[j] = there ? *at(row, depth_at + j) : from_float<T>(0.0f);
                }
            }
        }
    }
};

// Where a sum over channels and taps is.
struct Step {
    int channel, tap;

    __device__ __forceinline__ void start(int k, int taps) {
        channel = k / taps;
        tap = k % taps;
    }
    // On by channels and fewer taps than there are.
    __device__ __forceinline__ void on(int channels, int by, int taps) {
        channel += channels;
        tap += by;
        if (tap >= taps) {
            tap -= taps;
            channel++;
        }
    }
};

// Right operand of forward and data gradient: columns are pixels, a thread has one of them.
template <class T, int BN, int BK, int THREADS> struct Pixels {
    static constexpr int CHUNKS = BN * BK / 8 / THREADS;
    // Which pixel each tap of each column reaches, (taps, BN); in shared memory.
    const int* table;
    // This thread's image, or null beyond the last.
    const T* image;
    int plane, channels, taps, column;
    bool by_tap;
    Step steps[CHUNKS];
    unsigned held[CHUNKS][4];

    // Fills the table: `first` is the first column of the block. A barrier must follow.
    __device__ __forceinline__ void start(const T* from, const Shape& s, int* to, int first, int k) {
        const int target = s.out_height * s.out_width, columns = s.images * target;
        table = to;
        plane = s.height * s.width;
        channels = s.channels;
        taps = s.kh * s.kw;
        by_tap = s.by_tap != 0;
        column = threadIdx.x % BN;
        const int mine = first + column;
        image = mine < columns ? from + (long long)(mine / target) * channels * plane : nullptr;
        for (int i = threadIdx.x; i < taps * BN; i += THREADS) {
            const int n = first + i % BN, tap = i / BN, pixel = n % target;
            to[i] = n < columns ? reached(s, pixel / s.out_width, pixel % s.out_width, tap / s.kw, tap % s.kw) : -1;
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int at = k + (int(threadIdx.x) / BN + THREADS / BN * i) * 8;
            steps[i].start(at, taps);
            if (by_tap) {
                steps[i] = {at % channels, at / channels};
            }
        }
    }

    // Reads this thread's elements of the next BK depths.
    __device__ __forceinline__ void gather() {
        if (by_tap) {
            gather_channels();
        } else {
            gather_taps();
        }
    }

    // Eight channels of one tap: the table is asked once.
    __device__ __forceinline__ void gather_channels() {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int pixel = steps[i].tap < taps ? table[steps[i].tap * BN + column] : -1;
            const T* from = image + ((long long)steps[i].channel * plane + pixel);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const unsigned low = pixel >= 0 ? bits_of(from[(long long)j * plane]) : 0u;
                const unsigned high = pixel >= 0 ? bits_of(from[(long long)(j + 1) * plane]) : 0u;
                held[i][j / 2] = low | high << 16;
            }
            steps[i].channel += BK;
            while (steps[i].channel >= channels) {
                steps[i].channel -= channels;
                steps[i].tap++;
            }
        }
    }

    __device__ __forceinline__ void gather_taps() {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            Step at = steps[i];
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const unsigned low = element(at);
                at.on(0, 1, taps);
                const unsigned high = element(at);
                at.on(0, 1, taps);
                held[i][j / 2] = low | high << 16;
            }
            steps[i].on(BK / taps, BK % taps, taps);
        }
    }

    __device__ __forceinline__ unsigned element(const Step& at) const {
        const int pixel = table[at.tap * BN + column];
        return pixel >= 0 && at.channel < channels ? bits_of(image[(long long)at.channel * plane + pixel]) : 0u;
    }

    __device__ __forceinline__ void put(T* tile) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            *reinterpret_cast<uint4*>(tile + place<BK>(column, threadIdx.x / BN + THREADS / BN * i)) = make_uint4(
                held[i][0], held[i][1], held[i][2], held[i][3]);
        }
    }
};

// Where a sum over pixels of all images is.
struct Pixel {
    int image, y, x;

    __device__ __forceinline__ void start(int k, const Shape& s) {
        const int target = s.out_height * s.out_width, pixel = k % target;
        image = k / target;
        y = pixel / s.out_width;
        x = pixel % s.out_width;
    }
    __device__ __forceinline__ void next(const Shape& s) {
        if (++x == s.out_width) {
            x = 0;
            if (++y == s.out_height) {
                y = 0;
                image++;
            }
        }
    }
};

// Right operand of the weight gradient: columns are input channels and taps, of which a thread has CHUNKS; eight
// depths, which are pixels, of each.
template <class T, int BN, int BK, int THREADS> struct Taps {
    static constexpr int CHUNKS = BN * BK / 8 / THREADS, LANES = BK / 8;
    const T* from;
    Shape s;
    int depth;
    int channel[CHUNKS], ky[CHUNKS], kx[CHUNKS];
    unsigned held[CHUNKS][4];

    __device__ __forceinline__ void start(const T* images, const Shape& shape, int*, int first, int k) {
        from = images;
        s = shape;
        depth = k + int(threadIdx.x) % LANES * 8;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int column = first + threadIdx.x / LANES + THREADS / LANES * i, taps = s.kh * s.kw;
            channel[i] = column / taps;
            ky[i] = column % taps / s.kw - s.top;
            kx[i] = column % taps % s.kw - s.left;
        }
    }

    __device__ __forceinline__ void gather() {
        Pixel at;
        at.start(depth, s);
        if (s.stride == 1 && s.out_width % 8 == 0) {
            gather_run(at);
        } else {
            gather_each(at);
        }
        depth += BK;
    }

    // Eight pixels of one line, which lie in one line of the source.
    __device__ __forceinline__ void gather_run(const Pixel& at) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int y = at.y + ky[i], x = at.x + kx[i];
            const bool line = at.image < s.images && channel[i] < s.channels && y >= 0 && y < s.height;
            const T* run = from + ((((long long)at.image * s.channels + channel[i]) * s.height + y) * s.width + x);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                const unsigned low = line && unsigned(x + j) < unsigned(s.width) ? bits_of(run[j]) : 0u;
                const unsigned high = line && unsigned(x + j + 1) < unsigned(s.width) ? bits_of(run[j + 1]) : 0u;
                held[i][j / 2] = low | high << 16;
            }
        }
    }

    __device__ __forceinline__ void gather_each(Pixel at) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            Pixel next = at;
            next.next(s);
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                held[i][j / 2] = element(at, i) | element(next, i) << 16;
            }
            at = next;
            at.next(s);
        }
    }

    __device__ __forceinline__ unsigned element(const Pixel& at, int i) const {
        const int y = at.y * s.stride + ky[i], x = at.x * s.stride + kx[i];
        const bool there = at.image < s.images && channel[i] < s.channels && y >= 0 && y < s.height && x >= 0 &&
                           x < s.width;
        return there ? bits_of(from[(((long long)at.image * s.channels + channel[i]) * s.height + y) * s.width + x])
                     : 0u;
    }

    __device__ __forceinline__ void put(T* tile) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            *reinterpret_cast<uint4*>(tile + place<BK>(threadIdx.x / LANES + THREADS / LANES * i,
                                                       threadIdx.x % LANES)) = make_uint4(held[i][0], held[i][1],
                                                                                          held[i][2], held[i][3]);
        }
    }
};

// Where results go: pixels of images in T, bias added, or weights' gradients, which are added to what is there; or, if
// the depth is cut, parts of sums in float, as they would lie in the result, a copy for each part.
template <class T> struct Out {
    T* y;
    float* gradient;
    const T* bias;
    // Or null.
    float* parts;
    int rows, columns, plane;

    // Whether columns 2 i and 2 i + 1 lie next to each other, where both can be written at once.
    __device__ __forceinline__ bool paired() const {
        const void* to = parts ? parts : gradient ? static_cast<const void*>(gradient) : y;
        const int size = parts || gradient ? 8 : 2 * sizeof(T);
        return (gradient ? columns : plane) % 2 == 0 && reinterpret_cast<uintptr_t>(to) % size == 0;
    }
    // Where column n of row 0 lies.
    __device__ __forceinline__ long long column(int n) const {
        return gradient ? n : (long long)(n / plane) * rows * plane + n % plane;
    }
    __device__ __forceinline__ void put(int m, int n, long long column, float value) const {
        if (m >= rows || n >= columns) {
            return;
        }
        const long long at = column + (long long)m * (gradient ? columns : plane);
        if (parts) {
            parts[(long long)blockIdx.z * rows * columns + at] = value;
        } else if (gradient) {
            gradient[at] += value;
        } else {
            y[at] = from_float<T>(bias ? value + to_float(bias[m]) : value);
        }
    }
    // Columns n, which is even, and n + 1 of paired ones.
    __device__ __forceinline__ void put_two(int m, int n, long long column, float low, float high) const {
        if (m >= rows || n >= columns) {
            return;
        }
        const long long at = column + (long long)m * (gradient ? columns : plane);
        if (parts) {
            store<float, 2>(parts + (long long)blockIdx.z * rows * columns + at, {low, high});
        } else if (gradient) {
            const Elements<float, 2> there = load<float, 2>(gradient + at);
            store<float, 2>(gradient + at, {there.at[0] + low, there.at[1] + high});
        } else {
            const float more = bias ? to_float(bias[m]) : 0.0f;
            store<T, 2>(y + at, {from_float<T>(low + more), from_float<T>(high + more)});
        }
    }
};
