// The Python face of the C ABI. Addresses travel as integers: nothing here knows a tensor library.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
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
// payload memory: that belongs to llm_allreduce_plugin.transport, whose object is kept here as long as anything can be
// called.
class Workspace {
 public:
  // `local`: the address of memory for lar_workspace.local; 0: within the workspace itself. `first_timeout_s`: 0 for
  // the same as `timeout_s`. `owner`: whatever keeps the memory alive.
  Workspace(int rank, const std::vector<uint64_t>& bases, const lar_layout& layout, double timeout_s, int device,
            uint64_t local, double first_timeout_s, nb::object owner)
      : device_(device), owner_(std::move(owner)) {
    if (static_cast<int>(bases.size()) != layout.world_size)
      throw std::invalid_argument("bases: got " + std::to_string(bases.size()) + " addresses for world size " +
                                  std::to_string(layout.world_size));
    if (rank < 0 || rank >= layout.world_size)
      throw std::invalid_argument("rank: " + std::to_string(rank) + " is not in a group of " +
                                  std::to_string(layout.world_size));
    if (!(timeout_s > 0)) throw std::invalid_argument("timeout_s: must be positive");
    if (!(first_timeout_s >= 0)) throw std::invalid_argument("first_timeout_s: must not be negative");
    workspace_.rank = rank;
    for (size_t peer = 0; peer < bases.size(); ++peer) workspace_.base[peer] = pointer(bases[peer]);
    workspace_.local = local ? pointer(local) : workspace_.base[rank];
    workspace_.layout = layout;
    workspace_.timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
    workspace_.first_timeout_ns = static_cast<int64_t>(std::max(timeout_s, first_timeout_s) * 1e9);
    workspace_.should_leave = &should_leave;
    workspace_.should_leave_context = this;
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

  // What a call is, beside its message.
  struct Call {
    lar_algorithm algorithm;
    lar_launch launch;
    const void* const* inputs = nullptr;  // see lar_two_shot_pull_cuda; null otherwise
    int wire_format = -1;                 // of LOWPRECISION
    const int32_t* domains = nullptr;     // of LOW_PRECISION_HIERARCHICAL
  };

  // One all-reduce; `captured` is set to whether it went into a graph. Returns at once with the status
  // of a broken group when an earlier wait has expired.
  int call(const Call& call, const lar_message& message, void* stream, bool* captured) {
    if (closed_.load(std::memory_order_relaxed)) return LAR_ERROR_CLOSED;
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) != 0) return LAR_ERROR_TIMEOUT;
    *captured = false;
    const bool is_first = !called_.load(std::memory_order_relaxed);
    const int status = device_ == kCpu
                           ? call_on_cpu(call, message, is_first)
                           : with_order(stream, is_first, captured, [&] { return launch(call, message, stream); });
    if (status == LAR_OK && !*captured) called_.store(true, std::memory_order_relaxed);
    return status;
  }

  int world_size() const { return workspace_.layout.world_size; }

  double time_launches(lar_algorithm algorithm, const lar_message& message, const lar_launch& launch, void* stream,
                       int launches) {
    const auto call = algorithm == LAR_ONE_SHOT ? lar_one_shot_cuda : lar_two_shot_cuda;
    double nanoseconds = 0;
    bool captured = false;
    with_order(stream, false, &captured, [&] {
      const auto start = std::chrono::steady_clock::now();
      int status = LAR_OK;
      for (int i = 0; i < launches && status == LAR_OK; ++i) status = call(&workspace_, &message, &launch, stream);
      nanoseconds = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
      return status;
    });
    return nanoseconds / launches;
  }

  void probe_write(uint32_t nonce, uint64_t stream) {
    bool captured = false;
    with_order(pointer(stream), false, &captured,
               [&] { return lar_probe_write_cuda(&workspace_, nonce, pointer(stream)); });
  }

  void probe_check(uint32_t nonce, uint64_t verdict, uint64_t stream) {
    auto* words = static_cast<int32_t*>(pointer(verdict));
    bool captured = false;
    with_order(pointer(stream), false, &captured,
               [&] { return lar_probe_check_cuda(&workspace_, nonce, words, pointer(stream)); });
  }

  using Failure = std::tuple<int, int, int, int, int, uint32_t, uint32_t, double>;
  std::optional<Failure> failure() const {
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) == 0) return std::nullopt;
    return Failure{failure_->rank, failure_->peer,           failure_->algorithm,  failure_->phase,
                   failure_->lane, failure_->expected_round, failure_->seen_round, failure_->waited_ns * 1e-9};
  }

  // lar_reason, of a failure.
  int reason() const { return failure_->reason; }

  // Of a mismatch, this rank's call and the peer's: algorithm, dtype, wire format, count.
  using Made = std::tuple<int, int, int, int64_t>;
  std::tuple<Made, Made> mismatch() const {
    const auto made = [](const lar_call_record& call) {
      return Made{call.algorithm, call.dtype, call.wire_format, call.count};
    };
    return {made(failure_->mine), made(failure_->theirs)};
  }

  void mark_gone(int peer) {
    if (peer < 0 || peer >= world_size()) throw std::invalid_argument("peer: is not in the group");
    __atomic_fetch_or(&failure_->gone, uint64_t{1} << peer, __ATOMIC_RELEASE);
  }

  // Lets no call begin, and waits at most `wait_s` seconds for those on a CPU rank to leave their waits. True when no
  // call is under way any more.
  bool close(double wait_s) {
    closed_.store(true);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait_s);
    nb::gil_scoped_release release;
    while (inside_.load()) {
      if (std::chrono::steady_clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

 private:
  int call_on_cpu(const Call& call, const lar_message& message, bool is_first) {
    if (call.inputs) return LAR_ERROR_INVALID_ARGUMENT;
    // A second thread's call could meet another call of the peers than the one it is for.
    if (inside_.exchange(true)) return LAR_ERROR_BUSY;
    workspace_.begun = is_first ? 0 : -1;
    int status = LAR_OK;
    {
      nb::gil_scoped_release release;  // a CPU rank may wait here for its peers
      status = compute(call, message);
    }
    inside_.store(false);
    if (status == LAR_ERROR_INTERRUPTED && closed_.load() && !PyErr_Occurred()) return LAR_ERROR_CLOSED;
    if (PyErr_Occurred()) throw nb::python_error();  // what a signal's handler raised
    return status;
  }

  int compute(const Call& call, const lar_message& message) {
    const auto format = static_cast<lar_wire_format>(call.wire_format);
    switch (call.algorithm) {
      case LAR_LOW_PRECISION:
        return lar_low_precision_cpu(&workspace_, &message, &call.launch, format);
      case LAR_LOW_PRECISION_RING:
        return lar_low_precision_ring_cpu(&workspace_, &message, &call.launch, format);
      case LAR_LOW_PRECISION_HIERARCHICAL:
        return lar_low_precision_hierarchical_cpu(&workspace_, &message, &call.launch, format, call.domains);
      case LAR_ONE_SHOT:
        return lar_one_shot_cpu(&workspace_, &message, &call.launch);
      default:
        return lar_two_shot_cpu(&workspace_, &message, &call.launch);
    }
  }

  int launch(const Call& call, const lar_message& message, void* stream) {
    const auto format = static_cast<lar_wire_format>(call.wire_format);
    switch (call.algorithm) {
      case LAR_LOW_PRECISION:
        return lar_low_precision_cuda(&workspace_, &message, &call.launch, format, stream);
      case LAR_LOW_PRECISION_RING:
        return lar_low_precision_ring_cuda(&workspace_, &message, &call.launch, format, stream);
      case LAR_LOW_PRECISION_HIERARCHICAL:
        return lar_low_precision_hierarchical_cuda(&workspace_, &message, &call.launch, format, call.domains, stream);
      case LAR_ONE_SHOT:
        return lar_one_shot_cuda(&workspace_, &message, &call.launch, stream);
      default:
        return call.inputs ? lar_two_shot_pull_cuda(&workspace_, &message, call.inputs, &call.launch, stream)
                           : lar_two_shot_cuda(&workspace_, &message, &call.launch, stream);
    }
  }

  // A launch waits where the stream's queue is full, as it is behind a kernel that waits for a peer: without the
  // interpreter's lock, so that others can say what is wrong meanwhile.
  template <typename Launch>
  int with_order(void* stream, bool is_first, bool* captured, Launch launch) {
    if (device_ == kCpu) throw std::invalid_argument("this workspace belongs to a CPU rank");
    const char* what = "before a launch";
    int status = LAR_OK;
    {
      nb::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(order_mutex_);
      lar_call_order order{};
      status = lar_stream_order_begin(order_, stream, &order);
      if (status == LAR_OK) {
        *captured = order.capture != 0;
        workspace_.starts_late = order.starts_late;
        workspace_.begun = begun_word(order.capture, is_first);
        what = "launch";
        status = launch();
        const int end = lar_stream_order_end(order_, stream);
        if (status == LAR_OK && end != LAR_OK) {
          what = "after a launch";
          status = end;
        }
      }
    }
    throw_on_error(status, what);
    return status;
  }

  // The word that counts the beginnings of a graph, or of the first eager call of all; else -1. After some thousands,
  // words are used again; whoever gets one then counts as begun before.
  int32_t begun_word(uint64_t capture, bool is_first) {
    if (capture == 0) return is_first ? static_cast<int32_t>(begun_++ % LAR_BEGUN_WORDS) : -1;
    if (capture != capture_) captures_word_ = static_cast<int32_t>(begun_++ % LAR_BEGUN_WORDS);
    capture_ = capture;
    return captures_word_;
  }

  // What a waiting CPU rank asks now and then. Runs the handlers of signals that have come, as Python does between two
  // instructions; one that raises ends the wait.
  static int should_leave(void* context) {
    const auto* self = static_cast<const Workspace*>(context);
    if (self->closed_.load()) return 1;
    const nb::gil_scoped_acquire acquire;
    return PyErr_CheckSignals();
  }

  const int device_;
  const nb::object owner_;
  lar_workspace workspace_{};
  lar_failure* failure_ = nullptr;
  lar_stream_order* order_ = nullptr;
  std::mutex order_mutex_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> inside_{false};  // a CPU rank's call
  std::atomic<bool> called_{false};  // an eager call was made
  uint32_t begun_ = 0;
  uint64_t capture_ = 0;
  int32_t captures_word_ = -1;
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
    Workspace::Call call{algorithm_, launch_};
    call.inputs = peer_distances_.empty() ? nullptr : inputs;
    call.wire_format = wire_format_;
    call.domains = domains_.empty() ? nullptr : domains_.data();
    bool captured = false;
    const int status = workspace_.call(call, message(input, output), pointer(stream), &captured);
    if (status == LAR_OK) ++(captured ? captured_ : calls_);
    return status;
  }

  // Nanoseconds of host time per launch when nothing but launches is done: what a call's own cost is measured against.
  double time_launches(uint64_t input, uint64_t output, uint64_t stream, int launches) {
    return workspace_.time_launches(algorithm_, message(input, output), launch_, pointer(stream), launches);
  }

  int64_t calls() const { return calls_; }
  int64_t captured() const { return captured_; }

 private:
  lar_message message(uint64_t input, uint64_t output) const {
    return {pointer(input), pointer(output), count_, static_cast<lar_dtype>(dtype_)};
  }

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
  module.attr("STATUS_CLOSED") = static_cast<int>(LAR_ERROR_CLOSED);
  module.attr("STATUS_BUSY") = static_cast<int>(LAR_ERROR_BUSY);
  module.attr("REASON_EXPIRED") = static_cast<int>(LAR_REASON_EXPIRED);
  module.attr("REASON_MISMATCH") = static_cast<int>(LAR_REASON_MISMATCH);
  module.attr("REASON_OVERWRITTEN") = static_cast<int>(LAR_REASON_OVERWRITTEN);
  module.attr("REASON_INTERRUPTED") = static_cast<int>(LAR_REASON_INTERRUPTED);
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
      .def(nb::init<int, const std::vector<uint64_t>&, const lar_layout&, double, int, uint64_t, double, nb::object>(),
           "rank"_a, "bases"_a, "layout"_a, "timeout_s"_a, "device"_a, "local"_a = 0, "first_timeout_s"_a = 0.0,
           "owner"_a = nb::none(),
           "`local`: layout.local_bytes of zeroed memory of this rank's own; 0: in the workspace. `first_timeout_s`: "
           "how "
           "long the first eager call, and the first of a graph, may wait; never less than `timeout_s`. `owner`: kept "
           "alive "
           "as "
           "long as anything can be called.")
      .def("probe_write", &Workspace::probe_write, "nonce"_a, "stream"_a)
      .def("probe_check", &Workspace::probe_check, "nonce"_a, "verdict"_a, "stream"_a)
      .def("failure", &Workspace::failure,
           "None, or (rank, peer, algorithm, phase, lane, expected_round, seen_round, waited_s).")
      .def("reason", &Workspace::reason, "Of a failure, one of REASON_*.")
      .def("mismatch", &Workspace::mismatch,
           "Of a mismatch, this rank's call and its peer's, each (algorithm, dtype, wire_format, count).")
      .def("mark_gone", &Workspace::mark_gone, "peer"_a, "A peer will never come: nothing waits for it for long.")
      .def("close", &Workspace::close, "wait_s"_a,
           "Let no call begin, and wait so many seconds for those of a CPU rank to leave. True when none is left.");

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
           "Returns 0; STATUS_TIMEOUT or another negative number when the group is broken, now (CPU ranks) or earlier; "
           "STATUS_CLOSED; STATUS_BUSY when another thread is in a call (CPU ranks).")
      .def("time_launches", &Plan::time_launches, "input"_a, "output"_a, "stream"_a, "launches"_a,
           "Host nanoseconds per launch of so many bare ones, on GPUs. Collective, like as many calls.")
      .def_prop_ro("calls", &Plan::calls, "Calls that ran at once.")
      .def_prop_ro("captured", &Plan::captured, "Calls that went into a CUDA graph.");
}
