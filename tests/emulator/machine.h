// GPUs, streams, kernels and their threads, and who of them runs next.
#ifndef LLM_ALLREDUCE_EMULATOR_MACHINE_H_
#define LLM_ALLREDUCE_EMULATOR_MACHINE_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "random.h"
#include "schedule.h"

namespace emulator {

struct Stream;

// How to call a kernel: it is given the addresses of its parameters, copies them, and returns the body of a thread.
using BindKernel = std::function<void()> (*)(const void* kernel, void* const* parameters);

// A kernel that was launched.
struct Grid {
  Stream* stream = nullptr;
  std::function<void()> body;
  dim3 blocks;
  dim3 threads;
  bool may_start_early = false;  // with programmatic dependent launch
  bool is_cooperative = false;
  uint32_t started = 0;  // blocks, in order
  uint32_t ended = 0;
  uint32_t letting = 0;                          // blocks that have let the next kernel start, or have ended
  std::vector<std::unique_ptr<Block>> resident;  // kept until all have ended: their stores may still be on their way
  std::vector<Thread*> waiting;                  // for the end of the kernel before

  bool has_started() const { return started == blocks.x; }
  bool has_ended() const { return ended == blocks.x; }
};

struct Event {
  uint64_t after = 0;  // kernels of `stream` that come before it
  Stream* stream = nullptr;
};

// What a stream was given: a kernel, or the wait for an event.
struct Work {
  std::unique_ptr<Grid> grid;
  Event event;
};

struct Device;

struct Stream {
  Device* device = nullptr;
  int number = 0;
  std::deque<Work> work;
  uint64_t launched = 0;
  uint64_t ended = 0;
  Runnable runnable;
};

struct Device {
  int number = 0;
  int multiprocessors = 132;
  int blocks_per_multiprocessor = 16;
  int resident = 0;  // blocks
  // Of no kernel and without threads: the stores to host memory that ended kernels have left under way.
  std::shared_ptr<Block> left;
  bool broken = false;
};

class Machine {
 public:
  static constexpr int kDevices = 128;

  Machine();

  // Forgets all streams and what they were given, and mends devices. `seed`: of everything random.
  void reset(uint64_t seed);

  Device& device(int number) { return devices_[number]; }
  Stream* add_stream(int device);
  bool has(const Stream* stream) const;

  void launch(Stream* stream, std::unique_ptr<Grid> grid);
  void wait_for(Stream* stream, const Event& event);
  bool has_happened(const Event& event) const { return event.stream->ended >= event.after; }

  // Until all streams have done all that they were given. An error in words if that cannot be; empty otherwise.
  std::string run();

  // -- for threads

  // Lets others run, now or soon. A poll that came to nothing is one for which others had better run.
  void step();
  void polled();
  void polled(const void* vector);

  // Until wake() is called for this thread.
  void block();
  void wake(Thread* thread);

  void previous_kernel();
  void let_next_kernel_start();
  [[noreturn]] void break_device();

  // This block has stores or copies that are not everywhere yet.
  void add_under_way(Block* block);

  // What lies there is host memory, until reset().
  void add_host_memory(const char* first, size_t bytes) { host_memory_.push_back({first, first + bytes}); }

  // Something was done that GPUs do not bear: run() ends, and says so.
  void fault(const std::string& text) { fault_ = text; }

  // Something has changed that a poll might have waited for.
  void progress() {
    fruitless_ = 0;
    vain_ = 0;
    polled_.clear();
  }

  int64_t now_ns() const { return now_ns_; }
  Random& random() { return random_; }
  Schedule& schedule() { return schedule_; }

  Thread* self = nullptr;

 private:
  void switch_away(bool polls);
  void add_runnable(Thread* thread, bool polls);
  void remove_runnable(Thread* thread);
  void let_stores_arrive();
  void forget_under_way(const Grid& grid);
  void leave_to_device(Block& block);
  bool is_host(const char* address) const;
  void let_all_arrive();
  void start_blocks();
  bool start_blocks_of(Stream& stream);
  void end_block(Block& block);
  void run_thread(Thread* thread);
  void forget_grids(Device& device);
  bool is_starved(const Thread& thread) const;
  Thread* pick();
  Stream* pick_stream();
  bool is_idle() const;
  std::string what_stands() const;

  std::vector<Device> devices_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Stream*> candidates_;  // in order: those of whose threads one may run
  bool are_candidates_old_ = true;
  size_t runnable_threads_ = 0;  // of all streams
  std::vector<Block*> under_way_;
  Random random_{0};
  Schedule schedule_{0};
  int64_t now_ns_ = 1;
  uint32_t budget_ = 0;
  uint64_t fruitless_ = 0;         // polls in a row, of all threads, that came to nothing
  uint64_t vain_ = 0;              // as many at the last try to let come what they wait for, of which nothing came
  std::vector<uintptr_t> polled_;  // the vectors, by their number in memory, that they looked at; the newest
  bool idle_ = false;
  size_t turn_ = 0;
  bool may_start_blocks_ = false;
  bool broke_ = false;
  std::string fault_;
  std::vector<std::pair<const char*, const char*>> host_memory_;
};

extern Machine machine;

inline StoreBuffer* Block::left_by_kernels() const {
  const Block* left = grid->stream->device->left.get();
  return left && left->has_any_under_way() ? const_cast<StoreBuffer*>(&left->stores) : nullptr;
}

// For sources with errors patched into them: which of them is made.
inline int mutation = 0;

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_MACHINE_H_
