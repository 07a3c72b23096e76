// LAR_RMS_NORM by itself, of rows that are summed already: the same bits as from the kernels that sum, too.
#include "cpu/norm.h"
#include "device/instances.cuh"
#include "device/sink/rms_norm.cuh"
#include "host/check.h"
#include "host/launch.h"

namespace lar {
namespace {

struct RmsNormArguments {
  NormArguments norm;
  const void* input;
};

// Rows that a block keeps in registers. `kBlocks`: that a multiprocessor holds at least. One is best where each has a
// row or two; of many rows, several blocks keep more loads under way, and what they need is loaded when it is needed.
// They do not let the next kernel in before they end: where some multiprocessors are done early, its blocks would crowd
// there (benchmarks/h200/norm_lets_in_tp2.json: a sum of 16 MiB and this took 97 us instead of 70).
template <typename T, int kUnits, int kMostThreads = LAR_MAX_THREADS, int kBlocks = 1>
__global__ void __launch_bounds__(kMostThreads, kBlocks)
    rms_norm_kernel(const __grid_constant__ RmsNormArguments arguments) {
  LAR_BLOCK_VARIABLE(RowMemory, memory);
  constexpr bool kHasFactors = kUnits == 1 && kMostThreads <= LAR_MAX_THREADS;
  constexpr Ahead kAhead = kBlocks > 1 ? Ahead::kNothing : kHasFactors ? Ahead::kFactors : Ahead::kAll;
  RmsNorm<T, kUnits, kAhead, Overlap::kEarly> sink(arguments.norm, memory);
  const auto& rows = sink.rows();
  wait_for_previous_kernel();
  if constexpr (kBlocks == 1) let_next_kernel_start();
#pragma unroll 1
  for (uint32_t row = rows.group(); row < arguments.norm.rows; row += rows.groups()) {
    Unit<T> sums[kUnits];
#pragma unroll
    for (int k = 0; k < kUnits; ++k)
      if (rows.has(k)) sums[k] = Unit<T>::load(arguments.input, int64_t{row} * arguments.norm.units + rows.unit(k));
    sink.prepare(row);
    sink(row, sums);
  }
}

constexpr uint32_t kManyRows = 264;
constexpr uint32_t kMostLongTiles = 1024;  // 262144 elements

// Longer rows: what a block has computed of a row lies in residual_out, and is read again.
template <typename T>
__global__ void __launch_bounds__(LAR_MAX_THREADS, 1)
    rms_norm_long_kernel(const __grid_constant__ RmsNormArguments arguments) {
  const NormArguments& norm = arguments.norm;
  LAR_BLOCK_ARRAY(float, tiles, 2 * kMostLongTiles);
  LAR_BLOCK_VARIABLE(RowMemory, memory);
  Rows<1> rows(norm.units, memory, blockDim.x);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const float given = norm.scale ? *static_cast<const volatile float*>(norm.scale) : 0.0f;
  const uint32_t number = (norm.units + 31) / 32;
  uint32_t leaves = codec::kLeastTiles;
  while (leaves < number) leaves *= 2;
  const uint32_t whole = number * 32;  // units, with those that the last tile lacks
#pragma unroll 1
  for (uint32_t row = blockIdx.x; row < norm.rows; row += gridDim.x) {
    const int64_t first = int64_t{row} * norm.units;
    float x[codec::kUnitElements];
    for (uint32_t unit = threadIdx.x; unit < whole; unit += blockDim.x) {
      float squares = 0.0f;
      if (unit < norm.units) {
        Unit<T> r = Unit<T>::load(arguments.input, first + unit);
        if (norm.residual) r = r.plus(Unit<T>::load(norm.residual, first + unit));
        r.store(norm.residual_out, first + unit);
        r.widened(x);
        squares = codec::sum_of_squares(x);
      }
      squares = tree_of_warp(squares);
      if (threadIdx.x % 32 == 0) tiles[unit / 32] = squares;
    }
    for (uint32_t tile = number + threadIdx.x; tile < leaves; tile += blockDim.x) tiles[tile] = 0.0f;
    __syncthreads();
    float* from = tiles;
    for (uint32_t left = leaves; left > 1; left /= 2) {
      float* const to = from == tiles ? tiles + kMostLongTiles : tiles;
      for (uint32_t i = threadIdx.x; i < left / 2; i += blockDim.x) to[i] = codec::add(from[2 * i], from[2 * i + 1]);
      __syncthreads();
      from = to;
    }
    const float inverse = codec::inverse_of_norm(from[0], norm.inverse_hidden, norm.eps);
    __syncthreads();
    const auto y_of = [&](uint32_t unit, float (&y)[codec::kUnitElements]) {
      float weight[codec::kUnitElements];
      Unit<T>::load(norm.residual_out, first + unit).widened(y);
      Unit<T>::load(norm.weight, unit).widened(weight);
#pragma unroll
      for (int i = 0; i < codec::kUnitElements; ++i)
        y[i] = codec::normed(y[i], inverse, codec::add(weight[i], norm.weight_bias));
      const Unit<T> rounded = Unit<T>::rounded(y);
      rounded.widened(y);
      return rounded;
    };
    uint32_t peak = 0;
    for (uint32_t unit = threadIdx.x; unit < norm.units; unit += blockDim.x) {
      const Unit<T> y = y_of(unit, x);
      peak = max(peak, peak_of(x));
      if (norm.norm_out) y.store(norm.norm_out, first + unit);
    }
    if (norm.quant != LAR_QUANT_NONE)
      quantize_long(norm, row, given, rows.largest(peak), whole,
                    [&](uint32_t unit, float (&y)[codec::kUnitElements]) { y_of(unit, y); });
  }
}

template <typename T>
int run(const lar_message& message, const lar_norm& norm, void* stream) {
  RmsNormArguments arguments{norm_arguments(message, norm, 0, message.count / norm.hidden), message.input};
  const uint32_t units = arguments.norm.units;
  if (units > kMostLongTiles * codec::kTileUnits) return refuse("norm.hidden: more than a block holds");
  const int blocks = static_cast<int>(std::min<uint32_t>(arguments.norm.rows, 1u << 16));
  const void* kernel = kernel_address(rms_norm_long_kernel<T>);
  int threads = LAR_MAX_THREADS;
  // 64 registers hold a unit of 16-bit elements, not one of 32-bit ones.
  constexpr int kMostOfOne = sizeof(T) == 2 ? LAR_MAX_WIDE_THREADS : LAR_MAX_THREADS;
  if (units <= 2 * LAR_MAX_THREADS) {
    constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;
    const bool many = kBlocks > 1 && arguments.norm.rows >= kManyRows;
    const bool one = units <= kMostOfOne && !many;
    kernel = many                       ? kernel_address(rms_norm_kernel<T, 2, LAR_MAX_THREADS, kBlocks>)
             : units <= LAR_MAX_THREADS ? kernel_address(rms_norm_kernel<T, 1>)
             : one                      ? kernel_address(rms_norm_kernel<T, 1, kMostOfOne>)
                                        : kernel_address(rms_norm_kernel<T, 2>);
    threads = static_cast<int>(ceil_div(ceil_div(units, one ? 1 : 2), 32) * 32);
  }
  return launch_kernel(kernel, blocks, threads, 1, true, &arguments, stream);
}

// The address of a tensor that is there must be a multiple of 16.
bool is_aligned(const lar_message& message, const lar_norm& norm) {
  for (const void* address : {message.input, static_cast<const void*>(message.output), norm.residual, norm.weight,
                              static_cast<const void*>(norm.norm_out), static_cast<const void*>(norm.quant_out),
                              static_cast<const void*>(norm.scale_out)})
    if (!starts_on_a_vector(address)) return false;
  return true;
}

}  // namespace
}  // namespace lar

extern "C" int lar_rms_norm(const lar_message* message, const lar_norm* norm, int32_t device, void* stream) {
  using namespace lar;
  if (!message || !norm) return refuse("message, norm: null");
  if (const char* fault = fault_of_message(*message)) return refuse(fault);
  if (const char* fault = fault_of_norm(*message, *norm)) return refuse(fault);
  if (message->count == 0) return LAR_OK;
  if (device == LAR_CPU) {
    cpu::rms_norm(*message, *norm);
    return LAR_OK;
  }
  if (!is_aligned(*message, *norm)) return refuse("input, output, norm: a tensor that is not at 16 bytes");
  switch (message->dtype) {
    case LAR_FLOAT32:
      return run<float>(*message, *norm, stream);
    case LAR_FLOAT16:
      return run<__half>(*message, *norm, stream);
    default:
      return run<__nv_bfloat16>(*message, *norm, stream);
  }
}
