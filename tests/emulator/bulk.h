// Bulk copies from shared memory, of one thread, in groups. They read when they like, but before they are waited for.
#ifndef LLM_ALLREDUCE_EMULATOR_BULK_H_
#define LLM_ALLREDUCE_EMULATOR_BULK_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

namespace emulator {

struct Block;
struct Thread;

class BulkCopies {
 public:
  void add(void* to, uint32_t from_shared, uint32_t bytes) {
    open_.push_back({static_cast<char*>(to), from_shared, bytes});
  }
  void commit();

  // Lets the oldest groups read, until no more than so many are left. `copier`: whose copies these are.
  void read(Block& block, size_t left, const Thread* copier);

  // All but so many have been read and written, as far as their thread is concerned: fence() makes them its stores.
  void wait(Block& block, size_t left, const Thread* copier);
  void fence(Block& block, const Thread* copier);

  size_t pending() const { return groups_.size(); }

 private:
  struct Copy {
    char* to;
    uint32_t from;
    uint32_t bytes;
  };

  bool waited_ = false;  // since the last was committed
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_BULK_H_
