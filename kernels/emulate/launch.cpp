// Launches of emulated kernels: what there is, arguments, threads of the operating system that share the blocks.

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>

#include <sys/mman.h>

#include "faults.h"
#include "worker.h"

namespace emulator {

namespace {

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

} // namespace

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

namespace {

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
extern "C" __attribute__((visibility("default"))) int
emulator_launch(const char* name, const Launch* launch, uint64_t* shared_cycles, char* message, size_t room) {
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
