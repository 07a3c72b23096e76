// TWOSHOT in stages, of vectors as they are and in every wire format but FP8: device/two_shot_staged.cuh.
#include "device/two_shot_staged.cuh"

namespace lar {
namespace {

const Registration rows([] { add_two_shot_staged<Wires::kOthers>(); });

}  // namespace
}  // namespace lar
