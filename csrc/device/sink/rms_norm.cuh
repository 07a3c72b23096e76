// The sink of LAR_RMS_NORM: takes whole rows of sums, adds the residual, norms and quantizes. codec/norm.h has the
// arithmetic, device/schedule/rows.cuh says who handles what.
#ifndef LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_
#define LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_

#include "device/sink/quantize.cuh"
#include "device/unit.cuh"

namespace lar {

// Whether residual and weights are loaded before the sums are there, as registers allow, or when they are needed.
enum class Ahead { kNothing, kAll };

template <typename T, int kUnits, Ahead kAhead>
class RmsNorm {
 public:
  // `threads`: of Rows; by default all.
  __device__ __forceinline__ RmsNorm(const NormArguments& norm, RowMemory& memory, uint32_t threads = blockDim.x)
      : norm_(norm), rows_(norm.units, memory, threads) {}

  __device__ __forceinline__ const Rows<kUnits>& rows() const { return rows_; }

  // Loads what a row needs beside its sums, ahead of them. `row`: of the launch.
  __device__ __forceinline__ void prepare(uint32_t row) {
    const int64_t first = int64_t{norm_.first_row + row} * norm_.units;
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows_.has(k)) continue;
      if (kHolds && norm_.residual) residual_[k] = Unit<T>::load(norm_.residual, first + rows_.unit(k));
      if (kHolds) weight_[k] = Unit<T>::load(norm_.weight, rows_.unit(k));
    }
    if (norm_.scale) given_ = *static_cast<const volatile float*>(norm_.scale);
  }

  // Takes the sums of the row that was prepared. For all threads of the row.
  __device__ __forceinline__ void operator()(uint32_t row, const Unit<T> (&sums)[kUnits]) {
    row += norm_.first_row;
    const int64_t first = int64_t{row} * norm_.units;
    Unit<T> r[kUnits];
    float squares[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      squares[k] = 0.0f;
      if (!rows_.has(k)) continue;
      float x[Unit<T>::kElements];
      r[k] = sums[k];
      if (norm_.residual) {
        r[k] = r[k].plus(kHolds ? residual_[k] : Unit<T>::load(norm_.residual, first + rows_.unit(k)));
      }
      r[k].widened(x);
      squares[k] = codec::sum_of_squares(x);
    }
    const float total = rows_.sum(squares);
    // Behind the first meeting: nobody waits for these stores.
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
      if (rows_.has(k)) r[k].store(norm_.residual_out, first + rows_.unit(k));
    const float inverse = codec::inverse_of_norm(total, norm_.inverse_hidden, norm_.eps);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows_.has(k)) continue;
      float x[Unit<T>::kElements];
      float weight[Unit<T>::kElements];
      r[k].widened(x);
      (kHolds ? weight_[k] : Unit<T>::load(norm_.weight, rows_.unit(k))).widened(weight);
#pragma unroll
      for (int i = 0; i < Unit<T>::kElements; ++i)
        x[i] = codec::normed(x[i], inverse, codec::add(weight[i], norm_.weight_bias));
      r[k] = Unit<T>::rounded(x);  // y
      if (norm_.norm_out) r[k].store(norm_.norm_out, first + rows_.unit(k));
    }
    if (norm_.quant != LAR_QUANT_NONE)
      quantize(norm_, rows_, row, given_, [&](int k, float (&v)[Unit<T>::kElements]) { r[k].widened(v); });
  }

 private:
  static constexpr bool kHolds = kAhead == Ahead::kAll;

  const NormArguments& norm_;
  Rows<kUnits> rows_;
  Unit<T> residual_[kHolds ? kUnits : 1];
  Unit<T> weight_[kHolds ? kUnits : 1];
  float given_ = 0.0f;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_
