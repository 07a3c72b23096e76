#include "switch.h"

#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace emulator {
namespace {

// When a store was fenced, by fences of all threads so far; 0: not yet.
using Fenced = std::shared_ptr<uint64_t>;

struct Store {
  uint4 before;  // what lay there
  Fenced fenced;
};

struct Fences {
  Fenced pending = std::make_shared<uint64_t>(0);  // of what was stored since the last
  uint64_t last = 0;
};

constexpr size_t kKept = 4;  // stores to a place: of a call there is one

uint64_t fences = 0;
std::unordered_map<const Thread*, Fences> by_thread;
std::unordered_map<const char*, std::deque<Store>> stores;

bool is_own(const char* address) {
  if (multicast_ranges.empty()) return false;
  const MulticastRange& any = multicast_ranges.front();  // all have the same memory behind them
  for (const char* own : any.own)
    if (address >= own && address < own + any.bytes) return true;
  return false;
}

}  // namespace

void before_store_to_own(const void* address) {
  const char* place = static_cast<const char*>(address);
  if (!is_own(place)) return;
  Store store{{}, by_thread[machine.self].pending};
  std::memcpy(&store.before, place, sizeof(store.before));
  std::deque<Store>& kept = stores[place];
  kept.push_back(store);
  if (kept.size() > kKept) kept.pop_front();
}

void fence_addresses() {
  Fences& of = by_thread[machine.self];
  of.last = *of.pending = ++fences;
  of.pending = std::make_shared<uint64_t>(0);
}

uint4 through_the_switch(const char* own) {
  uint4 seen;
  std::memcpy(&seen, own, sizeof(seen));
  const auto found = stores.find(own);
  if (found == stores.end()) return seen;
  const uint64_t last = by_thread[machine.self].last;
  for (auto store = found->second.rbegin(); store != found->second.rend(); ++store) {
    if (*store->fenced != 0 && *store->fenced <= last) break;
    seen = store->before;
  }
  return seen;
}

void forget_fences() {
  fences = 0;
  by_thread.clear();
  stores.clear();
}

}  // namespace emulator
