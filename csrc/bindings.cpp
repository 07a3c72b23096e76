// The Python face of the C ABI. Addresses travel as integers: nothing here knows a tensor library.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "llm_allreduce.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr int kCpu = -1;

void throw_on_error(int status, const char* what) {
  if (status != LAR_OK) throw std::runtime_error(std::string(what) + ": " + lar_error_string(status));
}

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// A rank's workspace with what a call needs beside it. Owns the failure record and the stream order, not the
// payload memory: that belongs to llm_allreduce_plugin.memory.
class Workspace {
 public:
  // `local`: the address of memory for lar_workspace.local; 0: within the workspace itself.
  Workspace(int rank, const std::vector<uint64_t>& bases, const lar_layout& layout, double timeout_s, int device,
            uint64_t local)
      : device_(device) {
    if (static_cast<int>(bases.size()) != layout.world_size)
      throw std::invalid_argument("bases: got " + std::to_string(bases.size()) + " addresses for world size " +
                                  std::to_string(layout.world_size));
    if (rank < 0 || rank >= layout.world_size)
      throw std::invalid_argument("rank: " + std::to_string(rank) + " is not in a group of " +
                                  std::to_string(layout.world_size));
    if (!(timeout_s > 0)) throw std::invalid_argument("timeout_s: must be positive");
    workspace_.rank = rank;
    for (size_t peer = 0; peer < bases.size(); ++peer) workspace_.base[peer] = pointer(bases[peer]);
    workspace_.local = local ? pointer(local) : workspace_.base[rank];
    workspace_.layout = layout;
    workspace_.timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
    if (device == kCpu) {
      throw_on_error(lar_failure_create(&failure_, nullptr), "failure record");
      workspace_.failure = failure_;
    } else {
      throw_on_error(lar_stream_order_create(&order_, device), "stream order");
      const int status = lar_failure_create(&failure_, &workspace_.failure);
      if (status != LAR_OK) lar_stream_order_destroy(order_);
      throw_on_error(status, "failure record");
    }
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  ~Workspace() {
    lar_stream_order_destroy(order_);
    lar_failure_destroy(failure_, device_ != kCpu);
  }

  // One all-reduce; `capturing` (may be null) is set to whether it went into a graph. Returns at once with the status
  // of a broken group when an earlier wait has expired. `inputs`: see lar_two_shot_pull_cuda; null otherwise.
  // `domains`: of LOW_PRECISION_HIERARCHICAL.
  int call(lar_algorithm algorithm, void* input, void* output, int64_t count, int dtype, const lar_launch& launch,
           void* stream, bool* capturing = nullptr, const void* const* inputs = nullptr, int wire_format = -1,
           const int32_t* domains = nullptr) {
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) != 0) return LAR_ERROR_TIMEOUT;
    const lar_message message{input, output, count, static_cast<lar_dtype>(dtype)};
    const bool one_shot = algorithm == LAR_ONE_SHOT;
    const auto format = static_cast<lar_wire_format>(wire_format);
    if (device_ == kCpu) {
      if (inputs) return LAR_ERROR_INVALID_ARGUMENT;
      nb::gil_scoped_release release;  // a CPU rank may wait here for its peers
      if (algorithm == LAR_LOW_PRECISION) return lar_low_precision_cpu(&workspace_, &message, &launch, format);
      if (algorithm == LAR_LOW_PRECISION_RING)
        return lar_low_precision_ring_cpu(&workspace_, &message, &launch, format);
      if (algorithm == LAR_LOW_PRECISION_HIERARCHICAL)
        return lar_low_precision_hierarchical_cpu(&workspace_, &message, &launch, format, domains);
      return one_shot ? lar_one_shot_cpu(&workspace_, &message, &launch)
                      : lar_two_shot_cpu(&workspace_, &message, &launch);
    }
    return with_order(
        stream,
        [&] {
          if (algorithm == LAR_LOW_PRECISION)
            return lar_low_precision_cuda(&workspace_, &message, &launch, format, stream);
          if (algorithm == LAR_LOW_PRECISION_RING)
            return lar_low_precision_ring_cuda(&workspace_, &message, &launch, format, stream);
          if (algorithm == LAR_LOW_PRECISION_HIERARCHICAL)
            return lar_low_precision_hierarchical_cuda(&workspace_, &message, &launch, format, domains, stream);
          if (inputs) return lar_two_shot_pull_cuda(&workspace_, &message, inputs, &launch, stream);
          return one_shot ? lar_one_shot_cuda(&workspace_, &message, &launch, stream)
                          : lar_two_shot_cuda(&workspace_, &message, &launch, stream);
        },
        capturing);
  }

  int world_size() const { return workspace_.layout.world_size; }

  double time_launches(lar_algorithm algorithm, void* input, void* output, int64_t count, int dtype,
                       const lar_launch& launch, void* stream, int launches) {
    const lar_message message{input, output, count, static_cast<lar_dtype>(dtype)};
    const auto call = algorithm == LAR_ONE_SHOT ? lar_one_shot_cuda : lar_two_shot_cuda;
    double nanoseconds = 0;
    with_order(stream, [&] {
      const auto start = std::chrono::steady_clock::now();
      int status = LAR_OK;
      for (int i = 0; i < launches && status == LAR_OK; ++i) status = call(&workspace_, &message, &launch, stream);
      nanoseconds = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
      return status;
    });
    return nanoseconds / launches;
  }

  void probe_write(uint32_t nonce, uint64_t stream) {
    with_order(pointer(stream), [&] { return lar_probe_write_cuda(&workspace_, nonce, pointer(stream)); });
  }

  void probe_check(uint32_t nonce, uint64_t verdict, uint64_t stream) {
    auto* words = static_cast<int32_t*>(pointer(verdict));
    with_order(pointer(stream), [&] { return lar_probe_check_cuda(&workspace_, nonce, words, pointer(stream)); });
  }

  using Failure = std::tuple<int, int, int, int, int, uint32_t, uint32_t, double>;
  std::optional<Failure> failure() const {
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) == 0) return std::nullopt;
    return Failure{failure_->rank, failure_->peer,           failure_->algorithm,  failure_->phase,
                   failure_->lane, failure_->expected_round, failure_->seen_round, failure_->waited_ns * 1e-9};
  }

 private:
  template <typename Call>
  int with_order(void* stream, Call launch, bool* capturing = nullptr) {
    if (device_ == kCpu) throw std::invalid_argument("this workspace belongs to a CPU rank");
    throw_on_error(lar_stream_order_begin(order_, stream), "before a launch");
    const int status = launch();
    int is_capturing = 0;
    const int end = lar_stream_order_end(order_, stream, &is_capturing);
    if (capturing) *capturing = is_capturing != 0;
    throw_on_error(status, "launch");
    throw_on_error(end, "after a launch");
    return status;
  }

  const int device_;
  lar_workspace workspace_{};
  lar_failure* failure_ = nullptr;
  lar_stream_order* order_ = nullptr;
};

