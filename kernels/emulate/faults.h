// Faults of emulated threads: memory that is not theirs, indices out of an array's bounds, vectors that are not
// aligned.
#pragma once

#include <csignal>

namespace emulator {

// Fills the static shared memory of this thread of the operating system with NaNs.
void fill_static_shared();

// Whether an emulated thread runs on this thread of the operating system.
bool in_fiber();

// While it lives, a bad access of an emulated thread ends the launch with a message instead of the process.
struct FaultCatcher {
    FaultCatcher();
    ~FaultCatcher();

  private:
    stack_t stack_before;
};

} // namespace emulator
