// A stand-in for NVIDIA's driver (libcuda.so.1) on a machine without a GPU: streams are threads that work through what
// they were given, late now and then; memory is the host's and is handed out again as soon as the stream that freed it
// asks, whatever others still do with it; kernels run in the emulator. So a wait that is missing between streams shows as
// wrong bytes, as on a GPU, and calls with wrong arguments fail. It computes nothing that is not in kernels/ or candle.cpp.
//
// STAND_IN_KERNELS names the emulator's library (build/emulate.rs). STAND_IN_DELAY_US: at most so late. STAND_IN_DRIVER,
// STAND_IN_CAPABILITY, STAND_IN_GPUS, STAND_IN_GIB: what it says of itself. STAND_IN_FAILS="STATUS LAUNCH RANK": that launch on
// the rank with that LOCAL_RANK fails, as everything after it. STAND_IN_IDLE=1: kernels, fills and copies on the GPU do nothing and are counted, to
// see how long the host takes to launch them. Only what dblaunch and candle call is here.
#include "candle.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

enum { SUCCESS = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 100, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
       ALREADY_LOCKED = 712, LAUNCH_FAILED = 719, ECC_UNCORRECTABLE = 214 };

long setting(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

std::atomic<int> sticky{0};

// Launches of this process. In idle mode, told at its end.
struct Launches {
    std::atomic<long> count{0};
    const bool idle = setting("STAND_IN_IDLE", 0) > 0;
    long fails_at = -1;
    int status = 0;

    Launches() {
        int rank;
        const char* text = getenv("STAND_IN_FAILS");
        if (text && (sscanf(text, "%d %ld %d", &status, &fails_at, &rank) != 3 || rank != setting("LOCAL_RANK", 0))) {
            fails_at = -1;
        }
    }
    ~Launches() {
        if (idle) {
            fprintf(stderr, "stand-in: %ld launches\n", count.load());
        }
    }
} launches;

// ---- Streams and events ----

struct Stream {
    std::mutex lock;
    std::condition_variable news;
    std::deque<std::function<void()>> work;
    bool over = false, busy = false;
    std::thread thread{[this] { run(); }};

    void run() {
        std::minstd_rand draws(reinterpret_cast<uintptr_t>(this) >> 4);
        long most = setting("STAND_IN_DELAY_US", 200);
        std::unique_lock held(lock);
        for (;;) {
            news.wait(held, [&] { return over || !work.empty(); });
            if (work.empty()) {
                return;
            }
            auto next = std::move(work.front());
            work.pop_front();
            busy = true;
            held.unlock();
            if (most > 0 && draws() % 8 == 0) {
                std::this_thread::sleep_for(std::chrono::microseconds(draws() % most));
            }
            next();
            next = nullptr;
            held.lock();
            busy = false;
            news.notify_all();
        }
    }
    void put(std::function<void()> what) {
        std::lock_guard held(lock);
        work.push_back(std::move(what));
        news.notify_all();
    }
    void wait() {
        std::unique_lock held(lock);
        news.wait(held, [&] { return work.empty() && !busy; });
    }
    ~Stream() {
        {
            std::lock_guard held(lock);
            over = true;
            news.notify_all();
        }
        thread.join();
    }
};

struct Event {
    std::mutex lock;
    std::condition_variable news;
    uint64_t recorded = 0, reached = 0;
    std::chrono::steady_clock::time_point time;

    void wait_for(uint64_t which) {
        std::unique_lock held(lock);
        news.wait(held, [&] { return reached >= which; });
    }
};

std::mutex table_lock;
std::map<void*, std::shared_ptr<Event>> events;
std::map<void*, std::shared_ptr<Stream>> streams;

std::shared_ptr<Event> event(void* handle) {
    std::lock_guard held(table_lock);
    auto found = events.find(handle);
    return found == events.end() ? nullptr : found->second;
}

std::shared_ptr<Stream> stream(void* handle) {
    std::lock_guard held(table_lock);
    auto found = streams.find(handle);
    if (found == streams.end()) {
        fprintf(stderr, "stand-in: %p is no stream\n", handle);
        return nullptr;
    }
    return found->second;
}

// ---- Memory ----

struct Pool {
    size_t limit = 0, used = 0, used_high = 0, held = 0, held_high = 0;
};

struct Block {
    Pool* pool;
    size_t bytes, taken;
    void* freed_on;
};

std::recursive_mutex memory_lock;
std::map<uintptr_t, Block> handed_out, spare;
// Of what is spare.
std::set<std::pair<size_t, uintptr_t>> by_size;
std::map<uintptr_t, size_t> page_locked;
Pool own_pool;
Pool* current = &own_pool;

bool within(uintptr_t at, size_t bytes) {
    std::lock_guard held(memory_lock);
    auto found = handed_out.upper_bound(at);
    bool fits = found != handed_out.begin() && (--found, at + bytes <= found->first + found->second.taken);
    if (!fits) {
        fprintf(stderr, "stand-in: %zu bytes at %lx are not handed out\n", bytes, at);
    }
    return fits;
}

bool is_page_locked(const void* at, size_t bytes) {
    std::lock_guard held(memory_lock);
    auto found = page_locked.upper_bound(uintptr_t(at));
    return found != page_locked.begin() && (--found, uintptr_t(at) + bytes <= found->first + found->second);
}

void give_back_spare(Pool* pool) {
    for (auto at = spare.begin(); at != spare.end();) {
        if (at->second.pool != pool) {
            at++;
            continue;
        }
        if (auto last = stream(at->second.freed_on)) {
            last->wait();
        }
        pool->held -= at->second.bytes;
        free(reinterpret_cast<void*>(at->first));
        by_size.erase({at->second.bytes, at->first});
        at = spare.erase(at);
    }
}

int take(uintptr_t* to, size_t bytes, Pool* pool, void* on) {
    if (!bytes || !stream(on)) {
        return INVALID;
    }
    std::lock_guard held(memory_lock);
    uintptr_t found = 0;
    for (auto at = by_size.lower_bound({bytes, 0}); at != by_size.end() && at->first <= 2 * bytes + 512; at++) {
        const Block& block = spare[at->second];
        if (block.pool == pool && block.freed_on == on) {
            found = at->second;
            break;
        }
    }
    if (!found) {
        size_t whole = (bytes + 511) / 512 * 512;
        if (pool->limit && pool->held + whole > pool->limit) {
            give_back_spare(pool);
        }
        if (pool->limit && pool->held + whole > pool->limit) {
            return NO_MEMORY;
        }
        found = uintptr_t(aligned_alloc(512, whole));
        if (!found) {
            return NO_MEMORY;
        }
        // NaNs, so that what nobody wrote shows.
        memset(reinterpret_cast<void*>(found), launches.idle ? 0 : 0xff, whole);
        pool->held += whole;
        pool->held_high = std::max(pool->held_high, pool->held);
        spare[found] = {pool, whole, 0, on};
        by_size.insert({whole, found});
    }
    Block block = spare[found];
    spare.erase(found);
    by_size.erase({block.bytes, found});
    block.taken = bytes;
    handed_out[found] = block;
    pool->used += bytes;
    pool->used_high = std::max(pool->used_high, pool->used);
    *to = found;
    return SUCCESS;
}

// ---- Kernels ----

struct Argument {
    uint32_t kind, unused;
    uint64_t bits;
};

struct Launch {
    uint32_t blocks[3], threads, shared, order, workers, count;
    const Argument* arguments;
};

using LaunchFunction = int (*)(const char*, const Launch*, uint64_t*, char*, size_t);
using KindsFunction = int (*)(const char*, uint32_t*, size_t);

template <class F> F emulator(const char* name) {
    static void* library = [] {
        const char* path = getenv("STAND_IN_KERNELS");
        void* opened = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (!opened) {
            fprintf(stderr, "stand-in: STAND_IN_KERNELS: %s\n", path ? dlerror() : "not set");
        }
        return opened;
    }();
    return library ? reinterpret_cast<F>(dlsym(library, name)) : nullptr;
}

const int DEVICE = 7;
char context;

} // namespace

