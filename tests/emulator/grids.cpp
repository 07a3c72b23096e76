// Which kernels and blocks of the streams run.
#include <algorithm>

#include "machine.h"
#include "report.h"

namespace emulator {
namespace {

void body_of_thread(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  thread->block->grid->body();
  thread->block->leave();
  thread->ended = true;
}

}  // namespace

void Machine::start_blocks() {
  may_start_blocks_ = false;
  std::vector<Stream*> order;
  for (const auto& stream : streams_)
    if (!stream->work.empty() && !stream->device->broken) order.push_back(stream.get());
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
  for (Stream* stream : order)
    if (start_blocks_of(*stream)) may_start_blocks_ = true;  // what has ended may let others begin
}

// True if something of the stream's work was taken off it.
bool Machine::start_blocks_of(Stream& stream) {
  bool any_taken = false;
  while (!stream.work.empty() && !stream.work.front().grid && has_happened(stream.work.front().event)) {
    stream.work.pop_front();
    any_taken = true;
  }
  const Device& device = *stream.device;
  const int most = device.multiprocessors * device.blocks_per_multiprocessor;
  const Grid* before = nullptr;
  for (Work& work : stream.work) {
    Grid* grid = work.grid.get();
    if (!grid) {
      if (!has_happened(work.event)) break;
      continue;
    }
    if (before && !(grid->may_start_early && before->letting == before->blocks.x)) break;
    while (!grid->has_started() && stream.device->resident < most) {
      Block& block = *grid->resident.emplace_back(std::make_unique<Block>(grid, grid->started, grid->threads));
      ++grid->started;
      ++stream.device->resident;
      progress();
      for (Thread& thread : block.threads) {
        thread.fiber.prepare(&body_of_thread, &thread);
        add_runnable(&thread, false);
      }
    }
    if (!grid->has_started()) break;
    before = grid;
  }
  return any_taken;
}

void Machine::end_block(Block& block) {
  Grid& grid = *block.grid;
  Stream& stream = *grid.stream;
  if (!block.lets_next_start) ++grid.letting;
  ++grid.ended;
  --stream.device->resident;
  block.threads.clear();
  may_start_blocks_ = true;
  while (!stream.work.empty() && stream.work.front().grid && stream.work.front().grid->has_ended()) {
    forget_under_way(*stream.work.front().grid);
    stream.work.pop_front();
    ++stream.ended;
    while (!stream.work.empty() && !stream.work.front().grid && has_happened(stream.work.front().event))
      stream.work.pop_front();
    if (stream.work.empty() || !stream.work.front().grid) continue;
    for (Thread* thread : stream.work.front().grid->waiting) wake(thread);
    stream.work.front().grid->waiting.clear();
  }
}

void Machine::previous_kernel() {
  Grid* grid = self->block->grid;
  if (grid->stream->work.front().grid.get() != grid) {
    grid->waiting.push_back(self);
    block();
  } else {
    step();
  }
}

void Machine::let_next_kernel_start() {
  Block* block = self->block;
  if (block->lets_next_start) return;
  block->lets_next_start = true;
  ++block->grid->letting;
  may_start_blocks_ = true;
  step();
}

// A trap ends everything on the device.
void Machine::break_device() {
  self->block->grid->stream->device->broken = true;
  broke_ = true;
  self->fiber.pause();
  fail("a thread has gone on behind its trap");
}

void Machine::forget_grids(Device& device) {
  for (const auto& stream : streams_) {
    if (stream->device != &device) continue;
    for (const Work& work : stream->work)
      if (work.grid) forget_under_way(*work.grid);
    runnable_threads_ -= stream->runnable.ready.size() + stream->runnable.polling.size();
    are_candidates_old_ = true;
    stream->runnable = {};
    stream->work.clear();
    stream->ended = stream->launched;
  }
  device.resident = 0;
}

}  // namespace emulator
