// What the emulator's scheduler knows: threads, warps, and the block that a thread of the operating system runs.
#pragma once

#include <vector>

#include "emulator.h"

namespace emulator {

constexpr size_t PAGE = 4096;
constexpr size_t STACK = 96 << 10;
constexpr unsigned MOST_THREADS = 1024;

struct Kernel {
    Call call;
    const Kind* kinds;
    size_t count;
};

struct Launch {
    uint32_t blocks[3];
    uint32_t threads;
    uint32_t shared;
    // 0: threads and blocks in ascending order, 1: descending, otherwise shuffled.
    uint32_t order;
    uint32_t workers;
    uint32_t count;
    const Argument* arguments;
};

enum class State { READY, BARRIER, MEETING, DONE };

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, valid;
    unsigned group;
};

struct Fiber : Self {
    State state;
    void* context;
    // At a barrier.
    const char* file;
    int line;
    unsigned value;
    // At a meeting.
    unsigned mask;
    Operation operation;
    void* argument;
    const char* what;
    // Copies that have not been waited for, and groups of them that were committed and waited for.
    std::vector<Copy> copies;
    unsigned committed, arrived;
};

struct Warp {
    unsigned live, waiting;
};

// Runs blocks on one thread of the operating system.
struct Worker {
    const Kernel* kernel;
    const char* name;
    const Launch* launch;
    Block block;
    void* scheduler;
    bool failed;
    char message[1024];
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> warp_order, lane_order;
    unsigned char* stacks;
    unsigned char* shared;
    size_t shared_room;
    uint64_t cycles, ideal;

    void run(unsigned index);
    void run_warp(unsigned warp);
    void release_barrier();
    void check_stuck();
    void check_canary();
    Fiber& fiber() { return *static_cast<Fiber*>(own.current); }
};

// Numbers below `count` in the order of a launch.
std::vector<unsigned> in_order(unsigned count, unsigned order);

} // namespace emulator
