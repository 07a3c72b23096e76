// ONESHOT by flags, each lane alone (device/lane.cuh), chunk by chunk: the steps of protocol/one_shot.h.
//
// In the split kernel a lane is two blocks, neighbours in the grid: one pushes, the other reduces, so that reads
// through PCIe do not queue behind writes of the same multiprocessor. The pusher pushes chunk s once its own rank's
// reducer has reduced chunk s-2: then all that protocol/one_shot.h says of a lane holds of the two. The grid need not
// be resident as long as there is room for two blocks: blocks start in order, so the lanes that have begun are the
// first ones, of which at most the last has no reducer yet, and all others come to their end.
#include "device/instances.cuh"
#include "device/lane.cuh"
#include "device/payload.cuh"
#include "device/sink/store.cuh"
#include "protocol/one_shot.h"

namespace lar {
namespace {

// kSplits: blocks come in pairs.
template <typename T, typename Epilogue, bool kSplits>
class OneShotLane {
 public:
  __device__ __forceinline__ explicit OneShotLane(const FlagsArguments& arguments)
      : workspace_(arguments.workspace),
        layout_(workspace_.layout),
        lane_(workspace_, arguments.limit, EpochPlane::kOneShot, blockIdx.x / kBlocks),
        input_(arguments.message.input, arguments.message.count),
        sink_(arguments.message.output, arguments.message.count),
        cut_{ceil_div(arguments.message.count, Vector<T>::kElements), arguments.chunk_vectors, 1,
             static_cast<int>(gridDim.x / kBlocks), lane_.index()},
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    const int64_t chunks = cut_.chunks();
    if (!(lane_.is_releaser() ? run_one_shot(chunks, Releases{*this}) : run_one_shot(chunks, *this))) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

  __device__ __forceinline__ void run_pusher() const {
    lane_.start();
    const int64_t chunks = cut_.chunks();
#pragma unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (lane_.is_releaser()) {
        if (!lane_.deliver(FlagPlane::kOneShot, round(chunk))) return;
      } else {
        if (chunk >= 2 && !lane_.wait_for_reduced(round(chunk - 2))) return;
        push(chunk);
      }
    }
    if (!lane_.is_releaser() && !lane_.wait_for_reduced(round(chunks - 1))) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
  }

  // It has read the epoch before the pusher can advance it, which waits for the last chunk to be reduced.
  __device__ __forceinline__ void run_reducer() const {
    lane_.start(false);
    if (lane_.is_releaser()) return;
    const int64_t chunks = cut_.chunks();
#pragma unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (!reduce(chunk)) return;
      lane_.tell_reduced(round(chunk));
    }
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

  static constexpr int kBlocks = kSplits ? 2 : 1;

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
  OneShotLane<T, Epilogue, false>(arguments).run();
}

template <typename T, typename Epilogue>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    one_shot_split_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  const OneShotLane<T, Epilogue, true> lane(arguments);
  blockIdx.x % 2 == 0 ? lane.run_pusher() : lane.run_reducer();
}

const Registration rows([] {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<0>, Epilogues>([](auto type, auto, auto epilogue) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    const auto add = [](Form form, auto kernel) {
      add_row({kind_of(LAR_ONE_SHOT, LAR_FLAGS, LAR_WIRE_RAW, Epilogue::kEpilogue), dtype_of<T>(), 0, form,
               kernel_address(kernel), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
    };
    add(Form::kAny, one_shot_flags_kernel<T, Epilogue>);
    add(Form::kSplit, one_shot_split_flags_kernel<T, Epilogue>);
  });
});

}  // namespace
}  // namespace lar