#define CALL extern "C" __attribute__((visibility("default"))) int

// ---- The device ----

CALL cuInit(unsigned) {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    return setting("STAND_IN_GPUS", 1) > 0 && (!visible || *visible) ? SUCCESS : NO_DEVICE;
}
CALL cuDriverGetVersion(int* version) { return *version = setting("STAND_IN_DRIVER", 13000), SUCCESS; }
CALL cuDeviceGetCount(int* count) { return *count = setting("STAND_IN_GPUS", 1), SUCCESS; }
CALL cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
CALL cuDeviceGetName(char* name, int room, int device) {
    return snprintf(name, room, "stand-in %d", device), SUCCESS;
}
// Came with 11.4; where a function is missing the program's trampolines say that there is no device.
CALL cuDeviceGetUuid_v2(char* uuid, int device) {
    if (setting("STAND_IN_DRIVER", 13000) < 11040) {
        return NO_DEVICE;
    }
    memset(uuid, 0x40 + device, 16);
    return SUCCESS;
}
CALL cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
CALL cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t(setting("STAND_IN_GIB", 8)) << 30, SUCCESS; }
CALL cuDeviceGetAttribute(int* value, int attribute, int) {
    long capability = setting("STAND_IN_CAPABILITY", 80);
    switch (attribute) {
    case 16: *value = 4; break;                     // multiprocessors
    case 75: *value = int(capability / 10); break;  // capability
    case 76: *value = int(capability % 10); break;
    case 97: *value = 163 << 10; break;             // shared memory that a kernel may opt in to
    case 115: *value = 1; break;                    // pools
    default: *value = 0;
    }
    return SUCCESS;
}
CALL cuDevicePrimaryCtxRetain(void** to, int) { return *to = &context, SUCCESS; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
thread_local void* bound = nullptr;
CALL cuCtxGetCurrent(void** to) { return *to = bound, SUCCESS; }
CALL cuCtxSetCurrent(void* which) { return bound = which, SUCCESS; }
CALL cuCtxSetFlags(unsigned) { return SUCCESS; }
CALL cuCtxSynchronize() {
    std::vector<std::shared_ptr<Stream>> all;
    {
        std::lock_guard held(table_lock);
        for (auto& [handle, stream] : streams) {
            all.push_back(stream);
        }
    }
    for (auto& stream : all) {
        stream->wait();
    }
    return sticky;
}
CALL cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    std::lock_guard held(memory_lock);
    *total = size_t(setting("STAND_IN_GIB", 8)) << 30;
    *free_bytes = *total - (size_t(300) << 20) - current->held;
    return SUCCESS;
}
CALL cuGetErrorString(int status, const char** text) {
    *text = status == NO_MEMORY           ? "out of memory"
            : status == LAUNCH_FAILED     ? "a kernel failed"
            : status == ECC_UNCORRECTABLE ? "uncorrectable ECC error encountered"
                                          : "an error";
    return SUCCESS;
}
CALL cuGetErrorName(int status, const char** text) { return cuGetErrorString(status, text); }

