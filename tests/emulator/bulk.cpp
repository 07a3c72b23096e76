#include "bulk.h"

#include <cstring>

#include "access.h"
#include "machine.h"

namespace emulator {

void BulkCopies::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}

void BulkCopies::read(Block& block, size_t left) {
  while (groups_.size() > left) {
    for (const Copy& copy : groups_.front())
      for (uint32_t at = 0; at < copy.bytes; at += sizeof(uint32_t)) {
        uint32_t word;
        std::memcpy(&word, block.shared_memory(copy.from + at), sizeof(word));
        store_word(block, nullptr, copy.to + at, word, sizeof(word));
      }
    groups_.pop_front();
  }
}

}  // namespace emulator