// All that does not change between all-reduces of one size and type, so that a call is two addresses and a stream.
class Plan {
 public:
  Plan(Workspace& workspace, int algorithm, int64_t count, int dtype, const lar_launch& launch,
       const std::vector<int64_t>& peer_distances, int wire_format, const std::vector<int32_t>& domains)
      : workspace_(workspace),
        algorithm_(static_cast<lar_algorithm>(algorithm)),
        count_(count),
        dtype_(dtype),
        launch_(launch),
        peer_distances_(peer_distances),
        wire_format_(wire_format),
        domains_(domains) {
    if (!peer_distances.empty() && static_cast<int>(peer_distances.size()) != workspace.world_size())
      throw std::invalid_argument("peer_distances: must be empty or have one entry per rank");
    if (!domains.empty() && static_cast<int>(domains.size()) != workspace.world_size())
      throw std::invalid_argument("domains: must be empty or have one entry per rank");
  }

  int operator()(uint64_t input, uint64_t output, uint64_t stream) {
    const void* inputs[LAR_MAX_WORLD_SIZE];
    for (size_t rank = 0; rank < peer_distances_.size(); ++rank) inputs[rank] = pointer(input + peer_distances_[rank]);
    bool captured = false;
    const int status = workspace_.call(algorithm_, pointer(input), pointer(output), count_, dtype_, launch_,
                                       pointer(stream), &captured, peer_distances_.empty() ? nullptr : inputs,
                                       wire_format_, domains_.empty() ? nullptr : domains_.data());
    if (status == LAR_OK) ++(captured ? captured_ : calls_);
    return status;
  }

