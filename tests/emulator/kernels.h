// The kernels whose addresses somebody has asked for.
#ifndef LLM_ALLREDUCE_EMULATOR_KERNELS_H_
#define LLM_ALLREDUCE_EMULATOR_KERNELS_H_

#include "machine.h"

namespace emulator {

void add_kernel(const void* kernel, BindKernel bind);

// Null: nobody has added it.
BindKernel find_kernel(const void* kernel);

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_KERNELS_H_
