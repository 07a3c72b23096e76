// FP8 in the kernels that wait for flags.
#include "device/hierarchical_flags.cuh"
#include "device/ring_flags.cuh"
#include "device/two_shot_flags.cuh"
#include "device/two_shot_staged.cuh"

namespace lar {
namespace {

const Registration rows([] {
  add_two_shot_flags<Wires::kFp8>();
  add_two_shot_staged<Wires::kFp8>();
  add_ring_flags<Wires::kFp8>();
  add_hierarchical_flags<Wires::kFp8>();
});

}  // namespace
}  // namespace lar
