// The scheduler of emulated kernels: launches, blocks, fibers, barriers.

#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "faults.h"
#include "fiber.h"

namespace emulator {

constinit thread_local Own own = {};

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t STACK = 96 << 10;
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned char CANARY = 0xa5;

struct Kernel {
    Call call;
    const Kind* kinds;
    size_t count;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

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

} // namespace

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

namespace {

void yield() {
    Fiber& self = own.worker->fiber();
    emulator_switch(&self.context, own.worker->scheduler);
}

void complete(unsigned warp, unsigned mask) {
    Worker& w = *own.worker;
    void* arguments[32] = {};
    Fiber* lanes = &w.fibers[warp * 32];
    unsigned met = mask & w.warps[warp].live;
    const Fiber* first = lanes + __builtin_ctz(met);
    for (unsigned lane = 0; lane < 32; lane++) {
        if (met >> lane & 1) {
            Fiber& f = lanes[lane];
            if (f.mask != mask || f.operation != first->operation) {
                fail("lanes of warp %u do not agree: lane %u is at %s of lanes %08x, lane %u at %s of lanes %08x", warp,
                     first->lane, first->what, first->mask, lane, f.what, f.mask);
            }
            arguments[lane] = f.argument;
            f.state = State::READY;
        }
    }
    w.warps[warp].waiting &= ~met;
    first->operation(met, arguments);
}

void fiber_main() {
    own.worker->kernel->call(own.worker->launch->arguments);
    Fiber& self = own.worker->fiber();
    unsigned index = self.thread.x / 32;
    Warp& warp = own.worker->warps[index];
    self.state = State::DONE;
    warp.live &= ~(1u << self.lane);
    // Others may have waited for this one only.
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned mask = own.worker->fibers[index * 32 + (lane % 32)].mask;
        if ((warp.waiting >> lane & 1) && !(mask & warp.live & ~warp.waiting)) {
            complete(index, mask);
        }
    }
    yield();
    __builtin_unreachable();
}

} // namespace

void Worker::run_warp(unsigned warp) {
    for (bool progress = true; progress && !failed;) {
        progress = false;
        for (unsigned lane : lane_order) {
            unsigned thread = warp * 32 + lane;
            if (thread >= launch->threads || fibers[thread].state != State::READY) {
                continue;
            }
            progress = true;
            own.current = &fibers[thread];
            emulator_switch(&scheduler, fibers[thread].context);
            if (failed) {
                return;
            }
        }
    }
}

// Called when no thread is ready: all that live must be at one barrier.
void Worker::check_stuck() {
    const Fiber *at_barrier = nullptr, *in_warp = nullptr;
    for (const Fiber& f : fibers) {
        if (f.state == State::MEETING) {
            in_warp = &f;
        } else if (f.state == State::BARRIER) {
            if (at_barrier && (at_barrier->line != f.line || strcmp(at_barrier->file, f.file) != 0)) {
                own.current = const_cast<Fiber*>(&f);
                snprintf(message, sizeof(message), "thread %u waits at %s:%d, thread %u at %s:%d", at_barrier->thread.x,
                         at_barrier->file, at_barrier->line, f.thread.x, f.file, f.line);
                failed = true;
                return;
            }
            at_barrier = &f;
        }
    }
    if (in_warp) {
        int length = snprintf(message, sizeof(message), "thread %u waits for lanes %08x in %s", in_warp->thread.x,
                              in_warp->mask, in_warp->what);
        if (at_barrier) {
            snprintf(message + length, sizeof(message) - length, ", thread %u at the barrier of %s:%d",
                     at_barrier->thread.x, at_barrier->file, at_barrier->line);
        }
        own.current = const_cast<Fiber*>(in_warp);
        failed = true;
    }
}

void Worker::release_barrier() {
    unsigned total = 0;
    for (Fiber& f : fibers) {
        total += f.state == State::BARRIER && f.value;
    }
    for (Fiber& f : fibers) {
        if (f.state == State::BARRIER) {
            f.value = total;
            f.state = State::READY;
        }
    }
}

void Worker::check_canary() {
    for (unsigned char* at = shared + shared_room - (shared_room - launch->shared) % 16; at < shared + shared_room; at++) {
        if (*at != CANARY) {
            snprintf(message, sizeof(message), "wrote past its %u bytes of dynamic shared memory", launch->shared);
            failed = true;
        }
    }
}

