#include "bulk.h"

#include <cstring>

#include "access.h"
#include "llm_allreduce.h"
#include "machine.h"

namespace emulator {

void BulkCopies::fence_stores(Block& block) {
  for (const uint32_t at : unfenced_) block.show_engine(at, LAR_VECTOR_BYTES);
  unfenced_.clear();
}

void BulkCopies::read(Block& block, const Copy& copy, const Thread* copier) {
  for (uint32_t at = 0; at < copy.bytes; at += kWordBytes) {
    uint32_t word;
    std::memcpy(&word, block.engine_memory(copy.from + at), sizeof(word));
    store_word(block, {copy.to + at, nullptr, word, kWordBytes, false, copier, copy.group});
  }
}

void BulkCopies::read_any(Block& block, Random& random, const Thread* copier) {
  const size_t chosen = random.below(unread_.size());
  const Copy copy = unread_[chosen];
  unread_.erase(unread_.begin() + static_cast<ptrdiff_t>(chosen));
  read(block, copy, copier);
}

void BulkCopies::read(Block& block, uint64_t pending, const Thread* copier) {
  const uint64_t end = groups_but(pending);
  std::vector<Copy> left;
  for (const Copy& copy : unread_) {
    if (copy.group < end)
      read(block, copy, copier);
    else
      left.push_back(copy);
  }
  unread_ = std::move(left);
}

void BulkCopies::read_all(Block& block, const Thread* copier) {
  for (const Copy& copy : unread_) read(block, copy, copier);
  unread_.clear();
}

void BulkCopies::complete(Block& block, uint64_t pending, const Thread* copier) {
  read(block, pending, copier);
  completed_ = groups_but(pending);
}

void BulkCopies::fence_copies(Block& block, const Thread* copier) const { block.stores.adopt(copier, completed_); }

}  // namespace emulator
