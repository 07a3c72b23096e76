// Encoding and decoding by themselves: what the tests compare with the oracle, and what the break-even report times.
#include <algorithm>

#include "device/kernel.cuh"
#include "device/sink/store.cuh"
#include "device/wire/packets.cuh"
#include "host/check.h"

namespace lar {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 1 << 16;

// Every warp takes every so many packets.
template <typename Body>
__device__ __forceinline__ void for_each_packet(int64_t packets, Body body) {
  for (int64_t packet = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; packet < packets;
       packet += int64_t{gridDim.x} * kWarps)
    body(packet);
}

template <typename T, typename Packet>
__global__ void __launch_bounds__(kThreads, 4) encode_kernel(const void* values, int64_t count, char* packets) {
  const Packets<T, Packet, Store> message(values, nullptr, count);
  for_each_packet(message.number(),
                  [&](int64_t packet) { Packet::store(packets + packet * Packet::kBytes, message.encoded(packet)); });
}

template <typename T, typename Packet>
__global__ void __launch_bounds__(kThreads) decode_kernel(const char* packets, void* values, int64_t count) {
  const Packets<T, Packet, Store> message(nullptr, values, count);
  for_each_packet(message.number(), [&](int64_t packet) {
    typename Packets<T, Packet, Store>::Values decoded;
    Packet::decode(Packet::load(packets + packet * Packet::kBytes), decoded);
    message.store(packet, decoded);
  });
}

struct Call {
  bool encodes;
  lar_dtype dtype;
  const void* from;
  void* to;
  int64_t count;
  int64_t packets;
  void* stream;
};

template <typename T, typename Packet>
cudaError_t run(const Call& call) {
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(call.packets, kWarps), kMostBlocks));
  if (call.encodes)
    return launch(encode_kernel<T, Packet>, blocks, kThreads, call.stream, call.from, call.count,
                  static_cast<char*>(call.to));
  return launch(decode_kernel<T, Packet>, blocks, kThreads, call.stream, static_cast<const char*>(call.from), call.to,
                call.count);
}

template <typename Packet>
cudaError_t run(const Call& call) {
  switch (call.dtype) {
    case LAR_FLOAT32:
      return run<float, Packet>(call);
    case LAR_FLOAT16:
      return run<__half, Packet>(call);
    case LAR_BFLOAT16:
      return run<__nv_bfloat16, Packet>(call);
  }
  return cudaErrorInvalidValue;
}

int code(lar_wire wire, lar_dtype dtype, const void* values, int64_t count, void* packets, bool encodes, void* stream) {
  int32_t packet_values = 0;
  int32_t packet_bytes = 0;
  if (const int status = check_codec_call(wire, dtype, values, count, packets, &packet_values, &packet_bytes);
      status != LAR_OK || count == 0)
    return status;
  if (reinterpret_cast<uintptr_t>(packets) % LAR_VECTOR_BYTES != 0) return refuse("packets: not at 16 bytes");
  const void* from = encodes ? values : packets;
  void* to = encodes ? packets : const_cast<void*>(values);
  const Call call{encodes, dtype, from, to, count, ceil_div(count, packet_values), stream};
  int status = LAR_OK;  // of a format that check_codec_call() has found
  codec::with_format(wire, [&](auto format) { status = run<PacketOf<decltype(format)>>(call); });
  return status;
}

}  // namespace
}  // namespace lar

extern "C" int lar_encode_cuda(lar_wire format, lar_dtype dtype, const void* values, int64_t count, void* packets,
                               void* stream) {
  return lar::code(format, dtype, values, count, packets, true, stream);
}

extern "C" int lar_decode_cuda(lar_wire format, lar_dtype dtype, const void* packets, int64_t count, void* values,
                               void* stream) {
  return lar::code(format, dtype, values, count, const_cast<void*>(packets), false, stream);
}
