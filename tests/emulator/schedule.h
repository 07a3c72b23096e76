// Who is favoured: interleavings differ by seed not only in their details.
#ifndef LLM_ALLREDUCE_EMULATOR_SCHEDULE_H_
#define LLM_ALLREDUCE_EMULATOR_SCHEDULE_H_

#include <cstdint>

#include "random.h"

namespace emulator {

struct Schedule {
  explicit Schedule(uint64_t seed) {
    Random random(seed ^ 0x5eed);
    constexpr uint32_t kBursts[] = {1, 4, 16, 64};
    constexpr uint32_t kArrivals[] = {1, 8, 64, 0};
    constexpr uint32_t kStores[] = {0, 8, 32, 256};
    burst = kBursts[random.below(4)];
    stores_under_way = kStores[random.below(4)];
    arrivals = kArrivals[random.below(4)];
    bias = static_cast<Bias>(random.below(4));
    which = random.below(1 << 16);
    starves_warp = (which >> 14 & 1) != 0;
    copies_are_late = random.once_in(2);
  }

  enum class Bias : uint32_t { kNone, kAhead, kBehind, kStarved };

  uint32_t burst;             // accesses of a thread before another runs, at most
  uint32_t stores_under_way;  // words of a block that others do not see yet, at most; 0: they see them at once
  uint32_t arrivals;          // a word arrives once in so many steps; 0: only where others have to wait for it
  Bias bias;                  // kAhead, kBehind: one stream; kStarved: one thread, or one warp
  uint32_t which;
  // Bulk copies read, and what they write and what kernels leave under way at their end arrives, only where others have
  // to wait for it.
  bool copies_are_late;
  bool starves_warp;  // instead of a thread: the other warps of its block go on without any thread of it
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_SCHEDULE_H_
