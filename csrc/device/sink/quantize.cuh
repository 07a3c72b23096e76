// The last step of LAR_RMS_NORM: normed values in fewer bits, and their scales. codec/norm.h has the arithmetic.
#ifndef LLM_ALLREDUCE_DEVICE_SINK_QUANTIZE_CUH_
#define LLM_ALLREDUCE_DEVICE_SINK_QUANTIZE_CUH_

#include "device/schedule/rows.cuh"
#include "device/sink/norm_arguments.h"

namespace lar {

// Of a unit: the largest magnitude, as bits. Those of NaN are larger than all others.
__device__ __forceinline__ uint32_t peak_of(const float (&y)[codec::kUnitElements]) {
  uint32_t peak = 0;
#pragma unroll
  for (int i = 0; i < codec::kUnitElements; ++i) peak = max(peak, __float_as_uint(y[i]) & codec::kMagnitudeMask);
  return peak;
}

__device__ __forceinline__ void store_e4m3(void* out, int64_t unit, const float (&y)[codec::kUnitElements],
                                           float multiplier) {
  float v[codec::kUnitElements];
#pragma unroll
  for (int i = 0; i < codec::kUnitElements; ++i) v[i] = codec::multiply(y[i], multiplier);
  uint2 codes;
  codes.x = codec::to_e4m3(v[0], v[1], v[2], v[3]);
  codes.y = codec::to_e4m3(v[4], v[5], v[6], v[7]);
  static_cast<uint2*>(out)[unit] = codes;
}

__device__ __forceinline__ void store_e2m1(void* out, int64_t unit, const float (&y)[codec::kUnitElements],
                                           float multiplier) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < codec::kUnitElements; ++i) codes |= codec::to_e2m1(codec::multiply(y[i], multiplier)) << (4 * i);
  static_cast<uint32_t*>(out)[unit] = codes;
}

// The scale of group `group` of a row, and the next ones' words that there are not.
__device__ __forceinline__ void store_group_scale(const NormArguments& norm, uint32_t row, uint32_t group,
                                                  float scale) {
  const uint32_t groups = norm.units * codec::kUnitElements / codec::kGroupElements;
  if (norm.scales == LAR_SCALES_UE8M0) {
    uint8_t* word = static_cast<uint8_t*>(norm.scale_out) + 4 * (int64_t{group / 4} * norm.scale_stride + row);
    word[group % 4] = static_cast<uint8_t>(__float_as_uint(scale) >> 23);
    if (group + 1 == groups)
      for (uint32_t absent = group % 4 + 1; absent < 4; ++absent) word[absent] = 0;
    return;
  }
  const int64_t place =
      norm.scales == LAR_SCALES_COLUMNS ? int64_t{group} * norm.scale_stride + row : int64_t{row} * groups + group;
  static_cast<float*>(norm.scale_out)[place] = scale;
}

