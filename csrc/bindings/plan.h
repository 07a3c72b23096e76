// All-reduces of one size and kind as Python holds them.
#ifndef LLM_ALLREDUCE_BINDINGS_PLAN_H_
#define LLM_ALLREDUCE_BINDINGS_PLAN_H_

#include <string>
#include <utility>
#include <vector>

#include "bindings/workspace.h"

// The tensors of LAR_RMS_NORM by their addresses; 0: there is none.
struct NormTensors {
  uint64_t residual;
  uint64_t weight;
  uint64_t norm_out;
  uint64_t quant_out;
  uint64_t scale_out;
  uint64_t scale;

  lar_norm in(lar_norm norm) const {
    norm.residual = pointer(residual);
    norm.weight = pointer(weight);
    norm.norm_out = pointer(norm_out);
    norm.quant_out = pointer(quant_out);
    norm.scale_out = pointer(scale_out);
    norm.scale = static_cast<const float*>(pointer(scale));
    return norm;
  }
};

// All that does not change between all-reduces of one size and kind, so that a call is two addresses and a stream.
class Plan {
 public:
  // `call`: its addresses come with every call. `domains`: empty, or a number for each rank. `peer_distances`: empty,
  // or the bytes from this rank's input to where it sees each rank's, in whose place peers read it. `pools`: of
  // LAR_PLACE, the address at which this rank sees each rank's registered memory; otherwise empty. `norm`: null, or
  // what LAR_RMS_NORM does, without addresses.
  Plan(Workspace& workspace, const lar_call& call, std::vector<int32_t> domains, std::vector<int64_t> peer_distances,
       const std::vector<uint64_t>& pools, const lar_norm* norm)
      : workspace_(workspace), call_(call), domains_(std::move(domains)), peer_distances_(std::move(peer_distances)) {
    if (norm) norm_ = *norm;
    check("domains", domains_.size());
    check("peer_distances", peer_distances_.size());
    check("pools", pools.size());
    for (const uint64_t pool : pools) pools_.push_back(pointer(pool));
    if (!pools_.empty()) call_.pools = pools_.data();
    if (!domains_.empty()) call_.domains = domains_.data();
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int operator()(uint64_t input, uint64_t output, uint64_t stream) {
    return run(Addressed(*this, input, output), stream);
  }

  // The same with LAR_RMS_NORM: the output is the new residual.
  int normed(uint64_t input, uint64_t residual_out, uint64_t stream, const NormTensors& tensors) {
    Addressed addressed(*this, input, residual_out);
    const lar_norm norm = tensors.in(norm_);
    addressed.call.norm = &norm;
    return run(addressed, stream);
  }

  // Nanoseconds of host time per launch when nothing but launches is done: what a call's own cost is measured against.
  double time_launches(uint64_t input, uint64_t output, uint64_t stream, int launches) {
    const Addressed addressed(*this, input, output);
    return workspace_.time_launches(addressed.call, pointer(stream), launches);
  }

  int64_t calls() const { return calls_; }
  int64_t captured() const { return captured_; }

 private:
  struct Addressed;

  int run(const Addressed& addressed, uint64_t stream) {
    bool captured = false;
    const int status = workspace_.call(addressed.call, pointer(stream), &captured);
    if (status == LAR_OK) ++(captured ? captured_ : calls_);
    return status;
  }

  void check(const char* name, size_t entries) const {
    if (entries != 0 && static_cast<int>(entries) != workspace_.world_size())
      throw std::invalid_argument(std::string(name) + ": must be empty or have one entry per rank");
  }

  // The call with its addresses. Each call has one of its own: another thread may come while this one waits.
  struct Addressed {
    Addressed(const Plan& plan, uint64_t input, uint64_t output) : call(plan.call_) {
      call.message.input = pointer(input);
      call.message.output = pointer(output);
      for (size_t rank = 0; rank < plan.peer_distances_.size(); ++rank)
        inputs[rank] = pointer(input + plan.peer_distances_[rank]);
      if (!plan.peer_distances_.empty()) call.inputs = inputs;
    }
    Addressed(const Addressed&) = delete;
    Addressed& operator=(const Addressed&) = delete;

    lar_call call;
    const void* inputs[LAR_MAX_WORLD_SIZE];
  };

  Workspace& workspace_;
  lar_call call_;    // without addresses
  lar_norm norm_{};  // without addresses
  const std::vector<int32_t> domains_;
  const std::vector<int64_t> peer_distances_;
  std::vector<void*> pools_;
  int64_t calls_ = 0;
  int64_t captured_ = 0;
};

#endif  // LLM_ALLREDUCE_BINDINGS_PLAN_H_
