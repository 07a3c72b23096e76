// Stores that are under way: the block's own threads may see them earlier than others do.
//
// A word (or what is smaller) lies here from the store until it arrives in memory, which it does at some time, in any
// order with others but those to the same word. Meanwhile the thread that stored it reads it here, and, once they
// have met at a barrier, so do the others of the block. A release or a fence of a thread waits for its own words and
// for those that it shares with it; the end of the kernel waits for all.
#ifndef LLM_ALLREDUCE_EMULATOR_STORES_H_
#define LLM_ALLREDUCE_EMULATOR_STORES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

struct Thread;
class Random;

class StoreBuffer {
 public:
  bool empty() const { return words_.empty(); }
  size_t size() const { return words_.size(); }

  // `copier`: of a bulk copy, the thread that has asked for it; then there is no writer.
  void add(const Thread* writer, void* address, uint32_t value, uint32_t bytes, const Thread* copier = nullptr);

  // What this thread has copied in bulk, and waited for, counts as stored by itself.
  void adopt(const Thread* copier);

  // What `reader` sees at this address: `value`, which lies in memory, and over it what is under way in its block.
  void see(const Thread* reader, const void* address, uint32_t bytes, void* value) const;

  // The block, or the threads first .. end-1 of it, have met: all see what they stored.
  void share();
  void share(uint32_t first, uint32_t end);

  // Any word arrives.
  void arrive(Random& random);

  // All that this thread has stored or shares arrives.
  void release(const Thread* writer);

  void arrive_all();

 private:
  struct Word {
    char* address;
    const Thread* writer;  // null: of a bulk copy, which no release waits for before adopt()
    uint32_t value;
    uint8_t bytes;
    bool shared;
    const Thread* copier;
  };

  // Most loads are of what nobody in the block has stored. By the low bits of an address: words that are under way.
  static constexpr size_t kCounts = 1024;
  uint16_t& count(const void* address) { return counts_[reinterpret_cast<uintptr_t>(address) / 4 % kCounts]; }
  uint16_t count(const void* address) const { return counts_[reinterpret_cast<uintptr_t>(address) / 4 % kCounts]; }

  void store(const Word& word);

  std::vector<Word> words_;
  uint16_t counts_[kCounts] = {};
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_STORES_H_
