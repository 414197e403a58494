// The functions of mma.cuh for emulated warps.
#pragma once

namespace emulator {

struct Load {
    unsigned* r;
    const void* row;
};

template <int BLOCKS, bool TRANSPOSED> void load_blocks(unsigned lanes, void* const* arguments) {
    if (lanes != ~0u) {
        fail("ldmatrix by some lanes only: %08x", lanes);
    }
    for (int block = 0; block < BLOCKS; block++) {
        uint16_t values[8][8];
        unsigned taken[32] = {}, cycles = 0;
        const char* seen[8];
        for (int row = 0; row < 8; row++) {
            auto* from = static_cast<const char*>(static_cast<const Load*>(arguments[block * 8 + row])->row);
            auto address = reinterpret_cast<uintptr_t>(from);
            if (address % 16 || !in_dynamic_shared(from, 16)) {
                fail("ldmatrix: the row %p of lane %d is not aligned to 16 bytes or not in dynamic shared memory", from,
                     block * 8 + row);
            }
            memcpy(values[row], from, 16);
            seen[row] = from;
            if (std::find(seen, seen + row, from) == seen + row) {
                cycles = std::max(cycles, ++taken[address / 16 % 8]);
            }
        }
        count_shared(cycles, 1);
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            unsigned low = TRANSPOSED ? values[2 * t][g] : values[g][2 * t];
            unsigned high = TRANSPOSED ? values[2 * t + 1][g] : values[g][2 * t + 1];
            static_cast<const Load*>(arguments[lane])->r[block] = low | high << 16;
        }
    }
}

// A sum as tensor cores leave it, which do not round but cut off. (They add more than is added here before they do, so that
// theirs is no further off; how much, their makers do not say.)
inline float cut_off(double sum) {
    const float near = float(sum);
    return std::fabs(double(near)) > std::fabs(sum) ? std::nextafter(near, 0.0f) : near;
}

template <class T> struct Product {
    float* d;
    const unsigned *a, *b;
};

// A of 16 x 16, B of 16 x 8; DEPTH columns and rows of them count.
template <class T, int DEPTH> void multiply(unsigned lanes, void* const* arguments) {
    if (lanes != ~0u) {
        fail("mma by some lanes only: %08x", lanes);
    }
    auto value = [](unsigned bits) {
        T half;
        half.bits = uint16_t(bits);
        if constexpr (std::is_same_v<T, __half>) {
            return __half2float(half);
        } else {
            return __bfloat162float(half);
        }
    };
    float a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* p = static_cast<const Product<T>*>(arguments[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < DEPTH / 8; i++) {
            for (int half = 0; half < 2; half++) {
                a[g][8 * i + 2 * t + half] = value(p->a[2 * i] >> 16 * half);
                a[g + 8][8 * i + 2 * t + half] = value(p->a[2 * i + 1] >> 16 * half);
                b[8 * i + 2 * t + half][g] = value(p->b[i] >> 16 * half);
            }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* p = static_cast<const Product<T>*>(arguments[lane]);
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
            double sum = p->d[i];
            for (int k = 0; k < DEPTH; k++) {
                sum += double(a[row][k]) * double(b[k][column]);
            }
            p->d[i] = cut_off(sum);
        }
    }
}

// A of 16 x 8, B of 8 x 8, whose numbers must have been rounded.
inline void multiply_tf32(unsigned lanes, void* const* arguments) {
    if (lanes != ~0u) {
        fail("mma by some lanes only: %08x", lanes);
    }
    auto value = [](unsigned bits) {
        if (bits & 0x1fff) {
            fail("mma.tf32: %08x was not rounded", bits);
        }
        float x;
        memcpy(&x, &bits, 4);
        return x;
    };
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        auto* p = static_cast<const Product<float>*>(arguments[lane]);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; i++) {
            a[g][t + 4 * i] = value(p->a[2 * i]);
            a[g + 8][t + 4 * i] = value(p->a[2 * i + 1]);
            b[t + 4 * i][g] = value(p->b[i]);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* p = static_cast<const Product<float>*>(arguments[lane]);
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
            double sum = p->d[i];
            for (int k = 0; k < 8; k++) {
                sum += double(a[row][k]) * double(b[k][column]);
            }
            p->d[i] = cut_off(sum);
        }
    }
}

} // namespace emulator

template <int BLOCKS> inline void ldmatrix(unsigned (&r)[BLOCKS], const void* row) {
    emulator::Load load{r, row};
    emulator::meet(ALL_LANES, emulator::load_blocks<BLOCKS, false>, &load, "ldmatrix");
}
template <int BLOCKS> inline void ldmatrix_transposed(unsigned (&r)[BLOCKS], const void* row) {
    emulator::Load load{r, row};
    emulator::meet(ALL_LANES, emulator::load_blocks<BLOCKS, true>, &load, "ldmatrix.trans");
}

inline void mma_k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0) {
    const unsigned a[] = {a0, a1}, b[] = {b0};
    emulator::Product<f16> product{d, a, b};
    emulator::meet(ALL_LANES, emulator::multiply<f16, 8>, &product, "mma.m16n8k8");
}

inline unsigned tf32(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x1000) & ~0x1fffu : 0x7fffe000u;
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if (__CUDA_ARCH__ < 800) {
        emulator::fail("no products in tf32 before 8.0");
    }
    emulator::Product<float> product{d, a, b};
    emulator::meet(ALL_LANES, emulator::multiply_tf32, &product, "mma.m16n8k8.tf32");
}

template <class T> inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    emulator::Product<T> product{d, a, b};
    emulator::meet(ALL_LANES, emulator::multiply<T, 16>, &product, "mma.m16n8k16");
#else
    if constexpr (std::is_same_v<T, f16>) {
        mma_k8(d, a[0], a[1], b[0]);
        mma_k8(d, a[2], a[3], b[1]);
    } else {
        emulator::fail("no products of bf16 before 8.0");
    }
#endif
}

namespace emulator {
inline void copy(void* to, const void* from, int bytes, int valid) {
    copy_later(to, from, bytes, valid);
#if __CUDA_ARCH__ < 800
    commit_copies();
    wait_for_copies(0);
#endif
}
} // namespace emulator

inline void copy_async_16(void* to, const void* from, int valid = 16) { emulator::copy(to, from, 16, valid); }
inline void copy_async_4(void* to, const void* from, int valid = 4) { emulator::copy(to, from, 4, valid); }
inline void copy_commit() {
#if __CUDA_ARCH__ >= 800
    emulator::commit_copies();
#endif
}
template <int LEFT> inline void copy_wait() {
#if __CUDA_ARCH__ >= 800
    emulator::wait_for_copies(LEFT);
#endif
}
