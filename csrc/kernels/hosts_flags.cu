// The halves of an all-reduce over several hosts (protocol/hosts.h), by flags, each lane alone (device/lane.cuh).
#include "device/instances.cuh"
#include "device/lane.cuh"
#include "device/payload.cuh"
#include "device/vector.cuh"
#include "protocol/hosts.h"
#include "protocol/one_shot.h"

namespace lar {
namespace {

// The fp32 sums of the elements of a vector of T.
template <typename T>
struct Sums {
  static constexpr int kElements = Vector<T>::kElements;
  static constexpr int kVectors = kElements * sizeof(float) / LAR_VECTOR_BYTES;

  // `sums`: of a message, or of a part of it.
  __device__ __forceinline__ static void store(void* sums, int64_t index, const Accumulator<T>& sum) {
    auto* to = static_cast<float4*>(sums) + index * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      to[i] = {sum.sum[4 * i], sum.sum[4 * i + 1], sum.sum[4 * i + 2], sum.sum[4 * i + 3]};
  }

  __device__ __forceinline__ static void add(const void* sums, int64_t index, Accumulator<T>& sum) {
    const auto* from = static_cast<const float4*>(sums) + index * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 part = from[i];
      sum.sum[4 * i] += part.x;
      sum.sum[4 * i + 1] += part.y;
      sum.sum[4 * i + 2] += part.z;
      sum.sum[4 * i + 3] += part.w;
    }
  }
};

// The hosts' sums, one after another.
template <typename T>
class HostSums {
 public:
  // `elements`: of each sum.
  __device__ __forceinline__ HostSums(const void* sums, int hosts, int64_t elements)
      : sums_(static_cast<const char*>(sums)), hosts_(hosts), bytes_(elements * sizeof(float)) {}

  // The vector of the result whose sums come `index` vectors after the beginning.
  __device__ __forceinline__ uint4 rounded(int64_t index) const {
    Accumulator<T> sum;
#pragma unroll 1
    for (int host = 0; host < hosts_; ++host) Sums<T>::add(sums_ + host * bytes_, index, sum);
    return sum.rounded();
  }

 private:
  const char* sums_;
  const int hosts_;
  const int64_t bytes_;
};

// Counts what the host watches. For one thread of the grid.
__device__ __forceinline__ void count_exchange(const lar_workspace& workspace, EpochPlane plane,
                                               volatile uint32_t& exchanges) {
  uint32_t* word = epoch_word(workspace.local, workspace.layout, plane, 0);
  *word = *word + 1;
  exchanges = *word;
}

// Begins a second half. What came of an exchange that has failed must not be read as if it had worked.
__device__ __forceinline__ void begin_second_half(const FlagsArguments& arguments) {
  if (blockIdx.x > 0 || threadIdx.x > 0) return;
  count_exchange(arguments.workspace, EpochPlane::kExchangeEnded, arguments.limit.failure->exchanges_ended);
  if (arguments.limit.failure->state != 0) __trap();
}

template <typename T, lar_algorithm kAlgorithm>
class HalfLane {
 public:
  static constexpr int kElements = Vector<T>::kElements;

  __device__ __forceinline__ explicit HalfLane(const FlagsArguments& arguments)
      : workspace_(arguments.workspace),
        limit_(arguments.limit),
        message_(arguments.message),
        lane_(workspace_, limit_, EpochPlane::kOneShot),
        sum_(part_elements(message_.count, has_parts(kAlgorithm) ? workspace_.layout.world_size : 1)),
        hosts_(arguments.hosts),
        chunk_bytes_(arguments.chunk_vectors * LAR_VECTOR_BYTES),
        cut_{ceil_div(message_.count, kElements), sum_ / kElements, arguments.chunk_vectors,
             static_cast<int>(gridDim.x), lane_.index()},
        epoch_(lane_.epoch()) {}

  __device__ __forceinline__ void run() const {
    lane_.start();
    const int64_t chunks = cut_.chunks();
    if (!(lane_.is_releaser() ? run_one_shot(chunks, Releases{*this}) : run_one_shot(chunks, *this))) return;
    lane_.finish(epoch_ + static_cast<uint32_t>(chunks));
    if (!sums_hosts(kAlgorithm) && lane_.index() == 0 && threadIdx.x == 0)
      count_exchange(workspace_, EpochPlane::kExchangeBegun, limit_.failure->exchanges_begun);
  }

  // Peers in rotated order, so that no GPU is everyone's first target.
  __device__ __forceinline__ bool push(int64_t chunk) const {
    const int copies = shared_copies(workspace_.layout);
    if constexpr (kAlgorithm == LAR_HOST_SUM_GATHER) {
      const Piece own = cut_.piece(chunk, workspace_.rank);
      const int64_t first = own.first - workspace_.rank * cut_.part;
      const HostSums<T> sums(message_.input, hosts_, sum_);
      const Payload<T> output(message_.output, message_.count);
#pragma unroll 1
      for (int64_t i = threadIdx.x; i < own.span; i += lane_.workers()) {
        const uint4 result = sums.rounded(first + i);
        output.store(own.first + i, result);
#pragma unroll 1
        for (int step = 1; step <= copies; ++step) store_slot(slot(peer(step), workspace_.rank, chunk), i, result);
      }
    } else if constexpr (kAlgorithm == LAR_REDUCE) {
      move_input(cut_.piece(chunk, 0), [&](int64_t i, const uint4& mine) {
#pragma unroll 1
        for (int step = 1; step <= copies; ++step) store_slot(slot(peer(step), workspace_.rank, chunk), i, mine);
      });
    } else {
#pragma unroll 1
      for (int step = 1; step < workspace_.layout.world_size; ++step) {
        char* to = slot(peer(step), workspace_.rank, chunk);
        move_input(cut_.piece(chunk, peer(step)), [&](int64_t i, const uint4& mine) { store_slot(to, i, mine); });
      }
    }
    lane_.publish(FlagPlane::kOneShot, round(chunk));
    return true;
  }

