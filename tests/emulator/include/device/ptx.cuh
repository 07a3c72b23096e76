// What csrc/device/ptx.cuh says in PTX, on a CPU. The names and what they promise are those of that file.
#ifndef LLM_ALLREDUCE_DEVICE_PTX_CUH_
#define LLM_ALLREDUCE_DEVICE_PTX_CUH_

#include "access.h"
#include "switch.h"

#pragma GCC push_options  // see access.h
#pragma GCC optimize("O2", "inline")

// Variables are told apart by the type of a lambda, which every expansion, and every instance of a template around it,
// has for itself.
#define LAR_BLOCK_VARIABLE(type, name) type& name = ::emulator::shared_variable<type>([] {})
#define LAR_BLOCK_ARRAY(type, name, count) type* const name = &::emulator::shared_variable<type, (count)>([] {})
#define LAR_HAS_BULK_COPIES 1

namespace emulator {

template <typename Key>
inline const char shared_key = 0;

template <typename T, size_t kCount = 1, typename Key>
T& shared_variable(Key) {
  Block& block = *machine.self->block;
  const uint32_t offset = block.shared(&shared_key<Key>, sizeof(T) * kCount);
  return *reinterpret_cast<T*>(block.shared_memory(offset));
}

}  // namespace emulator

namespace lar {

inline void store_release_system(uint32_t* address, uint32_t value) {
  emulator::release();
  *address = value;
  emulator::machine.progress();
  emulator::machine.step();
}

inline uint32_t load_acquire_system(const uint32_t* address) {
  emulator::machine.polled();
  return *static_cast<const volatile uint32_t*>(address);
}

inline uint32_t increment_acquire_release_system(uint32_t* address) {
  emulator::release();
  const uint32_t before = *address;
  *address = before + 1;
  emulator::machine.progress();
  emulator::machine.step();
  return before;
}

inline void increment_relaxed_gpu(uint32_t* address) {
  ++*address;
  emulator::machine.step();
}

inline uint32_t load_relaxed_gpu(const uint32_t* address) {
  emulator::machine.step();
  return *address;
}

inline void store_relaxed_system(uint4* address, const uint4& raw) {
  if (!emulator::is_multicast(address)) emulator::store(address, raw);  // what becomes of it there nobody knows
}

inline void load_relaxed_system_if(bool wanted, const void* address, uint4& raw) {
  if (!wanted) return;
  emulator::machine.polled(address);
  raw = emulator::load(static_cast<const uint4*>(address));
}

inline void fill_relaxed_system_if(bool wanted, void* address, uint32_t word) {
  if (wanted) store_relaxed_system(static_cast<uint4*>(address), uint4{word, word, word, word});
}

inline uint4 load_in_order(const uint4* address) { return *address; }

template <typename T>
void store_weak(T* address, const T& value) {
  if constexpr (sizeof(T) == sizeof(uint4)) emulator::before_store_to_own(address);
  emulator::store(address, value);
}

template <typename T>
T load_weak(const T* address) {
  emulator::machine.step();
  return emulator::load(address);
}

inline void store_to_all(uint4* address, const uint4& raw) {
  if (emulator::is_multicast(address)) emulator::store(address, raw);
}

// In any order, as the switch's may be: here, from a random rank on.
template <typename T>
uint4 load_reduced_in_switch(const void* address) {
  emulator::machine.step();
  const std::vector<const char*> own = emulator::behind(address);
  if (own.empty()) emulator::fail("a sum in the switch of what is no multicast memory");
  constexpr int kElements = sizeof(uint4) / sizeof(T);
  float sums[kElements] = {};
  const size_t first = emulator::machine.random().below(own.size());
  for (size_t i = 0; i < own.size(); ++i) {
    const uint4 seen = emulator::through_the_switch(own[(first + i) % own.size()]);
    T values[kElements];
    std::memcpy(values, &seen, sizeof(seen));
    for (int element = 0; element < kElements; ++element) sums[element] += static_cast<float>(values[element]);
  }
  uint4 raw;
  T rounded[kElements];
  for (int element = 0; element < kElements; ++element) rounded[element] = static_cast<T>(sums[element]);
  std::memcpy(&raw, rounded, sizeof(raw));
  return raw;
}

inline void fence_between_addresses() {
  emulator::fence_addresses();
  emulator::machine.step();
}

inline int64_t global_timer_ns() { return emulator::machine.now_ns(); }

inline void wait_for_previous_kernel() { emulator::machine.previous_kernel(); }
inline void let_next_kernel_start() { emulator::machine.let_next_kernel_start(); }

template <int kBarrier>
void barrier_sync(uint32_t threads) {
  emulator::machine.self->block->meet_at(kBarrier, emulator::Meeting::kBarrier, threads, true, true);
}

template <int kBarrier>
void barrier_arrive(uint32_t threads) {
  emulator::machine.self->block->meet_at(kBarrier, emulator::Meeting::kBarrier, threads, true, false);
}

template <int kBarrier>
bool barrier_all(uint32_t threads, bool value) {
  return emulator::machine.self->block->meet_at(kBarrier, emulator::Meeting::kBarrierAnd, threads, value, true) != 0;
}

template <int kCount>
void compute_here(float (&)[kCount]) {}

// Every block is a cluster of its own.
struct Cluster {
  uint32_t size;
  uint32_t block;
  uint32_t index;
  uint32_t number;
};
inline Cluster cluster() { return {1, 0, blockIdx.x, gridDim.x}; }
inline void begin_byte_barrier(uint64_t*) { emulator::fail("there are no clusters"); }
inline void let_cluster_in() { emulator::fail("there are no clusters"); }
inline void wait_for_cluster() { emulator::fail("there are no clusters"); }
inline void store_in_cluster(void*, uint64_t*, uint32_t, uint32_t) { emulator::fail("there are no clusters"); }
inline void expect_bytes(uint64_t*, uint32_t) { emulator::fail("there are no clusters"); }
inline void wait_for_bytes(uint64_t*, uint32_t) { emulator::fail("there are no clusters"); }

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - emulator::machine.self->block->shared_memory(0));
}

inline void store_shared(uint32_t address, const uint4& raw) {
  std::memcpy(emulator::machine.self->block->shared_memory(address), &raw, sizeof(raw));
  emulator::machine.self->copies.stored(address);
  emulator::machine.step();
}

inline void fence_before_bulk_copies() { emulator::machine.self->copies.fence_stores(*emulator::machine.self->block); }

inline void copy_bulk(void* to, uint32_t from_shared, uint32_t bytes) {
  emulator::machine.self->copies.add(to, from_shared, bytes);
  emulator::machine.self->block->add_copies();
  emulator::machine.step();
}

inline void commit_bulk_copies() {
  emulator::machine.self->copies.commit();
  emulator::machine.step();
}

template <int kPending>
void wait_for_bulk_reads() {
  emulator::machine.self->copies.read(*emulator::machine.self->block, kPending, emulator::machine.self);
  emulator::machine.step();
}

template <int kPending>
void wait_for_bulk_writes() {
  emulator::machine.self->copies.complete(*emulator::machine.self->block, kPending, emulator::machine.self);
  emulator::machine.step();
}

inline void fence_behind_bulk_copies() {
  emulator::machine.self->copies.fence_copies(*emulator::machine.self->block, emulator::machine.self);
}

}  // namespace lar

#pragma GCC pop_options

#endif  // LLM_ALLREDUCE_DEVICE_PTX_CUH_
