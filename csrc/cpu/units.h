// What travels, on a CPU rank. `Units` knows the size of a unit:
//   int64_t total()                       units in the message
//   int bytes()                           of a unit in a slot
//   void pack(Piece, char* slot)          this rank's own, for their owner
//   void reduce(Piece, sources, outputs, copies)
//                                         sums the packed units of all ranks, of which sources[rank] is null for this
//                                         rank's own, stores the result and writes it, packed, to so many outputs
//   void unpack(Piece, const char* slot)  stores a peer's result
// Pieces may end before they begin: then there is nothing to do.
#ifndef LLM_ALLREDUCE_CPU_UNITS_H_
#define LLM_ALLREDUCE_CPU_UNITS_H_

#include <algorithm>
#include <cstring>

#include "cpu/packets.h"
#include "cpu/sum.h"
#include "protocol/pieces.h"

namespace lar::cpu {

// Elements as they are.
class ElementUnits {
 public:
  ElementUnits(const lar_message& message, int world_size)
      : message_(message), world_size_(world_size), bytes_(element_bytes(message.dtype)) {}

  int64_t total() const { return message_.count; }
  int bytes() const { return bytes_; }

  void pack(const Piece& part, char* slot) const {
    if (part.span > 0) std::memcpy(slot, input(part.first), part.span * bytes_);
  }

  void reduce(const Piece& part, const char* const* packed, char* const* outputs, int copies) const {
    if (part.span <= 0) return;
    const void* sources[LAR_MAX_WORLD_SIZE];
    void* everywhere[LAR_MAX_WORLD_SIZE];
    for (int source = 0; source < world_size_; ++source)
      sources[source] = packed[source] ? packed[source] : input(part.first);
    std::copy_n(outputs, copies, everywhere);
    everywhere[copies] = output(part.first);
    reduce_in_rank_order(message_.dtype, sources, world_size_, everywhere, copies + 1, part.span);
  }

  void unpack(const Piece& part, const char* slot) const {
    if (part.span > 0) std::memcpy(output(part.first), slot, part.span * bytes_);
  }

 private:
  const char* input(int64_t first) const { return static_cast<const char*>(message_.input) + first * bytes_; }
  char* output(int64_t first) const { return static_cast<char*>(message_.output) + first * bytes_; }

  const lar_message& message_;
  const int world_size_;
  const int bytes_;
};

// Packets of a wire format.
class PacketUnits {
 public:
  PacketUnits(const Packets& packets, int world_size)
      : packets_(packets), world_size_(world_size), bytes_(packets.bytes()) {}

  int64_t total() const { return packets_.number(); }
  int bytes() const { return bytes_; }

  void pack(const Piece& part, char* slot) const {
    for (int64_t i = 0; i < part.span; ++i) packets_.encode(part.first + i, slot + i * bytes_);
  }

  void reduce(const Piece& part, const char* const* packed, char* const* outputs, int copies) const {
    char encoded[kMostPacketBytes];
    float sum[kMostPacketValues];
    for (int64_t i = 0; i < part.span; ++i) {
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
    for (int64_t i = 0; i < part.span; ++i) packets_.store(part.first + i, slot + i * bytes_);
  }

 private:
  const Packets& packets_;
  const int world_size_;
  const int bytes_;
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_UNITS_H_
