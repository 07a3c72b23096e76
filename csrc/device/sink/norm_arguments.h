// What kernels are given of a lar_norm.
#ifndef LLM_ALLREDUCE_DEVICE_SINK_NORM_ARGUMENTS_H_
#define LLM_ALLREDUCE_DEVICE_SINK_NORM_ARGUMENTS_H_

#include "codec/norm.h"
#include "llm_allreduce.h"

namespace lar {

// Tensors begin with the first row of the message. A launch has `rows` of them from `first_row` on.
struct NormArguments {
  const void* residual;
  const void* weight;
  void* residual_out;
  void* norm_out;
  void* quant_out;
  void* scale_out;
  const float* scale;
  uint32_t units;         // of a row
  uint32_t all_rows;      // of the message
  uint32_t scale_stride;  // of scales in columns
  uint32_t first_row;
  uint32_t rows;
  float inverse_hidden;
  float eps;
  float weight_bias;
  int32_t quant;
  int32_t scales;
};

inline NormArguments norm_arguments(const lar_message& message, const lar_norm& norm, int64_t first_row, int64_t rows) {
  const int64_t all_rows = message.count / norm.hidden;
  return {norm.residual,
          norm.weight,
          message.output,
          norm.norm_out,
          norm.quant_out,
          norm.scale_out,
          norm.scale,
          static_cast<uint32_t>(norm.hidden / codec::kUnitElements),
          static_cast<uint32_t>(all_rows),
          static_cast<uint32_t>(codec::scale_stride(norm, all_rows)),
          static_cast<uint32_t>(first_row),
          static_cast<uint32_t>(rows),
          1.0f / static_cast<float>(norm.hidden),
          norm.eps,
          norm.weight_bias,
          norm.quant,
          norm.scales};
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SINK_NORM_ARGUMENTS_H_
