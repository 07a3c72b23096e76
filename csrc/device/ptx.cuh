// Everything of the hardware that C++ has no name for: accesses with an order and a scope, barriers, the timer,
// dependent launch, bulk copies, shared memory. One function for each, and no other file has PTX. tests/emulator/ has a
// second version of this file, in which the same kernels run on a CPU.
//
// "System": the other side may be another GPU, or the host. Relaxed accesses are in no order with anything else.
#ifndef LLM_ALLREDUCE_DEVICE_PTX_CUH_
#define LLM_ALLREDUCE_DEVICE_PTX_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// A variable, and an array, of which each block has one.
#define LAR_BLOCK_VARIABLE(type, name) __shared__ type name
#define LAR_BLOCK_ARRAY(type, name, count) __shared__ __align__(128) type name[count]

namespace lar {

// Whether bulk copies can be used (sm_90 and newer), which also have dependent launch.
#if __CUDA_ARCH__ >= 900
#define LAR_HAS_BULK_COPIES 1
#else
#define LAR_HAS_BULK_COPIES 0
#endif

// -- flags and counts

__device__ __forceinline__ void store_release_system(uint32_t* address, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Adds 1; what was there before.
__device__ __forceinline__ uint32_t increment_acquire_release_system(uint32_t* address) {
  uint32_t before;
  asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(address) : "memory");
  return before;
}

__device__ __forceinline__ void increment_relaxed_gpu(uint32_t* address) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(address) : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

// -- vectors

// Whole 32-bit words, each for itself.
__device__ __forceinline__ void store_relaxed_system(uint4* address, const uint4& raw) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w));
}

// Predicated, not branched around: the loads of all peers must leave together.
__device__ __forceinline__ void load_relaxed_system_if(bool wanted, const void* address, uint4& raw) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w)
      : "l"(address), "r"(static_cast<uint32_t>(wanted)));
}

// The same word four times.
__device__ __forceinline__ void fill_relaxed_system_if(bool wanted, void* address, uint32_t word) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %2, 0;\n\t"
      "@p st.relaxed.sys.global.v4.u32 [%0], {%1, %1, %1, %1};\n\t}" ::"l"(address),
      "r"(word), "r"(static_cast<uint32_t>(wanted)));
}

// A load where the program says so, not through the read-only path.
__device__ __forceinline__ uint4 load_in_order(const uint4* address) {
  uint4 raw;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(address));
  return raw;
}

// What becomes visible to others with the next release behind it, and is read after an acquire. Loads skip L1: peers
// write these lines behind its back.
template <typename T>
__device__ __forceinline__ void store_weak(T* address, const T& value) {
  *address = value;
}

template <typename T>
__device__ __forceinline__ T load_weak(const T* address) {
  return __ldcg(address);
}

// -- multicast memory: stores that reach every rank, sums in the switch, and other names of the same memory

// To an address of multicast memory, where only such instructions may go. Whole 32-bit words, each for itself, whatever
// they mean: to this instruction they are called floats, but nothing computes with them. sm_90 and newer.
__device__ __forceinline__ void store_to_all(uint4* address, const uint4& raw) {
#if __CUDA_ARCH__ >= 900
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "f"(__uint_as_float(raw.x)), "f"(__uint_as_float(raw.y)), "f"(__uint_as_float(raw.z)),
               "f"(__uint_as_float(raw.w)));
#else
  (void)address;
  (void)raw;
  __trap();
#endif
}

// What lies at this address of multicast memory on every rank, as the switch sums it, in no order that anybody knows.
// At least fp32 is asked for; what the switch does differs per generation, and is not documented. sm_90 and newer;
// kernels that ask for it are not launched elsewhere.
template <typename T>
__device__ __forceinline__ uint4 load_reduced_in_switch(const void* address) {
  uint4 raw = {0u, 0u, 0u, 0u};
#if __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<T, float>) {
    float4 sum;
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(sum.x), "=f"(sum.y), "=f"(sum.z), "=f"(sum.w)
                 : "l"(address)
                 : "memory");
    raw = {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w)};
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(address)
                 : "memory");
  } else {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(address)
                 : "memory");
  }
