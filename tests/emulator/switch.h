// Multicast memory: where a switch copies what is stored, and sums what it reads of all ranks.
#ifndef LLM_ALLREDUCE_EMULATOR_SWITCH_H_
#define LLM_ALLREDUCE_EMULATOR_SWITCH_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace emulator {

// Multicast memory: the range of its address, and where each rank's own lies.
struct MulticastRange {
  const char* all;
  int64_t bytes;
  std::vector<const char*> own;
};

// By the addresses that ranks have for it: each has its own.
inline std::vector<MulticastRange> multicast_ranges;

inline bool is_multicast(const void* address) {
  for (const MulticastRange& range : multicast_ranges) {
    const int64_t at = static_cast<const char*>(address) - range.all;
    if (at >= 0 && at < range.bytes) return true;
  }
  return false;
}

// Where each rank's memory lies behind this address; empty: it is no multicast address.
inline std::vector<const char*> behind(const void* address) {
  for (const MulticastRange& range : multicast_ranges) {
    const int64_t at = static_cast<const char*>(address) - range.all;
    if (at < 0 || at >= range.bytes) continue;
    std::vector<const char*> out;
    for (const char* own : range.own) out.push_back(own + at);
    return out;
  }
  return {};
}

// Two addresses of the same memory: loads of the switch see of what was stored through a rank's own address only what
// the storing thread has fenced since, before the last fence of the thread that loads.

// This thread is about to store 16 bytes through its rank's own address, or anywhere else.
void before_store_to_own(const void* address);

// A fence of this thread, for what it has stored and for what it loads.
void fence_addresses();

// What the switch finds for this thread at 16 bytes of some rank's memory.
uint4 through_the_switch(const char* own);

void forget_fences();

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_SWITCH_H_
