// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace emulator {

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack);
}

#if defined(__x86_64__)

// Saves what a call preserves on the present stack, takes the other stack, and returns there. swapcontext would ask the
// kernel for the signal mask each time.
asm(R"(
.text
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
.type emulator_begin, @function
emulator_begin:
  movq %r12, %rdi
  callq *%r13
  ud2
.size emulator_begin, . - emulator_begin
)");

extern "C" void emulator_switch(void** save, void* take) __asm__("emulator_switch");
extern "C" void emulator_begin() __asm__("emulator_begin");

namespace {
void* map_stack(size_t bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) abort();
  mprotect(found, 4096, PROT_NONE);  // an overflow ends the process rather than another fiber
  return found;
}
}  // namespace

void Fiber::start(void (*run)(void*), void* argument) {
  if (stack_ == nullptr) stack_ = static_cast<char*>(map_stack(kStack));
  void** top = reinterpret_cast<void**>(stack_ + kStack) - 2;
  // As emulator_switch leaves a stack: r15, r14, r13, r12, rbx, rbp, and where to return to.
  void* frame[] = {nullptr, nullptr, reinterpret_cast<void*>(run),           argument,
                   nullptr, nullptr, reinterpret_cast<void*>(emulator_begin)};
  for (int i = 6; i >= 0; --i) *--top = frame[i];
  own_ = top;
}

void Fiber::resume() { emulator_switch(&caller_, own_); }
void Fiber::pause() { emulator_switch(&own_, caller_); }

#else

void Fiber::begin(unsigned high, unsigned low) {
  Fiber* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  fiber->run_(fiber->argument_);
  abort();
}

void Fiber::start(void (*run)(void*), void* argument) {
  if (stack_ == nullptr) {
    void* found = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) abort();
    stack_ = static_cast<char*>(found);
  }
  run_ = run;
  argument_ = argument;
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStack;
  own_.uc_link = nullptr;
  const uintptr_t self = reinterpret_cast<uintptr_t>(this);
  makecontext(&own_, reinterpret_cast<void (*)()>(begin), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Fiber::resume() { swapcontext(&caller_, &own_); }
void Fiber::pause() { swapcontext(&own_, &caller_); }

#endif

}  // namespace emulator
