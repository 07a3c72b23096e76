// What kernels do with memory: each access is a step, after which another thread may run.
#ifndef LLM_ALLREDUCE_EMULATOR_ACCESS_H_
#define LLM_ALLREDUCE_EMULATOR_ACCESS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

// Kernels are compiled without optimization (tests/support/emulator.py), but not what they call most.
#pragma GCC push_options
#pragma GCC optimize("O2", "inline")

namespace emulator {

inline constexpr uint32_t kWordBytes = 4;

// Stores into the block's buffer, from which words arrive in memory later.
inline void store_word(Block& block, const StoreBuffer::Word& word) {
  machine.progress();
  if (StoreBuffer* left = block.left_by_kernels()) left->arrive_at(word.address);
  if (word.copier && machine.schedule().copies_are_late) {
    block.stores.add_late(word);
    machine.add_under_way(&block);
    return;
  }
  const uint32_t most = machine.schedule().stores_under_way;
  if (most == 0) {
    std::memcpy(word.address, &word.value, word.bytes);
    return;
  }
  block.stores.add(word);
  machine.add_under_way(&block);
  while (block.stores.size() > most) block.stores.arrive(machine.random());
}

// Word by word, or in one piece what is smaller.
template <typename T>
void store(T* address, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) <= kWordBytes || sizeof(T) % kWordBytes == 0);
  constexpr uint32_t kBytes = sizeof(T) < kWordBytes ? sizeof(T) : kWordBytes;
  for (uint32_t at = 0; at < sizeof(T); at += kBytes) {
    uint32_t word = 0;
    std::memcpy(&word, reinterpret_cast<const char*>(&value) + at, kBytes);
    store_word(*machine.self->block, {reinterpret_cast<char*>(address) + at, machine.self, word, kBytes});
  }
  machine.step();
}

template <typename T>
T load(const T* address) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, address, sizeof(value));
  const StoreBuffer* left = machine.self->block->left_by_kernels();
  if (left) {
    left->see(machine.self, address, sizeof(value), &value);
    left->see_late(address, sizeof(value), &value);
  }
  const StoreBuffer& stores = machine.self->block->stores;
  if (!stores.empty()) stores.see(machine.self, address, sizeof(value), &value);
  return value;
}

// All that this thread and those it has met have stored arrives.
inline void release() { machine.self->block->stores.release(machine.self); }

}  // namespace emulator

#pragma GCC pop_options

#endif  // LLM_ALLREDUCE_EMULATOR_ACCESS_H_
