#include "stores.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "random.h"

namespace emulator {
namespace {

bool is_same_word(const char* a, const char* b) {
  return reinterpret_cast<uintptr_t>(a) / sizeof(uint32_t) == reinterpret_cast<uintptr_t>(b) / sizeof(uint32_t);
}

}  // namespace

void StoreBuffer::add(const Thread* writer, void* address, uint32_t value, uint32_t bytes, const Thread* copier) {
  words_.push_back({static_cast<char*>(address), writer, value, static_cast<uint8_t>(bytes), false, copier});
  ++count(address);
}

void StoreBuffer::adopt(const Thread* copier) {
  for (Word& word : words_)
    if (word.copier == copier) word.writer = copier;
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
  for (size_t i = 0; i < chosen; ++i)
    if (is_same_word(words_[i].address, words_[chosen].address)) chosen = i;
  store(words_[chosen]);
  words_.erase(words_.begin() + static_cast<ptrdiff_t>(chosen));
}

void StoreBuffer::release(const Thread* writer) {
  const auto arrives = [&](const Word& word) {
    const bool is_meant = word.shared || word.writer == writer;
    if (is_meant) store(word);
    return is_meant;
  };
  words_.erase(std::remove_if(words_.begin(), words_.end(), arrives), words_.end());
}

void StoreBuffer::arrive_all() {
  for (const Word& word : words_) store(word);
  words_.clear();
}

}  // namespace emulator
