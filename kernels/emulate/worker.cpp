// Blocks of emulated threads: the scheduler, barriers, meetings of warps, copies in the background.

#include "worker.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "faults.h"
#include "fiber.h"

namespace emulator {

constinit thread_local Own own = {};

namespace {

// What is written between the end of the shared memory and the end of its page.
constexpr unsigned char CANARY = 0xa5;

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
        if (!(warp.waiting >> lane & 1)) {
            continue;
        }
        const unsigned mask = own.worker->fibers[index * 32 + lane].mask;
        if (!(mask & warp.live & ~warp.waiting)) {
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
    for (unsigned char* at = shared + shared_room - (shared_room - launch->shared) % 16; at < shared + shared_room;
         at++) {
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
    return at >= own.worker->block.dynamic_shared &&
           at + bytes <= own.worker->block.dynamic_shared + own.worker->launch->shared;
}

void count_shared(unsigned cycles, unsigned ideal) {
    own.worker->cycles += cycles;
    own.worker->ideal += ideal;
}

bool in_fiber() { return own.worker != nullptr && own.current != nullptr; }

} // namespace emulator
