#include "cpu/sum.h"

#include <algorithm>
#include <cstring>

#include "cpu/float_types.h"

namespace lar::cpu {
namespace {

template <typename Type>
void reduce_typed(const void* const* sources, int num_sources, void* const* outputs, int num_outputs, int64_t count) {
  using Storage = typename Type::Storage;
  constexpr int64_t kBlock = 1024;  // sums that stay in L1
  float sum[kBlock];
  Storage rounded[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::fill_n(sum, size, 0.0f);
    for (int source = 0; source < num_sources; ++source) {
      // Callers' tensors need not be aligned, hence the copy into a block of our own.
      std::memcpy(rounded, static_cast<const Storage*>(sources[source]) + start, size * sizeof(Storage));
      for (int64_t i = 0; i < size; ++i) sum[i] += Type::widen(rounded[i]);
    }
    for (int64_t i = 0; i < size; ++i) rounded[i] = Type::round(sum[i]);
    for (int output = 0; output < num_outputs; ++output)
      std::memcpy(static_cast<Storage*>(outputs[output]) + start, rounded, size * sizeof(Storage));
  }
}

}  // namespace

void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count) {
  switch (dtype) {
    case LAR_FLOAT32:
      return reduce_typed<Float32>(sources, num_sources, outputs, num_outputs, count);
    case LAR_FLOAT16:
      return reduce_typed<Float16>(sources, num_sources, outputs, num_outputs, count);
    case LAR_BFLOAT16:
      return reduce_typed<BFloat16>(sources, num_sources, outputs, num_outputs, count);
  }
}

}  // namespace lar::cpu
