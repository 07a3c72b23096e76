// The sum in rank order on the CPU.
#ifndef LLM_ALLREDUCE_CPU_SUM_H_
#define LLM_ALLREDUCE_CPU_SUM_H_

#include "llm_allreduce.h"

namespace lar::cpu {

// output[i] = sources[0][i] + sources[1][i] + ..., in fp32 from +0, in that order, rounded once: the arithmetic of
// device/vector.cuh. `output` may lie in several places at once: it is written to each of `outputs`.
void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count);

// The same sum, not rounded: fp32.
void sum_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, float* output, int64_t count);

// The sum of fp32 sums, from +0 and in their order, rounded once to `dtype`, to each of `outputs`.
void round_sum_of_sums(lar_dtype dtype, const void* const* sums, int num_sums, void* const* outputs, int num_outputs,
                       int64_t count);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_SUM_H_
