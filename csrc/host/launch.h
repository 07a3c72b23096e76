// From a row of the registry to a kernel on a stream.
#ifndef LLM_ALLREDUCE_HOST_LAUNCH_H_
#define LLM_ALLREDUCE_HOST_LAUNCH_H_

#include <algorithm>

#include "host/check.h"
#include "host/layout.h"
#include "host/registry.h"

namespace lar {

// Starts a kernel with one argument. `cluster`: blocks that run together, 1 to 8.
int launch_kernel(const void* kernel, int blocks, int threads, int cluster, bool early, void* argument, void* stream);

// Programmatic dependent launch: blocks may be scheduled while the previous kernel of the stream drains, and wait
// before they touch memory.
enum class Start { kLate, kEarly };

// Starts a row's kernel with one argument. kEarly counts where the device can and the workspace's caller allows it.
// LAR_ERROR_NOT_RESIDENT when blocks that must all run at the same time would not.
int launch(const Row* row, const lar_workspace& workspace, const lar_launch& shape, Start start, void* argument,
           void* stream);

// Whether kernels that go by multicast are more than empty on the current device (sm_90 and newer).
bool knows_multicast();

inline bool ends_on_a_vector(const lar_message& message) {
  return message.count * element_bytes(message.dtype) % LAR_VECTOR_BYTES == 0;
}

// The rounds of an in-band call, each a launch of its own, of `parts` chunks: run(message of the round, its offset in
// bytes) until one fails.
template <typename Run>
int in_rounds(const lar_call& call, int parts, Run run) {
  const lar_message& message = call.message;
  const WireUnit unit = wire_unit(call.kind, message.dtype);
  const int64_t elements = call.launch.chunk_vectors * LAR_VECTOR_BYTES / unit.bytes * parts * unit.values;
  for (int64_t first = 0; first < message.count; first += elements) {
    const int64_t offset = first * element_bytes(message.dtype);
    const lar_message round{static_cast<const char*>(message.input) + offset,
                            static_cast<char*>(message.output) + offset, std::min(elements, message.count - first),
                            message.dtype};
    if (const int status = run(round, offset); status != LAR_OK) return status;
  }
  return LAR_OK;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_LAUNCH_H_
