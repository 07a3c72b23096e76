#include "stores.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>

#include "block.h"
#include "llm_allreduce.h"
#include "random.h"

namespace emulator {
namespace {

bool is_same_word(const char* a, const char* b) {
  return reinterpret_cast<uintptr_t>(a) / sizeof(uint32_t) == reinterpret_cast<uintptr_t>(b) / sizeof(uint32_t);
}

uintptr_t vector_of(const void* address) { return reinterpret_cast<uintptr_t>(address) / LAR_VECTOR_BYTES; }

}  // namespace

void StoreBuffer::add(const Word& word) {
  words_.push_back(word);
  ++count(word.address);
}

void StoreBuffer::add_late(const Word& word) {
  const uintptr_t vector = vector_of(word.address);
  std::vector<Word>& words = late_[vector];
  if (words.empty()) ++late_count(vector);
  words.push_back(word);
}

StoreBuffer::Late::iterator StoreBuffer::erase_late(Late::iterator vector) {
  --late_count(vector->first);
  return late_.erase(vector);
}

void StoreBuffer::adopt(const Thread* copier, uint64_t end_of_groups) {
  const auto is_meant = [&](const Word& word) { return word.copier == copier && word.group < end_of_groups; };
  for (Word& word : words_)
    if (is_meant(word)) word.writer = copier;
  for (auto vector = late_.begin(); vector != late_.end();) {
    std::vector<Word>& words = vector->second;
    const auto first = std::stable_partition(words.begin(), words.end(), std::not_fn(is_meant));
    for (auto word = first; word != words.end(); ++word) {
      add(*word);
      words_.back().writer = copier;
    }
    words.erase(first, words.end());
    vector = words.empty() ? erase_late(vector) : std::next(vector);
  }
}

void StoreBuffer::see_late(const void* address, uint32_t bytes, void* value) const {
  const auto* first = static_cast<const char*>(address);
  for (uintptr_t vector = vector_of(first); vector <= vector_of(first + bytes - 1); ++vector) {
    if (late_count(vector) == 0) continue;
    const auto found = late_.find(vector);
    if (found == late_.end()) continue;
    for (const Word& word : found->second)
      for (uint32_t i = 0; i < word.bytes; ++i)
        if (const ptrdiff_t at = word.address + i - first; at >= 0 && at < ptrdiff_t{bytes})
          static_cast<char*>(value)[at] = reinterpret_cast<const char*>(&word.value)[i];
  }
}

void StoreBuffer::see(const Thread* reader, const void* address, uint32_t bytes, void* value) const {
  bool any = false;
  for (uint32_t at = 0; at < bytes; at += sizeof(uint32_t)) any |= count(static_cast<const char*>(address) + at) != 0;
  if (!any) return;
  for (const Word& word : words_) {
    const ptrdiff_t distance = word.address - static_cast<const char*>(address);
    if (distance <= -ptrdiff_t{word.bytes} || distance >= ptrdiff_t{bytes}) continue;
    if (word.writer != reader && !word.shared) continue;
    const auto* from = reinterpret_cast<const char*>(&word.value);
    for (uint32_t i = 0; i < word.bytes; ++i)
      if (const ptrdiff_t at = distance + i; at >= 0 && at < ptrdiff_t{bytes}) static_cast<char*>(value)[at] = from[i];
  }
}

void StoreBuffer::share() {
  for (Word& word : words_) word.shared = word.writer != nullptr;
}

void StoreBuffer::share(uint32_t first, uint32_t end) {
  for (Word& word : words_)
    if (word.writer && word.writer->index.x >= first && word.writer->index.x < end) word.shared = true;
}

void StoreBuffer::store(const Word& word) {
  std::memcpy(word.address, &word.value, word.bytes);
  --count(word.address);
}

void StoreBuffer::arrive(Random& random) {
  size_t chosen = random.below(words_.size());
  for (size_t i = 0; i < chosen && count(words_[chosen].address) > 1; ++i)
    if (is_same_word(words_[i].address, words_[chosen].address)) chosen = i;
  store(words_[chosen]);
  words_.erase(words_.begin() + static_cast<ptrdiff_t>(chosen));
}

bool StoreBuffer::arrive_late(Random& random, const std::vector<uintptr_t>& vectors) {
  size_t next = random.below(vectors.size());
  for (size_t tries = vectors.size(); tries > 0; --tries) {
    const uintptr_t polled = vectors[next];
    if (++next == vectors.size()) next = 0;
    if (late_count(polled) == 0) continue;
    const auto vector = late_.find(polled);
    if (vector == late_.end()) continue;
    std::vector<Word>& words = vector->second;
    const size_t chosen = random.below(words.size());
    std::memcpy(words[chosen].address, &words[chosen].value, words[chosen].bytes);
    words.erase(words.begin() + static_cast<ptrdiff_t>(chosen));
    if (words.empty()) erase_late(vector);
    return true;
  }
  return false;
}

void StoreBuffer::release(const Thread* writer) {
  const auto arrives = [&](const Word& word) {
    const bool is_meant = word.shared || word.writer == writer;
    if (is_meant) store(word);
    return is_meant;
  };
  words_.erase(std::remove_if(words_.begin(), words_.end(), arrives), words_.end());
}

void StoreBuffer::arrive_at(const char* address) {
  if (const uintptr_t vector = vector_of(address); late_count(vector) != 0)
    if (const auto found = late_.find(vector); found != late_.end()) {
      std::vector<Word>& words = found->second;
      const auto arrives = [&](const Word& word) {
        const bool is_meant = is_same_word(word.address, address);
        if (is_meant) std::memcpy(word.address, &word.value, word.bytes);
        return is_meant;
      };
      words.erase(std::remove_if(words.begin(), words.end(), arrives), words.end());
      if (words.empty()) erase_late(found);
    }
  if (count(address) == 0) return;
  const auto arrives = [&](const Word& word) {
    const bool is_meant = is_same_word(word.address, address);
    if (is_meant) store(word);
    return is_meant;
  };
  words_.erase(std::remove_if(words_.begin(), words_.end(), arrives), words_.end());
}

void StoreBuffer::arrive_all() {
  for (const Word& word : words_) store(word);
  words_.clear();
  if (late_.empty()) return;
  for (const auto& [_, words] : late_)
    for (const Word& word : words) std::memcpy(word.address, &word.value, word.bytes);
  late_.clear();
  std::fill(std::begin(late_counts_), std::end(late_counts_), uint16_t{0});
}

}  // namespace emulator
