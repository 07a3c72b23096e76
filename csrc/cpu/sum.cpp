#include "cpu/sum.h"

#include <algorithm>
#include <cstring>

#include "cpu/float_types.h"

namespace lar::cpu {
namespace {

// From elements of type `In` to elements of type `Out`.
template <typename In, typename Out>
void reduce_typed(const void* const* sources, int num_sources, void* const* outputs, int num_outputs, int64_t count) {
  using Storage = typename In::Storage;
  using Rounded = typename Out::Storage;
  constexpr int64_t kBlock = 1024;  // sums that stay in L1
  float sum[kBlock];
  Storage loaded[kBlock];
  Rounded rounded[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    std::fill_n(sum, size, 0.0f);
    for (int source = 0; source < num_sources; ++source) {
      // Callers' tensors need not be aligned, hence the copy into a block of our own.
      std::memcpy(loaded, static_cast<const Storage*>(sources[source]) + start, size * sizeof(Storage));
      for (int64_t i = 0; i < size; ++i) sum[i] += In::widen(loaded[i]);
    }
    for (int64_t i = 0; i < size; ++i) rounded[i] = Out::round(sum[i]);
    for (int output = 0; output < num_outputs; ++output)
      std::memcpy(static_cast<Rounded*>(outputs[output]) + start, rounded, size * sizeof(Rounded));
  }
}

}  // namespace

void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count) {
  switch (dtype) {
    case LAR_FLOAT32:
      return reduce_typed<Float32, Float32>(sources, num_sources, outputs, num_outputs, count);
    case LAR_FLOAT16:
      return reduce_typed<Float16, Float16>(sources, num_sources, outputs, num_outputs, count);
    case LAR_BFLOAT16:
      return reduce_typed<BFloat16, BFloat16>(sources, num_sources, outputs, num_outputs, count);
  }
}

void sum_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, float* output, int64_t count) {
  void* const outputs[] = {output};
  switch (dtype) {
    case LAR_FLOAT32:
      return reduce_typed<Float32, Float32>(sources, num_sources, outputs, 1, count);
    case LAR_FLOAT16:
      return reduce_typed<Float16, Float32>(sources, num_sources, outputs, 1, count);
    case LAR_BFLOAT16:
      return reduce_typed<BFloat16, Float32>(sources, num_sources, outputs, 1, count);
  }
}

void round_sum_of_sums(lar_dtype dtype, const void* const* sums, int num_sums, void* const* outputs, int num_outputs,
                       int64_t count) {
  switch (dtype) {
    case LAR_FLOAT32:
      return reduce_typed<Float32, Float32>(sums, num_sums, outputs, num_outputs, count);
    case LAR_FLOAT16:
      return reduce_typed<Float32, Float16>(sums, num_sums, outputs, num_outputs, count);
    case LAR_BFLOAT16:
      return reduce_typed<Float32, BFloat16>(sums, num_sums, outputs, num_outputs, count);
  }
}

}  // namespace lar::cpu
