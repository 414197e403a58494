// A switch between two stacks: what a function may not change is saved on one and taken from the other.
#pragma once

#include <cstdint>

#if defined(__x86_64__)

extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));

asm(R"(
    .text
    .hidden emulator_switch
    .globl emulator_switch
    .type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch, . - emulator_switch
)");

// A stack on which `run` begins when it is first switched to.
inline void* new_context(unsigned char* top, void (*run)()) {
    auto* at = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63)) - 8;
    at[6] = reinterpret_cast<void*>(run);
    at[7] = nullptr;
    return at;
}

#elif defined(__aarch64__)

extern "C" void emulator_switch(void** from, void* to) __attribute__((visibility("hidden")));

asm(R"(
    .text
    .hidden emulator_switch
    .globl emulator_switch
    .type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size emulator_switch, . - emulator_switch
)");

inline void* new_context(unsigned char* top, void (*run)()) {
    auto* at = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63)) - 20;
    at[11] = reinterpret_cast<void*>(run);
    return at;
}

#else
#error "the emulator of kernels knows x86-64 and aarch64"
#endif
