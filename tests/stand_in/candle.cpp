// candle's own kernels (candle-kernels/src/*.cu), as far as training asks for them: plain loops with the same parameters.
// Numbers are computed in double precision and rounded once, which for one sum, difference, product or quotient of fp32
// is what fp32 gives. What is not here is not known, and the driver says so with its name.
#include "candle.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

enum class Type { NONE, U8, U32, I64, F16, BF16, F32, F64 };

Type type_of(const std::string& name) {
    const char* names[] = {"", "u8", "u32", "i64", "f16", "bf16", "f32", "f64"};
    for (int i = 1; i < 8; i++) {
        if (name == names[i]) {
            return Type(i);
        }
    }
    return Type::NONE;
}

size_t size_of(Type type) {
    const size_t sizes[] = {0, 1, 4, 8, 2, 2, 4, 8};
    return sizes[int(type)];
}

double get(Type type, const void* from, size_t index) {
    const char* at = static_cast<const char*>(from) + index * size_of(type);
    switch (type) {
    case Type::U8: return double(*reinterpret_cast<const uint8_t*>(at));
    case Type::U32: { uint32_t x; memcpy(&x, at, 4); return double(x); }
    case Type::I64: { int64_t x; memcpy(&x, at, 8); return double(x); }
    case Type::F16: { _Float16 x; memcpy(&x, at, 2); return double(x); }
    case Type::BF16: { uint32_t bits = 0; memcpy(reinterpret_cast<char*>(&bits) + 2, at, 2); float x; memcpy(&x, &bits, 4); return x; }
    case Type::F32: { float x; memcpy(&x, at, 4); return x; }
    default: { double x; memcpy(&x, at, 8); return x; }
    }
}

void put(Type type, void* to, size_t index, double value) {
    char* at = static_cast<char*>(to) + index * size_of(type);
    switch (type) {
    case Type::U8: *reinterpret_cast<uint8_t*>(at) = uint8_t(value); break;
    case Type::U32: { uint32_t x = uint32_t(value); memcpy(at, &x, 4); break; }
    case Type::I64: { int64_t x = int64_t(value); memcpy(at, &x, 8); break; }
    case Type::F16: { _Float16 x = _Float16(value); memcpy(at, &x, 2); break; }
    case Type::BF16: {
        float x = float(value);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        // To the nearest, even in the middle; what is no number stays none.
        bits = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
        memcpy(at, reinterpret_cast<char*>(&bits) + 2, 2);
        break;
    }
    case Type::F32: { float x = float(value); memcpy(at, &x, 4); break; }
    default: memcpy(at, &value, 8);
    }
}

// Which kernel: its name up to the types.
struct Kernel {
    std::string kind;
    Type from = Type::NONE, to = Type::NONE;
};

Kernel parse(const std::string& name) {
    size_t last = name.rfind('_');
    if (last == std::string::npos) {
        return {};
    }
    Kernel kernel{name.substr(0, last), type_of(name.substr(last + 1)), type_of(name.substr(last + 1))};
    size_t before = kernel.kind.rfind('_');
    if (kernel.kind.rfind("cast_", 0) == 0) {
        kernel.from = type_of(kernel.kind.substr(before + 1));
        kernel.kind = "cast";
    }
    // By indices, which are u32.
    if (kernel.kind == "is_u32" || kernel.kind == "ia_u32") {
        return kernel;
    }
    for (const char* known : {"affine", "cast", "const_set", "copy2d", "fast_sum", "fast_sum_small", "ucopy", "usqr",
                              "badd", "bsub", "bmul", "bdiv"}) {
        if (kernel.kind == known && kernel.from != Type::NONE && kernel.to != Type::NONE) {
            return kernel;
        }
    }
    return {};
}

template <class T> T parameter(void** parameters, int which) {
    T value;
    memcpy(&value, parameters[which], sizeof value);
    return value;
}

// Where element `index` of a tensor lies whose dims and strides are these; none: one after the other.
size_t place(size_t index, size_t count, const size_t* dims, const size_t* strides) {
    if (!dims) {
        return index;
    }
    size_t at = 0;
    for (size_t d = count; d-- > 0; index /= dims[d]) {
        at += index % dims[d] * strides[d];
    }
    return at;
}

double binary(const std::string& kind, double a, double b) {
    return kind == "badd" ? a + b : kind == "bsub" ? a - b : kind == "bmul" ? a * b : a / b;
}

} // namespace

bool candle::knows(const std::string& name) { return !parse(name).kind.empty(); }

