// Launches of the kernels that exchange in band: pushed, pulled, placed, and shared. One launch to a round.
#include "device/in_band.cuh"
#include "device/multicast.cuh"
#include "device/place.cuh"
#include "device/pull.cuh"
#include "device/rows_in_band.cuh"
#include "device/shared.cuh"
#include "device/shared_rows.cuh"
#include "host/launch.h"

namespace lar {
namespace {

// The in-band slots that an algorithm's kernels use.
struct SlotUse {
  EpochPlane epochs;
  LengthPlane lengths;
  int parts;  // slots that a round fills at most
  int64_t offset;
  int64_t bytes;             // of a slot
  int64_t generation_bytes;  // from one of those that are pushed to the same of the next generation
  int64_t gather_offset;     // two-shot; of what is stored once, of either algorithm
};

SlotUse slot_use(const lar_layout& layout, lar_kind kind) {
  const lar_slots& slots = layout.in_band;
  SlotUse out{};
  out.epochs = in_band_epochs(layout, kind.algorithm);
  if (kind.algorithm == LAR_ONE_SHOT) {
    out.lengths = LengthPlane::kOneShot;
    out.parts = 1;
    out.bytes = slots.one_shot_bytes;
    out.offset = out.gather_offset = slots.one_shot_offset;
  } else {
    out.lengths = LengthPlane::kTwoShot;
    out.parts = layout.world_size;
    out.bytes = slots.two_shot_bytes;
    out.offset = slots.scatter_offset;
    out.gather_offset = slots.gather_offset;
  }
  out.generation_bytes = pushed_generation_bytes(layout, out.bytes);
  return out;
}

// A kernel of a fixed world size has as many entries of the table at the end as it needs.
PushArguments<0> in_band_arguments(const lar_workspace& workspace, const lar_call& call, const lar_message& round,
                                   const SlotUse& use) {
  const int world_size = workspace.layout.world_size;
  const auto region = [&](int rank) { return static_cast<char*>(workspace.base[rank]) + use.offset; };
  const auto vectors = [](int64_t bytes) { return static_cast<uint32_t>(bytes / LAR_VECTOR_BYTES); };
  PushArguments<0> out{};
  out.input = round.input;
  out.output = round.output;
  out.count = round.count;
  for (int step = 1; step < world_size; ++step)  // to that rank, I am the one world_size - step places on
    out.to[step] = region((workspace.rank + step) % world_size) + (world_size - step - 1) * use.bytes;
  out.own = region(workspace.rank);
  out.epochs = epoch_word(workspace.local, workspace.layout, use.epochs, 0);
  out.lanes = static_cast<uint32_t>(workspace.layout.lanes);
  out.generation_stride = vectors(use.generation_bytes);
  out.peer_stride = vectors(use.bytes);
  out.gather_stride = vectors(use.gather_offset - use.offset);
  out.part = static_cast<uint32_t>(call.launch.chunk_vectors);
  out.scatter_lanes = static_cast<uint32_t>(call.launch.scatter_lanes);
  out.drain_lanes = static_cast<uint32_t>(call.launch.drain_lanes);
  out.rank = workspace.rank;
  out.world_size = world_size;
  out.limit = wait_limit(workspace, call.kind);
  return out;
}

// Where the tensor starts differs from rank to rank, how long it is does not. `aligned`: it starts on a vector.
Form form_of(const lar_call& call, const lar_message& round, bool aligned) {
  const lar_launch& shape = call.launch;
  const bool raw = call.kind.wire == LAR_WIRE_RAW;
  const bool one_shot = call.kind.algorithm == LAR_ONE_SHOT;
  // Packets have their own way with tensors that start or end anywhere.
  if (raw && (!aligned || !ends_on_a_vector(round))) return Form::kAny;
  if (shape.scatter_lanes > 0) return Form::kSplit;
  const bool is_short = shape.chunk_vectors <= int64_t{shape.lanes} * shape.threads;
  if (raw) return is_short ? Form::kShort : one_shot ? Form::kBulk : Form::kAny;
  return is_short && one_shot ? Form::kShort : Form::kAny;
}

constexpr const char* kNoAlignedRows = "dtype, input, output, norm: not 16-bit, or a tensor that is not at 16 bytes";
constexpr const char* kUnalignedSplit = "scatter_lanes: of tensors at 16 bytes only";
constexpr const char* kNoWholeInputs = "inputs, output, count: not whole vectors at 16 bytes";

// Calls of whole rows: whole vectors, 16-bit elements.
bool has_aligned_rows(const lar_call& call) {
  const lar_norm& norm = *call.norm;
  for (const void* address : {call.message.input, static_cast<const void*>(call.message.output), norm.residual,
                              norm.weight, static_cast<const void*>(norm.norm_out),
                              static_cast<const void*>(norm.quant_out), static_cast<const void*>(norm.scale_out)})
    if (!starts_on_a_vector(address)) return false;
  return element_bytes(call.message.dtype) == 2;
}

// The rounds of a call of whole rows, of `parts` parts each: run(message of the round, its rows).
template <typename Run>
int in_rounds_of_rows(const lar_call& call, int parts, Run run) {
  const int64_t row_vectors = call.norm->hidden / codec::kUnitElements;
  const int64_t rows = call.message.count / call.norm->hidden;
  if (call.launch.chunk_vectors % row_vectors != 0) return refuse("chunk_vectors: not whole rows");
  const int64_t most = call.launch.chunk_vectors / row_vectors * parts;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t number = std::min(most, rows - first);
    lar_message round = call.message;
    round.input = static_cast<const char*>(call.message.input) + first * row_vectors * LAR_VECTOR_BYTES;
    round.count = number * call.norm->hidden;
    if (const int status = run(round, norm_arguments(call.message, *call.norm, first, number)); status != LAR_OK)
      return status;
  }
  return LAR_OK;
}

int push_rows(const lar_workspace& workspace, const lar_call& call, void* stream) {
  const lar_launch& shape = call.launch;
  const int64_t units = call.norm->hidden / codec::kUnitElements;
  const int64_t threads = int64_t{shape.threads} * lanes_of_a_row(shape);
  const bool split = shape.scatter_lanes > 0;
  if (!has_aligned_rows(call)) return refuse(kNoAlignedRows);
  if (ceil_div(units, threads) > 2) return refuse("threads: too few for a row of norm.hidden");
  if (units > int64_t{kMostTiles} * codec::kTileUnits) return refuse("norm.hidden: more than a block holds");
  if (lanes_of_a_row(shape) > 1 && split) return refuse("cluster: not with scatter_lanes");
  const SlotUse use = slot_use(workspace.layout, call.kind);
  const bool wide = shape.threads > LAR_MAX_THREADS;
  if (wide && units > threads) return refuse("threads: too few for a row of norm.hidden, of so many a unit each");
  const Form form = split ? Form::kSplit : wide ? Form::kWide : units <= threads ? Form::kShort : Form::kAny;
  const Row* row = find_row(call.kind, call.message.dtype, workspace.layout.world_size, form);
  return in_rounds_of_rows(call, use.parts, [&](const lar_message& round, const NormArguments& norm) {
    RowsArguments<0> arguments{norm, in_band_arguments(workspace, call, round, use)};
    return launch(row, workspace, shape, Start::kEarly, &arguments, stream);
  });
}

int push(const lar_workspace& workspace, const lar_call& call, void* stream) {
  if (call.norm) return push_rows(workspace, call, stream);
  const bool aligned = starts_on_a_vector(call.message.input) && starts_on_a_vector(call.message.output);
  const bool split = call.launch.scatter_lanes > 0;
  if (call.kind.wire == LAR_WIRE_RAW && split && !aligned) return refuse(kUnalignedSplit);
  const SlotUse use = slot_use(workspace.layout, call.kind);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t) {
    PushArguments<0> arguments = in_band_arguments(workspace, call, round, use);
    const Row* row = find_row(call.kind, round.dtype, workspace.layout.world_size, form_of(call, round, aligned));
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

// Whether peers may read the inputs of a call in place.
bool has_whole_inputs(const lar_workspace& workspace, const lar_call& call) {
  bool whole = call.inputs && ends_on_a_vector(call.message) && starts_on_a_vector(call.message.output);
  for (int rank = 0; whole && rank < workspace.layout.world_size; ++rank)
    whole = call.inputs[rank] && starts_on_a_vector(call.inputs[rank]);
  return whole;
}

int pull(const lar_workspace& workspace, const lar_call& call, void* stream) {
  const int world_size = workspace.layout.world_size;
  if (!has_whole_inputs(workspace, call)) return refuse(kNoWholeInputs);
  const SlotUse use = slot_use(workspace.layout, call.kind);
  const Row* row = find_row(call.kind, call.message.dtype, world_size, Form::kAny);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t offset) {
    PullArguments arguments{workspace, {}, in_band_arguments(workspace, call, round, use)};
    for (int rank = 0; rank < world_size; ++rank)
      arguments.inputs[rank] = static_cast<const char*>(call.inputs[rank]) + offset;
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

PlaceArguments place_arguments(const lar_workspace& workspace, const lar_call& call, const lar_message& round,
                               const SlotUse& use) {
  const int world_size = workspace.layout.world_size;
  const int64_t where = distance_in_vectors(call.pools[workspace.rank], round.output);
  PlaceArguments out{workspace, {}, static_cast<uint32_t>(where), in_band_arguments(workspace, call, round, use)};
  for (int step = 0; step < world_size; ++step)
    out.pools[step] = static_cast<char*>(call.pools[(workspace.rank + step) % world_size]);
  return out;
}

int place_pulled(const lar_workspace& workspace, const lar_call& call, void* stream) {
  const int world_size = workspace.layout.world_size;
  if (call.launch.scatter_lanes > 0) return refuse("scatter_lanes: not of inputs that are read in place");
  if (!has_whole_inputs(workspace, call)) return refuse(kNoWholeInputs);
  const SlotUse use = slot_use(workspace.layout, call.kind);
  const Row* row = find_row(call.kind, call.message.dtype, world_size, Form::kPull);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t offset) {
    PlacePullArguments arguments{place_arguments(workspace, call, round, use), {}};
    for (int rank = 0; rank < world_size; ++rank)
      arguments.inputs[rank] = static_cast<const char*>(call.inputs[rank]) + offset;
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

int place(const lar_workspace& workspace, const lar_call& call, void* stream) {
  const bool aligned = starts_on_a_vector(call.message.input);
  if (call.launch.drain_lanes > 0) return refuse("drain_lanes: results that are placed are taken in by nobody");
  if (call.launch.scatter_lanes > 0 && !aligned) return refuse(kUnalignedSplit);
  if (call.inputs) return place_pulled(workspace, call, stream);
  const SlotUse use = slot_use(workspace.layout, call.kind);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t) {
    PlaceArguments arguments = place_arguments(workspace, call, round, use);
    const bool split = call.launch.scatter_lanes > 0 && ends_on_a_vector(round);
    const Row* row = find_row(call.kind, round.dtype, workspace.layout.world_size, split ? Form::kSplit : Form::kAny);
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

SharedArguments shared_arguments(const lar_workspace& workspace, const lar_call& call, const lar_message& round,
                                 const SlotUse& use) {
  const lar_layout& layout = workspace.layout;
  SharedArguments out{};
  for (int rank = 0; rank < layout.world_size; ++rank)
    out.slots[rank] = static_cast<char*>(workspace.base[rank]) + use.gather_offset;
  out.slots_stride = static_cast<uint32_t>(use.bytes / LAR_VECTOR_BYTES);
  out.lengths = length_words(workspace.local, layout, use.lengths);
  out.in_band = in_band_arguments(workspace, call, round, use);
  return out;
}

int shared(const lar_workspace& workspace, const lar_call& call, void* stream) {
  if (call.launch.scatter_lanes > 0)
    return refuse("scatter_lanes: in memory that ranks share, every lane does everything");
  if (call.launch.cluster > 1) return refuse("cluster: not in memory that ranks share");
  const SlotUse use = slot_use(workspace.layout, call.kind);
  const Row* row = find_row(call.kind, call.message.dtype, workspace.layout.world_size, Form::kAny);
  if (call.norm) {
    const int64_t units = call.norm->hidden / codec::kUnitElements;
    if (!has_aligned_rows(call)) return refuse(kNoAlignedRows);
    if (units > int64_t{call.launch.threads} * kSharedUnits) return refuse("threads: too few for a row of norm.hidden");
    return in_rounds_of_rows(call, use.parts, [&](const lar_message& round, const NormArguments& norm) {
      SharedRowsArguments arguments{norm, shared_arguments(workspace, call, round, use)};
      return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
    });
  }
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t) {
    SharedArguments arguments = shared_arguments(workspace, call, round, use);
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

constexpr const char* kMulticastNorm = "norm: not by multicast";
constexpr const char* kNoMulticast = "exchange: multicast is of sm_90 and newer";

MulticastArguments multicast_arguments(const lar_workspace& workspace, const lar_call& call) {
  const lar_multicast& multicast = workspace.multicast;
  const lar_multicast_layout& layout = multicast.layout;
  const int64_t offset = call.kind.algorithm == LAR_ONE_SHOT ? layout.one_shot_offset : layout.results_offset;
  MulticastArguments out{};
  out.all = static_cast<char*>(multicast.all) + offset;
  out.own = static_cast<char*>(multicast.own) + offset;
  out.all_inputs = static_cast<char*>(multicast.all) + layout.inputs_offset;
  out.own_inputs = static_cast<char*>(multicast.own) + layout.inputs_offset;
  out.rank_stride = static_cast<uint32_t>(layout.one_shot_bytes / LAR_VECTOR_BYTES);
  out.generation_stride = static_cast<uint32_t>(workspace.layout.world_size) * out.rank_stride;
  out.flags = flag_row(workspace.base[workspace.rank], workspace.layout, FlagPlane::kInSwitch, 0);
  out.flag_words = static_cast<uint32_t>(workspace.layout.flag_words);
  return out;
}

int multicast(const lar_workspace& workspace, const lar_call& call, void* stream) {
  const bool aligned = starts_on_a_vector(call.message.input) && starts_on_a_vector(call.message.output);
  const bool split = call.launch.scatter_lanes > 0;
  if (call.norm) return refuse(kMulticastNorm);
  if (!knows_multicast()) return refuse(kNoMulticast);
  if (split && !aligned) return refuse(kUnalignedSplit);
  if (split && call.kind.algorithm == LAR_ONE_SHOT) return refuse("scatter_lanes: not in one step by multicast");
  const SlotUse use = slot_use(workspace.layout, call.kind);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t) {
    MulticastCall<0> arguments{multicast_arguments(workspace, call), in_band_arguments(workspace, call, round, use)};
    const Form form = form_of(call, round, aligned);
    const Row* row =
        find_row(call.kind, round.dtype, workspace.layout.world_size, form == Form::kBulk ? Form::kAny : form);
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

int in_switch(const lar_workspace& workspace, const lar_call& call, void* stream) {
  if (call.norm) return refuse(kMulticastNorm);
  if (call.launch.scatter_lanes > 0) return refuse("scatter_lanes: not of sums in the switch");
  if (!knows_multicast()) return refuse(kNoMulticast);
  const int world_size = workspace.layout.world_size;
  SlotUse use = slot_use(workspace.layout, call.kind);
  use.epochs = EpochPlane::kInSwitch;  // no slot is pushed
  const Row* row = find_row(call.kind, call.message.dtype, world_size, Form::kAny);
  return in_rounds(call, use.parts, [&](const lar_message& round, int64_t) {
    const PushArguments<0> in_band = in_band_arguments(workspace, call, round, use);
    InSwitchCall<0> arguments{multicast_arguments(workspace, call), in_band, {}};
    for (int rank = 0; rank < world_size; ++rank)
      arguments.peer_flags[rank] = flag_row(workspace.base[rank], workspace.layout, FlagPlane::kInSwitch, 0);
    return launch(row, workspace, call.launch, Start::kEarly, &arguments, stream);
  });
}

const Registration exchanges([] {
  add_exchange(LAR_MULTICAST, multicast);
  add_exchange(LAR_IN_SWITCH, in_switch);
  add_exchange(LAR_PUSH, push);
  add_exchange(LAR_PULL, pull);
  add_exchange(LAR_PLACE, place);
  add_exchange(LAR_SHARED, shared);
});

}  // namespace
}  // namespace lar
