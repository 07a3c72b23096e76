// The Python face of the C ABI. Addresses travel as integers: nothing here knows a tensor library.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>

#include "bindings/eager_calls.h"
#include "bindings/plan.h"

using namespace nb::literals;

namespace {

// Encodes or decodes `count` values between two addresses, on the CPU or, with a stream, on the current device.
void encode(int format, int dtype, uint64_t values, int64_t count, uint64_t packets, std::optional<uint64_t> stream) {
  const auto wire = static_cast<lar_wire>(format);
  const auto type = static_cast<lar_dtype>(dtype);
  throw_on_error(stream ? lar_encode_cuda(wire, type, pointer(values), count, pointer(packets), pointer(*stream))
                        : lar_encode_cpu(wire, type, pointer(values), count, pointer(packets)),
                 "encode");
}

void decode(int format, int dtype, uint64_t packets, int64_t count, uint64_t values, std::optional<uint64_t> stream) {
  const auto wire = static_cast<lar_wire>(format);
  const auto type = static_cast<lar_dtype>(dtype);
  throw_on_error(stream ? lar_decode_cuda(wire, type, pointer(packets), count, pointer(values), pointer(*stream))
                        : lar_decode_cpu(wire, type, pointer(packets), count, pointer(values)),
                 "decode");
}

std::tuple<int, int> packet_size(int format) {
  int32_t values = 0;
  int32_t bytes = 0;
  throw_on_error(lar_packet_size(static_cast<lar_wire>(format), &values, &bytes), "packet_size");
  return {values, bytes};
}

std::map<std::string, int> wire_codes() {
  std::map<std::string, int> codes;
  for (int code = LAR_WIRE_RAW; const char* name = lar_wire_name(static_cast<lar_wire>(code)); ++code)
    codes[name] = code;
  return codes;
}

lar_layout make_layout(int world_size, int lanes, int64_t in_band_bytes, int64_t flagged_bytes, bool shared) {
  const lar_layout_sizes sizes{world_size, lanes, shared, in_band_bytes, flagged_bytes};
  lar_layout layout;
  if (lar_layout_init(&layout, &sizes) != LAR_OK)
    throw std::invalid_argument(
        "no workspace layout for world_size=" + std::to_string(world_size) + ", lanes=" + std::to_string(lanes) +
        ", in_band_bytes=" + std::to_string(in_band_bytes) + ", flagged_bytes=" + std::to_string(flagged_bytes) +
        ": world size must be 2 to " + std::to_string(LAR_MAX_WORLD_SIZE) + ", lanes 1 to " +
        std::to_string(LAR_MAX_LANES) + ", and a slot must hold at least one vector of 16 bytes");
  return layout;
}

lar_multicast_layout make_multicast_layout(int world_size, int64_t bytes, bool in_switch) {
  lar_multicast_layout layout;
  if (lar_multicast_layout_init(&layout, world_size, bytes, in_switch) != LAR_OK)
    throw std::invalid_argument("no multicast layout for world_size=" + std::to_string(world_size) +
                                ", bytes=" + std::to_string(bytes) + ": world size must be 2 to " +
                                std::to_string(LAR_MAX_WORLD_SIZE) +
                                ", and a slot must hold at least one vector of 16 bytes");
  return layout;
}

void rms_norm(const lar_norm& norm, const NormTensors& tensors, uint64_t input, uint64_t residual_out, int64_t count,
              int dtype, int device, uint64_t stream) {
  const lar_message message{pointer(input), pointer(residual_out), count, static_cast<lar_dtype>(dtype)};
  const lar_norm addressed = tensors.in(norm);
  int status = LAR_OK;
  {
    const nb::gil_scoped_release release;
    status = lar_rms_norm(&message, &addressed, device, pointer(stream));
  }
  throw_on_error(status, "rms_norm");
}

uint64_t host_register(uint64_t address, int64_t bytes) {
  void* seen = nullptr;
  throw_on_error(lar_host_register(pointer(address), bytes, &seen), "pinning host memory");
  return reinterpret_cast<uint64_t>(seen);
}

// Those of the C ABI that Python needs.
void bind_numbers(nb::module_& module) {
  module.attr("MAX_WORLD_SIZE") = static_cast<int>(LAR_MAX_WORLD_SIZE);
  module.attr("MAX_HOSTS") = static_cast<int>(LAR_MAX_HOSTS);
  module.attr("VECTOR_BYTES") = static_cast<int>(LAR_VECTOR_BYTES);
  module.attr("MAX_LANES") = static_cast<int>(LAR_MAX_LANES);
  module.attr("MAX_THREADS") = static_cast<int>(LAR_MAX_THREADS);
  module.attr("MAX_WIDE_THREADS") = static_cast<int>(LAR_MAX_WIDE_THREADS);
  module.attr("MAX_FLAGGED_THREADS") = static_cast<int>(LAR_MAX_FLAGGED_THREADS);
  module.attr("MAX_STAGED_THREADS") = static_cast<int>(LAR_MAX_STAGED_THREADS);
  module.attr("STAGE_TIMES") = static_cast<int>(LAR_STAGE_TIMES);
  module.attr("IN_BAND_MARKER") = static_cast<uint32_t>(LAR_IN_BAND_MARKER);
  module.attr("STATUS_INVALID_ARGUMENT") = static_cast<int>(LAR_ERROR_INVALID_ARGUMENT);
  module.attr("STATUS_TIMEOUT") = static_cast<int>(LAR_ERROR_TIMEOUT);
  module.attr("STATUS_CLOSED") = static_cast<int>(LAR_ERROR_CLOSED);
  module.attr("STATUS_BUSY") = static_cast<int>(LAR_ERROR_BUSY);
  module.attr("REASON_EXPIRED") = static_cast<int>(LAR_REASON_EXPIRED);
  module.attr("REASON_MISMATCH") = static_cast<int>(LAR_REASON_MISMATCH);
  module.attr("REASON_OVERWRITTEN") = static_cast<int>(LAR_REASON_OVERWRITTEN);
  module.attr("REASON_INTERRUPTED") = static_cast<int>(LAR_REASON_INTERRUPTED);
  module.attr("REASON_EXCHANGE") = static_cast<int>(LAR_REASON_EXCHANGE);
  module.attr("ONE_SHOT") = static_cast<int>(LAR_ONE_SHOT);
  module.attr("TWO_SHOT") = static_cast<int>(LAR_TWO_SHOT);
  module.attr("RING") = static_cast<int>(LAR_RING);
  module.attr("HIERARCHICAL") = static_cast<int>(LAR_HIERARCHICAL);
  module.attr("REDUCE") = static_cast<int>(LAR_REDUCE);
  module.attr("REDUCE_SCATTER") = static_cast<int>(LAR_REDUCE_SCATTER);
  module.attr("HOST_SUM") = static_cast<int>(LAR_HOST_SUM);
  module.attr("HOST_SUM_GATHER") = static_cast<int>(LAR_HOST_SUM_GATHER);
  module.attr("PUSH") = static_cast<int>(LAR_PUSH);
  module.attr("SHARED") = static_cast<int>(LAR_SHARED);
  module.attr("FLAGS") = static_cast<int>(LAR_FLAGS);
  module.attr("STAGED") = static_cast<int>(LAR_STAGED);
  module.attr("PULL") = static_cast<int>(LAR_PULL);
  module.attr("PLACE") = static_cast<int>(LAR_PLACE);
  module.attr("MULTICAST") = static_cast<int>(LAR_MULTICAST);
  module.attr("IN_SWITCH") = static_cast<int>(LAR_IN_SWITCH);
  module.attr("STORE") = static_cast<int>(LAR_STORE);
  module.attr("RMS_NORM") = static_cast<int>(LAR_RMS_NORM);
  module.attr("QUANT_NONE") = static_cast<int>(LAR_QUANT_NONE);
  module.attr("QUANT_FP8_TENSOR") = static_cast<int>(LAR_QUANT_FP8_TENSOR);
  module.attr("QUANT_FP8_TOKEN") = static_cast<int>(LAR_QUANT_FP8_TOKEN);
  module.attr("QUANT_FP8_GROUP") = static_cast<int>(LAR_QUANT_FP8_GROUP);
  module.attr("QUANT_NVFP4") = static_cast<int>(LAR_QUANT_NVFP4);
  module.attr("SCALES_ROWS") = static_cast<int>(LAR_SCALES_ROWS);
  module.attr("SCALES_COLUMNS") = static_cast<int>(LAR_SCALES_COLUMNS);
  module.attr("SCALES_UE8M0") = static_cast<int>(LAR_SCALES_UE8M0);
  module.attr("SCALES_SWIZZLED") = static_cast<int>(LAR_SCALES_SWIZZLED);
  module.attr("WIRE_RAW") = static_cast<int>(LAR_WIRE_RAW);
  module.attr("WIRE_FP8") = static_cast<int>(LAR_WIRE_FP8);
  module.attr("WIRE_TQ3") = static_cast<int>(LAR_WIRE_TQ3);
  module.attr("WIRE_HADAMARD2") = static_cast<int>(LAR_WIRE_HADAMARD2);
  module.attr("WIRE_FP8_GROUP") = static_cast<int>(LAR_WIRE_FP8_GROUP);
  module.attr("CPU") = static_cast<int>(LAR_CPU);
}

// What lies where in memory that ranks share.
void bind_layouts(nb::module_& module) {
  nb::class_<lar_slots>(module, "Slots",
                        "Where a kind of slots lies in a workspace; a slot of 0 bytes: there are none.")
      .def_ro("one_shot_offset", &lar_slots::one_shot_offset)
      .def_ro("one_shot_bytes", &lar_slots::one_shot_bytes)
      .def_ro("scatter_offset", &lar_slots::scatter_offset)
      .def_ro("gather_offset", &lar_slots::gather_offset)
      .def_ro("two_shot_bytes", &lar_slots::two_shot_bytes)
      .def_ro("staged_bytes", &lar_slots::staged_bytes)
      .def_ro("generation_bytes", &lar_slots::generation_bytes);

  nb::class_<lar_layout>(module, "Layout", "Where everything lies inside a workspace; offsets and sizes in bytes.")
      .def_ro("world_size", &lar_layout::world_size)
      .def_ro("lanes", &lar_layout::lanes)
      .def_prop_ro("shared", [](const lar_layout& layout) { return layout.shared != 0; })
      .def_ro("flag_words", &lar_layout::flag_words)
      .def_ro("epochs_offset", &lar_layout::epochs_offset)
      .def_ro("stages_offset", &lar_layout::stages_offset)
      .def_ro("flags_offset", &lar_layout::flags_offset)
      .def_ro("probe_offset", &lar_layout::probe_offset)
      .def_ro("in_band", &lar_layout::in_band)
      .def_ro("flagged", &lar_layout::flagged)
      .def_ro("local_bytes", &lar_layout::local_bytes)
      .def_ro("total_bytes", &lar_layout::total_bytes);

  module.def("make_layout", &make_layout, "world_size"_a, "lanes"_a, nb::kw_only(), "in_band_bytes"_a = 0,
             "flagged_bytes"_a = 0, "shared"_a = false,
             "Lay out a workspace with so many bytes of slots of each kind. Raises ValueError when they are too few.");
  nb::class_<lar_multicast_layout>(module, "MulticastLayout", "Where everything lies in multicast memory, in bytes.")
      .def_ro("one_shot_offset", &lar_multicast_layout::one_shot_offset)
      .def_ro("one_shot_bytes", &lar_multicast_layout::one_shot_bytes)
      .def_ro("results_offset", &lar_multicast_layout::results_offset)
      .def_ro("results_bytes", &lar_multicast_layout::results_bytes)
      .def_ro("inputs_offset", &lar_multicast_layout::inputs_offset)
      .def_ro("inputs_bytes", &lar_multicast_layout::inputs_bytes)
      .def_ro("total_bytes", &lar_multicast_layout::total_bytes);
  module.def("make_multicast_layout", &make_multicast_layout, "world_size"_a, "bytes"_a, nb::kw_only(),
             "in_switch"_a = false,
             "Lay out so many bytes of multicast memory. Raises ValueError when they are too few.");
  module.def("sum_elements", &lar_sum_elements, "count"_a, "parts"_a,
             "fp32 elements of a sum that REDUCE (`parts` 1) or REDUCE_SCATTER (`parts`: ranks of the host) makes.");
}

// Memory and kernels of a device, and the library itself.
void bind_device(nb::module_& module) {
  module.def("host_register", &host_register, "address"_a, "bytes"_a,
             "Pin whole pages of host memory; the address at which the current device sees them.");
  module.def(
      "host_unregister", [](uint64_t address) { throw_on_error(lar_host_unregister(pointer(address)), "unpin"); },
      "address"_a);
  module.def(
      "load_kernels", [](int world_size) { throw_on_error(lar_load_kernels_cuda(world_size), "load kernels"); },
      "world_size"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Load all kernels for a world size onto the current device. Others may run Python meanwhile.");
  module.def(
      "capture_of", [](uint64_t stream) { return lar_capture_of(pointer(stream)); }, "stream"_a,
      "A number for the CUDA graph that a stream is being captured into; 0: none.");
  module.def("abi_version", &lar_abi_version);
  module.def("cuda_release", &lar_cuda_release, "Of the compiler of the kernels: 13000 is 13.0.");
  module.def("error_string", [](int code) { return std::string(lar_error_string(code)); }, "code"_a);
  module.def(
      "refusal", [] { return std::string(lar_refusal()); },
      "What was wrong with this thread's last call of STATUS_INVALID_ARGUMENT, as \"field: condition\".");
}

// What travels.
void bind_wire_formats(nb::module_& module) {
  module.def("wire_codes", &wire_codes, "The number of each wire format, raw among them, by its name.");
  module.def("packet_size", &packet_size, "format"_a, "Values and bytes of a packet of a wire format.");
  module.def("encode", &encode, "format"_a, "dtype"_a, "values"_a, "count"_a, "packets"_a, "stream"_a = nb::none(),
             "Encode `count` values at one address into packets at another, on the CPU or on a stream.");
  module.def("decode", &decode, "format"_a, "dtype"_a, "packets"_a, "count"_a, "values"_a, "stream"_a = nb::none(),
             "The other way round.");
}

// What becomes of summed rows.
void bind_norms(nb::module_& module) {
  nb::class_<lar_norm>(module, "Norm", "What becomes of summed rows: lar_norm without addresses.")
      .def(
          "__init__",
          [](lar_norm* self, int64_t hidden, float eps, float weight_bias, int quant, int scales,
             int64_t scale_stride) {
            new (self) lar_norm{};
            self->hidden = hidden;
            self->eps = eps;
            self->weight_bias = weight_bias;
            self->quant = quant;
            self->scales = scales;
            self->scale_stride = scale_stride;
          },
          "hidden"_a, "eps"_a, nb::kw_only(), "weight_bias"_a = 0.0F, "quant"_a = static_cast<int>(LAR_QUANT_NONE),
          "scales"_a = static_cast<int>(LAR_SCALES_ROWS), "scale_stride"_a = 0,
          "`quant`: one of QUANT_*. `scales`: one of SCALES_*. `scale_stride`: of SCALES_COLUMNS, scales from one "
          "column to the next; 0: as many as there are rows.");
  nb::class_<NormTensors>(module, "NormTensors", "The tensors of a Norm by their addresses; 0: there is none.")
      .def(
          "__init__",
          [](NormTensors* self, uint64_t residual, uint64_t weight, uint64_t norm_out, uint64_t quant_out,
             uint64_t scale_out,
             uint64_t scale) { new (self) NormTensors{residual, weight, norm_out, quant_out, scale_out, scale}; },
          nb::kw_only(), "residual"_a = 0, "weight"_a, "norm_out"_a = 0, "quant_out"_a = 0, "scale_out"_a = 0,
          "scale"_a = 0);
  module.def("rms_norm", &rms_norm, "norm"_a, "tensors"_a, "input"_a, "residual_out"_a, "count"_a, "dtype"_a,
             "device"_a, "stream"_a = 0,
             "Norm rows that are summed already. `device`: CPU or that of the tensors. `residual_out` may be `input`.");
}

// A rank in its group.
void bind_workspace(nb::module_& module) {
  nb::class_<Workspace>(module, "Workspace", "One rank's view of the group's workspaces.")
      .def(nb::init<int, const std::vector<uint64_t>&, const lar_layout&, double, int, uint64_t, double, nb::object>(),
           "rank"_a, "bases"_a, "layout"_a, "timeout_s"_a, "device"_a, "local"_a = 0, "first_timeout_s"_a = 0.0,
           "owner"_a = nb::none(),
           "`local`: layout.local_bytes of zeroed memory of this rank's own; 0: in the workspace. `first_timeout_s`: "
           "how "
           "long the first eager call, and the first of a graph, may wait; never less than `timeout_s`. `owner`: kept "
           "alive "
           "as "
           "long as anything can be called.")
      .def("set_multicast", &Workspace::set_multicast, "all"_a, "own"_a, "layout"_a,
           "Let calls of MULTICAST and IN_SWITCH use this memory; 0 and 0: refuse them. Between calls.")
      .def("probe_write", &Workspace::probe_write, "nonce"_a, "stream"_a)
      .def("probe_check", &Workspace::probe_check, "nonce"_a, "verdict"_a, "stream"_a)
      .def("failure", &Workspace::failure,
           "None, or (rank, peer, kind, phase, lane, expected_round, seen_round, waited_s); kind: (algorithm, "
           "exchange, wire, epilogue).")
      .def("reason", &Workspace::reason, "Of a failure, one of REASON_*.")
      .def("mismatch", &Workspace::mismatch,
           "Of a mismatch, this rank's call and its peer's, each (kind, dtype, count).")
      .def("mark_gone", &Workspace::mark_gone, "peer"_a, "A peer will never come: nothing waits for it for long.")
      .def("exchanges", &Workspace::exchanges,
           "First halves that have ended, and second halves that have begun, modulo 2**32.")
      .def("fail_exchange", &Workspace::fail_exchange, "waited_s"_a,
           "An exchange between hosts has failed: no call begins any more, and no second half works on what came.")
      .def("close", &Workspace::close, "wait_s"_a,
           "Let no call begin, and wait so many seconds for those of other threads: on CPU ranks until they have left "
           "their waits, on GPUs until they have been launched. True when none is left.");
}

// Calls of one size and type.
void bind_plan(nb::module_& module) {
  nb::class_<Plan>(module, "Plan", "All-reduces of one size and type: called with input, output and stream.")
      .def(
          "__init__",
          [](Plan* self, Workspace& workspace, int algorithm, int exchange, int wire, int64_t count, int dtype,
             int lanes, int threads, int64_t chunk_vectors, int scatter_lanes, int drain_lanes, int epilogue,
             const std::vector<int32_t>& domains, const std::vector<int64_t>& peer_distances,
             const std::vector<uint64_t>& pools, int cluster, const lar_norm* norm, int hosts) {
            lar_call call{};
            call.kind = {static_cast<uint8_t>(algorithm), static_cast<uint8_t>(exchange), static_cast<uint8_t>(wire),
                         static_cast<uint8_t>(epilogue)};
            call.message = {nullptr, nullptr, count, static_cast<lar_dtype>(dtype)};
            call.launch = {lanes, threads, chunk_vectors, scatter_lanes, drain_lanes, cluster};
            call.hosts = hosts;
            new (self) Plan(workspace, call, domains, peer_distances, pools, norm);
          },
          "workspace"_a, nb::kw_only(), "algorithm"_a, "exchange"_a, "wire"_a = static_cast<int>(LAR_WIRE_RAW),
          "count"_a, "dtype"_a, "lanes"_a, "threads"_a, "chunk_vectors"_a, "scatter_lanes"_a = 0, "drain_lanes"_a = 0,
          "epilogue"_a = static_cast<int>(LAR_STORE), "domains"_a = std::vector<int32_t>{},
          "peer_distances"_a = std::vector<int64_t>{}, "pools"_a = std::vector<uint64_t>{}, "cluster"_a = 1,
          "norm"_a = nb::none(), "hosts"_a = 0, nb::keep_alive<1, 2>(),
          "`domains`: for HIERARCHICAL, the number of each rank's domain. `peer_distances`: for PULL, bytes from this "
          "rank's input to where it sees each rank's. `pools`: for PLACE, where it sees each rank's registered memory. "
          "`norm`: for RMS_NORM; "
          "`cluster`: lanes that share a row. "
          "`hosts`: for "
          "HOST_SUM and HOST_SUM_GATHER, sums in the input.")
      .def("__call__", &Plan::operator(), "input"_a, "output"_a, "stream"_a = 0,
           "Returns 0; STATUS_TIMEOUT or another negative number when the group is broken, now (CPU ranks) or earlier; "
           "STATUS_CLOSED; STATUS_BUSY when another thread is in a call (CPU ranks).")
      .def("normed", &Plan::normed, "input"_a, "residual_out"_a, "stream"_a, "tensors"_a,
           "The same with RMS_NORM, whose output is the new residual.")
      .def("time_launches", &Plan::time_launches, "input"_a, "output"_a, "stream"_a, "launches"_a,
           "Host nanoseconds per launch of so many bare ones, on GPUs. Collective, like as many calls.")
      .def_prop_ro("calls", &Plan::calls, "Calls that ran at once.")
      .def_prop_ro("captured", &Plan::captured, "Calls that went into a CUDA graph.");
}

// A communicator's calls in one step.
void bind_eager_calls(nb::module_& module) {
  nb::class_<EagerCalls>(module, "EagerCalls", "The plans of a communicator: called with a tensor, gives its sum.")
      .def(nb::init<const nb::object&, nb::object, int, nb::object, nb::object>(), "api"_a, "tensor_type"_a, "device"_a,
           "empty_strided"_a, "current_stream"_a,
           "`api`: the capsule of DLPack's C exchange interface. `tensor_type`: of the tensors that are taken. "
           "`device`: "
           "the index of a CUDA device, or CPU. `empty_strided`: called with shape, strides and dtype. "
           "`current_stream`: called with the device's index; not on a CPU.")
      .def(
          "keep", &EagerCalls::keep, "count"_a, "type_code"_a, "dtype"_a, "plan"_a, "must_be_aligned"_a, "refused"_a,
          "Messages like this run by `plan`. `refused`: called with the status of a call that was refused, and raises.")
      .def("forget", &EagerCalls::forget, "count"_a, "type_code"_a, "They do no longer.")
      .def("clear", &EagerCalls::clear, "Let go of all plans.")
      .def("see", &EagerCalls::see, "tensor"_a,
           "Address, elements, number of the type, and whether it is contiguous; None for what is never taken.")
      .def_prop_rw("empty_strided", &EagerCalls::empty_strided, &EagerCalls::set_empty_strided,
                   "What outputs are made by.")
      .def("__len__", &EagerCalls::size)
      .def("__call__", &EagerCalls::operator(), "tensor"_a, "None where nothing is kept for such a tensor.");
}

}  // namespace

NB_MODULE(_C, module) {
  // A communicator that lives until the interpreter ends, as an engine's does, is not a leak worth a page of text.
  nb::set_leak_warnings(false);
  module.doc() = "Bindings of libllm_allreduce (csrc/include/llm_allreduce.h).";
  bind_numbers(module);
  bind_layouts(module);
  bind_device(module);
  bind_wire_formats(module);
  bind_norms(module);
  bind_workspace(module);
  bind_plan(module);
  bind_eager_calls(module);
}
