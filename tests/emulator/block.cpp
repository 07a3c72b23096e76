#include "block.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"
#include "report.h"

namespace emulator {

namespace {
constexpr int kForeignByte = 0x3c;  // what others have left in shared memory; no word of it is the in-band marker
}

void Runnable::add(Thread* thread, bool polls) {
  std::vector<Thread*>& list = polls ? polling : ready;
  thread->polls = polls;
  thread->place = static_cast<uint32_t>(list.size());
  list.push_back(thread);
}

void Runnable::remove(Thread* thread) {
  std::vector<Thread*>& list = thread->polls ? polling : ready;
  list.back()->place = thread->place;
  list[thread->place] = list.back();
  list.pop_back();
}

Block::Block(Grid* grid_, uint32_t number, dim3 threads_of_block) : grid(grid_), size(threads_of_block) {
  index = {number, 0, 0};
  live = size.x;
  warps_.resize((live + kWarpThreads - 1) / kWarpThreads);
  live_in_warp_.assign(warps_.size(), 0);
  for (uint32_t i = 0; i < live; ++i) {
    Thread& thread = threads.emplace_back();
    thread.block = this;
    thread.index = {i, 0, 0};
    ++live_in_warp_[i / kWarpThreads];
  }
}

void Block::arrive(Meet& meet, Meeting what, bool value) {
  if (meet.what != Meeting::kNone && meet.what != what)
    fail("threads wait for each other at one barrier in different functions");
  meet.what = what;
  ++meet.arrived;
  meet.all &= value;
  meet.any |= value;
}

void Block::finish(Meet& meet) {
  machine.progress();
  const bool result = meet.what == Meeting::kOr ? meet.any : meet.all;
  const std::vector<Thread*> waiting = std::move(meet.waiting);
  meet = {};
  for (Thread* thread : waiting) {
    thread->result = result;
    machine.wake(thread);
  }
}

uint32_t Block::meet(Meeting what, bool value) {
  Meet& meet = barriers_[0];
  arrive(meet, what, value);
  meet.waiting.push_back(machine.self);
  if (meet.arrived == live) {
    stores.share();
    finish(meet);
    machine.step();
  } else {
    machine.block();
  }
  return machine.self->result;
}

uint32_t Block::meet_at(int barrier, Meeting what, uint32_t number, bool value, bool waits) {
  Meet& meet = barriers_[barrier];
  arrive(meet, what, value);
  stores.share(machine.self->index.x, machine.self->index.x + 1);
  if (waits) meet.waiting.push_back(machine.self);
  if (meet.arrived == number) {
    finish(meet);
    machine.step();
  } else if (waits) {
    machine.block();
  } else {
    machine.step();
  }
  return machine.self->result;
}

uint32_t Block::meet_warp(Meeting what, uint32_t value, uint32_t source) {
  const uint32_t warp = machine.self->warp();
  Meet& meet = warps_[warp];
  const uint32_t lane = machine.self->lane();
  arrive(meet, what, value != 0);
  meet.values[lane] = value;
  meet.sources[lane] = source;
  meet.present |= 1u << lane;
  meet.waiting.push_back(machine.self);
  if (meet.arrived == live_in_warp_[warp]) {
    finish_warp(warp);
    machine.step();
  } else {
    machine.block();
  }
  return machine.self->result;
}

void Block::finish_warp(uint32_t warp) {
  machine.progress();
  stores.share(warp * kWarpThreads, (warp + 1) * kWarpThreads);
  Meet& meet = warps_[warp];
  uint32_t largest = 0;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane)
    if ((meet.present >> lane & 1u) != 0 && meet.values[lane] > largest) largest = meet.values[lane];
  for (Thread* thread : meet.waiting) {
    switch (meet.what) {
      case Meeting::kAll:
        thread->result = meet.all;
        break;
      case Meeting::kAny:
        thread->result = meet.any;
        break;
      case Meeting::kMax:
        thread->result = largest;
        break;
      case Meeting::kShuffle: {
        const uint32_t source = meet.sources[thread->lane()] % kWarpThreads;
        if ((meet.present >> source & 1u) == 0) fail("__shfl_sync() from a thread that has ended");
        thread->result = meet.values[source];
        break;
      }
      default:
        thread->result = 0;
    }
  }
  const std::vector<Thread*> waiting = std::move(meet.waiting);
  meet = {};
  for (Thread* thread : waiting) machine.wake(thread);
}

void Block::leave() {
  Thread* self = machine.self;
  if (--live == 0) {
    lose_shared_memory();
    for (int barrier = 0; barrier < kBarriers; ++barrier)
      if (barriers_[barrier].arrived != 0)
        machine.fault("a block has ended with threads at barrier " + std::to_string(barrier) +
                      " that others should have met there");
  }
  const uint32_t warp = self->warp();
  --live_in_warp_[warp];
  // Those who wait do not wait for threads that have ended.
  if (live > 0 && barriers_[0].arrived == live) {
    stores.share();
    finish(barriers_[0]);
  }
  if (live_in_warp_[warp] > 0 && warps_[warp].arrived == live_in_warp_[warp]) finish_warp(warp);
}

void Block::add_copies() {
  if (std::find(copying.begin(), copying.end(), machine.self) == copying.end()) copying.push_back(machine.self);
  machine.add_under_way(this);
}

bool Block::advance(const std::vector<uintptr_t>* polled) {
  const bool is_late = machine.schedule().copies_are_late;
  const auto is_read = [](const Thread* thread) { return !thread->copies.has_unread(); };
  copying.erase(std::remove_if(copying.begin(), copying.end(), is_read), copying.end());
  const bool may_read = !copying.empty() && (polled || !is_late);
  if (may_read && (stores.empty() || machine.random().once_in(2))) {
    Thread* thread = copying[machine.random().below(copying.size())];
    thread->copies.read_any(*this, machine.random(), thread);
    return true;
  }
  if (polled && !polled->empty() && stores.has_late() && (stores.empty() || machine.random().once_in(2)) &&
      stores.arrive_late(machine.random(), *polled))
    return true;
  if (stores.empty()) return false;
  stores.arrive(machine.random());
  return true;
}

void Block::show_engine(uint32_t offset, uint32_t bytes) {
  std::memcpy(engine_memory_.get() + offset, shared_memory_.get() + offset, bytes);
}

// Another block has it now: copies that nobody has waited for read anything.
void Block::lose_shared_memory() {
  if (engine_memory_) std::memset(engine_memory_.get(), kForeignByte, shared_bytes_);
  for (Thread& thread : threads) thread.copies.read_all(*this, &thread);
  copying.clear();
}

uint32_t Block::shared(const void* key, size_t bytes) {
  for (const Variable& variable : variables_)
    if (variable.key == key) return variable.offset;
  if (!shared_memory_) {
    shared_memory_.reset(new char[2 * kSharedBytes]());
    engine_memory_.reset(new char[2 * kSharedBytes]);
    std::memset(engine_memory_.get(), kForeignByte, 2 * kSharedBytes);
  }
  const auto offset = (shared_bytes_ + 127) / 128 * 128;
  shared_bytes_ = offset + static_cast<uint32_t>(bytes);
  if (shared_bytes_ > kSharedBytes + 1024) fail("a block has more shared memory than there is without opting in");
  variables_.push_back({key, offset});
  return offset;
}

}  // namespace emulator
