#include "machine.h"

#include <algorithm>

#include "llm_allreduce.h"
#include "report.h"

// The variables that kernels have.
uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace emulator {

Machine machine;

namespace {

constexpr int64_t kStepNs = 10;
// While nothing happens but polls, time runs faster: a wait ends after some hundred polls of its thread, not billions.
constexpr int64_t kIdleRoundNs = 500'000'000;  // of kPollsPerRound polls of every thread
constexpr int64_t kPollsPerRound = 256;
constexpr size_t kPolledVectors = 8192;
constexpr uint32_t kMostLateWords = 4096;
constexpr uint32_t kMostLeft = 4;  // times as many words of a GPU as a block has under way
constexpr int kTries = 16;         // to find somebody who is not starved

}  // namespace

Machine::Machine() : devices_(kDevices) {
  for (int i = 0; i < kDevices; ++i) devices_[i].number = i;
}

void Machine::reset(uint64_t seed) {
  streams_.clear();
  are_candidates_old_ = true;
  runnable_threads_ = 0;
  under_way_.clear();
  fault_.clear();
  host_memory_.clear();
  devices_.assign(kDevices, Device{});
  for (int i = 0; i < kDevices; ++i) devices_[i].number = i;
  random_ = Random(seed);
  schedule_ = Schedule(seed);
  progress();
  idle_ = false;
}

Stream* Machine::add_stream(int device) {
  auto& stream = streams_.emplace_back(std::make_unique<Stream>());
  stream->device = &devices_[device];
  stream->number = static_cast<int>(streams_.size()) - 1;
  return stream.get();
}

bool Machine::has(const Stream* stream) const {
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& other) { return other.get() == stream; });
}

void Machine::launch(Stream* stream, std::unique_ptr<Grid> grid) {
  grid->stream = stream;
  ++stream->launched;
  stream->work.push_back({std::move(grid), {}});
}

void Machine::wait_for(Stream* stream, const Event& event) { stream->work.push_back({nullptr, event}); }

// -- what is under way

void Machine::add_under_way(Block* block) {
  if (block->is_under_way) return;
  block->is_under_way = true;
  under_way_.push_back(block);
}

void Machine::let_stores_arrive() {
  if (under_way_.empty()) return;
  // Those who wait for what is under way must get it, and all of it: what arrives may be long in coming, not for ever.
  const bool is_waited_for = fruitless_ > vain_ + 4 * runnable_threads_;
  if (!is_waited_for && (schedule_.arrivals == 0 || !random_.once_in(schedule_.arrivals))) return;
  const std::vector<uintptr_t> polled = is_waited_for ? polled_ : std::vector<uintptr_t>();
  const bool of_all = is_waited_for && schedule_.copies_are_late;  // they wait for few words of many blocks
  uint32_t words = of_all ? 1 + random_.below(kMostLateWords) : is_waited_for ? 1 + random_.below(256) : 1;
  size_t chosen = random_.below(under_way_.size());
  for (size_t blocks = of_all ? under_way_.size() : 1; blocks > 0 && words > 0; --blocks) {
    Block* block = under_way_[chosen];
    for (; words > 0 && block->advance(is_waited_for ? &polled : nullptr); --words) progress();
    if (block->has_any_under_way()) {
      ++chosen;
    } else {
      block->is_under_way = false;
      under_way_[chosen] = under_way_.back();
      under_way_.pop_back();
    }
    if (chosen >= under_way_.size()) chosen = 0;
  }
  if (is_waited_for) vain_ = fruitless_;  // nothing has come: it takes as many polls before the next try
}

bool Machine::is_host(const char* address) const {
  return std::any_of(host_memory_.begin(), host_memory_.end(),
                     [&](const auto& range) { return range.first <= address && address < range.second; });
}

void Machine::leave_to_device(Block& block) {
  std::shared_ptr<Block>& left = block.grid->stream->device->left;
  if (!left) left = std::make_shared<Block>(nullptr, 0, dim3(0, 1, 1));
  block.stores.leave(left->stores, [&](const char* address) { return is_host(address); }, schedule_.copies_are_late);
  while (left->stores.size() > kMostLeft * schedule_.stores_under_way) left->stores.arrive(random_);
  if (left->has_any_under_way()) add_under_way(left.get());
}

// The host has waited for all kernels.
void Machine::let_all_arrive() {
  for (Device& device : devices_)
    if (device.left) device.left->stores.arrive_all();
}

// A kernel that ends leaves nothing under way but stores to host memory that no release of it has waited for.
void Machine::forget_under_way(const Grid& grid) {
  for (const auto& block : grid.resident) {
    if (host_memory_.empty() || block->stores.empty())
      block->stores.arrive_all();
    else
      leave_to_device(*block);
    if (block->is_under_way) under_way_.erase(std::find(under_way_.begin(), under_way_.end(), block.get()));
  }
}

// -- which thread runs

void Machine::step() {
  now_ns_ += kStepNs;
  if (budget_ > 1) {
    --budget_;
    return;
  }
  switch_away(false);
}

void Machine::polled() {
  now_ns_ += kStepNs;
  ++fruitless_;
  if (budget_ > 4) {
    budget_ -= 4;
    return;
  }
  switch_away(true);
}

void Machine::polled(const void* vector) {
  const uintptr_t number = reinterpret_cast<uintptr_t>(vector) / LAR_VECTOR_BYTES;
  if (polled_.size() < kPolledVectors)
    polled_.push_back(number);
  else
    polled_[fruitless_ % kPolledVectors] = number;
  polled();
}

