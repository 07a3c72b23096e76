// The halves of an all-reduce over several hosts on CPU ranks (protocol/hosts.h), one lane.
#include <cstring>

#include "cpu/lane.h"
#include "cpu/sum.h"
#include "host/registry.h"
#include "protocol/hosts.h"
#include "protocol/one_shot.h"

namespace lar::cpu {
namespace {

// Counts what the host watches: lar_failure.exchanges_begun and exchanges_ended. One thread makes all calls.
void count(volatile uint32_t& exchanges) { exchanges = exchanges + 1; }

class HalfSteps {
 public:
  HalfSteps(const Call& call, const lar_call& described)
      : workspace_(call.workspace()),
        message_(described.message),
        algorithm_(static_cast<lar_algorithm>(described.kind.algorithm)),
        hosts_(described.hosts),
        bytes_(element_bytes(message_.dtype)),
        sum_(part_elements(message_.count, parts())),
        chunk_bytes_(described.launch.chunk_vectors * LAR_VECTOR_BYTES),
        lane_(call, EpochPlane::kOneShot),
        cut_{message_.count, sum_, chunk_bytes_ / bytes_, 1, 0},
        epoch_(lane_.epoch()) {}

  int run() const {
    if (sums_hosts(algorithm_)) count(workspace_.failure->exchanges_ended);
    if (algorithm_ == LAR_HOST_SUM) return sum_hosts();
    if (!run_one_shot(cut_.chunks(), *this)) return lane_.broken();
    lane_.finish(epoch_ + static_cast<uint32_t>(cut_.chunks()));
    if (!sums_hosts(algorithm_)) count(workspace_.failure->exchanges_begun);
    return LAR_OK;
  }

  bool push(int64_t chunk) const {
    const int rank = workspace_.rank;
    if (algorithm_ == LAR_HOST_SUM_GATHER) {
      const Piece own = cut_.piece(chunk, rank);
      void* outputs[LAR_MAX_WORLD_SIZE];
      const int copies = shared_copies(workspace_.layout);
      for (int step = 1; step <= copies; ++step) outputs[step - 1] = slot(peer(step), rank, chunk);
      outputs[copies] = output(own.first);
      round_hosts(own, own.first - rank * sum_, outputs, copies + 1);
    } else {
      // Where memory is shared, the same for all is stored once.
      const int copies = algorithm_ == LAR_REDUCE ? shared_copies(workspace_.layout) : workspace_.layout.world_size - 1;
      for (int step = 1; step <= copies; ++step) {
        const Piece theirs = cut_.piece(chunk, part_of(peer(step)));
        if (theirs.span > 0) std::memcpy(slot(peer(step), rank, chunk), input(theirs.first), theirs.span * bytes_);
      }
    }
    lane_.publish(FlagPlane::kOneShot, round(chunk));
    return true;
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kOneShot, phase(), round(chunk))) return false;
    const int rank = workspace_.rank;
    const int world_size = workspace_.layout.world_size;
    if (algorithm_ == LAR_HOST_SUM_GATHER) {
      for (int step = 1; step < world_size; ++step) {
        const Piece theirs = cut_.piece(chunk, peer(step));
        if (theirs.span > 0) std::memcpy(output(theirs.first), slot(rank, peer(step), chunk), theirs.span * bytes_);
      }
      return true;
    }
    const Piece own = cut_.piece(chunk, part_of(rank));
    if (own.span <= 0) return true;
    const void* sources[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < world_size; ++source)
      sources[source] = source == rank ? input(own.first) : slot(rank, source, chunk);
    float* sums = static_cast<float*>(message_.output) + own.first - part_of(rank) * sum_;
    sum_in_rank_order(message_.dtype, sources, world_size, sums, own.span);
    return true;
  }

 private:
  int sum_hosts() const {
    void* outputs[] = {output(0)};
    round_hosts({0, message_.count}, 0, outputs, 1);
    return LAR_OK;
  }

  // Of a piece of the message that begins with element `first` of every host's sum.
  void round_hosts(const Piece& piece, int64_t first, void* const* outputs, int copies) const {
    if (piece.span <= 0) return;
    const auto* sums = static_cast<const float*>(message_.input) + first;
    const void* sources[LAR_MAX_HOSTS];
    for (int host = 0; host < hosts_; ++host) sources[host] = sums + host * sum_;
    round_sum_of_sums(message_.dtype, sources, hosts_, outputs, copies, piece.span);
  }

  int parts() const { return has_parts(algorithm_) ? workspace_.layout.world_size : 1; }
  int part_of(int rank) const { return has_parts(algorithm_) ? rank : 0; }
  lar_phase phase() const { return algorithm_ == LAR_REDUCE_SCATTER ? LAR_PHASE_SCATTER : LAR_PHASE_GATHER; }
  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }
  int peer(int step) const { return (workspace_.rank + step) % workspace_.layout.world_size; }

  char* slot(int reader, int source, int64_t chunk) const {
    return half_slot(workspace_, algorithm_, reader, source, round(chunk), 0, chunk_bytes_);
  }

  const char* input(int64_t first) const { return static_cast<const char*>(message_.input) + first * bytes_; }
  char* output(int64_t first) const { return static_cast<char*>(message_.output) + first * bytes_; }

  const lar_workspace& workspace_;
  const lar_message& message_;
  const lar_algorithm algorithm_;
  const int hosts_;
  const int bytes_;
  const int64_t sum_;  // elements of a sum
  const int64_t chunk_bytes_;
  const Lane lane_;
  const PartCut cut_;
  const uint32_t epoch_;
};

int half(const lar_workspace& workspace, const lar_call& described) {
  Call call(workspace, described);
  if (const int status = call.begin(); status != LAR_OK) return status;
  return HalfSteps(call, described).run();
}

const Registration rows([] {
  for (const lar_algorithm algorithm : {LAR_REDUCE, LAR_REDUCE_SCATTER, LAR_HOST_SUM, LAR_HOST_SUM_GATHER})
    add_cpu(kind_of(algorithm, LAR_FLAGS), half);
});

}  // namespace
}  // namespace lar::cpu
