// LOWPRECISION on CPU ranks: the steps of TWOSHOT with packets of a wire format in the slots.
#include <algorithm>

#include "cpu/packets.h"
#include "cpu/two_shot.h"

namespace lar::cpu {
namespace {

class PacketCargo {
 public:
  PacketCargo(const Packets& packets, int world_size)
      : packets_(packets), world_size_(world_size), bytes_(packets.bytes()) {}

  int64_t units() const { return packets_.number(); }

  void pack(const Piece& part, char* slot) const {
    for (int64_t i = 0; i < part.count; ++i) packets_.encode(part.first + i, slot + i * bytes_);
  }

  void reduce(const Piece& part, const char* const* packed, char* const* outputs, int copies) const {
    char encoded[kMostPacketBytes];
    float sum[kMostPacketValues];
    for (int64_t i = 0; i < part.count; ++i) {
      packets_.clear(sum);
      for (int source = 0; source < world_size_; ++source) {
        if (packed[source])
          packets_.add(packed[source] + i * bytes_, sum);
        else
          packets_.add_own(part.first + i, sum);
      }
      packets_.encode_sum(part.first + i, sum, encoded);
      for (int copy = 0; copy < copies; ++copy) std::copy_n(encoded, bytes_, outputs[copy] + i * bytes_);
      packets_.store(part.first + i, encoded);
    }
  }

  void unpack(const Piece& part, const char* slot) const {
    for (int64_t i = 0; i < part.count; ++i) packets_.store(part.first + i, slot + i * bytes_);
  }

 private:
  const Packets& packets_;
  const int world_size_;
  const int bytes_;
};

}  // namespace
}  // namespace lar::cpu

extern "C" int lar_low_precision_cpu(const lar_workspace* workspace, const lar_message* message,
                                     const lar_launch* shape, lar_wire_format format) {
  using namespace lar;
  if (!workspace) return LAR_ERROR_INVALID_ARGUMENT;
  if (const int status = check_call(workspace, message, shape, workspace->layout.flagged.two_shot_bytes);
      status != LAR_OK)
    return status;
  int32_t values = 0;
  int32_t bytes = 0;
  if (const int status = lar_packet_size(format, &values, &bytes); status != LAR_OK) return status;
  const int64_t chunk = shape->chunk_vectors * LAR_VECTOR_BYTES / bytes;
  if (chunk < 1) return LAR_ERROR_INVALID_ARGUMENT;
  cpu::Call call(*workspace, LAR_LOW_PRECISION, *message, format);
  if (const int status = call.begin(); status != LAR_OK) return status;
  if (message->count == 0) return LAR_OK;
  const cpu::Packets packets(*message, format, values, bytes);
  const cpu::PacketCargo cargo(packets, workspace->layout.world_size);
  return cpu::TwoShotSteps(call, cargo, chunk).run();
}