#else
  (void)address;
  __trap();
#endif
  return raw;
}

// Between accesses to the same memory by two addresses of it.
__device__ __forceinline__ void fence_between_addresses() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// -- the timer and dependent launch

__device__ __forceinline__ int64_t global_timer_ns() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Programmatic dependent launch (sm_90 and newer; nothing elsewhere). The first call returns once every earlier kernel
// of the stream has ended and its writes are visible: to be called before memory is touched. The second lets the next
// kernel's blocks be scheduled as soon as all of this kernel's have been; what they may read is decided by their own
// wait.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// -- barriers of a block, beside that of __syncthreads(), which is number 0

// For `threads` threads, of which this one waits.
template <int kBarrier>
__device__ __forceinline__ void barrier_sync(uint32_t threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// The same, but this thread only arrives.
template <int kBarrier>
__device__ __forceinline__ void barrier_arrive(uint32_t threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// All wait; whether all said yes.
template <int kBarrier>
__device__ __forceinline__ bool barrier_all(uint32_t threads, bool value) {
  uint32_t all;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\t"
      "barrier.cta.red.and.pred q, %2, %3, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(all)
      : "r"(static_cast<uint32_t>(value)), "n"(kBarrier), "r"(threads)
      : "memory");
  return all != 0;
}

// Has these values computed here. By itself the compiler computes them where they are used, which may be behind a wait.
template <int kCount>
__device__ __forceinline__ void compute_here(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i]));
}

// -- clusters: blocks that run together and reach each other's shared memory (sm_90 and newer; elsewhere a block is a
// cluster of its own)

struct Cluster {
  uint32_t size;    // blocks
  uint32_t block;   // this one's place in it
  uint32_t index;   // in the grid
  uint32_t number;  // of the grid's clusters
};

__device__ __forceinline__ Cluster cluster() {
#if __CUDA_ARCH__ >= 900
  Cluster of;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(of.size));
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(of.block));
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(of.index));
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(of.number));
  return of;
#else
  return {1, 0, blockIdx.x, gridDim.x};
#endif
}

// Words that blocks of a cluster store into each other's shared memory, and a barrier there that counts their bytes: it
// completes a phase when as many have arrived as this block expects. No fence: the bytes bring their own news.
#if LAR_HAS_BULK_COPIES
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// For one thread of each block, before let_cluster_in().
__device__ __forceinline__ void begin_byte_barrier(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
      : "memory");
#endif
}

// For all threads: this block's barriers are ready; and: those of all blocks are.
__device__ __forceinline__ void let_cluster_in() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// To where `shared` lies in block `block` of the cluster, whose `barrier` counts 4 bytes.
__device__ __forceinline__ void store_in_cluster(void* shared, uint64_t* barrier, uint32_t block, uint32_t word) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 there, counts;\n\tmapa.shared::cluster.u32 there, %0, %2;\n\t"
      "mapa.shared::cluster.u32 counts, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [counts];\n\t}" ::"r"(
          shared_address(shared)),
      "r"(shared_address(barrier)), "r"(block), "r"(word)
      : "memory");
#endif
}

// For one thread of the block, in every phase, before or after the bytes come.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity is complete: a block that has not stored its words ends with the kernel, too.
__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
}

// -- bulk copies from shared memory, whose addresses have 32 bits

#if LAR_HAS_BULK_COPIES
__device__ __forceinline__ void store_shared(uint32_t address, const uint4& raw) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

// Between this thread's stores to shared memory and the copies of them: the engine that copies is another proxy.
__device__ __forceinline__ void fence_before_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void copy_bulk(void* to, uint32_t from_shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from_shared), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_bulk_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all groups of this thread but the newest `kPending` have been read from shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// The same until they have been written.
template <int kPending>
__device__ __forceinline__ void wait_for_bulk_writes() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Between copies that have been written and a release of this thread, or of one that it meets: the engine that has
// copied is another proxy.
__device__ __forceinline__ void fence_behind_bulk_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
#endif

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_PTX_CUH_
