#include "faults.h"

#include "emulator.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace emulator {

namespace {

constexpr size_t SIGNAL_STACK = 64 << 10;

struct sigaction before[2];

[[noreturn]] void land() { fail("an access to %p, which is not its memory", own.faulty); }

// Goes on in `land`, outside of the signal handler.
void caught(int signal, siginfo_t* info, void* context) {
    if (in_fiber()) {
        own.faulty = info->si_addr;
#if defined(__x86_64__)
        auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
        registers[REG_RIP] = reinterpret_cast<greg_t>(&land);
        registers[REG_RSP] = reinterpret_cast<greg_t>(own.signal_stack + 2 * SIGNAL_STACK - 8);
        return;
#elif defined(__aarch64__)
        auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
        machine.pc = reinterpret_cast<uintptr_t>(&land);
        machine.sp = reinterpret_cast<uintptr_t>(own.signal_stack + 2 * SIGNAL_STACK);
        return;
#endif
    }
    // Not ours: it happens again, to whoever listened before.
    sigaction(signal, &before[signal == SIGBUS], nullptr);
}

// Finds the thread-local memory of this library.
int find_shared(dl_phdr_info* info, size_t, void*) {
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        auto at = reinterpret_cast<uintptr_t>(&find_shared) - info->dlpi_addr - header.p_vaddr;
        ours |= header.p_type == PT_LOAD && at < header.p_memsz;
        bytes = header.p_type == PT_TLS ? header.p_memsz : bytes;
    }
    if (ours) {
        own.shared = static_cast<unsigned char*>(info->dlpi_tls_data);
        own.shared_bytes = bytes;
    }
    return ours;
}

// Handlers are there while somebody catches.
std::mutex catchers_lock;
int catchers = 0;

} // namespace

void fill_static_shared() {
    if (!own.shared) {
        dl_iterate_phdr(find_shared, nullptr);
    }
    Own kept = own;
    memset(kept.shared, 0xff, kept.shared_bytes);
    own = kept;
}

FaultCatcher::FaultCatcher() {
    // Its lower half is the signal handler's, its upper half is for what follows.
    auto* room = static_cast<unsigned char*>(malloc(2 * SIGNAL_STACK));
    own.signal_stack = room;
    stack_t mine{}, old{};
    mine.ss_sp = room;
    mine.ss_size = SIGNAL_STACK;
    sigaltstack(&mine, &old);
    stack_before = old;
    std::lock_guard held(catchers_lock);
    if (catchers++ == 0) {
        struct sigaction action{};
        action.sa_sigaction = caught;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before[0]);
        sigaction(SIGBUS, &action, &before[1]);
    }
}

FaultCatcher::~FaultCatcher() {
    {
        std::lock_guard held(catchers_lock);
        if (--catchers == 0) {
            sigaction(SIGSEGV, &before[0], nullptr);
            sigaction(SIGBUS, &before[1], nullptr);
        }
    }
    sigaltstack(&stack_before, nullptr);
    free(own.signal_stack);
    own.signal_stack = nullptr;
}

} // namespace emulator

// What the compiler's checks of array bounds and of alignment call.

struct Place {
    const char* file;
    unsigned line, column;
};
struct TypeName {
    unsigned short kind, info;
    char name[1];
};
struct OutOfBounds {
    Place place;
    const TypeName *array, *index;
};
struct Mismatch {
    Place place;
    const TypeName* type;
    unsigned char log_alignment, kind;
};

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data,
                                                                                         uintptr_t index) {
    emulator::fail("%s:%u: index %ld of an array %s", data->place.file, data->place.line, long(index),
                   data->array->name);
}

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(Mismatch* data,
                                                                                            uintptr_t address) {
    emulator::fail("%s:%u: an access to %s at 0x%lx, which is not aligned to %d bytes", data->place.file,
                   data->place.line, data->type->name, long(address), 1 << data->log_alignment);
}
