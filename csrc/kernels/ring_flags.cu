// LOWPRECISION as a ring, in every wire format but FP8: device/ring_flags.cuh.
#include "device/ring_flags.cuh"

namespace lar {
namespace {

const Registration rows([] { add_ring_flags<Wires::kOthers>(); });

}  // namespace
}  // namespace lar
