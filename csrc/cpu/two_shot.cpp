// TWOSHOT on CPU ranks: the algorithm of kernels/two_shot.cu with one lane per rank, over shared memory.
#include <algorithm>
#include <cstring>

#include "cpu/lane.h"

namespace lar::cpu {
namespace {

class TwoShotLane {
 public:
  TwoShotLane(const lar_workspace& workspace, const lar_message& message, const lar_launch& shape)
      : workspace_(workspace),
        layout_(workspace.layout),
        message_(message),
        lane_(workspace, LAR_TWO_SHOT),
        element_(element_bytes(message.dtype)),
        chunk_(shape.chunk_vectors * LAR_VECTOR_BYTES / element_),
        epoch_(lane_.epoch()) {}

  int run() const {
    const int64_t chunks = ceil_div(message_.count, chunk_ * layout_.world_size);
    for (int64_t step = 0; step < chunks + 2; ++step) {
      if (step < chunks) scatter(step);
      if (step >= 1 && step <= chunks && !reduce(step - 1)) return LAR_ERROR_TIMEOUT;
      if (step >= 2 && !drain(step - 2)) return LAR_ERROR_TIMEOUT;
    }
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
    return LAR_OK;
  }

 private:
  // The elements of `chunk` that `owner` reduces.
  struct Piece {
    int64_t first;
    int64_t count;
  };

  Piece piece(int64_t chunk, int owner) const {
    const int64_t first = std::min((chunk * layout_.world_size + owner) * chunk_, message_.count);
    return {first, std::min(chunk_, message_.count - first)};
  }

  uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  char* slot(int64_t region, int holder, int source, int64_t chunk) const {
    return lane_.slot(region, layout_.two_shot_chunk_bytes, holder, source, round(chunk) % LAR_SLOTS);
  }

  const char* input(int64_t first) const { return static_cast<const char*>(message_.input) + first * element_; }
  char* output(int64_t first) const { return static_cast<char*>(message_.output) + first * element_; }
  int peer(int step) const { return (workspace_.rank + step) % layout_.world_size; }

  void scatter(int64_t chunk) const {
    for (int step = 1; step < layout_.world_size; ++step) {
      const Piece part = piece(chunk, peer(step));
      std::memcpy(slot(layout_.scatter_offset, peer(step), workspace_.rank, chunk), input(part.first),
                  part.count * element_);
    }
    lane_.publish(FlagPlane::kTwoShotScatter, round(chunk));
  }

  bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotScatter, LAR_PHASE_SCATTER, round(chunk))) return false;
    const int rank = workspace_.rank;
    const Piece part = piece(chunk, rank);
    const void* sources[LAR_MAX_WORLD_SIZE];
    void* outputs[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < layout_.world_size; ++source)
      sources[source] = source == rank ? static_cast<const void*>(input(part.first))
                                       : slot(layout_.scatter_offset, rank, source, chunk);
    for (int holder = 0; holder < layout_.world_size; ++holder)
      outputs[holder] = holder == rank ? output(part.first) : slot(layout_.gather_offset, holder, rank, chunk);
    reduce_in_rank_order(message_.dtype, sources, layout_.world_size, outputs, layout_.world_size, part.count);
    lane_.publish(FlagPlane::kTwoShotGather, round(chunk));
    return true;
  }

  bool drain(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kTwoShotGather, LAR_PHASE_GATHER, round(chunk))) return false;
    for (int step = 1; step < layout_.world_size; ++step) {
      const Piece part = piece(chunk, peer(step));
      std::memcpy(output(part.first), slot(layout_.gather_offset, workspace_.rank, peer(step), chunk),
                  part.count * element_);
    }
    return true;
  }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const lar_message& message_;
  const Lane lane_;
  const int element_;
  const int64_t chunk_;
  const uint32_t epoch_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_two_shot_cpu(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.two_shot_chunk_bytes);
      status != LAR_OK)
    return status;
  if (workspace->failure->state != 0) return LAR_ERROR_TIMEOUT;  // the group is broken for good
  if (message->count == 0) return LAR_OK;
  return cpu::TwoShotLane(*workspace, *message, *shape).run();
}
