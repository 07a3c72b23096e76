// LOWPRECISION over two domains, in every wire format but FP8: device/hierarchical_flags.cuh.
#include "device/hierarchical_flags.cuh"

namespace lar {
namespace {

const Registration rows([] { add_hierarchical_flags<Wires::kOthers>(); });

}  // namespace
}  // namespace lar
