// The sum in rank order on the CPU.
#ifndef LLM_ALLREDUCE_CPU_SUM_H_
#define LLM_ALLREDUCE_CPU_SUM_H_

#include "llm_allreduce.h"

namespace lar::cpu {

// output[i] = sources[0][i] + sources[1][i] + ..., in fp32 from +0, in that order, rounded once: the arithmetic of
// device/vector.cuh. `output` may lie in several places at once: it is written to each of `outputs`.
void reduce_in_rank_order(lar_dtype dtype, const void* const* sources, int num_sources, void* const* outputs,
                          int num_outputs, int64_t count);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_SUM_H_
