// Kernels that play the switch behind multicast memory, where there is none: what a rank stores to an ordinary buffer,
// which the kernels under test take for the multicast address, is carried from there to every rank's memory, the
// sender's own included, word by word, in random order and with delays.
//
// Compiled for the emulator by a C++ compiler, for GPUs at run time, without any header (tests/support/soft_switch.py).
#ifndef LLM_ALLREDUCE_SOFT_SWITCH_ON_GPU
#include "device/kernel.cuh"
#include "device/ptx.cuh"
#include "switch.h"
#else
// What it needs of device/ptx.cuh.
namespace lar {

__device__ __forceinline__ unsigned load_relaxed_gpu(const unsigned* address) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ unsigned load_acquire_system(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void load_relaxed_system_if(bool, const void* address, uint4& raw) {
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address));
}

__device__ __forceinline__ long long global_timer_ns() {
  long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace lar
#endif

// A word of a buffer that has been carried on, or was never stored. Any other may be data: tests have none that is this
// one, and a marker that a kernel stores there by mistake is carried like everything else.
#define SOFT_SWITCH_EMPTY 0x7fc12345u

namespace {

__device__ __forceinline__ unsigned next_random(unsigned& state) {
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

__device__ __forceinline__ void wait_ns(long long time, const unsigned* ended) {
  const long long until = lar::global_timer_ns() + time;
  while (lar::global_timer_ns() < until) lar::load_relaxed_gpu(ended);
}

__device__ __forceinline__ void store_word(unsigned* address, unsigned word) {
#ifdef LLM_ALLREDUCE_SOFT_SWITCH_ON_GPU
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(word) : "memory");
#else
  emulator::store(address, word);
#endif
}

}  // namespace

// One for each rank's stream, behind its calls.
extern "C" __global__ void soft_switch_leave(unsigned* ended) { atomicAdd(ended, 1u); }

// buffers[rank], own[rank]: addresses; a buffer at 0 is another switch's, on the GPU of its rank. spans[2 * i]: the
// first vector of a stretch that calls use, spans[2 * i + 1]: how many. Runs until `expected` ranks have left and
// everything has been carried, or for limit_ms.
extern "C" __global__ void soft_switch(const unsigned long long* buffers, const unsigned long long* own,
                                       const unsigned* spans, int span_count, int ranks, const unsigned* ended,
                                       int expected, int seed, int most_delay_ns, int limit_ms) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned threads = gridDim.x * blockDim.x;
  const long long end = lar::global_timer_ns() + 1000000ll * limit_ms;
  unsigned random = (unsigned(seed) + 1u) * 2654435761u ^ (thread + 1u) * 2246822519u;
  if (random == 0) random = 1;
  const auto carry = [&](int sender, unsigned at, unsigned word) {
    const bool comes_back_last = next_random(random) % 2 == 0;
    const int first = int(next_random(random) % unsigned(ranks));
    for (int i = 0; i <= ranks; ++i) {  // with a turn more, for the sender's own
      const bool is_late = i == ranks;
      const int to = is_late ? sender : (first + i) % ranks;
      if (to == sender && is_late != comes_back_last) continue;
      wait_ns(next_random(random) % unsigned(most_delay_ns) * (is_late ? 4 : 1), ended);
      store_word(reinterpret_cast<unsigned*>(own[to]) + at, word);
    }
  };
  while (lar::global_timer_ns() < end) {
    const bool all_have_left = int(lar::load_acquire_system(ended)) >= expected;
    bool any = false;
    for (int sender = 0; sender < ranks; ++sender)
      for (int span = 0; span < span_count && buffers[sender] != 0; ++span)
        for (unsigned i = thread; i < spans[2 * span + 1]; i += threads) {
          const unsigned vector = spans[2 * span] + i;
          unsigned* words = reinterpret_cast<unsigned*>(buffers[sender]) + 4ll * vector;
          uint4 seen;
          lar::load_relaxed_system_if(true, words, seen);
          const unsigned values[4] = {seen.x, seen.y, seen.z, seen.w};
          for (unsigned k = 0; k < 4; ++k) {
            if (values[k] == SOFT_SWITCH_EMPTY) continue;
            carry(sender, vector * 4 + k, atomicExch(words + k, SOFT_SWITCH_EMPTY));
            any = true;
          }
        }
    if (all_have_left && !any) return;
  }
}

#ifndef LLM_ALLREDUCE_SOFT_SWITCH_ON_GPU
#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename... Parameters, typename... Arguments>
int launch_on(void* stream, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(static_cast<emulator::Stream*>(stream)->device->number);
  const int status = lar::launch(kernel, blocks, threads, stream, arguments...);
  cudaSetDevice(before);
  return status;
}

}  // namespace

EMULATOR_EXPORT int emulator_soft_switch_leave(void* stream, uint32_t* ended) {
  return launch_on(stream, soft_switch_leave, 1, 1, ended);
}

EMULATOR_EXPORT int emulator_soft_switch(void* stream, unsigned blocks, unsigned threads,
                                         const unsigned long long* buffers, const unsigned long long* own,
                                         const uint32_t* spans, int span_count, int ranks, const uint32_t* ended,
                                         int expected, int seed, int most_delay_ns, int limit_ms) {
  return launch_on(stream, soft_switch, blocks, threads, buffers, own, spans, span_count, ranks, ended, expected, seed,
                   most_delay_ns, limit_ms);
}

// `bytes` at `all`, an address of one rank, are multicast memory: there only what is stored to all arrives, and sums in
// the switch read it.
EMULATOR_EXPORT void emulator_multicast(const void* all, int64_t bytes, const uint64_t* own, int ranks) {
  emulator::MulticastRange range{static_cast<const char*>(all), bytes, {}};
  for (int rank = 0; rank < ranks; ++rank) range.own.push_back(reinterpret_cast<const char*>(own[rank]));
  emulator::multicast_ranges.push_back(range);
}

EMULATOR_EXPORT void emulator_forget_multicast() {
  emulator::multicast_ranges.clear();
  emulator::forget_fences();
}
#endif