std::function<void()> candle::launch(const std::string& name, void** parameters,
                                     const std::function<bool(uintptr_t, size_t)>& within) {
    Kernel k = parse(name);
    auto pointer = [&](int which) { return parameter<void*>(parameters, which); };
    auto size = [&](int which) { return parameter<size_t>(parameters, which); };
    auto holds = [&](const void* at, Type type, size_t elements) {
        return at && within(uintptr_t(at), elements * size_of(type));
    };
    if (k.kind == "copy2d") {
        void *from = pointer(0), *to = pointer(1);
        size_t rows = parameter<uint32_t>(parameters, 2), columns = parameter<uint32_t>(parameters, 3);
        size_t next_from = parameter<uint32_t>(parameters, 4), next_to = parameter<uint32_t>(parameters, 5);
        if (!rows || !columns || !holds(from, k.from, (rows - 1) * next_from + columns) ||
            !holds(to, k.to, (rows - 1) * next_to + columns)) {
            return {};
        }
        return [=] {
            for (size_t row = 0; row < rows; row++) {
                memcpy(static_cast<char*>(to) + row * next_to * size_of(k.to),
                       static_cast<char*>(from) + row * next_from * size_of(k.from), columns * size_of(k.from));
            }
        };
    }
    if (k.kind == "ia_u32") {
        // Adds each row of `from` to the row of `to` that its index names.
        void *ids = pointer(0), *from = pointer(2), *to = pointer(3);
        size_t indices = size(1), left = size(4), rows = size(6), right = size(7);
        if (!holds(ids, Type::U32, indices) || !holds(from, k.from, left * indices * right) ||
            !holds(to, k.to, left * rows * right)) {
            return {};
        }
        return [=] {
            for (size_t l = 0; l < left; l++) {
                for (size_t i = 0; i < indices * right; i++) {
                    size_t row = size_t(get(Type::U32, ids, i / right)), at = (l * rows + row) * right + i % right;
                    put(k.to, to, at, get(k.to, to, at) + get(k.from, from, l * indices * right + i));
                }
            }
        };
    }
    size_t count = size(0);
    if (k.kind == "is_u32") {
        // The rows that the indices name; dims and strides are those of the indices.
        size_t of_dims = size(1), left = size(6), rows = size(7), indices = size(8), right = size(9);
        auto* info = static_cast<const size_t*>(pointer(2));
        void *ids = pointer(3), *from = pointer(4), *to = pointer(5);
        if ((info && !within(uintptr_t(info), 16 * of_dims)) || !holds(ids, Type::U32, info ? 1 : indices) ||
            !holds(from, k.from, left * rows * right) || !holds(to, k.to, left * indices * right)) {
            return {};
        }
        return [=] {
            for (size_t i = 0; i < count; i++) {
                size_t which = place(i / right % indices, of_dims, info, info + of_dims);
                size_t row = size_t(get(Type::U32, ids, which));
                put(k.to, to, i, get(k.from, from, (i / (indices * right) * rows + row) * right + i % right));
            }
        };
    }
    if (k.kind == "fast_sum" || k.kind == "fast_sum_small") {
        // The first counts what is summed, the second the sums; dims and strides come with the summed dims last.
        size_t each = size(1), of_dims = size(2), sums = k.kind == "fast_sum" ? count / (each ? each : 1) : count;
        void *info = pointer(3), *from = pointer(4), *to = pointer(5);
        if (!within(uintptr_t(info), 16 * of_dims) || !holds(to, k.to, sums) || !holds(from, k.from, 1)) {
            return {};
        }
        return [=] {
            auto* dims = static_cast<const size_t*>(info);
            for (size_t s = 0; s < sums; s++) {
                double sum = 0;
                for (size_t i = 0; i < each; i++) {
                    sum += get(k.from, from, place(s * each + i, of_dims, dims, dims + of_dims));
                }
                put(k.to, to, s, sum);
            }
        };
    }
    size_t of_dims = size(1);
    auto* info = static_cast<const size_t*>(pointer(2));
    size_t strides = k.kind[0] == 'b' ? 2 : 1;
    if (info && !within(uintptr_t(info), 8 * (1 + strides) * of_dims)) {
        return {};
    }
    if (k.kind == "const_set") {
        // The number is as wide as its type; read with it.
        double value = get(k.to, parameters[3], 0);
        void* to = pointer(4);
        if (!holds(to, k.to, info ? 1 : count)) {
            return {};
        }
        return [=] {
            for (size_t i = 0; i < count; i++) {
                put(k.to, to, place(i, of_dims, info, info + of_dims), value);
            }
        };
    }
    if (strides == 2) {
        void *a = pointer(3), *b = pointer(4), *to = pointer(5);
        if (!holds(a, k.from, info ? 1 : count) || !holds(b, k.from, info ? 1 : count) || !holds(to, k.to, count)) {
            return {};
        }
        return [=] {
            for (size_t i = 0; i < count; i++) {
                double x = get(k.from, a, place(i, of_dims, info, info + of_dims));
                double y = get(k.from, b, place(i, of_dims, info, info + 2 * of_dims));
                put(k.to, to, i, binary(k.kind, x, y));
            }
        };
    }
    void *from = pointer(3), *to = pointer(4);
    if (!holds(from, k.from, info ? 1 : count) || !holds(to, k.to, count)) {
        return {};
    }
    double times = 1, plus = 0;
    if (k.kind == "affine") {
        times = get(k.from, parameters[5], 0);
        plus = get(k.from, parameters[6], 0);
    }
    return [=] {
        for (size_t i = 0; i < count; i++) {
            double x = get(k.from, from, place(i, of_dims, info, info + of_dims));
            put(k.to, to, i, k.kind == "usqr" ? x * x : k.kind == "affine" ? x * times + plus : x);
        }
    };
}
