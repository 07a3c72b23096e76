// TWOSHOT by flags, of vectors as they are and in every wire format but FP8: device/two_shot_flags.cuh.
#include "device/two_shot_flags.cuh"

namespace lar {
namespace {

const Registration rows([] { add_two_shot_flags<Wires::kOthers>(); });

}  // namespace
}  // namespace lar
