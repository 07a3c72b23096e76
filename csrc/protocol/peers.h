// Whom a rank tells, and whom it waits for. Never itself, whatever these say.
#ifndef LLM_ALLREDUCE_PROTOCOL_PEERS_H_
#define LLM_ALLREDUCE_PROTOCOL_PEERS_H_

#include "host/layout.h"

namespace lar {

struct AllPeers {
  LAR_HOST_DEVICE bool has(int) const { return true; }
};

// Some of the first 32 ranks.
struct SomePeers {
  uint32_t bits;  // bit r: rank r
  LAR_HOST_DEVICE bool has(int peer) const { return (bits >> peer & 1u) != 0; }
};

struct OneOrAllPeers {
  int one;  // negative: all
  LAR_HOST_DEVICE bool has(int peer) const { return one < 0 || peer == one; }
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_PEERS_H_
