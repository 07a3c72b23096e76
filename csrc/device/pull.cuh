// What a kernel is given that reads its peers' inputs in place.
#ifndef LLM_ALLREDUCE_DEVICE_PULL_CUH_
#define LLM_ALLREDUCE_DEVICE_PULL_CUH_

#include "device/in_band.cuh"

namespace lar {

struct PullArguments {
  lar_workspace workspace;
  const void* inputs[LAR_MAX_WORLD_SIZE];  // by rank
  PushArguments<0> in_band;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PULL_CUH_