  __device__ __forceinline__ bool reduce(int64_t chunk) const {
    constexpr lar_phase kPhase = kAlgorithm == LAR_REDUCE_SCATTER ? LAR_PHASE_SCATTER : LAR_PHASE_GATHER;
    if (!lane_.wait(FlagPlane::kOneShot, kPhase, round(chunk))) return false;
    const int rank = workspace_.rank;
    if constexpr (kAlgorithm == LAR_HOST_SUM_GATHER) {
      const Payload<T> output(message_.output, message_.count);
#pragma unroll 1
      for (int step = 1; step < workspace_.layout.world_size; ++step) {
        const Piece theirs = cut_.piece(chunk, peer(step));
        const int64_t spans[] = {theirs.span};
        const char* from = slot(rank, peer(step), chunk);
        move_vectors(
            spans, lane_.workers(), [&](int, int64_t i) { return load_slot(from, i); },
            [&](int, int64_t i, const uint4& raw) { output.store(theirs.first + i, raw); });
      }
    } else {
      const int part = has_parts(kAlgorithm) ? rank : 0;
      const Piece own = cut_.piece(chunk, part);
      const Payload<T> input(message_.input, message_.count);
#pragma unroll 1
      for (int64_t i = threadIdx.x; i < own.span; i += lane_.workers()) {
        const uint4 mine = input.load(own.first + i);
        const Accumulator<T> sum = accumulate_in_rank_order<T, 0>(workspace_.layout.world_size, [&](int source) {
          return source == rank ? mine : load_slot(slot(rank, source, chunk), i);
        });
        Sums<T>::store(message_.output, own.first - part * cut_.part + i, sum);
      }
    }
    return true;
  }

 private:
  // What the releaser does in the same steps.
  struct Releases {
    const HalfLane& of;
    __device__ __forceinline__ bool push(int64_t chunk) const {
      return of.lane_.deliver(FlagPlane::kOneShot, of.round(chunk));
    }
    __device__ __forceinline__ bool reduce(int64_t) const { return true; }
  };

  // Two loads of each thread in flight: more would not fit the registers beside what a lane keeps.
  template <typename Store>
  __device__ __forceinline__ void move_input(const Piece& piece, Store store) const {
    const Payload<T> input(message_.input, message_.count);
    const int64_t stride = lane_.workers();
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < piece.span; i += 2 * stride) {
      const bool has_next = i + stride < piece.span;
      const uint4 mine = input.load(piece.first + i);
      uint4 next = {0u, 0u, 0u, 0u};
      if (has_next) next = input.load(piece.first + i + stride);
      store(i, mine);
      if (has_next) store(i + stride, next);
    }
  }

  __device__ __forceinline__ uint32_t round(int64_t chunk) const { return epoch_ + static_cast<uint32_t>(chunk) + 1; }
  __device__ __forceinline__ int peer(int step) const {
    return rotated(workspace_.rank, step, workspace_.layout.world_size);
  }

  __device__ __forceinline__ char* slot(int reader, int source, int64_t chunk) const {
    return half_slot(workspace_, kAlgorithm, reader, source, round(chunk), lane_.index(), chunk_bytes_);
  }

  const lar_workspace& workspace_;
  const WaitLimit& limit_;
  const lar_message& message_;
  const Lane<Roles::kWorkersAndReleaser> lane_;
  const int64_t sum_;  // elements of a sum
  const int hosts_;
  const int64_t chunk_bytes_;
  const PartCut cut_;
  const uint32_t epoch_;
};

template <typename T>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    reduce_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  HalfLane<T, LAR_REDUCE>(arguments).run();
}

template <typename T>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    reduce_scatter_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  HalfLane<T, LAR_REDUCE_SCATTER>(arguments).run();
}

template <typename T>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS + kReleaserThreads, 1)
    host_sum_gather_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  begin_second_half(arguments);
  HalfLane<T, LAR_HOST_SUM_GATHER>(arguments).run();
}

// No rank waits for another.
template <typename T>
__global__ void __launch_bounds__(LAR_MAX_FLAGGED_THREADS, 1)
    host_sum_flags_kernel(const __grid_constant__ FlagsArguments arguments) {
  begin_second_half(arguments);
  const lar_message& message = arguments.message;
  const HostSums<T> sums(message.input, arguments.hosts, part_elements(message.count, 1));
  const Payload<T> output(message.output, message.count);
  const int64_t total = ceil_div(message.count, Vector<T>::kElements);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += threads)
    output.store(i, sums.rounded(i));
}

template <typename T>
void add(lar_algorithm algorithm, const void* kernel, int extra_threads) {
  add_row({kind_of(algorithm, LAR_FLAGS), dtype_of<T>(), 0, Form::kAny, kernel, LAR_MAX_FLAGGED_THREADS, extra_threads,
           false});
}

const Registration rows([] {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<0>, Epilogues>([](auto type, auto, auto) {
    using T = typename decltype(type)::type;
    add<T>(LAR_REDUCE, kernel_address(reduce_flags_kernel<T>), kReleaserThreads);
    add<T>(LAR_REDUCE_SCATTER, kernel_address(reduce_scatter_flags_kernel<T>), kReleaserThreads);
    add<T>(LAR_HOST_SUM_GATHER, kernel_address(host_sum_gather_flags_kernel<T>), kReleaserThreads);
    add<T>(LAR_HOST_SUM, kernel_address(host_sum_flags_kernel<T>), 0);
  });
});

}  // namespace
}  // namespace lar
