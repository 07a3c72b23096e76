#include "host/refusal.h"

#include "llm_allreduce.h"

namespace lar {
namespace {
thread_local const char* refusal = "";
}  // namespace

int refuse(const char* why) {
  refusal = why;
  return LAR_ERROR_INVALID_ARGUMENT;
}

}  // namespace lar

extern "C" const char* lar_refusal(void) { return lar::refusal; }
