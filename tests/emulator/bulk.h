// Bulk copies from shared memory, of one thread, in groups. The engine that copies is a proxy of its own: of stores to
// shared memory it sees those behind which their thread has fenced, it reads when it likes, but before it is waited
// for, and what it has written belongs to a release only once it has been waited for to the end, with a fence behind.
#ifndef LLM_ALLREDUCE_EMULATOR_BULK_H_
#define LLM_ALLREDUCE_EMULATOR_BULK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

struct Block;
struct Thread;
class Random;

class BulkCopies {
 public:
  // This thread has stored a vector to shared memory. fence_stores() lets the engine see all that it has.
  void stored(uint32_t at) { unfenced_.push_back(at); }
  void fence_stores(Block& block);

  void add(void* to, uint32_t from, uint32_t bytes) {
    unread_.push_back({static_cast<char*>(to), from, bytes, committed_});
  }
  void commit() { ++committed_; }

  bool has_unread() const { return !unread_.empty(); }

  // The engine reads any copy, or what is left of all groups but the newest `pending`. `copier`: whose copies they are.
  void read_any(Block& block, Random& random, const Thread* copier);
  void read(Block& block, uint64_t pending, const Thread* copier);
  void read_all(Block& block, const Thread* copier);

  // All groups but the newest `pending` have been read and written, as far as their thread is concerned:
  // fence_copies() makes them its stores.
  void complete(Block& block, uint64_t pending, const Thread* copier);
  void fence_copies(Block& block, const Thread* copier) const;

 private:
  struct Copy {
    char* to;
    uint32_t from;
    uint32_t bytes;
    uint64_t group;
  };

  static void read(Block& block, const Copy& copy, const Thread* copier);
  uint64_t groups_but(uint64_t pending) const { return committed_ > pending ? committed_ - pending : 0; }

  std::vector<uint32_t> unfenced_;
  std::vector<Copy> unread_;
  uint64_t committed_ = 0;  // groups
  uint64_t completed_ = 0;
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_BULK_H_
