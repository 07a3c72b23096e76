// What tests ask of the emulated CUDA runtime.
#ifndef LLM_ALLREDUCE_EMULATOR_RUNTIME_H_
#define LLM_ALLREDUCE_EMULATOR_RUNTIME_H_

namespace emulator {

// See control.cpp.
void hold_launches(bool hold);
int held_launches();
int current_device_of_runtime();
int device_that_pinned();

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_RUNTIME_H_
