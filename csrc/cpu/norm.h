// LAR_RMS_NORM on the CPU (codec/norm.h).
#ifndef LLM_ALLREDUCE_CPU_NORM_H_
#define LLM_ALLREDUCE_CPU_NORM_H_

#include "llm_allreduce.h"

namespace lar::cpu {

// Rows of a message that is summed already, which has passed fault_of_norm(). message.output may be message.input.
void rms_norm(const lar_message& message, const lar_norm& norm);

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_NORM_H_
