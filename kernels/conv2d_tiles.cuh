// Operands of convolutions as matrix products. Images are (images, channels, height, width), weights (outputs, inputs,
// kh, kw), both as candle has them.
//
// Forward and data gradient: rows are output channels, columns are pixels of all images, the sum goes over channels of
// the source and taps. Weight gradient: rows are output channels, columns are input channels and taps, the sum goes
// over pixels of all images. What is summed over is called depth. The patches of an image are never written to memory:
// a block's threads gather the elements they stand for, into registers while the tile before is multiplied.
//
// Most convolutions are not taken here: conv2d_copies.cuh. What is gathered costs fewest instructions if depths go by taps
// and then channels: then the weight is turned first (a copy in scratch), which pays but for few pixels.
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

// Whether a tap of a row, or of a column, reaches one of the source's `size`.
__device__ __forceinline__ bool reaches(const Shape& s, int at, int tap, int before, int size) {
    if (!s.backward) {
        return unsigned(at * s.stride - before + tap) < unsigned(size);
    }
    const int from = at + before - tap;
    return from >= 0 && (s.stride == 1 ? from < size : from % s.stride == 0 && from / s.stride < size);
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

// A chunk of a tile.
template <class T> __device__ __forceinline__ void put_eight(T* to, const T (&from)[8]) {
    Elements<T, 8> chunk;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        chunk.at[i] = from[i];
    }
    store<T, 8>(to, chunk);
}

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
    // As they came: packing them would wait for them before the tile that is there is multiplied.
    T held[CHUNKS][8];

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
            for (int j = 0; j < 8; j++) {
                held[i][j] = pixel >= 0 ? from[(long long)j * plane] : from_float<T>(0.0f);
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
            for (int j = 0; j < 8; j++) {
                held[i][j] = element(at);
                at.on(0, 1, taps);
            }
            steps[i].on(BK / taps, BK % taps, taps);
        }
    }

    __device__ __forceinline__ T element(const Step& at) const {
        const int pixel = table[at.tap * BN + column];
        return pixel >= 0 && at.channel < channels ? image[(long long)at.channel * plane + pixel] : from_float<T>(0.0f);
    }

    __device__ __forceinline__ void put(T* tile) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            put_eight(tile + place<BK>(column, threadIdx.x / BN + THREADS / BN * i), held[i]);
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
    T held[CHUNKS][8];

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
            for (int j = 0; j < 8; j++) {
                held[i][j] = line && unsigned(x + j) < unsigned(s.width) ? run[j] : from_float<T>(0.0f);
            }
        }
    }

    __device__ __forceinline__ void gather_each(Pixel at) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int i = 0; i < CHUNKS; i++) {
                held[i][j] = element(at, i);
            }
            at.next(s);
        }
    }

    __device__ __forceinline__ T element(const Pixel& at, int i) const {
        const int y = at.y * s.stride + ky[i], x = at.x * s.stride + kx[i];
        const bool there = at.image < s.images && channel[i] < s.channels && y >= 0 && y < s.height && x >= 0 &&
                           x < s.width;
        return there ? from[(((long long)at.image * s.channels + channel[i]) * s.height + y) * s.width + x]
                     : from_float<T>(0.0f);
    }

    __device__ __forceinline__ void put(T* tile) const {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            put_eight(tile + place<BK>(threadIdx.x / LANES + THREADS / LANES * i, threadIdx.x % LANES), held[i]);
        }
    }
};
