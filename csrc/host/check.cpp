#include "host/check.h"

#include <algorithm>

#include "codec/norm.h"
#include "host/layout.h"
#include "protocol/hierarchy.h"
#include "protocol/hosts.h"
#include "protocol/place.h"

namespace lar {

bool supported_world_size(int32_t world_size) { return world_size >= 2 && world_size <= LAR_MAX_WORLD_SIZE; }

WireUnit wire_unit(lar_kind kind, lar_dtype dtype) {
  if (kind.wire == LAR_WIRE_RAW) return {LAR_VECTOR_BYTES / element_bytes(dtype), LAR_VECTOR_BYTES};
  WireUnit unit{};
  lar_packet_size(static_cast<lar_wire>(kind.wire), &unit.values, &unit.bytes);
  if (kind.algorithm == LAR_RING) unit.bytes = raw_packet_bytes(unit.values, dtype);
  return unit;
}

namespace {

bool is_multicast(int exchange) { return exchange == LAR_MULTICAST || exchange == LAR_IN_SWITCH; }

// CPU ranks place by flags: their slots are those of flagged calls.
bool is_in_band(int exchange) {
  return exchange == LAR_PUSH || exchange == LAR_SHARED || exchange == LAR_PULL || exchange == LAR_PLACE ||
         is_multicast(exchange);
}

// Whether a workspace has what an exchange needs.
bool fits(const lar_workspace& workspace, int exchange) {
  const lar_layout& layout = workspace.layout;
  switch (exchange) {
    case LAR_MULTICAST:
    case LAR_IN_SWITCH:
      return !layout.shared && workspace.device != LAR_CPU && workspace.multicast.all && workspace.multicast.own;
    case LAR_PUSH:
    case LAR_PULL:
      return !layout.shared;
    case LAR_PLACE:
      return !layout.shared || workspace.device == LAR_CPU;
    case LAR_SHARED:
      return layout.shared != 0;
    case LAR_STAGED:
      // Between two ranks staging makes no difference, and in memory that all share there are no streams between ranks.
      return !layout.shared && layout.world_size >= 3;
    default:
      return exchange == LAR_FLAGS;
  }
}

lar_algorithm algorithm_of(const lar_call& call) { return static_cast<lar_algorithm>(call.kind.algorithm); }

// What a round may move to one peer: in one lane with flags, in all lanes together in band.
int64_t most_chunk_bytes(const lar_workspace& workspace, const lar_call& call) {
  const lar_layout& layout = workspace.layout;
  if (is_multicast(call.kind.exchange)) {
    const lar_multicast_layout& multicast = workspace.multicast.layout;
    if (call.kind.algorithm == LAR_ONE_SHOT) return multicast.one_shot_bytes;
    const int64_t part = multicast.results_bytes / layout.world_size;
    if (call.kind.exchange == LAR_IN_SWITCH) return std::min(part, multicast.inputs_bytes / layout.world_size);
    return std::min(part, layout.in_band.two_shot_bytes);
  }
  const bool by_flags = call.kind.exchange == LAR_PLACE && workspace.device == LAR_CPU;
  const lar_slots& slots = is_in_band(call.kind.exchange) && !by_flags ? layout.in_band : layout.flagged;
  if (call.kind.exchange == LAR_STAGED) return slots.staged_bytes / call.launch.lanes;
  if (is_half(algorithm_of(call))) {
    const bool one_after_another = call.kind.algorithm == LAR_REDUCE_SCATTER && layout.shared;
    return slots.one_shot_bytes / (one_after_another ? layout.world_size : 1);
  }
  return call.kind.algorithm == LAR_ONE_SHOT ? slots.one_shot_bytes : slots.two_shot_bytes;
}

bool check_message(const lar_message& message) {
  if (message.count < 0 || message.dtype < LAR_FLOAT32 || message.dtype > LAR_BFLOAT16) return false;
  return message.count == 0 || (message.input && message.output);
}

// Whole warps. A kernel may allow less.
int most_threads_of(lar_kind kind) {
  if (!is_in_band(kind.exchange)) return LAR_MAX_FLAGGED_THREADS;
  return kind.epilogue == LAR_RMS_NORM ? LAR_MAX_WIDE_THREADS : LAR_MAX_THREADS;
}

bool check_launch(const lar_layout& layout, const lar_launch& launch, lar_kind kind) {
  if (launch.lanes < 1 || launch.lanes > layout.lanes) return false;
  const int most_threads = most_threads_of(kind);
  if (launch.threads < 32 || launch.threads > most_threads || launch.threads % 32 != 0) return false;
  // Some lane must be left for what the specialized ones do not do.
  if (launch.scatter_lanes < 0 || launch.drain_lanes < 0 || launch.scatter_lanes + launch.drain_lanes >= launch.lanes)
    return false;
  return launch.cluster >= 0 && launch.cluster <= kMostLanesOfARow && launch.lanes % lanes_of_a_row(launch) == 0;
}

// Beside the packets themselves.
bool check_wire(const lar_workspace& workspace, const lar_call& call) {
  if (call.kind.wire == LAR_WIRE_RAW) return true;
  int32_t values = 0;
  int32_t bytes = 0;
  if (lar_packet_size(static_cast<lar_wire>(call.kind.wire), &values, &bytes) != LAR_OK) return false;
  const bool limited = workspace.device != LAR_CPU || call.kind.algorithm == LAR_RING;
  return !limited || workspace.layout.world_size <= kMostCompressingRanks;
}

// Halves are exact, and a norm is no part of them.
bool check_hosts(const lar_call& call) {
  if (sums_hosts(algorithm_of(call)) ? call.hosts < 1 || call.hosts > LAR_MAX_HOSTS : call.hosts != 0) return false;
  return !is_half(algorithm_of(call)) || (call.kind.wire == LAR_WIRE_RAW && call.kind.epilogue == LAR_STORE);
}

bool check_domains(const lar_workspace& workspace, const lar_call& call) {
  if (call.kind.algorithm != LAR_HIERARCHICAL) return true;
  Domains domains;
  return make_domains(call.domains, workspace.layout.world_size, workspace.rank, &domains);
}

// Where the output lies in registered memory, of the exchange whose peers store there.
bool check_pools(const lar_workspace& workspace, const lar_call& call) {
  if ((call.kind.exchange == LAR_PLACE) != (call.pools != nullptr)) return false;
  if (!call.pools || call.message.count == 0) return true;
  for (int rank = 0; rank < workspace.layout.world_size; ++rank)
    if (!call.pools[rank] || !starts_on_a_vector(call.pools[rank])) return false;
  const int64_t where = distance_in_vectors(call.pools[workspace.rank], call.message.output);
  return where >= 0 && where <= UINT32_MAX && starts_on_a_vector(call.message.output);
}

}  // namespace

int check_call(const lar_workspace& workspace, const lar_call& call) {
  const lar_layout& layout = workspace.layout;
  const bool is_alone = layout.world_size == 1 && is_half(algorithm_of(call));
  if (!supported_world_size(layout.world_size) && !is_alone) return LAR_ERROR_INVALID_ARGUMENT;
  if (workspace.rank < 0 || workspace.rank >= layout.world_size) return LAR_ERROR_INVALID_ARGUMENT;
  if (!check_message(call.message) || !check_launch(layout, call.launch, call.kind)) return LAR_ERROR_INVALID_ARGUMENT;
  if (!fits(workspace, call.kind.exchange) || !check_wire(workspace, call)) return LAR_ERROR_INVALID_ARGUMENT;
  if (!check_domains(workspace, call) || !check_hosts(call) || !check_pools(workspace, call))
    return LAR_ERROR_INVALID_ARGUMENT;
  if ((call.kind.epilogue == LAR_RMS_NORM) != (call.norm != nullptr)) return LAR_ERROR_INVALID_ARGUMENT;
  if (call.norm && (call.kind.wire != LAR_WIRE_RAW || !check_norm(call.message, *call.norm)))
    return LAR_ERROR_INVALID_ARGUMENT;
  const int64_t chunk = call.launch.chunk_vectors;
  if (chunk < 1 || chunk > most_chunk_bytes(workspace, call) / LAR_VECTOR_BYTES) return LAR_ERROR_INVALID_ARGUMENT;
  // Whole packets to a slot. A CPU rank leaves the rest of a slot empty.
  const int64_t unit = wire_unit(call.kind, call.message.dtype).bytes;
  const int64_t bytes = chunk * LAR_VECTOR_BYTES;
  if (workspace.device == LAR_CPU ? bytes < unit : bytes % unit != 0) return LAR_ERROR_INVALID_ARGUMENT;
  return LAR_OK;
}

bool check_norm(const lar_message& message, const lar_norm& norm) {
  if (norm.hidden < 1 || norm.hidden % codec::kUnitElements != 0 || message.count % norm.hidden != 0) return false;
  if (message.count == 0) return true;
  if (!norm.weight || (!norm.norm_out && norm.quant == LAR_QUANT_NONE)) return false;
  const bool rows = norm.scales == LAR_SCALES_ROWS;
  if (norm.scale_stride != 0 && (norm.scales != LAR_SCALES_COLUMNS || norm.scale_stride < message.count / norm.hidden ||
                                 norm.scale_stride > UINT32_MAX))
    return false;
  if (norm.quant != LAR_QUANT_NONE && !norm.quant_out) return false;
  switch (norm.quant) {
    case LAR_QUANT_NONE:
      return rows;
    case LAR_QUANT_FP8_TENSOR:
      return rows && norm.scale;
    case LAR_QUANT_FP8_TOKEN:
      return rows && norm.scale_out;
    case LAR_QUANT_FP8_GROUP:
      return (rows || norm.scales == LAR_SCALES_COLUMNS || norm.scales == LAR_SCALES_UE8M0) && norm.scale_out &&
             norm.hidden % codec::kGroupElements == 0;
    case LAR_QUANT_NVFP4:
      return (rows || norm.scales == LAR_SCALES_SWIZZLED) && norm.scale && norm.scale_out &&
             norm.hidden % codec::kFp4Elements == 0;
    default:
      return false;
  }
}

int check_codec_call(lar_wire wire, lar_dtype dtype, const void* values, int64_t count, const void* packets,
                     int32_t* packet_values, int32_t* packet_bytes) {
  if (dtype < LAR_FLOAT32 || dtype > LAR_BFLOAT16 || count < 0) return LAR_ERROR_INVALID_ARGUMENT;
  if (count > 0 && (!values || !packets)) return LAR_ERROR_INVALID_ARGUMENT;
  return lar_packet_size(wire, packet_values, packet_bytes);
}

}  // namespace lar
