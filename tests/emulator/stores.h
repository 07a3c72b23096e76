// Stores that are under way: the block's own threads may see them earlier than others do.
//
// A word (or what is smaller) lies here from the store until it arrives in memory, which it does at some time, in any
// order with others but those to the same word. Meanwhile the thread that stored it reads it here, and, once they
// have met at a barrier, so do the others of the block. A release or a fence of a thread waits for its own words and
// for those that it shares with it; the end of the kernel waits for all but those to host memory, which go on in the
// buffer of the GPU (Machine::forget_under_way).
//
// Words of bulk copies are no thread's until adopt(): no thread of the block sees them, and no release waits for them.
// With a schedule in which copies are late they lie apart, and arrive only where somebody polls for them.
#ifndef LLM_ALLREDUCE_EMULATOR_STORES_H_
#define LLM_ALLREDUCE_EMULATOR_STORES_H_

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace emulator {

struct Thread;
class Random;

class StoreBuffer {
 public:
  struct Word {
    char* address;
    const Thread* writer;
    uint32_t value;
    uint32_t bytes;
    bool shared = false;
    const Thread* copier = nullptr;  // of a bulk copy, whose it is; then there is no writer before adopt()
    uint64_t group = 0;              // of that thread's bulk copies
  };

  bool empty() const { return words_.empty(); }
  size_t size() const { return words_.size(); }
  bool has_late() const { return !late_.empty(); }

  void add(const Word& word);
  void add_late(const Word& word);

  // What this thread has copied in bulk, in groups before this one, counts as stored by itself.
  void adopt(const Thread* copier, uint64_t end_of_groups);

  // What `reader` sees at this address: `value`, which lies in memory, and over it what is under way in its block.
  void see(const Thread* reader, const void* address, uint32_t bytes, void* value) const;

  // The block, or the threads first .. end-1 of it, have met: all see what they stored.
  void share();
  void share(uint32_t first, uint32_t end);

  // Any word arrives, late ones aside.
  void arrive(Random& random);

  // Over `value`, which was read at this address: late words.
  void see_late(const void* address, uint32_t bytes, void* value) const;

  // A late word of one of these vectors arrives. False if none is under way.
  bool arrive_late(Random& random, const std::vector<uintptr_t>& vectors);

  // All that this thread has stored or shares arrives.
  void release(const Thread* writer);

  void arrive_all();

  // The kernel has ended: what is_host(address) says lies in host memory goes to `rest`, where all threads of its GPU
  // see it; everything else arrives. `are_late`: they are late words there.
  template <typename IsHost>
  void leave(StoreBuffer& rest, IsHost is_host, bool are_late) {
    for (Word word : words_) {
      if (!is_host(word.address)) continue;
      word.shared = true;
      word.writer = nullptr;
      rest.arrive_at(word.address);
      are_late ? rest.add_late(word) : rest.add(word);
    }
    drop(is_host);
    arrive_all();
  }

  // What is under way to this word arrives, and so comes before what is stored there next.
  void arrive_at(const char* address);

 private:
  // Most loads are of what nobody in the block has stored. By the low bits of an address: words that are under way.
  static constexpr size_t kCounts = 1024;
  uint16_t& count(const void* address) { return counts_[reinterpret_cast<uintptr_t>(address) / 4 % kCounts]; }
  uint16_t count(const void* address) const { return counts_[reinterpret_cast<uintptr_t>(address) / 4 % kCounts]; }

  static constexpr size_t kLateCounts = 4096;
  // Most vectors that are polled have no late word. By the low bits of their number: vectors in late_.
  uint16_t& late_count(uintptr_t vector) { return late_counts_[vector % kLateCounts]; }
  uint16_t late_count(uintptr_t vector) const { return late_counts_[vector % kLateCounts]; }

  using Late = std::unordered_map<uintptr_t, std::vector<Word>>;  // by the number of their vector

  template <typename IsMeant>
  void drop(IsMeant is_meant) {
    size_t kept = 0;
    for (const Word& word : words_)
      if (is_meant(word.address))
        --count(word.address);
      else
        words_[kept++] = word;
    words_.resize(kept);
  }

  void store(const Word& word);
  Late::iterator erase_late(Late::iterator vector);

  std::vector<Word> words_;
  Late late_;
  uint16_t counts_[kCounts] = {};
  uint16_t late_counts_[kLateCounts] = {};
};

}  // namespace emulator

#endif  // LLM_ALLREDUCE_EMULATOR_STORES_H_