void Worker::run(unsigned index) {
    const uint32_t* blocks = launch->blocks;
    // The end of the shared memory is the end of a page.
    unsigned room = (launch->shared + 15) / 16 * 16;
    block.index = {index % blocks[0], index / blocks[0] % blocks[1], index / blocks[0] / blocks[1]};
    block.dynamic_shared = shared + shared_room - room;
    memset(shared, 0xff, shared_room);
    memset(block.dynamic_shared + launch->shared, CANARY, room - launch->shared);
    fill_static_shared();
    for (unsigned i = 0; i < launch->threads; i++) {
        Fiber& f = fibers[i];
        f.thread = {i, 0, 0};
        f.lane = i % 32;
        f.block = &block;
        f.state = State::READY;
        f.mask = 0;
        f.copies.clear();
        f.committed = f.arrived = 0;
        f.context = new_context(stacks + (i + 1) * STACK, fiber_main);
    }
    for (unsigned w = 0; w < warps.size(); w++) {
        unsigned lanes = std::min(32u, launch->threads - w * 32);
        warps[w] = {lanes == 32 ? ~0u : (1u << lanes) - 1, 0};
    }
    while (!failed) {
        for (unsigned w : warp_order) {
            run_warp(w);
        }
        bool done = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::DONE; });
        if (failed || done) {
            break;
        }
        check_stuck();
        release_barrier();
    }
    if (!failed) {
        check_canary();
    }
}

namespace {

std::vector<unsigned> in_order(unsigned count, unsigned order) {
    std::vector<unsigned> all(count);
    std::iota(all.begin(), all.end(), 0u);
    if (order == 1) {
        std::reverse(all.begin(), all.end());
    }
    uint64_t state = order;
    for (unsigned i = count; order > 1 && i > 1; i--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(all[i - 1], all[(state >> 33) % i]);
    }
    return all;
}

// Memory with a page after it, and between stacks, that must not be touched.
unsigned char* guarded(size_t count, size_t room) {
    size_t bytes = count * room + PAGE;
    void* all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) {
        return nullptr;
    }
    auto* at = static_cast<unsigned char*>(all);
    mprotect(at + count * room, PAGE, PROT_NONE);
    for (size_t i = 0; count > 1 && i < count; i++) {
        mprotect(at + i * room, PAGE, PROT_NONE);
    }
    return at;
}

// Stacks of workers that are not in use.
struct Stacks {
    std::mutex lock;
    std::vector<unsigned char*> unused;

    unsigned char* take() {
        std::lock_guard held(lock);
        if (unused.empty()) {
            return guarded(MOST_THREADS, STACK);
        }
        unsigned char* last = unused.back();
        unused.pop_back();
        return last;
    }
    void give(unsigned char* stacks) {
        std::lock_guard held(lock);
        unused.push_back(stacks);
    }
};

Stacks& stacks() {
    static Stacks all;
    return all;
}

struct Outcome {
    std::mutex lock;
    std::string message;
    std::atomic<bool> failed = false;
    std::atomic<uint64_t> next = 0;
    std::atomic<uint64_t> cycles = 0, ideal = 0;
};

void work(const Kernel& kernel, const char* name, const Launch& launch, const std::vector<unsigned>& order,
          Outcome& outcome) {
    auto w = std::make_unique<Worker>();
    w->kernel = &kernel;
    w->name = name;
    w->launch = &launch;
    w->block.threads = {launch.threads, 1, 1};
    w->block.blocks = {launch.blocks[0], launch.blocks[1], launch.blocks[2]};
    w->fibers.resize(launch.threads);
    w->warps.resize((launch.threads + 31) / 32);
    w->warp_order = in_order(w->warps.size(), launch.order);
    w->lane_order = in_order(32, launch.order);
    w->shared_room = (launch.shared + PAGE - 1) / PAGE * PAGE;
    w->shared = guarded(1, w->shared_room);
    w->stacks = stacks().take();
    if (w->shared && w->stacks) {
        FaultCatcher catcher;
        own.worker = w.get();
        for (uint64_t i; !outcome.failed && (i = outcome.next++) < order.size();) {
            w->run(order[i]);
            if (w->failed) {
                std::lock_guard held(outcome.lock);
                char place[256];
                const Index& block = w->block.index;
                snprintf(place, sizeof(place), "%s, block (%u, %u, %u): ", name, block.x, block.y, block.z);
                outcome.message = std::string(place) + w->message;
                outcome.failed = true;
            }
        }
        own.worker = nullptr;
        own.current = nullptr;
    }
    outcome.cycles += w->cycles;
    outcome.ideal += w->ideal;
    if (w->stacks) {
        stacks().give(w->stacks);
    }
    if (w->shared) {
        munmap(w->shared, w->shared_room + PAGE);
    }
}

std::string check(const char* name, const Kernel* kernel, const Launch& launch) {
    if (!kernel) {
        return std::string("there is no kernel ") + name;
    }
    if (kernel->count != launch.count) {
        return std::string(name) + " takes " + std::to_string(kernel->count) + " arguments, was given " +
               std::to_string(launch.count);
    }
    static const char* const words[] = {"an address", "an i32", "a u32", "an i64", "a u64", "an f32"};
    for (size_t i = 0; i < kernel->count; i++) {
        if (kernel->kinds[i] != launch.arguments[i].kind) {
            return std::string(name) + ": argument " + std::to_string(i) + " is " + words[kernel->kinds[i]] +
                   ", was given " + words[launch.arguments[i].kind];
        }
    }
    return "";
}

} // namespace