  // Nanoseconds of host time per launch when nothing but launches is done: what a call's own cost is measured against.
  double time_launches(uint64_t input, uint64_t output, uint64_t stream, int launches) {
    return workspace_.time_launches(algorithm_, pointer(input), pointer(output), count_, dtype_, launch_,
                                    pointer(stream), launches);
  }

  int64_t calls() const { return calls_; }
  int64_t captured() const { return captured_; }

 private:
  Workspace& workspace_;
  const lar_algorithm algorithm_;
  const int64_t count_;
  const int dtype_;
  const lar_launch launch_;
  const std::vector<int64_t> peer_distances_;  // from my input to where I see each rank's; empty: input is sent
  const int wire_format_;                      // of LOW_PRECISION and its other forms
  const std::vector<int32_t> domains_;         // of LOW_PRECISION_HIERARCHICAL: a number for each rank
  int64_t calls_ = 0;
  int64_t captured_ = 0;
};

// Encodes or decodes `count` values between two addresses, on the CPU or, with a stream, on the current device.
void encode(int format, int dtype, uint64_t values, int64_t count, uint64_t packets, std::optional<uint64_t> stream) {
  const auto wire = static_cast<lar_wire_format>(format);
  const auto type = static_cast<lar_dtype>(dtype);
  throw_on_error(stream ? lar_encode_cuda(wire, type, pointer(values), count, pointer(packets), pointer(*stream))
                        : lar_encode_cpu(wire, type, pointer(values), count, pointer(packets)),
                 "encode");
}

void decode(int format, int dtype, uint64_t packets, int64_t count, uint64_t values, std::optional<uint64_t> stream) {
  const auto wire = static_cast<lar_wire_format>(format);
  const auto type = static_cast<lar_dtype>(dtype);
  throw_on_error(stream ? lar_decode_cuda(wire, type, pointer(packets), count, pointer(values), pointer(*stream))
                        : lar_decode_cpu(wire, type, pointer(packets), count, pointer(values)),
                 "decode");
}

std::tuple<int, int> packet_size(int format) {
  int32_t values = 0;
  int32_t bytes = 0;
  throw_on_error(lar_packet_size(static_cast<lar_wire_format>(format), &values, &bytes), "packet_size");
  return {values, bytes};
}

lar_layout make_layout(int world_size, int lanes, int64_t in_band_bytes, int64_t flagged_bytes, bool published) {
  const lar_layout_wish wish{world_size, lanes, published, in_band_bytes, flagged_bytes};
  lar_layout layout;
  if (lar_layout_init(&layout, &wish) != LAR_OK)
    throw std::invalid_argument(
        "no workspace layout for world_size=" + std::to_string(world_size) + ", lanes=" + std::to_string(lanes) +
        ", in_band_bytes=" + std::to_string(in_band_bytes) + ", flagged_bytes=" + std::to_string(flagged_bytes) +
        ": world size must be 2 to 8 or 16, lanes 1 to " + std::to_string(LAR_MAX_LANES) +
        ", and a slot must hold at least one vector of 16 bytes");
  return layout;
}

uint64_t host_register(uint64_t address, int64_t bytes) {
  void* seen = nullptr;
  throw_on_error(lar_host_register(pointer(address), bytes, &seen), "pinning host memory");
  return reinterpret_cast<uint64_t>(seen);
}

}  // namespace

