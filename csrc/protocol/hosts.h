// All-reduce over several hosts: what the kernels inside a host do before and after hosts exchange their sums. Shared
// by CUDA and CPU ranks.
//
//     one step   LAR_REDUCE          every rank sums the whole message over its host, in fp32
//                exchange            ranks of equal place on their hosts give each other those sums
//                LAR_HOST_SUM        every rank sums the hosts' sums in the order of hosts, and rounds once
//     two steps  LAR_REDUCE_SCATTER  every rank sums its part
//                exchange            the same, of parts
//                LAR_HOST_SUM_GATHER every rank sums the hosts' sums of its part, rounds once, and stores the result to
//                                    all ranks of its host
//
// Both give the same bits: an element is summed over the ranks of each host in rank order from +0, then over hosts in
// order from +0, wherever that happens and in however many pieces a message is cut.
//
// Inside a host each half is a ONESHOT (protocol/one_shot.h): a rank stores something for each peer, publishes, and
// takes what it was given once all have published. So all use the slots, flags and epochs of ONESHOT, and its proof
// holds for any sequence of them: it is about slots and rounds, whatever lies in a slot and whoever needs it. Ranks
// whose part is empty publish and wait like all others.
#ifndef LLM_ALLREDUCE_PROTOCOL_HOSTS_H_
#define LLM_ALLREDUCE_PROTOCOL_HOSTS_H_

#include "protocol/pieces.h"

namespace lar {

// Parts begin on whole vectors of every type.
constexpr int64_t kPartElements = 8;

// Elements of a part, the largest; the last ones may be shorter.
LAR_HOST_DEVICE int64_t part_elements(int64_t count, int parts) {
  return ceil_div(ceil_div(count, parts), kPartElements) * kPartElements;
}

LAR_HOST_DEVICE bool sums_hosts(lar_algorithm algorithm) {
  return algorithm == LAR_HOST_SUM || algorithm == LAR_HOST_SUM_GATHER;
}

// Whether an algorithm is one of these halves.
LAR_HOST_DEVICE bool is_half(lar_algorithm algorithm) {
  return algorithm == LAR_REDUCE || algorithm == LAR_REDUCE_SCATTER || sums_hosts(algorithm);
}

// Whether every rank has a part of its own.
LAR_HOST_DEVICE bool has_parts(lar_algorithm algorithm) {
  return algorithm == LAR_REDUCE_SCATTER || algorithm == LAR_HOST_SUM_GATHER;
}

// A message cut into parts, one after another, and each part into chunks, of which each lane has `units` units.
struct PartCut {
  int64_t total;  // units of the message
  int64_t part;   // units of a part
  int64_t units;
  int lanes;
  int lane;

  // As many for every part.
  LAR_HOST_DEVICE int64_t chunks() const { return ceil_div(total < part ? total : part, units * lanes); }

  LAR_HOST_DEVICE Piece piece(int64_t chunk, int index) const {
    const int64_t in_part = (chunk * lanes + lane) * units;
    const int64_t first = index * part + in_part;
    const int64_t in_message = total - first;
    const int64_t left = part - in_part < in_message ? part - in_part : in_message;
    return {first, left < units ? left : units};
  }
};

// The slot for what `source` has for `reader`. Where workspaces are shared, what differs by reader lies in one slot,
// one part after another.
LAR_HOST_DEVICE char* half_slot(const lar_workspace& workspace, lar_algorithm algorithm, int reader, int source,
                                uint32_t round, int lane, int64_t chunk_bytes) {
  const lar_slots& slots = workspace.layout.flagged;
  char* slot = flagged_slot(workspace, slots.one_shot_offset, slots.one_shot_bytes, round % LAR_SLOTS, reader, source,
                            lane, true);
  const bool one_after_another = algorithm == LAR_REDUCE_SCATTER && workspace.layout.shared;
  return one_after_another ? slot + reader * chunk_bytes : slot;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_HOSTS_H_
