// A rank's workspace as Python holds it.
#ifndef LLM_ALLREDUCE_BINDINGS_WORKSPACE_H_
#define LLM_ALLREDUCE_BINDINGS_WORKSPACE_H_

#include <nanobind/nanobind.h>

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

inline void throw_on_error(int status, const char* what) {
  if (status == LAR_OK) return;
  std::string text = std::string(what) + ": " + lar_error_string(status);
  if (status == LAR_ERROR_INVALID_ARGUMENT) text += std::string(" (") + lar_refusal() + ")";
  throw std::runtime_error(text);
}

inline void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

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
    workspace_.device = device;
    for (size_t peer = 0; peer < bases.size(); ++peer) workspace_.base[peer] = pointer(bases[peer]);
    workspace_.local = local ? pointer(local) : workspace_.base[rank];
    workspace_.layout = layout;
    workspace_.timeout_ns = static_cast<int64_t>(timeout_s * 1e9);
    workspace_.first_timeout_ns = static_cast<int64_t>(std::max(timeout_s, first_timeout_s) * 1e9);
    workspace_.should_leave = &should_leave;
    workspace_.should_leave_context = this;
    if (device == LAR_CPU) {
      throw_on_error(lar_failure_create(&failure_, nullptr, device), "failure record");
      workspace_.failure = failure_;
    } else {
      throw_on_error(lar_stream_order_create(&order_, device), "stream order");
      const int status = lar_failure_create(&failure_, &workspace_.failure, device);
      if (status != LAR_OK) lar_stream_order_destroy(order_);
      throw_on_error(status, "failure record");
    }
  }

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  ~Workspace() {
    lar_stream_order_destroy(order_);
    lar_failure_destroy(failure_, device_);
  }

  // One all-reduce; `captured` is set to whether it went into a graph. Returns at once with the status
  // of a broken group when an earlier wait has expired.
  int call(const lar_call& call, void* stream, bool* captured) {
    if (closed_.load(std::memory_order_relaxed)) return LAR_ERROR_CLOSED;
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) != 0) return LAR_ERROR_TIMEOUT;
    *captured = false;
    const bool is_first = !called_.load(std::memory_order_relaxed);
    const int status = device_ == LAR_CPU ? call_on_cpu(call, is_first) : with_order(stream, is_first, captured, [&] {
      return lar_all_reduce(&workspace_, &call, stream);
    });
    if (status == LAR_OK && !*captured) called_.store(true, std::memory_order_relaxed);
    return status;
  }

  int world_size() const { return workspace_.layout.world_size; }

  // From now on, calls that need it may use memory of which one store, to `all`, reaches every rank; 0 and 0: none may.
  void set_multicast(uint64_t all, uint64_t own, const lar_multicast_layout& layout) {
    if (device_ == LAR_CPU) throw std::invalid_argument("set_multicast: this workspace belongs to a CPU rank");
    if ((all == 0) != (own == 0)) throw std::invalid_argument("set_multicast: needs both addresses, or neither");
    workspace_.multicast = {pointer(all), pointer(own), layout};
  }

  // Nanoseconds of host time per launch when nothing but launches is done.
  double time_launches(const lar_call& call, void* stream, int launches) {
    double nanoseconds = 0;
    bool captured = false;
    const int ended = with_order(stream, false, &captured, [&] {
      const auto start = std::chrono::steady_clock::now();
      int status = LAR_OK;
      for (int i = 0; i < launches && status == LAR_OK; ++i) status = lar_all_reduce(&workspace_, &call, stream);
      nanoseconds = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
      return status;
    });
    throw_on_error(ended, "launch");
    return nanoseconds / launches;
  }

  void probe_write(uint32_t nonce, uint64_t stream) {
    bool captured = false;
    const int status = with_order(pointer(stream), false, &captured,
                                  [&] { return lar_probe_write_cuda(&workspace_, nonce, pointer(stream)); });
    throw_on_error(status, "probe");
  }

  void probe_check(uint32_t nonce, uint64_t verdict, uint64_t stream) {
    auto* words = static_cast<int32_t*>(pointer(verdict));
    bool captured = false;
    const int status = with_order(pointer(stream), false, &captured,
                                  [&] { return lar_probe_check_cuda(&workspace_, nonce, words, pointer(stream)); });
    throw_on_error(status, "probe");
  }

  // Algorithm, exchange, wire format and epilogue.
  using Kind = std::tuple<int, int, int, int>;
  using Failure = std::tuple<int, int, Kind, int, int, uint32_t, uint32_t, double>;
  std::optional<Failure> failure() const {
    if (__atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE) == 0) return std::nullopt;
    if (const int64_t waited_ns = exchange_waited_ns_.load(); waited_ns >= 0)
      return Failure{workspace_.rank,
                     workspace_.rank,
                     Kind{LAR_REDUCE, LAR_FLAGS, LAR_WIRE_RAW, LAR_STORE},
                     LAR_PHASE_EXCHANGE,
                     0,
                     0,
                     0,
                     waited_ns * 1e-9};
    return Failure{failure_->rank, failure_->peer,           kind(failure_->kind), failure_->phase,
                   failure_->lane, failure_->expected_round, failure_->seen_round, failure_->waited_ns * 1e-9};
  }

  // lar_reason, of a failure.
  int reason() const { return exchange_waited_ns_.load() >= 0 ? LAR_REASON_EXCHANGE : failure_->reason; }

  // Of a mismatch, this rank's call and the peer's: kind, dtype, count.
  using Made = std::tuple<Kind, int, int64_t>;
  std::tuple<Made, Made> mismatch() const {
    const auto made = [](const lar_call_record& call) { return Made{kind(call.kind), call.dtype, call.count}; };
    return {made(failure_->mine), made(failure_->theirs)};
  }

  void mark_gone(int peer) {
    if (peer < 0 || peer >= world_size()) throw std::invalid_argument("peer: is not in the group");
    __atomic_store_n(&failure_->gone[peer], uint8_t{1}, __ATOMIC_RELEASE);
    __atomic_store_n(&failure_->any_gone, 1, __ATOMIC_RELEASE);
  }

  std::tuple<uint32_t, uint32_t> exchanges() const { return {failure_->exchanges_begun, failure_->exchanges_ended}; }

  // What is known of it is kept here, and is there before `state` says so: a kernel whose wait expires at the same time
  // may be writing the record.
  void fail_exchange(double waited_s) {
    int32_t state = __atomic_load_n(&failure_->state, __ATOMIC_ACQUIRE);
    if (state != 0) return;
    int64_t none = -1;
    exchange_waited_ns_.compare_exchange_strong(none, static_cast<int64_t>(std::max(waited_s, 0.0) * 1e9));
    __atomic_compare_exchange_n(&failure_->state, &state, kExchangeFailed, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }

  // Lets no call begin, and waits at most `wait_s` seconds for those of other threads: on a CPU rank until they have
  // left their waits, on a GPU until they have been launched. True when none is under way any more.
  bool close(double wait_s) {
    closed_.store(true);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(wait_s);
    nb::gil_scoped_release release;
    while (!are_calls_over()) {
      if (std::chrono::steady_clock::now() >= deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
  }

 private:
  static constexpr int32_t kExchangeFailed = 2;  // lar_failure.state

  static Kind kind(const lar_kind& kind) { return {kind.algorithm, kind.exchange, kind.wire, kind.epilogue}; }

  // Of a closed workspace. On a GPU, whoever takes the lock from now on finds it closed.
  bool are_calls_over() {
    if (device_ == LAR_CPU) return !inside_.load();
    return std::unique_lock<std::mutex>(order_mutex_, std::try_to_lock).owns_lock();
  }

  int call_on_cpu(const lar_call& call, bool is_first) {
    // A second thread's call could meet another call of the peers than the one it is for.
    if (inside_.exchange(true)) return LAR_ERROR_BUSY;
    workspace_.begun = is_first ? 0 : -1;
    int status = LAR_OK;
    {
      nb::gil_scoped_release release;  // a CPU rank may wait here for its peers
      status = lar_all_reduce(&workspace_, &call, nullptr);
    }
    inside_.store(false);
    if (status == LAR_ERROR_INTERRUPTED && closed_.load() && !PyErr_Occurred()) return LAR_ERROR_CLOSED;
    if (PyErr_Occurred()) throw nb::python_error();  // what a signal's handler raised
    return status;
  }

  // A launch waits where the stream's queue is full, as it is behind a kernel that waits for a peer: without the
  // interpreter's lock, so that others can say what is wrong meanwhile. LAR_OK, or LAR_ERROR_CLOSED, also where another
  // thread has closed the workspace before this one's turn came; throws what else is wrong.
  template <typename Launch>
  int with_order(void* stream, bool is_first, bool* captured, Launch launch) {
    if (device_ == LAR_CPU) throw std::invalid_argument("this workspace belongs to a CPU rank");
    const char* what = "before a launch";
    int status = LAR_OK;
    {
      nb::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(order_mutex_);
      if (closed_.load()) return LAR_ERROR_CLOSED;
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

  // The word that counts the beginnings of a graph, or of the first eager call of all; else -1, as where first calls
  // wait no longer than others: words belong to the memory, which may have a second workspace. After some thousands,
  // words are used again; whoever gets one then counts as begun before.
  int32_t begun_word(uint64_t capture, bool is_first) {
    if (workspace_.first_timeout_ns == workspace_.timeout_ns) return -1;
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
  std::atomic<bool> inside_{false};              // a CPU rank's call
  std::atomic<bool> called_{false};              // an eager call was made
  std::atomic<int64_t> exchange_waited_ns_{-1};  // of an exchange between hosts that has failed; -1: none
  uint32_t begun_ = 0;
  uint64_t capture_ = 0;
  int32_t captures_word_ = -1;
};

#endif  // LLM_ALLREDUCE_BINDINGS_WORKSPACE_H_
