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

// Whole warps. A kernel may allow less.
int most_threads_of(lar_kind kind) {
  if (!is_in_band(kind.exchange)) return LAR_MAX_FLAGGED_THREADS;
  return kind.epilogue == LAR_RMS_NORM ? LAR_MAX_WIDE_THREADS : LAR_MAX_THREADS;
}

// Why a call may not be made, by what is checked; null: it may.

const char* fault_of(const lar_layout& layout, const lar_launch& launch, lar_kind kind) {
  if (launch.lanes < 1 || launch.lanes > layout.lanes) return "lanes: not from 1 to those of the workspace";
  if (launch.threads < 32 || launch.threads > most_threads_of(kind) || launch.threads % 32 != 0)
    return "threads: not whole warps, or more than kernels of this exchange take";
  if (launch.scatter_lanes < 0 || launch.drain_lanes < 0) return "scatter_lanes, drain_lanes: negative";
  // Some lane must be left for what the specialized ones do not do.
  if (launch.scatter_lanes + launch.drain_lanes >= launch.lanes)
    return "scatter_lanes, drain_lanes: leave no lane for the rest";
  static_assert(kMostLanesOfARow == 8, "see the text below");
  if (launch.cluster < 0 || launch.cluster > kMostLanesOfARow) return "cluster: not from 0 to 8";
  return launch.lanes % lanes_of_a_row(launch) == 0 ? nullptr : "lanes: not whole clusters";
}

// Beside the packets themselves.
const char* fault_of_wire(const lar_workspace& workspace, const lar_call& call) {
  if (call.kind.wire == LAR_WIRE_RAW) return nullptr;
  int32_t values = 0;
  int32_t bytes = 0;
  if (lar_packet_size(static_cast<lar_wire>(call.kind.wire), &values, &bytes) != LAR_OK)
    return "wire: there is no format of this number";
  const bool limited = workspace.device != LAR_CPU || call.kind.algorithm == LAR_RING;
  return !limited || workspace.layout.world_size <= kMostCompressingRanks ? nullptr
                                                                          : "wire: too many ranks for a wire format";
}

// Halves are exact, and a norm is no part of them.
const char* fault_of_hosts(const lar_call& call) {
  const bool sums = sums_hosts(algorithm_of(call));
  if (!sums && call.hosts != 0) return "hosts: only of calls that sum hosts' sums";
  if (sums && (call.hosts < 1 || call.hosts > LAR_MAX_HOSTS)) return "hosts: less than 1, or more than LAR_MAX_HOSTS";
  if (!is_half(algorithm_of(call))) return nullptr;
  if (call.kind.wire != LAR_WIRE_RAW) return "wire: halves of several hosts are exact";
  return call.kind.epilogue == LAR_STORE ? nullptr : "epilogue: halves of several hosts have none";
}

const char* fault_of_domains(const lar_workspace& workspace, const lar_call& call) {
  if (call.kind.algorithm != LAR_HIERARCHICAL) return nullptr;
  Domains domains;
  return make_domains(call.domains, workspace.layout.world_size, workspace.rank, &domains)
             ? nullptr
             : "domains: not two of equal size, of 2 to 4 ranks each";
}

// Where the output lies in registered memory, of the exchange whose peers store there.
const char* fault_of_pools(const lar_workspace& workspace, const lar_call& call) {
  if ((call.kind.exchange == LAR_PLACE) != (call.pools != nullptr))
    return "pools: only of calls that are placed, and of all of them";
  if (!call.pools || call.message.count == 0) return nullptr;
  for (int rank = 0; rank < workspace.layout.world_size; ++rank)
    if (!call.pools[rank] || !starts_on_a_vector(call.pools[rank])) return "pools: null, or not at 16 bytes";
  const int64_t where = distance_in_vectors(call.pools[workspace.rank], call.message.output);
  return where >= 0 && where <= UINT32_MAX && starts_on_a_vector(call.message.output)
             ? nullptr
             : "output: not in this rank's pool, or not at 16 bytes";
}

const char* fault_of_epilogue(const lar_call& call) {
  if ((call.kind.epilogue == LAR_RMS_NORM) != (call.norm != nullptr))
    return "norm: only of calls with this epilogue, and of all of them";
  if (!call.norm) return nullptr;
  if (call.kind.wire != LAR_WIRE_RAW) return "wire: a norm is of exact sums";
  return fault_of_norm(call.message, *call.norm);
}

