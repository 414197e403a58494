// Where the sums of a convolution's products go.
#pragma once

#include "common.cuh"

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

// A warp's sums, whose first is at (row, column) of the result.
template <class T, int M, int N>
__device__ __forceinline__ void put_sums(const float (&sum)[M][2 * N][4], const Out<T>& out, int row, int column) {
    const int lane = threadIdx.x % 32;
    row += lane / 4;
    column += lane % 4 * 2;
    const bool paired = out.paired();
#pragma unroll
    for (int j = 0; j < 2 * N; j++) {
        const int at = column + 8 * j;
        const long long low = out.column(at), high = paired ? 0 : out.column(at + 1);
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const float* pair = &sum[i / 2][j][i % 2 * 2];
            if (paired) {
                out.put_two(row + 8 * i, at, low, pair[0], pair[1]);
            } else {
                out.put(row + 8 * i, at, low, pair[0]);
                out.put(row + 8 * i, at + 1, high, pair[1]);
            }
        }
    }
}