NB_MODULE(_C, module) {
  // A communicator that lives until the interpreter ends, as an engine's does, is not a leak worth a page of text.
  nb::set_leak_warnings(false);
  module.doc() = "Bindings of libllm_allreduce (csrc/include/llm_allreduce.h).";
  module.attr("MAX_WORLD_SIZE") = static_cast<int>(LAR_MAX_WORLD_SIZE);
  module.attr("VECTOR_BYTES") = static_cast<int>(LAR_VECTOR_BYTES);
  module.attr("MAX_LANES") = static_cast<int>(LAR_MAX_LANES);
  module.attr("MAX_THREADS") = static_cast<int>(LAR_MAX_THREADS);
  module.attr("MAX_FLAGGED_THREADS") = static_cast<int>(LAR_MAX_FLAGGED_THREADS);
  module.attr("MAX_STAGED_THREADS") = static_cast<int>(LAR_MAX_STAGED_THREADS);
  module.attr("STAGE_TIMES") = static_cast<int>(LAR_STAGE_TIMES);
  module.attr("IN_BAND_MARKER") = static_cast<uint32_t>(LAR_IN_BAND_MARKER);
  module.attr("STATUS_TIMEOUT") = static_cast<int>(LAR_ERROR_TIMEOUT);
  module.attr("ONE_SHOT") = static_cast<int>(LAR_ONE_SHOT);
  module.attr("TWO_SHOT") = static_cast<int>(LAR_TWO_SHOT);
  module.attr("TWO_SHOT_PULL") = static_cast<int>(LAR_TWO_SHOT_PULL);
  module.attr("LOW_PRECISION") = static_cast<int>(LAR_LOW_PRECISION);
  module.attr("LOW_PRECISION_RING") = static_cast<int>(LAR_LOW_PRECISION_RING);
  module.attr("LOW_PRECISION_HIERARCHICAL") = static_cast<int>(LAR_LOW_PRECISION_HIERARCHICAL);
  module.attr("CPU") = kCpu;

  nb::class_<lar_slots>(module, "Slots",
                        "Where a kind of slots lies in a workspace; a slot of 0 bytes: there are none.")
      .def_ro("one_shot_offset", &lar_slots::one_shot_offset)
      .def_ro("one_shot_bytes", &lar_slots::one_shot_bytes)
      .def_ro("scatter_offset", &lar_slots::scatter_offset)
      .def_ro("gather_offset", &lar_slots::gather_offset)
      .def_ro("two_shot_bytes", &lar_slots::two_shot_bytes)
      .def_ro("staged_bytes", &lar_slots::staged_bytes);

  nb::class_<lar_layout>(module, "Layout", "Where everything lies inside a workspace; offsets and sizes in bytes.")
      .def_ro("world_size", &lar_layout::world_size)
      .def_ro("lanes", &lar_layout::lanes)
      .def_prop_ro("published", [](const lar_layout& layout) { return layout.published != 0; })
      .def_ro("epochs_offset", &lar_layout::epochs_offset)
      .def_ro("stages_offset", &lar_layout::stages_offset)
      .def_ro("flags_offset", &lar_layout::flags_offset)
      .def_ro("probe_offset", &lar_layout::probe_offset)
      .def_ro("in_band", &lar_layout::in_band)
      .def_ro("flagged", &lar_layout::flagged)
      .def_ro("local_bytes", &lar_layout::local_bytes)
      .def_ro("total_bytes", &lar_layout::total_bytes);

  module.def("make_layout", &make_layout, "world_size"_a, "lanes"_a, nb::kw_only(), "in_band_bytes"_a = 0,
             "flagged_bytes"_a = 0, "published"_a = false,
             "Lay out a workspace with so many bytes of slots of each kind. Raises ValueError when they are too few.");
  module.def("host_register", &host_register, "address"_a, "bytes"_a,
             "Pin whole pages of host memory; the address at which the current device sees them.");
  module.def(
      "host_unregister", [](uint64_t address) { throw_on_error(lar_host_unregister(pointer(address)), "unpin"); },
      "address"_a);
  module.def(
      "load_kernels", [](int world_size) { throw_on_error(lar_load_kernels_cuda(world_size), "load kernels"); },
      "world_size"_a, "Load all kernels for a world size onto the current device.");
  module.def("packet_size", &packet_size, "format"_a, "Values and bytes of a packet of a wire format.");
  module.def("encode", &encode, "format"_a, "dtype"_a, "values"_a, "count"_a, "packets"_a, "stream"_a = nb::none(),
             "Encode `count` values at one address into packets at another, on the CPU or on a stream.");
  module.def("decode", &decode, "format"_a, "dtype"_a, "packets"_a, "count"_a, "values"_a, "stream"_a = nb::none(),
             "The other way round.");
  module.attr("WIRE_FP8") = static_cast<int>(LAR_WIRE_FP8);
  module.attr("WIRE_TQ3") = static_cast<int>(LAR_WIRE_TQ3);
  module.attr("WIRE_HADAMARD2") = static_cast<int>(LAR_WIRE_HADAMARD2);
  module.def("abi_version", &lar_abi_version);
  module.def("error_string", [](int code) { return std::string(lar_error_string(code)); }, "code"_a);

  nb::class_<Workspace>(module, "Workspace", "One rank's view of the group's workspaces.")
      .def(nb::init<int, const std::vector<uint64_t>&, const lar_layout&, double, int, uint64_t>(), "rank"_a, "bases"_a,
           "layout"_a, "timeout_s"_a, "device"_a, "local"_a = 0,
           "`local`: layout.local_bytes of zeroed memory of this rank's own; 0: in the workspace.")
      .def("probe_write", &Workspace::probe_write, "nonce"_a, "stream"_a)
      .def("probe_check", &Workspace::probe_check, "nonce"_a, "verdict"_a, "stream"_a)
      .def("failure", &Workspace::failure,
           "None, or (rank, peer, algorithm, phase, lane, expected_round, seen_round, waited_s).");

  nb::class_<Plan>(module, "Plan", "All-reduces of one size and type: called with input, output and stream.")
      .def(
          "__init__",
          [](Plan* self, Workspace& workspace, int algorithm, int64_t count, int dtype, int lanes, int threads,
             int64_t chunk_vectors, bool in_band, int scatter_lanes, int drain_lanes,
             const std::vector<int64_t>& peer_distances, int wire_format, const std::vector<int32_t>& domains,
             bool staged) {
            const lar_launch launch{lanes, threads, chunk_vectors, in_band, scatter_lanes, drain_lanes, staged};
            new (self) Plan(workspace, algorithm, count, dtype, launch, peer_distances, wire_format, domains);
          },
          "workspace"_a, "algorithm"_a, "count"_a, "dtype"_a, "lanes"_a, "threads"_a, "chunk_vectors"_a, "in_band"_a,
          "scatter_lanes"_a = 0, "drain_lanes"_a = 0, "peer_distances"_a = std::vector<int64_t>{}, "wire_format"_a = -1,
          "domains"_a = std::vector<int32_t>{}, "staged"_a = false, nb::keep_alive<1, 2>(),
          "`peer_distances`: bytes from this rank's input to where it sees each rank's, for peers to read in place. "
          "`wire_format`: for LOW_PRECISION and its other forms, one of WIRE_*. `domains`: for "
          "LOW_PRECISION_HIERARCHICAL, "
          "the number of each rank's domain.")
      .def("__call__", &Plan::operator(), "input"_a, "output"_a, "stream"_a = 0,
           "Returns 0, or STATUS_TIMEOUT when a wait has expired, now (CPU ranks) or earlier.")
      .def("time_launches", &Plan::time_launches, "input"_a, "output"_a, "stream"_a, "launches"_a,
           "Host nanoseconds per launch of so many bare ones, on GPUs. Collective, like as many calls.")
      .def_prop_ro("calls", &Plan::calls, "Calls that ran at once.")
      .def_prop_ro("captured", &Plan::captured, "Calls that went into a CUDA graph.");
}
