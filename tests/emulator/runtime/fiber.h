// SPDX-License-Identifier: Apache-2.0
// Stacks of their own for the threads of a block, switched without the kernel's help.
#ifndef SAGERT_EMULATOR_FIBER_H_
#define SAGERT_EMULATOR_FIBER_H_

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // What runs when it is next resumed, from its beginning. It must not return.
  void start(void (*run)(void*), void* argument);
  // Runs it until it pauses.
  void resume();
  // Goes back to who resumed it; called on the fiber itself.
  void pause();

 private:
  static constexpr size_t kStack = size_t{1} << 20;  // pages that nothing touches cost nothing
  char* stack_ = nullptr;
#if defined(__x86_64__)
  void* own_ = nullptr;  // stack pointers
  void* caller_ = nullptr;
#else
  static void begin(unsigned high, unsigned low);
  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
  ucontext_t own_, caller_;
#endif
};

}  // namespace emulator

#endif  // SAGERT_EMULATOR_FIBER_H_
