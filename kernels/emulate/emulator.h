// The emulator's own interface: what the header of intrinsics and the emulated tensor-core instructions call.
//
// A block of threads is a set of fibers on one thread of the operating system; they run one after the other, each until
// it waits for others. Blocks run over a few threads. The scheduler is worker.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace emulator {

struct Index {
    unsigned x, y, z;
};

struct Block;

// What a thread of a kernel knows about itself.
struct Self {
    Index thread;
    unsigned lane;
    Block* block;
};

// What all threads of a block share.
struct Block {
    Index index, threads, blocks;
    unsigned char* dynamic_shared;
};

// The emulator's own words of a thread of the operating system, from which fibers never move. All else that is
// thread-local is shared memory.
struct Own {
    // The thread of the kernel that runs.
    Self* current;
    struct Worker* worker;
    // Where static shared memory lies.
    unsigned char* shared;
    size_t shared_bytes;
    const void* faulty;
    unsigned char* signal_stack;
};
extern constinit thread_local Own own __attribute__((visibility("hidden")));

// Ends the launch with a message that names kernel, block and thread. Never returns.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until every live thread of the block is here; returns how many of them brought a value that is not zero.
unsigned barrier(const char* file, int line, bool value);

// An operation of a warp: gets the lanes that meet and each one's argument, and is run once, by the last that comes.
using Operation = void (*)(unsigned lanes, void* const* arguments);
// Waits until every live lane of `mask` is here with the same operation.
void meet(unsigned mask, Operation operation, void* argument, const char* what);

// cp.async: the bytes arrive when they are waited for, and not before, so that a missing wait is seen.
void copy_later(void* to, const void* from, unsigned bytes, unsigned valid);
void commit_copies();
void wait_for_copies(unsigned groups_left);

// Whether `bytes` at `address` lie in this block's dynamic shared memory.
bool in_dynamic_shared(const void* address, size_t bytes);
// Counts a read of shared memory by a group of lanes that took `times` as many cycles as it should.
void count_shared(unsigned cycles, unsigned ideal);

// Arguments of a launch, as the Rust side passes them.
enum Kind : uint32_t { ADDRESS, I32, U32, I64, U64, F32 };
struct Argument {
    uint32_t kind;
    uint32_t unused;
    uint64_t bits;
};

template <class T> constexpr Kind kind_of() {
    if constexpr (std::is_pointer_v<T>) {
        return ADDRESS;
    } else if constexpr (std::is_same_v<T, float>) {
        return F32;
    } else {
        static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "no argument of this type");
        return sizeof(T) == 4 ? (std::is_signed_v<T> ? I32 : U32) : (std::is_signed_v<T> ? I64 : U64);
    }
}

template <class T> T value_of(const Argument& argument) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(argument.bits);
    } else if constexpr (std::is_same_v<T, float>) {
        return __builtin_bit_cast(float, static_cast<uint32_t>(argument.bits));
    } else {
        return static_cast<T>(argument.bits);
    }
}

using Call = void (*)(const Argument*);

// A kernel as a function of an array of arguments.
template <auto kernel> struct Thunk;
template <class... P, void (*kernel)(P...)> struct Thunk<kernel> {
    static constexpr size_t count = sizeof...(P);
    static constexpr Kind kinds[] = {kind_of<std::remove_cv_t<P>>()..., ADDRESS};

    static void call(const Argument* arguments) { with(arguments, std::make_index_sequence<sizeof...(P)>()); }

  private:
    template <size_t... i> static void with(const Argument* arguments, std::index_sequence<i...>) {
        kernel(value_of<std::remove_cv_t<P>>(arguments[i])...);
    }
};

struct Registration {
    Registration(const char* name, Call call, const Kind* kinds, size_t count);
};

} // namespace emulator

#define EXPORT(name)                                                                                                   \
    static const emulator::Registration registration_of_##name(                                                        \
        #name, emulator::Thunk<&name>::call, emulator::Thunk<&name>::kinds, emulator::Thunk<&name>::count);
