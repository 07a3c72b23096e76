#include "cpu/packets.h"

#include <algorithm>

#include "codec/scalar.h"

namespace lar::cpu {

int64_t Packets::values_here(int64_t packet) const {
  return std::min<int64_t>(values_, message_.count - packet * values_);
}

char* Packets::output(int64_t packet) const {
  return static_cast<char*>(message_.output) + packet * values_ * element_bytes(message_.dtype);
}

// This rank's values in a packet; the last packet is filled up with zeros.
void Packets::load(int64_t packet, float* values) const {
  const int64_t here = values_here(packet);
  const int64_t offset = packet * values_ * element_bytes(message_.dtype);
  widen(message_.dtype, static_cast<const char*>(message_.input) + offset, here, values);
  std::fill(values + here, values + values_, 0.0f);
}

void Packets::encode(int64_t packet, char* encoded) const {
  float values[kMostPacketValues];
  load(packet, values);
  encode_packet(format_, values, encoded);
}

void Packets::store(int64_t packet, const char* encoded) const {
  float values[kMostPacketValues];
  decode_packet(format_, encoded, values);
  for (int i = 0; i < values_; ++i) values[i] = codec::add(0.0f, values[i]);
  round(message_.dtype, values, values_here(packet), output(packet));
}

void Packets::clear(float* sum) const { std::fill_n(sum, values_, 0.0f); }

void Packets::add_own(int64_t packet, float* sum) const {
  if (own_as_sent(format_)) {
    char encoded[kMostPacketBytes];
    encode(packet, encoded);
    return add(encoded, sum);
  }
  const bool infinity_travels = sends_infinity(format_);
  float values[kMostPacketValues];
  load(packet, values);
  for (int i = 0; i < values_; ++i)
    sum[i] = codec::add(sum[i], infinity_travels ? values[i] : codec::infinity_as_nan(values[i]));
}

void Packets::add(const char* encoded, float* sum) const {
  float values[kMostPacketValues];
  decode_packet(format_, encoded, values);
  for (int i = 0; i < values_; ++i) sum[i] = codec::add(sum[i], values[i]);
}

// Where the format sends infinities as NaN, a sum of finite values stays finite.
void Packets::limit(float* sum) const {
  if (sends_infinity(format_)) return;
  for (int i = 0; i < values_; ++i) sum[i] = codec::largest_for_infinity(sum[i]);
}

void Packets::encode_sum(int64_t packet, float* sum, char* encoded) const {
  limit(sum);
  // Behind the message's end a rotated block decodes to something, which must not count.
  std::fill(sum + values_here(packet), sum + values_, 0.0f);
  encode_packet(format_, sum, encoded);
}

void Packets::round_sum(float* sum, char* raw) const {
  limit(sum);
  for (int i = 0; i < values_; ++i) sum[i] = codec::add(0.0f, sum[i]);  // a zero is +0
  round(message_.dtype, sum, values_, raw);
}

void Packets::store_raw(int64_t packet, const char* raw) const {
  std::copy_n(raw, values_here(packet) * element_bytes(message_.dtype), output(packet));
}

}  // namespace lar::cpu
