// Comes before everything else in the .cu files: a C++ compiler then takes them for CUDA. The real headers of the
// toolkit give types, host functions and conversions; what they leave to nvcc is here.
#ifndef LLM_ALLREDUCE_EMULATOR_CUDA_H_
#define LLM_ALLREDUCE_EMULATOR_CUDA_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "access.h"
#include "arithmetic.h"
#include "report.h"

// From here on, the code of the project sees a compiler for sm_90.
#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// -- barriers and warps

inline void __syncthreads() { emulator::machine.self->block->meet(emulator::Meeting::kSync, true); }
inline int __syncthreads_and(int value) {
  return static_cast<int>(emulator::machine.self->block->meet(emulator::Meeting::kAnd, value != 0));
}
inline int __syncthreads_or(int value) {
  return static_cast<int>(emulator::machine.self->block->meet(emulator::Meeting::kOr, value != 0));
}

namespace emulator {
inline uint32_t meet_warp(unsigned mask, Meeting what, uint32_t value, uint32_t source = 0) {
  if (mask != 0xffffffffu) fail("only whole warps can meet here");
  return machine.self->block->meet_warp(what, value, source);
}
}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::meet_warp(mask, emulator::Meeting::kSync, 0); }
inline int __all_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::meet_warp(mask, emulator::Meeting::kAll, value != 0));
}
inline int __any_sync(unsigned mask, int value) {
  return static_cast<int>(emulator::meet_warp(mask, emulator::Meeting::kAny, value != 0));
}
inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  return emulator::meet_warp(mask, emulator::Meeting::kMax, value);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  word = emulator::meet_warp(mask, emulator::Meeting::kShuffle, word, static_cast<uint32_t>(source));
  std::memcpy(&value, &word, sizeof(word));
  return value;
}

// -- memory and traps

inline void __threadfence_system() {
  emulator::release();
  emulator::machine.step();
}

inline uint32_t atomicCAS(uint32_t* address, uint32_t expected, uint32_t value) {
  const uint32_t before = *address;
  if (before == expected) *address = value;
  emulator::machine.progress();
  emulator::machine.step();
  return before;
}

inline uint32_t atomicExch(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address = value;
  emulator::machine.progress();
  emulator::machine.step();
  return before;
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  return atomicExch(address, before + value);
}

template <typename T>
void __stcs(T* address, const T& value) {
  *address = value;
}

[[noreturn]] inline void __trap() { emulator::machine.break_device(); }

// -- arithmetic

#pragma GCC push_options  // see access.h
#pragma GCC optimize("O2", "inline")
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using Both = std::common_type_t<A, B>;
  return static_cast<Both>(b) < static_cast<Both>(a) ? static_cast<Both>(b) : static_cast<Both>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using Both = std::common_type_t<A, B>;
  return static_cast<Both>(a) < static_cast<Both>(b) ? static_cast<Both>(b) : static_cast<Both>(a);
}
#pragma GCC pop_options

#endif  // LLM_ALLREDUCE_EMULATOR_CUDA_H_
