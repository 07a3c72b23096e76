// How many ranks there are: at compile time where speed needs it, so that the loop over ranks unrolls and the loads of
// all peers are in flight together; otherwise at run time, some ranks at once.
#ifndef LLM_ALLREDUCE_DEVICE_WORLD_CUH_
#define LLM_ALLREDUCE_DEVICE_WORLD_CUH_

#include "host/layout.h"

namespace lar {

// kWorldSize: of the kernel, or 0 for any.
template <int kWorldSize>
struct World {
  static constexpr bool kIsFixed = kWorldSize > 0;
  // Ranks, and peers, that a loop handles at once: the addresses of all of a large group would not fit the registers.
  static constexpr int kRanksAtOnce = kIsFixed ? kWorldSize : 4;
  static constexpr int kPeersAtOnce = kIsFixed ? kWorldSize - 1 : 3;

  // `at_run_time`: where the kernel's arguments have it.
  __device__ __forceinline__ static int size(int at_run_time) { return kIsFixed ? kWorldSize : at_run_time; }
};

// Entries of a table that a kernel is given by rank or step.
template <int kWorldSize>
constexpr int kTableEntries = kWorldSize > 0 ? kWorldSize : LAR_MAX_WORLD_SIZE;

// The rank `step` places after `rank`, without a division.
__device__ __forceinline__ int rotated(int rank, int step, int world_size) {
  return rank + step < world_size ? rank + step : rank + step - world_size;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_WORLD_CUH_
