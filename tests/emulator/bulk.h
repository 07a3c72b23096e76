// Bulk copies from shared memory, of one thread, in groups. They read when they like, but before they are waited for.
#ifndef LLM_ALLREDUCE_EMULATOR_BULK_H_
#define LLM_ALLREDUCE_EMULATOR_BULK_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace emulator {

struct Block;

class BulkCopies {
 public:
  void add(void* to, uint32_t from_shared, uint32_t bytes) {
    open_.push_back({static_cast<char*>(to), from_shared, bytes});
  }
  void commit();

  // Lets the oldest groups read, until no more than so many are left.
  void read(Block& block, size_t left);

  size_t pending() const { return groups_.size(); }

 private:
  struct Copy {
    char* to;
    uint32_t from;
    uint32_t bytes;
  };

  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_BULK_H_
