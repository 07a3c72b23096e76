// Threads of the emulated GPUs: each has a stack of its own, and all take turns on one thread of the operating system.
#ifndef LLM_ALLREDUCE_EMULATOR_FIBER_H_
#define LLM_ALLREDUCE_EMULATOR_FIBER_H_

#include <setjmp.h>

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

 private:
  static void enter(unsigned high, unsigned low);
  void start();

  Body body_ = nullptr;
  void* argument_ = nullptr;
  char* stack_ = nullptr;
  bool started_ = false;
  jmp_buf inside_;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_FIBER_H_