// Where scale `k` of a row lies, in tiles of 128 rows by 4 scales; `tiles`: of a row.
__device__ __forceinline__ int64_t swizzled(uint32_t row, uint32_t k, uint32_t tiles) {
  return (int64_t{row / 128} * tiles + k / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + k % 4;
}

__device__ __forceinline__ void store_fp4_scale(const NormArguments& norm, uint32_t row, uint32_t k, uint8_t scale) {
  const uint32_t scales = norm.units * codec::kUnitElements / codec::kFp4Elements;
  uint8_t* out = static_cast<uint8_t*>(norm.scale_out);
  if (norm.scales != LAR_SCALES_SWIZZLED) {
    out[int64_t{row} * scales + k] = scale;
    return;
  }
  const uint32_t tiles = (scales + 3) / 4;
  out[swizzled(row, k, tiles)] = scale;
  if (k + 1 == scales)
    for (uint32_t absent = scales; absent < tiles * 4; ++absent) out[swizzled(row, absent, tiles)] = 0;
}

// Rows that there are not, behind the last of the message. For the first `threads` of one of its blocks.
__device__ __forceinline__ void clear_absent_rows(const NormArguments& norm, uint32_t row, uint32_t threads) {
  if (norm.scales != LAR_SCALES_SWIZZLED || row + 1 != norm.all_rows) return;
  const uint32_t tiles = (norm.units * codec::kUnitElements / codec::kFp4Elements + 3) / 4;
  const uint32_t absent = (128 - norm.all_rows % 128) % 128;
  for (uint32_t i = threadIdx.x; i < absent * tiles; i += threads) {
    const int64_t word = swizzled(norm.all_rows + i / tiles, i % tiles * 4, tiles) / 4;
    static_cast<uint32_t*>(norm.scale_out)[word] = 0;
  }
}

// A unit of a row of which the scale is known.
__device__ __forceinline__ void quantize_unit(const NormArguments& norm, uint32_t row, uint32_t unit,
                                              const float (&y)[codec::kUnitElements], float multiplier) {
  store_e4m3(norm.quant_out, int64_t{row} * norm.units + unit, y, multiplier);
}

// A unit of a row in groups. For a whole warp, whose units are neighbours; `has`: whether there is one.
__device__ __forceinline__ void quantize_in_groups(const NormArguments& norm, uint32_t row, uint32_t unit, bool has,
                                                   const float (&y)[codec::kUnitElements], float given) {
  uint32_t peak = has ? peak_of(y) : 0;
  peak = max(peak, shuffle_xor(peak, 1));
  if (norm.quant == LAR_QUANT_NVFP4) {
    if (!has) return;
    const uint8_t scale = codec::fp4_scale(__uint_as_float(peak), given);
    if (unit % 2 == 0) store_fp4_scale(norm, row, unit / 2, scale);
    store_e2m1(norm.quant_out, int64_t{row} * norm.units + unit, y, codec::fp4_multiplier(scale, given));
    return;
  }
  constexpr uint32_t kUnitsOfGroup = codec::kGroupElements / codec::kUnitElements;
#pragma unroll
  for (int mask = 2; mask < static_cast<int>(kUnitsOfGroup); mask *= 2) peak = max(peak, shuffle_xor(peak, mask));
  if (!has) return;
  float scale = codec::group_scale(__uint_as_float(peak));
  if (norm.scales == LAR_SCALES_UE8M0) scale = codec::power_of_two(codec::exponent_above(scale));
  if (unit % kUnitsOfGroup == 0) store_group_scale(norm, row, unit / kUnitsOfGroup, scale);
  quantize_unit(norm, row, unit, y, codec::divide(1.0f, scale));
}

// What all values of a row are multiplied by: one scale is given, or made of the largest value and stored.
__device__ __forceinline__ float row_multiplier(const NormArguments& norm, uint32_t row, bool stores, float given,
                                                uint32_t peak) {
  if (norm.quant == LAR_QUANT_FP8_TENSOR) return codec::divide(1.0f, given);
  const float scale = codec::token_scale(__uint_as_float(peak));
  if (stores) static_cast<float*>(norm.scale_out)[row] = scale;
  return codec::divide(1.0f, scale);
}

__device__ __forceinline__ bool has_groups(const NormArguments& norm) {
  return norm.quant == LAR_QUANT_FP8_GROUP || norm.quant == LAR_QUANT_NVFP4;
}

// Quantizes a row: y(k, values) gives those of this thread's k-th unit, which is there when rows.has(k). For all
// threads of the row. `given`: norm.scale[0], where there is one.
template <int kUnits, Overlap kOverlap, typename Values>
__device__ __forceinline__ void quantize(const NormArguments& norm, Rows<kUnits, kOverlap>& rows, uint32_t row,
                                         float given, const Values& y) {
  float v[codec::kUnitElements];
  if (has_groups(norm)) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (rows.has(k)) y(k, v);
      quantize_in_groups(norm, row, rows.unit(k), rows.has(k), v, given);
    }
    if (rows.is_first_block()) clear_absent_rows(norm, row, rows.threads());
    return;
  }
  uint32_t peak = 0;
  if (norm.quant == LAR_QUANT_FP8_TOKEN) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows.has(k)) continue;
      y(k, v);
      peak = max(peak, peak_of(v));
    }
    peak = rows.largest(peak);
  }
  const float multiplier = row_multiplier(norm, row, rows.is_first_thread(), given, peak);
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    if (!rows.has(k)) continue;
    y(k, v);
    quantize_unit(norm, row, rows.unit(k), v, multiplier);
  }
}

// The same for a block whose threads take every blockDim.x-th unit. `whole`: units with those that the last warp lacks;
// `peak`: of the row.
template <typename Values>
__device__ __forceinline__ void quantize_long(const NormArguments& norm, uint32_t row, float given, uint32_t peak,
                                              uint32_t whole, const Values& y) {
  const bool groups = has_groups(norm);
  const float multiplier = groups ? 0.0f : row_multiplier(norm, row, threadIdx.x == 0, given, peak);
  float v[codec::kUnitElements];
#pragma unroll 1
  for (uint32_t unit = threadIdx.x; unit < whole; unit += blockDim.x) {
    const bool has = unit < norm.units;
    if (has) y(unit, v);
    if (groups)
      quantize_in_groups(norm, row, unit, has, v, given);
    else if (has)
      quantize_unit(norm, row, unit, v, multiplier);
  }
  if (groups) clear_absent_rows(norm, row, blockDim.x);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SINK_QUANTIZE_CUH_
