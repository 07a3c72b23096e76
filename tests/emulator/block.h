// A block of threads: where they meet, and what they share.
#ifndef LLM_ALLREDUCE_EMULATOR_BLOCK_H_
#define LLM_ALLREDUCE_EMULATOR_BLOCK_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "bulk.h"
#include "fiber.h"
#include "stores.h"

namespace emulator {

struct Block;
struct Grid;

constexpr uint32_t kWarpThreads = 32;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  uint32_t result = 0;  // of what it has met others in
  uint32_t place = 0;   // among those of its stream that may run
  bool polls = false;
  bool blocked = false;
  bool ended = false;
  BulkCopies copies;

  uint32_t warp() const { return index.x / kWarpThreads; }
  uint32_t lane() const { return index.x % kWarpThreads; }
};

// The threads of a stream that may run: those that have something to do, and those whose last poll came to nothing.
struct Runnable {
  std::vector<Thread*> ready;
  std::vector<Thread*> polling;

  bool empty() const { return ready.empty() && polling.empty(); }
  void add(Thread* thread, bool polls);
  void remove(Thread* thread);
};

// What threads meet in. All that meet must call the same.
enum class Meeting : int { kNone, kSync, kAnd, kOr, kAll, kAny, kShuffle, kMax, kBarrier, kBarrierAnd };

// Where threads meet: all that are expected, then all go on.
struct Meet {
  Meeting what = Meeting::kNone;
  uint32_t arrived = 0;
  uint32_t values[kWarpThreads] = {};  // of a warp
  uint32_t sources[kWarpThreads] = {};
  uint32_t present = 0;  // of a warp: bit l: lane l has arrived
  bool all = true;
  bool any = false;
  std::vector<Thread*> waiting;
};

struct Block {
  static constexpr int kBarriers = 16;

  Block(Grid* grid_, uint32_t number, dim3 threads);

  // For the thread that runs. Of the whole block: every thread that has not ended.
  uint32_t meet(Meeting what, bool value);
  // Of a barrier with a number, for so many threads; only whoever waits stays.
  uint32_t meet_at(int barrier, Meeting what, uint32_t number, bool value, bool waits);
  // Of the warp.
  uint32_t meet_warp(Meeting what, uint32_t value, uint32_t source);

  // For the thread that runs: it has come to its end.
  void leave();

  // For the thread that runs: it has begun bulk copies.
  void add_copies();

  // A word or a copy that is under way, by chance. `polled`: somebody waits, and these are the vectors that threads
  // have looked at since anything has changed; null: nobody does. False when there is none that may come now.
  bool advance(const std::vector<uintptr_t>* polled);
  bool has_any_under_way() const { return !copying.empty() || !stores.empty() || stores.has_late(); }

  // Stores to host memory that kernels of this GPU have left under way at their end; null if there are none.
  StoreBuffer* left_by_kernels() const;

  // Of the variable with this key, zeroed the first time; its offset.
  uint32_t shared(const void* key, size_t bytes);
  char* shared_memory(uint32_t offset) { return shared_memory_.get() + offset; }

  // The same as the engine of bulk copies sees it: what it has not been shown is not what lies there.
  const char* engine_memory(uint32_t offset) const { return engine_memory_.get() + offset; }
  void show_engine(uint32_t offset, uint32_t bytes);

  Grid* grid;
  uint3 index{};
  dim3 size;
  uint32_t live;
  bool lets_next_start = false;
  bool is_under_way = false;
  std::vector<Thread*> copying;  // with groups of bulk copies that have not been read
  std::deque<Thread> threads;
  StoreBuffer stores;

 private:
  static constexpr size_t kSharedBytes = 48 << 10;  // that need no opting in

  void arrive(Meet& meet, Meeting what, bool value);
  void finish(Meet& meet);
  void finish_warp(uint32_t warp);
  void lose_shared_memory();

  Meet barriers_[kBarriers];
  std::vector<Meet> warps_;
  std::vector<uint32_t> live_in_warp_;
  struct Variable {
    const void* key;
    uint32_t offset;
  };
  std::vector<Variable> variables_;
  std::unique_ptr<char[]> shared_memory_;
  std::unique_ptr<char[]> engine_memory_;
  uint32_t shared_bytes_ = 0;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_BLOCK_H_
