// What must not go on: a program that CUDA would not run, or that this emulator cannot.
#ifndef LLM_ALLREDUCE_EMULATOR_REPORT_H_
#define LLM_ALLREDUCE_EMULATOR_REPORT_H_

#include <cstdio>
#include <cstdlib>

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_REPORT_H_
