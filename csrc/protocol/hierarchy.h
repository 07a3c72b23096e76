// LOWPRECISION over two domains of ranks, the NUMA nodes of a machine for example. Shared by CUDA and CPU ranks.
//
// A chunk is split among the members of a domain, by their index in it: the owner of a part sums what its domain has of
// it and exchanges that with its counterpart, the owner in the other domain. Both add up the two partial sums, their
// own too as it was encoded, domain 0's first: so both have the same bits, and both tell their domain. Four steps, with
// four chunks in flight:
//
//     step s:  scatter  chunk s      encode my values into their owners' scatter slots, publish to my domain
//              partial  chunk s-1    wait for my domain, sum its ranks in order, encode, store to the counterpart and
//                                    keep, publish to the counterpart
//              combine  chunk s-2    wait for the counterpart, add the partial sums, encode, store to my domain,
//              publish drain    chunk s-3    wait for my domain, decode the other owners' results
//
// Slots are those of TWOSHOT. Between counterparts none is used otherwise: the scatter slot takes the partial sum, the
// gather plane the flag that says so. What a rank keeps lies in its scatter slot for itself.
//
// Why four slots are enough:
//   - scatter(s) overwrites chunk s-4 at its owner, who read it before it published the result, and this lane has
//     drained that at step s-1.
//   - partial(s-1) overwrites chunk s-5 at the counterpart, who read it in its combine(s-5), at its step s-3, before it
//     published partial(s-3) at its step s-2, and this lane has seen that in combine(s-3) at step s-1. What is kept of
//     chunk s-5 this lane itself has read by then.
//   - combine(s-2) overwrites the results of chunk s-6. A reader drains those at its step s-3, before it publishes
//     scatter(s-2), and this lane has seen its whole domain do so in partial(s-2) at step s-1.
//
// From call to call: a call ends with everything drained but, at the counterpart, the partial sums of its last two
// chunks, by the second argument; the counterpart reads them before it takes part in the next call. The second argument
// then holds across calls of this algorithm. A TWOSHOT overwrites those slots with its third and fourth chunk, having
// seen every peer scatter the first; the ring (ring.h) takes care of them. The other way round, a rank may end a
// TWOSHOT or a ring while the other domain still drains the results of its last two chunks, which lie in the workspace
// of their owner where layouts are shared. combine() gets to those slots in its third chunk. By then it has seen its
// own domain scatter, and its counterpart exchange, which came after the whole other domain had scattered: all in this
// call.
//
// The last flags of a call go to all peers, as in the ring and for the same reason.
#ifndef LLM_ALLREDUCE_PROTOCOL_HIERARCHY_H_
#define LLM_ALLREDUCE_PROTOCOL_HIERARCHY_H_

#include "protocol/peers.h"

namespace lar {

constexpr int kMostMembers = 4;  // ranks of a domain

struct Domains {
  int32_t members;               // ranks of a domain
  int32_t index;                 // of this rank among those of its domain, in rank order
  int32_t counterpart;           // the rank with the same index in the other domain
  bool is_first;                 // this rank's domain is that of rank 0
  uint32_t bits;                 // bit r: rank r is in this rank's domain
  int32_t member[kMostMembers];  // the ranks of this rank's domain, rising
};

// Whom a rank tells of a chunk, beside its counterpart: its domain, and of the last one all.
template <typename Chunk>
LAR_HOST_DEVICE SomePeers receivers_in(const Domains& domains, Chunk chunk, Chunk chunks) {
  return {chunk == chunks - 1 ? ~0u : domains.bits};
}

// Calls steps.scatter(chunk), partial(chunk), combine(chunk) and drain(chunk) in order. False as soon as one of them
// is.
template <typename Chunk, typename Steps>
LAR_HOST_DEVICE bool run_hierarchical(Chunk chunks, const Steps& steps) {
#pragma unroll 1
  for (Chunk step = 0; step < chunks + 3; ++step) {
    if (step < chunks && !steps.scatter(step)) return false;
    if (step >= 1 && step <= chunks && !steps.partial(step - 1)) return false;
    if (step >= 2 && step <= chunks + 1 && !steps.combine(step - 2)) return false;
    if (step >= 3 && !steps.drain(step - 3)) return false;
  }
  return true;
}

// False unless `domain`, a number for each rank, tells exactly two domains of 2 to kMostMembers ranks each.
inline bool make_domains(const int32_t* domain, int world_size, int rank, Domains* out) {
  if (!domain || world_size > 2 * kMostMembers || rank < 0 || rank >= world_size) return false;
  int32_t sizes[2] = {0, 0};
  int32_t other = domain[0];  // the number of the domain without rank 0, once there is one
  int32_t ranks[2][kMostMembers];
  for (int r = 0; r < world_size; ++r) {
    if (other == domain[0]) other = domain[r];
    if (domain[r] != domain[0] && domain[r] != other) return false;
    const int which = domain[r] != domain[0];
    if (sizes[which] == kMostMembers) return false;
    ranks[which][sizes[which]++] = r;
  }
  if (sizes[0] != sizes[1] || sizes[0] < 2) return false;
  const int mine = domain[rank] != domain[0];
  *out = {};
  out->members = sizes[0];
  out->is_first = mine == 0;
  for (int i = 0; i < sizes[0]; ++i) {
    out->member[i] = ranks[mine][i];
    out->bits |= 1u << ranks[mine][i];
    if (ranks[mine][i] != rank) continue;
    out->index = i;
    out->counterpart = ranks[1 - mine][i];
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_HIERARCHY_H_
