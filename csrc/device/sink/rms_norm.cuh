// The sink of LAR_RMS_NORM: takes whole rows of sums, adds the residual, norms and quantizes. codec/norm.h has the
// arithmetic, device/schedule/rows.cuh says who handles what.
#ifndef LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_
#define LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_

#include "device/sink/quantize.cuh"
#include "device/unit.cuh"

namespace lar {

// Whether residual and weights are loaded before the sums are there, as registers allow, or when they are needed;
// kFactors: and what needs no total is computed while that is waited for, which takes a unit's values in fp32.
enum class Ahead { kNothing, kAll, kFactors };

// kAtOnce: rows whose sums come together, and whose threads meet once for all of them.
template <typename T, int kUnits, Ahead kAhead, Overlap kOverlap = Overlap::kLate, int kAtOnce = 1>
class RmsNorm {
 public:
  // `threads`: of Rows; by default all.
  __device__ __forceinline__ RmsNorm(const NormArguments& norm, RowMemory& memory, uint32_t threads = blockDim.x)
      : norm_(norm), rows_(norm.units, memory, threads) {}

  using RowsOfSink = Rows<kUnits, kOverlap>;
  __device__ __forceinline__ const RowsOfSink& rows() const { return rows_; }

  // Loads what a row needs beside its sums, ahead of them. `row`: of the launch.
  __device__ __forceinline__ void prepare(uint32_t row) { prepare<1>({row}, {true}); }

  // The same of the wanted ones of several rows.
  template <int kRows>
  __device__ __forceinline__ void prepare(const uint32_t (&rows)[kRows], const bool (&wanted)[kRows]) {
    static_assert(kRows <= kAtOnce);
    int64_t first[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) first[j] = first_unit(rows[j]);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows_.has(k)) continue;
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        if (kHolds && wanted[j] && norm_.residual)
          residual_[j][k] = Unit<T>::load(norm_.residual, first[j] + rows_.unit(k));
      if (kHolds) weight_[k] = Unit<T>::load(norm_.weight, rows_.unit(k));
    }
    if (norm_.scale) given_ = *static_cast<const volatile float*>(norm_.scale);
  }

  // Takes the sums of the row that was prepared. For all threads of the row.
  __device__ __forceinline__ void operator()(uint32_t row, const Unit<T> (&sums)[kUnits]) {
    Unit<T> of_row[1][kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) of_row[0][k] = sums[k];
    (*this)({row}, {true}, of_row);
  }

  // The same of the wanted ones of several rows.
  template <int kRows>
  __device__ __forceinline__ void operator()(const uint32_t (&rows)[kRows], const bool (&wanted)[kRows],
                                             const Unit<T> (&sums)[kRows][kUnits]) {
    static_assert(kRows <= kAtOnce);
    int64_t first[kRows];
    Unit<T> r[kRows][kUnits];
    float squares[kRows][kUnits];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      first[j] = first_unit(rows[j]);
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        squares[j][k] = 0.0f;
        if (!wanted[j] || !rows_.has(k)) continue;
        float x[Unit<T>::kElements];
        r[j][k] = sums[j][k];
        if (norm_.residual)
          r[j][k] = r[j][k].plus(kHolds ? residual_[j][k] : Unit<T>::load(norm_.residual, first[j] + rows_.unit(k)));
        r[j][k].widened(x);
        squares[j][k] = codec::sum_of_squares(x);
      }
    }
    rows_.tell_squares(squares);
    Factors early;
    if (kOverlap == Overlap::kEarly) store_residuals(wanted, first, r);
    if (kHasFactors && wanted[0] && rows_.has(0)) {
      factors_of(0, r[0][0], early);
      compute_here(early.r);
      compute_here(early.weight);
    }
    float totals[kRows];
    rows_.total_squares(totals);
    if (kOverlap == Overlap::kLate) store_residuals(wanted, first, r);  // behind the meeting: nobody waits for them
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (wanted[j]) finish(norm_.first_row + rows[j], first[j], totals[j], r[j], early);
  }

 private:
  static constexpr bool kHolds = kAhead != Ahead::kNothing;
  static constexpr bool kHasFactors = kAhead == Ahead::kFactors;
  static_assert(!kHasFactors || (kUnits == 1 && kAtOnce == 1 && kOverlap == Overlap::kEarly));

  // Of a row of the launch, in the tensors of the call.
  __device__ __forceinline__ int64_t first_unit(uint32_t row) const {
    return int64_t{norm_.first_row + row} * norm_.units;
  }

  template <int kRows>
  __device__ __forceinline__ void store_residuals(const bool (&wanted)[kRows], const int64_t (&first)[kRows],
                                                  const Unit<T> (&r)[kRows][kUnits]) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kUnits; ++k)
        if (wanted[j] && rows_.has(k)) r[j][k].store(norm_.residual_out, first[j] + rows_.unit(k));
  }

  // What a unit's norms are products of, beside what all of a row are multiplied by; weights with their bias.
  struct Factors {
    float r[Unit<T>::kElements];
    float weight[Unit<T>::kElements];
  };

  __device__ __forceinline__ void factors_of(int k, const Unit<T>& r, Factors& factors) const {
    r.widened(factors.r);
    (kHolds ? weight_[kHolds ? k : 0] : Unit<T>::load(norm_.weight, rows_.unit(k))).widened(factors.weight);
#pragma unroll
    for (int i = 0; i < Unit<T>::kElements; ++i) factors.weight[i] = codec::add(factors.weight[i], norm_.weight_bias);
  }

  // What is left of a row when the sum of its squares is known. `row`: of the call, from unit `first` on; `r`: sums and
  // residual; `early`: of the only unit, with kFactors.
  __device__ __forceinline__ void finish(uint32_t row, int64_t first, float total, Unit<T> (&r)[kUnits],
                                         const Factors& early) {
    const float inverse = codec::inverse_of_norm(total, norm_.inverse_hidden, norm_.eps);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!rows_.has(k)) continue;
      float x[Unit<T>::kElements];
      Factors of = early;
      if (!kHasFactors) factors_of(k, r[k], of);
#pragma unroll
      for (int i = 0; i < Unit<T>::kElements; ++i) x[i] = codec::normed(of.r[i], inverse, of.weight[i]);
      r[k] = Unit<T>::rounded(x);  // y
      if (norm_.norm_out) r[k].store(norm_.norm_out, first + rows_.unit(k));
    }
    if (norm_.quant != LAR_QUANT_NONE)
      quantize(norm_, rows_, row, given_, [&](int k, float (&v)[Unit<T>::kElements]) { r[k].widened(v); });
  }

  const NormArguments& norm_;
  RowsOfSink rows_;
  Unit<T> residual_[kHolds ? kAtOnce : 1][kHolds ? kUnits : 1];
  Unit<T> weight_[kHolds ? kUnits : 1];
  float given_ = 0.0f;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SINK_RMS_NORM_CUH_
