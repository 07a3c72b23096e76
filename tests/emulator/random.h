// A small generator: the same numbers from the same seed on every platform.
#ifndef LLM_ALLREDUCE_EMULATOR_RANDOM_H_
#define LLM_ALLREDUCE_EMULATOR_RANDOM_H_

#include <cstdint>

namespace emulator {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0xd1b54a32d192ed03u) {
    for (int i = 0; i < 4; ++i) next();
  }

  // xorshift64*: G. Marsaglia, S. Vigna.
  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }

  // 0 .. end-1; `end` is at least 1 and below 2^32.
  uint32_t below(uint64_t end) { return static_cast<uint32_t>(((next() >> 32) * end) >> 32); }

  // True once in so many times.
  bool once_in(uint32_t times) { return below(times) == 0; }

 private:
  uint64_t state_;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_RANDOM_H_