// ---- Streams ----

CALL cuStreamCreate(void** to, unsigned) {
    auto made = std::make_shared<Stream>();
    std::lock_guard held(table_lock);
    streams[made.get()] = made;
    return *to = made.get(), SUCCESS;
}
CALL cuStreamCreateWithPriority(void** to, unsigned flags, int) { return cuStreamCreate(to, flags); }
CALL cuStreamDestroy_v2(void* handle) {
    auto last = stream(handle);
    if (!last) {
        return INVALID_HANDLE;
    }
    std::lock_guard held(table_lock);
    streams.erase(handle);
    return SUCCESS;
}
CALL cuStreamSynchronize(void* handle) {
    auto which = stream(handle);
    return which ? which->wait(), int(sticky) : int(INVALID_HANDLE);
}
// For libraries that cannot be closed after a failure.
CALL stand_in_broken() { return sticky; }
// For what puts work of its own on streams.
CALL stand_in_put(void* handle, void (*what)(void*), void* with) {
    auto which = stream(handle);
    if (!which) {
        return INVALID_HANDLE;
    }
    launches.count++;
    which->put([=] { what(with); });
    return SUCCESS;
}
CALL cuStreamWaitEvent(void* handle, void* what, unsigned) {
    auto which = stream(handle);
    auto waited = event(what);
    if (!which || !waited) {
        return INVALID_HANDLE;
    }
    std::lock_guard held(waited->lock);
    which->put([waited, until = waited->recorded] { waited->wait_for(until); });
    return SUCCESS;
}
CALL cuEventCreate(void** to, unsigned) {
    auto made = std::make_shared<Event>();
    std::lock_guard held(table_lock);
    events[made.get()] = made;
    return *to = made.get(), SUCCESS;
}
CALL cuEventDestroy_v2(void* handle) {
    std::lock_guard held(table_lock);
    return events.erase(handle) ? SUCCESS : INVALID_HANDLE;
}
CALL cuEventRecord(void* handle, void* on) {
    auto which = stream(on);
    auto recorded = event(handle);
    if (!which || !recorded) {
        return INVALID_HANDLE;
    }
    std::lock_guard held(recorded->lock);
    which->put([recorded, number = ++recorded->recorded] {
        std::lock_guard held(recorded->lock);
        recorded->reached = number;
        recorded->time = std::chrono::steady_clock::now();
        recorded->news.notify_all();
    });
    return SUCCESS;
}
CALL cuEventQuery(void* handle) {
    auto asked = event(handle);
    if (!asked) {
        return INVALID_HANDLE;
    }
    std::lock_guard held(asked->lock);
    return sticky ? int(sticky) : asked->reached >= asked->recorded ? SUCCESS : NOT_READY;
}
CALL cuEventSynchronize(void* handle) {
    auto asked = event(handle);
    if (!asked) {
        return INVALID_HANDLE;
    }
    uint64_t until;
    {
        std::lock_guard held(asked->lock);
        until = asked->recorded;
    }
    asked->wait_for(until);
    return sticky;
}
CALL cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
    auto first = event(from), last = event(to);
    if (!first || !last) {
        return INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
    return SUCCESS;
}