void Machine::add_runnable(Thread* thread, bool polls) {
  Runnable& runnable = thread->block->grid->stream->runnable;
  are_candidates_old_ |= runnable.empty();
  runnable.add(thread, polls);
  ++runnable_threads_;
}

void Machine::remove_runnable(Thread* thread) {
  Runnable& runnable = thread->block->grid->stream->runnable;
  runnable.remove(thread);
  are_candidates_old_ |= runnable.empty();
  --runnable_threads_;
}

void Machine::switch_away(bool polls) {
  add_runnable(self, polls);
  self->fiber.pause();
}

void Machine::block() {
  self->blocked = true;
  self->fiber.pause();
}

void Machine::wake(Thread* thread) {
  if (!thread->blocked) return;
  thread->blocked = false;
  add_runnable(thread, false);
}

void Machine::run_thread(Thread* thread) {
  thread->fiber.expect();
  Stream& stream = *thread->block->grid->stream;
  remove_runnable(thread);
  budget_ = 1 + random_.below(schedule_.burst);
  self = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  blockDim = thread->block->size;
  gridDim = thread->block->grid->blocks;
  thread->fiber.resume();
  self = nullptr;
  if (broke_) {
    broke_ = false;
    forget_grids(*stream.device);
  } else if (thread->ended && thread->block->live == 0) {
    end_block(*thread->block);
  }
}

// Nothing but polls for so long that none can come to anything: all that was stored has arrived, and every thread that
// can has run many times since.
bool Machine::is_idle() const {
  if (fruitless_ < 64 * 16) return false;
  return fruitless_ > 64 * (runnable_threads_ + 16);
}

// Of the candidates. One that is favoured goes as far as it can, one that is held back waits for as long as others can
// go on, mostly.
Stream* Machine::pick_stream() {
  Stream* chosen = candidates_[random_.below(candidates_.size())];
  const bool is_ahead = schedule_.bias == Schedule::Bias::kAhead;
  if ((!is_ahead && schedule_.bias != Schedule::Bias::kBehind) || random_.once_in(64)) return chosen;
  Stream* special = streams_[schedule_.which % streams_.size()].get();
  if (is_ahead) return special->runnable.ready.empty() ? chosen : special;
  if (chosen != special) return chosen;
  const size_t first = random_.below(candidates_.size());
  for (size_t i = 0; i < candidates_.size(); ++i) {
    Stream* other = candidates_[(first + i) % candidates_.size()];
    if (other != special && !other->runnable.ready.empty()) return other;
  }
  return special;
}

// One of two threads or warps of each index, by turns of streams.
bool Machine::is_starved(const Thread& thread) const {
  if (schedule_.bias != Schedule::Bias::kStarved) return false;
  const Block& block = *thread.block;
  const uint32_t number = static_cast<uint32_t>(block.grid->stream->number);
  if (schedule_.starves_warp) {
    const uint32_t warps = (block.size.x + kWarpThreads - 1) / kWarpThreads;
    return (thread.warp() + warps * block.index.x + number) % (2 * warps) == schedule_.which % (2 * warps);
  }
  const uint32_t size = block.size.x;
  return (thread.index.x + size * block.index.x + 7 * number) % (2 * size) == schedule_.which % (2 * size);
}

Thread* Machine::pick() {
  std::vector<Stream*>& candidates = candidates_;
  if (are_candidates_old_) {
    candidates.clear();
    for (const auto& stream : streams_)
      if (!stream->runnable.empty()) candidates.push_back(stream.get());
    are_candidates_old_ = false;
  }
  if (candidates.empty()) return nullptr;
  if (idle_) {  // in turns, so that nobody is left out
    const Runnable& runnable = candidates[turn_++ % candidates.size()]->runnable;
    const std::vector<Thread*>& list = runnable.ready.empty() ? runnable.polling : runnable.ready;
    return list[random_.below(list.size())];
  }
  Stream* chosen = pick_stream();
  Runnable& runnable = chosen->runnable;
  const bool polls = runnable.ready.empty() || (!runnable.polling.empty() && random_.once_in(8));
  const std::vector<Thread*>& list = polls ? runnable.polling : runnable.ready;
  Thread* thread = list[random_.below(list.size())];
  // One that is starved runs now and then, or where next to nobody else can.
  for (int tries = 0; tries < kTries && is_starved(*thread) && !random_.once_in(64); ++tries)
    thread = list[random_.below(list.size())];
  return thread;
}

std::string Machine::run() {
  may_start_blocks_ = true;
  fruitless_ = 0;
  while (true) {
    while (may_start_blocks_) start_blocks();
    let_stores_arrive();
    idle_ = is_idle();
    if (idle_) now_ns_ += kIdleRoundNs / (kPollsPerRound * static_cast<int64_t>(runnable_threads_ + 1));
    Thread* thread = pick();
    if (!thread) {
      if (may_start_blocks_) continue;
      const bool done = std::all_of(streams_.begin(), streams_.end(), [](const auto& s) { return s->work.empty(); });
      if (!done) return what_stands();
      let_all_arrive();
      return "";
    }
    run_thread(thread);
    if (!fault_.empty()) return fault_;
  }
}

std::string Machine::what_stands() const {
  std::string text = "threads wait at barriers for threads that do not come, or blocks for room:";
  for (const auto& stream : streams_)
    for (const Work& work : stream->work) {
      if (!work.grid) continue;
      text += " stream " + std::to_string(stream->number) + ": " + std::to_string(work.grid->started) + " of " +
              std::to_string(work.grid->blocks.x) + " blocks have started, " + std::to_string(work.grid->ended) +
              " ended;";
    }
  return text;
}

}  // namespace emulator
