// What a call must be like, whatever runs it.
#ifndef LLM_ALLREDUCE_HOST_CHECK_H_
#define LLM_ALLREDUCE_HOST_CHECK_H_

#include "host/refusal.h"
#include "llm_allreduce.h"

namespace lar {

// Ranks of a call with a wire format on GPUs, and of the ring anywhere.
constexpr int kMostCompressingRanks = 8;

bool supported_world_size(int32_t world_size);

// What travels together: so many values in so many bytes of a slot. Raw: a vector; otherwise a packet.
struct WireUnit {
  int32_t values;
  int32_t bytes;
};

// Of a kind that has passed check_call(). The ring's slots hold a packet's values as they are, too.
WireUnit wire_unit(lar_kind kind, lar_dtype dtype);

inline bool starts_on_a_vector(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % LAR_VECTOR_BYTES == 0;
}

constexpr int kMostLanesOfARow = 8;

constexpr int lanes_of_a_row(const lar_launch& launch) { return launch.cluster > 1 ? launch.cluster : 1; }

// Why a message may not be given to any kernel; null: it may.
const char* fault_of_message(const lar_message& message);

// Why a message may not be normed so, wherever the tensors lie; null: it may.
const char* fault_of_norm(const lar_message& message, const lar_norm& norm);

// LAR_OK, or LAR_ERROR_INVALID_ARGUMENT for a call that no kernel may be given.
int check_call(const lar_workspace& workspace, const lar_call& call);

// The same for encoding and decoding; the packet size of the format.
int check_codec_call(lar_wire wire, lar_dtype dtype, const void* values, int64_t count, const void* packets,
                     int32_t* packet_values, int32_t* packet_bytes);

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_CHECK_H_