// ---- Memory ----

CALL cuMemPoolCreate(void** to, const char* properties) {
    uint32_t kind, location;
    memcpy(&kind, properties, 4);
    memcpy(&location, properties + 8, 4);
    if (kind != 1 || location != 1) {
        return INVALID;
    }
    auto* pool = new Pool;
    memcpy(&pool->limit, properties + 24, 8);
    return *to = pool, SUCCESS;
}
CALL cuMemPoolDestroy(void* pool) {
    std::lock_guard held(memory_lock);
    current = current == pool ? &own_pool : current;
    return SUCCESS;
}
CALL cuDeviceSetMemPool(int, void* pool) { return current = static_cast<Pool*>(pool), SUCCESS; }
CALL cuMemPoolSetAttribute(Pool* pool, int attribute, void* value) {
    std::lock_guard held(memory_lock);
    uint64_t number = 0;
    memcpy(&number, value, attribute <= 3 ? 4 : 8);
    if (attribute == 6 || attribute == 8) {
        if (number) {
            return INVALID;
        }
        (attribute == 6 ? pool->held_high : pool->used_high) = attribute == 6 ? pool->held : pool->used;
    }
    return SUCCESS;
}
CALL cuMemPoolGetAttribute(Pool* pool, int attribute, uint64_t* value) {
    std::lock_guard held(memory_lock);
    switch (attribute) {
    case 5: *value = pool->held; break;
    case 6: *value = pool->held_high; break;
    case 7: *value = pool->used; break;
    case 8: *value = pool->used_high; break;
    default: return INVALID;
    }
    return SUCCESS;
}
CALL cuMemPoolTrimTo(Pool* pool, size_t) {
    std::lock_guard held(memory_lock);
    give_back_spare(pool);
    return SUCCESS;
}
CALL cuMemAllocFromPoolAsync(uintptr_t* to, size_t bytes, Pool* pool, void* on) { return take(to, bytes, pool, on); }
CALL cuMemAllocAsync(uintptr_t* to, size_t bytes, void* on) { return take(to, bytes, current, on); }
CALL cuMemFreeAsync(uintptr_t at, void* on) {
    std::lock_guard held(memory_lock);
    auto found = handed_out.find(at);
    if (found == handed_out.end() || !stream(on)) {
        fprintf(stderr, "stand-in: %lx is freed and was not handed out\n", at);
        return INVALID;
    }
    Block block = found->second;
    handed_out.erase(found);
    block.pool->used -= block.taken;
    block.freed_on = on;
    // From now on this stream may have it again, and only this one.
    spare[at] = block;
    by_size.insert({block.bytes, at});
    return SUCCESS;
}
CALL cuMemHostAlloc(void** to, size_t bytes, unsigned) {
    std::lock_guard held(memory_lock);
    *to = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    page_locked[uintptr_t(*to)] = bytes;
    return *to ? SUCCESS : NO_MEMORY;
}
CALL cuMemFreeHost(void* at) {
    std::lock_guard held(memory_lock);
    auto found = page_locked.find(uintptr_t(at));
    if (found == page_locked.end()) {
        return INVALID;
    }
    // Whoever still copies gets these.
    memset(at, 0xdd, found->second);
    page_locked.erase(found);
    free(at);
    return SUCCESS;
}
CALL cuMemHostRegister_v2(void* at, size_t bytes, unsigned) {
    std::lock_guard held(memory_lock);
    auto next = page_locked.lower_bound(uintptr_t(at) + bytes);
    if (next != page_locked.begin() && (--next, next->first + next->second > uintptr_t(at))) {
        return ALREADY_LOCKED;
    }
    return page_locked[uintptr_t(at)] = bytes, SUCCESS;
}
CALL cuMemHostUnregister(void* at) {
    std::lock_guard held(memory_lock);
    return page_locked.erase(uintptr_t(at)) ? SUCCESS : INVALID;
}
CALL cuMemsetD8Async(uintptr_t at, unsigned char value, size_t bytes, void* on) {
    auto which = stream(on);
    if (!which || !within(at, bytes)) {
        return INVALID;
    }
    launches.count++;
    which->put([=] { launches.idle || memset(reinterpret_cast<void*>(at), value, bytes); });
    return SUCCESS;
}
CALL cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t bytes, void* on) {
    auto which = stream(on);
    if (!which || !within(to, bytes)) {
        return INVALID;
    }
    auto* target = reinterpret_cast<char*>(to);
    if (is_page_locked(from, bytes)) {
        which->put([=] { memcpy(target, from, bytes); });
    } else {
        // Has left the host's memory when the call returns.
        auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
        which->put([=] { memcpy(target, staged->data(), bytes); });
    }
    return SUCCESS;
}
CALL cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t bytes, void* on) {
    auto which = stream(on);
    if (!which || !within(from, bytes)) {
        return INVALID;
    }
    which->put([=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
    if (!is_page_locked(to, bytes)) {
        which->wait();
    }
    return SUCCESS;
}
CALL cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void* on) {
    auto which = stream(on);
    if (!which || !within(to, bytes) || !within(from, bytes)) {
        return INVALID;
    }
    launches.count++;
    which->put([=] { launches.idle || memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return SUCCESS;
}

// ---- Kernels ----

struct Module {
    // candle's, which come as text; none: ours.
    std::string text;
};
struct Function {
    std::string name;
    bool candles;
};
CALL cuModuleLoadData(Module** module, const void* image) {
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (magic == 0xba55ed50) {
        return *module = new Module, SUCCESS;
    }
    std::string text(static_cast<const char*>(image));
    if (text.find(".target sm_") == std::string::npos) {
        return NOT_FOUND;
    }
    return *module = new Module{std::move(text)}, SUCCESS;
}
CALL cuModuleUnload(Module* module) { return delete module, SUCCESS; }
CALL cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (!module->text.empty()) {
        bool compiled = module->text.find(std::string(".entry ") + name + "(") != std::string::npos;
        if (!compiled || !candle::knows(name)) {
            fprintf(stderr, "stand-in: candle's kernel %s is not %s\n", name, compiled ? "known here" : "in its module");
            return NOT_FOUND;
        }
        return *function = new Function{name, true}, SUCCESS;
    }
    auto kinds = emulator<KindsFunction>("emulator_kinds");
    if (!kinds || kinds(name, nullptr, 0) < 0) {
        return NOT_FOUND;
    }
    return *function = new Function{name, false}, SUCCESS;
}
CALL cuFuncSetAttribute(void*, int, int) { return SUCCESS; }
CALL cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                    unsigned shared, void* on, void** parameters, void**) {
    auto which = stream(on);
    if (!which || !x || !y || !z || !threads || threads > 1024) {
        return INVALID;
    }
    if (sticky) {
        return sticky;
    }
    long number = launches.count++;
    if (launches.fails_at >= 0 && number >= launches.fails_at) {
        which->put([] { sticky = launches.status; });
        return SUCCESS;
    }
    // The first two, a fill and this, are the self-test.
    if (launches.idle && number > 1) {
        which->put([] {});
        return SUCCESS;
    }
    if (function->candles) {
        auto work = candle::launch(function->name, parameters, within);
        return work ? which->put(std::move(work)), SUCCESS : INVALID;
    }
    auto kinds = emulator<KindsFunction>("emulator_kinds");
    auto launch = emulator<LaunchFunction>("emulator_launch");
    if (!kinds || !launch) {
        return INVALID;
    }
    uint32_t kind[64];
    int count = kinds(function->name.c_str(), kind, 64);
    std::vector<Argument> arguments(std::max(count, 0));
    for (size_t i = 0; i < arguments.size(); i++) {
        // Addresses and 64-bit integers, or 32 bits.
        arguments[i].kind = kind[i];
        memcpy(&arguments[i].bits, parameters[i], kind[i] == 0 || kind[i] == 3 || kind[i] == 4 ? 8 : 4);
    }
    which->put([=, name = function->name] {
        Launch what{{x, y, z}, threads, shared, 0, 2, uint32_t(arguments.size()), arguments.data()};
        uint64_t cycles[2];
        char message[2048];
        if (launch(name.c_str(), &what, cycles, message, sizeof message)) {
            fprintf(stderr, "stand-in: %s\n", message);
            sticky = LAUNCH_FAILED;
        }
    });
    return SUCCESS;
}