Registration::Registration(const char* name, Call call, const Kind* kinds, size_t count) {
    kernels()[name] = {call, kinds, count};
}

void fail(const char* format, ...) {
    Worker& w = *own.worker;
    int length = snprintf(w.message, sizeof(w.message), "thread %u: ", own.current->thread.x);
    va_list list;
    va_start(list, format);
    vsnprintf(w.message + length, sizeof(w.message) - length, format, list);
    va_end(list);
    w.failed = true;
    yield();
    __builtin_unreachable();
}

unsigned barrier(const char* file, int line, bool value) {
    Fiber& self = own.worker->fiber();
    self.state = State::BARRIER;
    self.file = file;
    self.line = line;
    self.value = value;
    yield();
    return self.value;
}

void meet(unsigned mask, Operation operation, void* argument, const char* what) {
    Fiber& self = own.worker->fiber();
    unsigned index = self.thread.x / 32;
    Warp& warp = own.worker->warps[index];
    if (!(mask >> self.lane & 1)) {
        fail("lane %u is not among the lanes %08x of its own %s", self.lane, mask, what);
    }
    self.mask = mask;
    self.operation = operation;
    self.argument = argument;
    self.what = what;
    warp.waiting |= 1u << self.lane;
    if (mask & warp.live & ~warp.waiting) {
        self.state = State::MEETING;
        yield();
    } else {
        complete(index, mask);
    }
}

void copy_later(void* to, const void* from, unsigned bytes, unsigned valid) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
        fail("an asynchronous copy of %u bytes that are not aligned to as many, to %p from %p", bytes, to, from);
    }
    Fiber& self = own.worker->fiber();
    self.copies.push_back({to, from, bytes, valid, self.committed});
}

void commit_copies() { own.worker->fiber().committed++; }

void wait_for_copies(unsigned groups_left) {
    Fiber& self = own.worker->fiber();
    unsigned until = self.committed > groups_left ? self.committed - groups_left : 0;
    size_t kept = 0;
    for (const Copy& copy : self.copies) {
        if (copy.group >= until) {
            self.copies[kept++] = copy;
            continue;
        }
        memcpy(copy.to, copy.from, copy.valid);
        memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    self.copies.resize(kept);
}

bool in_dynamic_shared(const void* address, size_t bytes) {
    auto* at = static_cast<const unsigned char*>(address);
    return at >= own.worker->block.dynamic_shared && at + bytes <= own.worker->block.dynamic_shared + own.worker->launch->shared;
}

void count_shared(unsigned cycles, unsigned ideal) {
    own.worker->cycles += cycles;
    own.worker->ideal += ideal;
}

bool in_fiber() { return own.worker != nullptr && own.current != nullptr; }

} // namespace emulator

using namespace emulator;

// How many parameters a kernel has, and of what kinds the first `room` are; -1 if there is no such kernel.
extern "C" __attribute__((visibility("default"))) int emulator_kinds(const char* name, uint32_t* kinds, size_t room) {
    auto found = kernels().find(name);
    if (found == kernels().end()) {
        return -1;
    }
    std::copy_n(found->second.kinds, std::min(room, found->second.count), kinds);
    return int(found->second.count);
}

// Runs a kernel to its end. 0, or 1 with what went wrong in `message`. `shared_cycles` gets cycles and ideal cycles of
// the counted reads of shared memory.
extern "C" __attribute__((visibility("default"))) int emulator_launch(const char* name, const Launch* launch,
                                                                      uint64_t* shared_cycles, char* message,
                                                                      size_t room) {
    auto found = kernels().find(name);
    const Kernel* kernel = found == kernels().end() ? nullptr : &found->second;
    std::string wrong = check(name, kernel, *launch);
    if (wrong.empty()) {
        uint64_t blocks = uint64_t(launch->blocks[0]) * launch->blocks[1] * launch->blocks[2];
        std::vector<unsigned> order = in_order(blocks, launch->order);
        Outcome outcome;
        uint64_t workers = std::min<uint64_t>(launch->workers, blocks);
        std::vector<std::thread> threads;
        for (uint64_t i = 1; i < workers; i++) {
            threads.emplace_back([&] { work(*kernel, name, *launch, order, outcome); });
        }
        work(*kernel, name, *launch, order, outcome);
        for (std::thread& thread : threads) {
            thread.join();
        }
        wrong = outcome.message;
        if (wrong.empty() && outcome.next < blocks) {
            wrong = "no memory for the stacks of an emulated block";
        }
        shared_cycles[0] += outcome.cycles;
        shared_cycles[1] += outcome.ideal;
    }
    snprintf(message, room, "%s", wrong.c_str());
    return !wrong.empty();
}
