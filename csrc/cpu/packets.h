// A message as packets of a wire format, on the CPU: the arithmetic of device/wire/packets.cuh.
#ifndef LLM_ALLREDUCE_CPU_PACKETS_H_
#define LLM_ALLREDUCE_CPU_PACKETS_H_

#include "cpu/codec.h"

namespace lar::cpu {

class Packets {
 public:
  // `wire`: not raw.
  Packets(const lar_message& message, lar_wire wire) : message_(message), format_(wire) {
    lar_packet_size(wire, &values_, &bytes_);
    number_ = ceil_div(message.count, values_);
  }

  int64_t number() const { return number_; }
  int bytes() const { return bytes_; }
  int raw_bytes() const { return raw_packet_bytes(values_, message_.dtype); }

  // This rank's own values.
  void encode(int64_t packet, char* encoded) const;

  // Decodes and stores to the output. A zero is +0.
  void store(int64_t packet, const char* encoded) const;

  // A sum is made term by term, from +0: this rank's own values, as they are or as others see
  // them (codec.h), and what others sent.
  void clear(float* sum) const;
  void add_own(int64_t packet, float* sum) const;
  void add(const char* encoded, float* sum) const;

  // A sum as it travels on, encoded or rounded to the message's type.
  void encode_sum(int64_t packet, float* sum, char* encoded) const;
  void round_sum(float* sum, char* raw) const;

  // Stores rounded values to the output.
  void store_raw(int64_t packet, const char* raw) const;

 private:
  int64_t values_here(int64_t packet) const;
  char* output(int64_t packet) const;
  void load(int64_t packet, float* values) const;
  void limit(float* sum) const;

  const lar_message& message_;
  const lar_wire format_;
  int32_t values_ = 0;
  int32_t bytes_ = 0;
  int64_t number_ = 0;
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_PACKETS_H_
