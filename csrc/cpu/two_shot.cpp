// TWOSHOT on CPU ranks: the algorithm of kernels/two_shot.cu with one lane per rank, over shared memory.
#include "cpu/two_shot.h"

#include <cstring>

namespace lar::cpu {
namespace {

// Elements as they are.
class Elements {
 public:
  Elements(const lar_message& message, int world_size)
      : message_(message), world_size_(world_size), element_(element_bytes(message.dtype)) {}

  int64_t units() const { return message_.count; }

  void pack(const Piece& part, char* slot) const { std::memcpy(slot, input(part.first), part.count * element_); }

  void reduce(const Piece& part, const char* const* packed, char* const* outputs, int copies) const {
    const void* sources[LAR_MAX_WORLD_SIZE];
    void* everywhere[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < world_size_; ++source)
      sources[source] = packed[source] ? packed[source] : input(part.first);
    std::copy_n(outputs, copies, everywhere);
    everywhere[copies] = output(part.first);
    reduce_in_rank_order(message_.dtype, sources, world_size_, everywhere, copies + 1, part.count);
  }

  void unpack(const Piece& part, const char* slot) const {
    std::memcpy(output(part.first), slot, part.count * element_);
  }

 private:
  const char* input(int64_t first) const { return static_cast<const char*>(message_.input) + first * element_; }
  char* output(int64_t first) const { return static_cast<char*>(message_.output) + first * element_; }

  const lar_message& message_;
  const int world_size_;
  const int element_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_two_shot_cpu(const lar_workspace* workspace, const lar_message* message, const lar_launch* shape) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.flagged.two_shot_bytes);
      status != LAR_OK)
    return status;
  cpu::Call call(*workspace, LAR_TWO_SHOT, *message, -1);
  if (const int status = call.begin(); status != LAR_OK) return status;
  if (message->count == 0) return LAR_OK;
  const cpu::Elements elements(*message, workspace->layout.world_size);
  const int64_t chunk = shape->chunk_vectors * LAR_VECTOR_BYTES / element_bytes(message->dtype);
  return cpu::TwoShotSteps(call, elements, chunk).run();
}
