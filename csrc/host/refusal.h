// Why a call was refused.
#ifndef LLM_ALLREDUCE_HOST_REFUSAL_H_
#define LLM_ALLREDUCE_HOST_REFUSAL_H_

namespace lar {

// LAR_ERROR_INVALID_ARGUMENT, of which lar_refusal() then says `why`, in this thread: a text that lives for ever,
// "field: what is wrong". Nothing else returns that status, so that no refusal has the reason of another.
int refuse(const char* why);

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_REFUSAL_H_
