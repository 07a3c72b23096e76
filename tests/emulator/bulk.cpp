#include "bulk.h"

#include <cstring>

#include "access.h"
#include "machine.h"

namespace emulator {

void BulkCopies::commit() {
  waited_ = false;
  groups_.push_back(std::move(open_));
  open_.clear();
}

void BulkCopies::read(Block& block, size_t left, const Thread* copier) {
  while (groups_.size() > left) {
    for (const Copy& copy : groups_.front())
      for (uint32_t at = 0; at < copy.bytes; at += sizeof(uint32_t)) {
        uint32_t word;
        std::memcpy(&word, block.shared_memory(copy.from + at), sizeof(word));
        store_word(block, nullptr, copy.to + at, word, sizeof(word), copier);
      }
    groups_.pop_front();
  }
}

void BulkCopies::wait(Block& block, size_t left, const Thread* copier) {
  read(block, left, copier);
  waited_ = true;
}

void BulkCopies::fence(Block& block, const Thread* copier) {
  if (waited_) block.stores.adopt(copier);
}

}  // namespace emulator
