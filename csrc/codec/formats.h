// The wire formats: a row for each, and the only place that maps lar_wire to what it is.
#ifndef LLM_ALLREDUCE_CODEC_FORMATS_H_
#define LLM_ALLREDUCE_CODEC_FORMATS_H_

#include <type_traits>

#include "codec/block32.h"
#include "codec/fp8.h"
#include "codec/fp8_group.h"
#include "codec/hadamard2.h"
#include "codec/tq3.h"
#include "llm_allreduce.h"

namespace lar::codec {

// `Codec`: its arithmetic; with kBlocks blocks of 32 values to a packet (codec/block32.h),
// or, like Fp8, codes of 8 bits, which is what such codecs are derived from.
template <lar_wire kWireFormat, typename CodecType>
struct Format {
  static constexpr lar_wire kWire = kWireFormat;
  using Codec = CodecType;
  static constexpr bool kHasBlocks = !std::is_base_of_v<Fp8, Codec>;
  using Packet = std::conditional_t<kHasBlocks, Packet32, Codec>;
  static constexpr int kValues = Packet::kValues;
  static constexpr int kBytes = Packet::kBytes;
};

template <typename... Format>
struct FormatList {};

using Formats = FormatList<Format<LAR_WIRE_FP8, Fp8>, Format<LAR_WIRE_TQ3, Tq3>, Format<LAR_WIRE_HADAMARD2, Hadamard2>,
                           Format<LAR_WIRE_FP8_GROUP, Fp8Group>>;

namespace detail {

template <typename... Format, typename Body>
bool with_format_of(FormatList<Format...>, lar_wire wire, Body body) {
  return ((Format::kWire == wire && (body(Format{}), true)) || ...);
}

}  // namespace detail

// Calls body(Format) for a wire format; false when there is none of this number.
template <typename Body>
bool with_format(lar_wire wire, Body body) {
  return detail::with_format_of(Formats{}, wire, body);
}

}  // namespace lar::codec

#endif  // LLM_ALLREDUCE_CODEC_FORMATS_H_
