// ONESHOT by flags, each lane alone (device/lane.cuh), chunk by chunk: the steps of protocol/one_shot.h.
#include "device/instances.cuh"
#include "device/lane.cuh"
#include "device/payload.cuh"
#include "device/sink/store.cuh"
#include "protocol/one_shot.h"

namespace lar {
namespace {

template <typename T, typename Epilogue>
class OneShotLane {
 public:
  __device__ __forceinline__ explicit OneShotLane(const FlagsArguments& arguments)
      : workspace_(arguments.workspace),
        layout_(workspace_.layout),
        lane_(workspace_, arguments.limit, EpochPlane::kOneShot),
        input_(arguments.message.input, arguments.message.count),
        sink_(arguments.message.output, arguments.message.count),
        cut_{ceil_div(arguments.message.count, Vector<T>::kElements), arguments.chunk_vectors, 1,
             static_cast<int>(gridDim.x), lane_.index()},
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    const int64_t chunks = cut_.chunks();
    if (!(lane_.is_releaser() ? run_one_shot(chunks, Releases{*this}) : run_one_shot(chunks, *this))) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

  // Peers in rotated order, so that no GPU is everyone's first target.
  __device__ __forceinline__ bool push(int64_t chunk) const {
    const Piece piece = cut_.piece(chunk, 0);
    const int64_t spans[] = {piece.span};
    const int copies = shared_copies(layout_);
    move_vectors(
        spans, lane_.workers(), [&](int, int64_t i) { return input_.load(piece.first + i); },
        [&](int, int64_t i, const uint4& mine) {
#pragma unroll 1
          for (int step = 1; step <= copies; ++step)
            store_slot(slot(rotated(workspace_.rank, step, layout_.world_size), workspace_.rank, chunk), i, mine);
        });
    lane_.publish(FlagPlane::kOneShot, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    if (!lane_.wait(FlagPlane::kOneShot, LAR_PHASE_GATHER, round(chunk))) return false;
    const Piece piece = cut_.piece(chunk, 0);
    sum_vectors<T>(
        piece.span, lane_.workers(), layout_.world_size,
        [&](int source, int64_t i) {
          return source == workspace_.rank ? input_.load(piece.first + i)
                                           : load_slot(slot(workspace_.rank, source, chunk), i);
        },
        [&](int64_t i, const uint4& result) { sink_(piece.first + i, result); });
    return true;
  }

 private:
  // What the releaser does in the same steps.
  struct Releases {
    const OneShotLane& of;
    __device__ __forceinline__ bool push(int64_t chunk) const {
      return of.lane_.deliver(FlagPlane::kOneShot, of.round(chunk));
    }
    __device__ __forceinline__ bool reduce(int64_t) const { return true; }
  };

  __device__ __forceinline__ uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }

  __device__ __forceinline__ char* slot(int reader, int source, int64_t chunk) const {
    const lar_slots& slots = layout_.flagged;
    return flagged_slot(workspace_, slots.one_shot_offset, slots.one_shot_bytes, round(chunk) % LAR_SLOTS, reader,
                        source, lane_.index(), true);
  }

  const lar_workspace& workspace_;
  const lar_layout& layout_;
  const Lane<Roles::kWorkersAndReleaser> lane_;
  const Payload<T> input_;
  const typename Epilogue::template Any<T> sink_;
  const Cut cut_;
  const uint32_t epoch_;
};

template <typename T, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    one_shot_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  OneShotLane<T, Epilogue>(arguments).run();
}

const Registration rows([] {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<0>, Epilogues>([](auto type, auto, auto epilogue) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    add_row({kind_of(LAR_ONE_SHOT, LAR_FLAGS, LAR_WIRE_RAW, Epilogue::kEpilogue), dtype_of<T>(), 0, Form::kAny,
             kernel_address(one_shot_flags_kernel<T, Epilogue>), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
  });
});

}  // namespace
}  // namespace lar