const char* fault_of_chunk(const lar_workspace& workspace, const lar_call& call) {
  const int64_t chunk = call.launch.chunk_vectors;
  if (chunk < 1) return "chunk_vectors: less than one";
  if (chunk > most_chunk_bytes(workspace, call) / LAR_VECTOR_BYTES) return "chunk_vectors: more than a slot holds";
  // Whole packets to a slot. A CPU rank leaves the rest of a slot empty.
  const int64_t unit = wire_unit(call.kind, call.message.dtype).bytes;
  const int64_t bytes = chunk * LAR_VECTOR_BYTES;
  return (workspace.device == LAR_CPU ? bytes < unit : bytes % unit != 0) ? "chunk_vectors: not whole packets"
                                                                          : nullptr;
}

const char* fault_of(const lar_workspace& workspace, const lar_call& call) {
  const lar_layout& layout = workspace.layout;
  const bool is_alone = layout.world_size == 1 && is_half(algorithm_of(call));
  if (!supported_world_size(layout.world_size) && !is_alone) return "world_size: not supported";
  if (workspace.rank < 0 || workspace.rank >= layout.world_size) return "rank: not in the group";
  if (const char* fault = fault_of_message(call.message)) return fault;
  if (const char* fault = fault_of(layout, call.launch, call.kind)) return fault;
  if (!fits(workspace, call.kind.exchange)) return "exchange: the workspace has no slots or memory for it";
  if (const char* fault = fault_of_wire(workspace, call)) return fault;
  if (const char* fault = fault_of_domains(workspace, call)) return fault;
  if (const char* fault = fault_of_hosts(call)) return fault;
  if (const char* fault = fault_of_pools(workspace, call)) return fault;
  if (const char* fault = fault_of_epilogue(call)) return fault;
  return fault_of_chunk(workspace, call);
}

}  // namespace

const char* fault_of_message(const lar_message& message) {
  if (message.count < 0) return "count: negative";
  if (message.dtype < LAR_FLOAT32 || message.dtype > LAR_BFLOAT16) return "dtype: there is none of this number";
  return message.count == 0 || (message.input && message.output) ? nullptr : "input, output: null";
}

int check_call(const lar_workspace& workspace, const lar_call& call) {
  const char* fault = fault_of(workspace, call);
  return fault ? refuse(fault) : LAR_OK;
}

const char* fault_of_norm(const lar_message& message, const lar_norm& norm) {
  static_assert(codec::kUnitElements == 8, "see the text below");
  if (norm.hidden < 1 || norm.hidden % codec::kUnitElements != 0) return "norm.hidden: not whole units of 8 elements";
  if (message.count % norm.hidden != 0) return "count: not whole rows of norm.hidden";
  if (message.count == 0) return nullptr;
  if (!norm.weight) return "norm.weight: null";
  if (!norm.norm_out && norm.quant == LAR_QUANT_NONE) return "norm.norm_out: null, and nothing is quantized";
  const bool rows = norm.scales == LAR_SCALES_ROWS;
  if (norm.scale_stride != 0 && (norm.scales != LAR_SCALES_COLUMNS || norm.scale_stride < message.count / norm.hidden ||
                                 norm.scale_stride > UINT32_MAX))
    return "norm.scale_stride: not of scales by columns, or out of range";
  if (norm.quant != LAR_QUANT_NONE && !norm.quant_out) return "norm.quant_out: null";
  const auto with_scales = [](bool known, bool given, bool whole) -> const char* {
    if (!known) return "norm.scales: no layout of this quantization";
    if (!given) return "norm.scale, norm.scale_out: null";
    return whole ? nullptr : "norm.hidden: not whole groups of this quantization";
  };
  switch (norm.quant) {
    case LAR_QUANT_NONE:
      return with_scales(rows, true, true);
    case LAR_QUANT_FP8_TENSOR:
      return with_scales(rows, norm.scale != nullptr, true);
    case LAR_QUANT_FP8_TOKEN:
      return with_scales(rows, norm.scale_out != nullptr, true);
    case LAR_QUANT_FP8_GROUP:
      return with_scales(rows || norm.scales == LAR_SCALES_COLUMNS || norm.scales == LAR_SCALES_UE8M0,
                         norm.scale_out != nullptr, norm.hidden % codec::kGroupElements == 0);
    case LAR_QUANT_NVFP4:
      return with_scales(rows || norm.scales == LAR_SCALES_SWIZZLED, norm.scale && norm.scale_out,
                         norm.hidden % codec::kFp4Elements == 0);
    default:
      return "norm.quant: there is none of this number";
  }
}

int check_codec_call(lar_wire wire, lar_dtype dtype, const void* values, int64_t count, const void* packets,
                     int32_t* packet_values, int32_t* packet_bytes) {
  if (dtype < LAR_FLOAT32 || dtype > LAR_BFLOAT16) return refuse("dtype: there is none of this number");
  if (count < 0) return refuse("count: negative");
  if (count > 0 && (!values || !packets)) return refuse("values, packets: null");
  return lar_packet_size(wire, packet_values, packet_bytes);
}

}  // namespace lar
