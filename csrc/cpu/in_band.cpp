#include "cpu/in_band.h"

#include <sched.h>
#include <time.h>

#include <algorithm>

namespace lar::cpu {
namespace {

constexpr int kVectorWords = LAR_VECTOR_BYTES / sizeof(uint32_t);

uint32_t* words(const Slot& slot) { return reinterpret_cast<uint32_t*>(slot.address); }

// Nobody wakes a reader: it looks again, less often the longer it has waited.
class Nap {
 public:
  void operator()(uint32_t, int64_t at_most_ns) {
    const timespec length{0, std::min(ns_, at_most_ns)};
    nanosleep(&length, nullptr);
    ns_ = std::min(ns_ * 2, kLongestNs);
  }

 private:
  static constexpr int64_t kLongestNs = 2'000'000;
  int64_t ns_ = 20'000;
};

}  // namespace

Vectors vectors_for(int64_t bytes) { return Vectors(ceil_div(bytes, LAR_VECTOR_BYTES) * kVectorWords); }

InBandCall::InBandCall(const Call& call, lar_algorithm algorithm)
    : call_(call),
      workspace_(call.workspace()),
      epochs_(in_band_epochs(workspace_.layout, algorithm)),
      lengths_(algorithm == LAR_ONE_SHOT ? LengthPlane::kOneShot : LengthPlane::kTwoShot),
      epoch_(*epoch_word(workspace_.local, workspace_.layout, epochs_, 0)) {}

Slot InBandCall::pushed(int64_t region, int64_t slot_bytes, int holder, int writer) const {
  const lar_layout& layout = workspace_.layout;
  const int64_t generation = layout.shared ? shared_generation(epoch_) : pushed_generation(epoch_);
  const int64_t slot = slot_of_step(step_to(holder, writer, layout.world_size));
  const int64_t at = region + generation * pushed_generation_bytes(layout, slot_bytes) + slot * slot_bytes;
  return {static_cast<char*>(workspace_.base[holder]) + at, writer};
}

Slot InBandCall::shared(int64_t region, int64_t slot_bytes, int writer) const {
  return {static_cast<char*>(workspace_.base[writer]) + region + int64_t{shared_generation(epoch_)} * slot_bytes,
          writer};
}

void InBandCall::store(const Slot& slot, const Vectors& vectors) const {
  for (size_t i = 0; i < vectors.size(); ++i)
    __atomic_store_n(words(slot) + i, vectors[i] == LAR_IN_BAND_MARKER ? 0u : vectors[i], __ATOMIC_RELAXED);
}

bool InBandCall::take(const Slot& slot, lar_phase phase, Vectors& vectors) const {
  const int64_t start = now_ns();
  Nap nap;
  for (size_t first = 0; first < vectors.size(); first += kVectorWords) {
    const auto look = [&]() -> Seen {
      bool arrived = true;
      for (size_t i = first; i < first + kVectorWords; ++i) {
        vectors[i] = __atomic_load_n(words(slot) + i, __ATOMIC_RELAXED);
        arrived &= vectors[i] != LAR_IN_BAND_MARKER;
      }
      return {arrived, false, 0};
    };
    if (!wait_for(call_, slot.writer, phase, 0, start, look, nap)) return false;
  }
  return true;
}

void InBandCall::clear(const Slot& slot, const Vectors& vectors) const {
  clear_vectors(slot.address, static_cast<int64_t>(vectors.size()) / kVectorWords);
}

void clear_vectors(char* address, int64_t vectors) {
  auto* word = reinterpret_cast<uint32_t*>(address);
  for (int64_t i = 0; i < vectors * kVectorWords; ++i) __atomic_store_n(word + i, LAR_IN_BAND_MARKER, __ATOMIC_RELAXED);
}

int64_t InBandCall::exchange_length(int64_t vectors) const {
  const lar_layout& layout = workspace_.layout;
  uint32_t* lengths = length_words(workspace_.local, layout, lengths_);
  const int64_t old = lengths[cleared_generation(epoch_) * layout.lanes];
  std::fill_n(lengths + shared_generation(epoch_) * layout.lanes, layout.lanes, static_cast<uint32_t>(vectors));
  return old;
}

// What this rank stores after the call comes after all of it, clears included: what a kernel's end is on GPUs.
void InBandCall::finish() const {
  std::fill_n(epoch_word(workspace_.local, workspace_.layout, epochs_, 0), workspace_.layout.lanes, epoch_ + 1);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

}  // namespace lar::cpu
