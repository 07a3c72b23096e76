// What a kernel is given that norms rows in memory that all ranks share.
#ifndef LLM_ALLREDUCE_DEVICE_SHARED_ROWS_CUH_
#define LLM_ALLREDUCE_DEVICE_SHARED_ROWS_CUH_

#include "device/rows_in_band.cuh"
#include "device/shared.cuh"

namespace lar {

// Units of a row that a thread has at most: there are 256 threads in a block.
constexpr int kSharedUnits = 4;

struct SharedRowsArguments {
  NormArguments norm;
  SharedArguments shared;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_SHARED_ROWS_CUH_
