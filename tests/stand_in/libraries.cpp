// Stand-ins for what candle opens besides the driver: cuBLAS, whose one product is a plain loop on the stand-in's streams,
// and cuRAND, which starts and computes nothing.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

#define CALL extern "C" __attribute__((visibility("default"))) int

namespace {

enum { SUCCESS = 0, INVALID = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };

struct Handle {
    void* stream = nullptr;
};

struct Operand {
    uintptr_t at;
    int type;
    // Elements from one row to the next, from one column to the next, and from one matrix to the next.
    long row, column, matrix;
};

struct Product {
    int m, n, k, count;
    double alpha, beta;
    Operand a, b, c;
};

size_t size_of(int type) { return type == F64 ? 8 : type == F32 ? 4 : 2; }
bool known(int type) { return type == F32 || type == F64 || type == F16 || type == BF16; }

double get(const Operand& o, long which, long row, long column) {
    const char* at = reinterpret_cast<const char*>(o.at) + (which * o.matrix + row * o.row + column * o.column) * size_of(o.type);
    switch (o.type) {
    case F64: { double x; memcpy(&x, at, 8); return x; }
    case F32: { float x; memcpy(&x, at, 4); return x; }
    case F16: { _Float16 x; memcpy(&x, at, 2); return double(x); }
    default: { uint32_t bits = 0; memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2); float x; memcpy(&x, &bits, 4); return x; }
    }
}

void put(const Operand& o, long which, long row, long column, double value) {
    char* at = reinterpret_cast<char*>(o.at) + (which * o.matrix + row * o.row + column * o.column) * size_of(o.type);
    float x = float(value);
    _Float16 half = _Float16(x);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    // To the nearest, even in the middle.
    bits += 0x7fff + (bits >> 16 & 1);
    switch (o.type) {
    case F64: memcpy(at, &value, 8); break;
    case F32: memcpy(at, &x, 4); break;
    case F16: memcpy(at, &half, 2); break;
    default: memcpy(at, reinterpret_cast<char*>(&bits) + 2, 2);
    }
}

void run(void* with) {
    auto* p = static_cast<Product*>(with);
    for (long which = 0; which < p->count; which++) {
        for (long row = 0; row < p->m; row++) {
            for (long column = 0; column < p->n; column++) {
                double sum = 0;
                for (long i = 0; i < p->k; i++) {
                    sum += get(p->a, which, row, i) * get(p->b, which, i, column);
                }
                double before = p->beta ? p->beta * get(p->c, which, row, column) : 0;
                put(p->c, which, row, column, p->alpha * sum + before);
            }
        }
    }
    delete p;
}

// A scalar of the host, in the type that goes with the way of computing.
double scalar(const void* at, int way) {
    Operand one{uintptr_t(at), way == 70 || way == 71 ? F64 : way == 64 || way == 65 ? F16 : F32, 0, 0, 0};
    return get(one, 0, 0, 0);
}

} // namespace

CALL cublasCreate_v2(Handle** to) { return *to = new Handle, SUCCESS; }
// As on a GPU that has failed, where nothing can be closed any more.
static int closed() {
    auto broken = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "stand_in_broken"));
    return broken && broken() ? INVALID : SUCCESS;
}
CALL cublasDestroy_v2(Handle* handle) { return delete handle, closed(); }
CALL cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, SUCCESS; }
CALL cublasSetWorkspace_v2(Handle*, void* at, size_t bytes) { return at && bytes ? SUCCESS : INVALID; }
CALL cublasSetMathMode(Handle*, int) { return SUCCESS; }
CALL cublasGemmStridedBatchedEx(Handle* handle, int turn_a, int turn_b, int m, int n, int k, const void* alpha,
                                uintptr_t a, int type_a, int ld_a, long long next_a, uintptr_t b, int type_b, int ld_b,
                                long long next_b, const void* beta, uintptr_t c, int type_c, int ld_c, long long next_c,
                                int count, int way, int) {
    auto put_on = reinterpret_cast<int (*)(void*, void (*)(void*), void*)>(dlsym(RTLD_DEFAULT, "stand_in_put"));
    if (!known(type_a) || !known(type_b) || !known(type_c) || !put_on) {
        return NOT_SUPPORTED;
    }
    if (closed()) {
        return EXECUTION_FAILED;
    }
    // As the kernels: nothing but the launch.
    if (const char* idle = getenv("STAND_IN_IDLE"); idle && *idle == '1') {
        return put_on(handle->stream, [](void*) {}, nullptr) ? INVALID : SUCCESS;
    }
    // Columns lie one after the other.
    auto operand = [](uintptr_t at, int type, int turn, int ld, long long next) {
        return turn ? Operand{at, type, ld, 1, long(next)} : Operand{at, type, 1, ld, long(next)};
    };
    auto* product = new Product{m, n, k, count, scalar(alpha, way), scalar(beta, way),
                                operand(a, type_a, turn_a, ld_a, next_a), operand(b, type_b, turn_b, ld_b, next_b),
                                operand(c, type_c, 0, ld_c, next_c)};
    return put_on(handle->stream, run, product) ? INVALID : SUCCESS;
}
CALL cublasGemmEx(Handle* handle, int turn_a, int turn_b, int m, int n, int k, const void* alpha, uintptr_t a, int type_a,
                  int ld_a, uintptr_t b, int type_b, int ld_b, const void* beta, uintptr_t c, int type_c, int ld_c, int way,
                  int algorithm) {
    return cublasGemmStridedBatchedEx(handle, turn_a, turn_b, m, n, k, alpha, a, type_a, ld_a, 0, b, type_b, ld_b, 0, beta,
                                      c, type_c, ld_c, 0, 1, way, algorithm);
}

static char generator;
CALL curandCreateGenerator(void** to, int) { return *to = &generator, SUCCESS; }
CALL curandDestroyGenerator(void*) { return closed(); }
CALL curandSetStream(void*, void*) { return SUCCESS; }
CALL curandSetPseudoRandomGeneratorSeed(void*, unsigned long long) { return SUCCESS; }
CALL curandSetGeneratorOffset(void*, unsigned long long) { return SUCCESS; }
