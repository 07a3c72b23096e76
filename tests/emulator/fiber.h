// Threads of the emulated GPUs: each has a stack of its own, and all take turns on one thread of the operating system.
#ifndef LLM_ALLREDUCE_EMULATOR_FIBER_H_
#define LLM_ALLREDUCE_EMULATOR_FIBER_H_

#include <cstddef>

namespace emulator {

// A fiber runs body(argument) once. Nothing is unwound when one is dropped in the middle.
class Fiber {
 public:
  using Body = void (*)(void* argument);

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void prepare(Body body, void* argument);

  // From outside: runs it until it pauses or ends.
  void resume();

  // From inside: back to who has resumed it.
  void pause();

  // Before resume(): what that reads first is on its way.
  void expect() const { __builtin_prefetch(rest_); }

 private:
  static void enter();
  void start();

  void* rest_ = nullptr;  // what it goes on with, on its stack
  char* stack_ = nullptr;
  Body body_ = nullptr;
  void* argument_ = nullptr;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_FIBER_H_
