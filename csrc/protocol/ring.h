// The ring of LOWPRECISION, as one rank sees it: which hop carries what, where, and when. Shared by CUDA and CPU ranks.
//
// A chunk has a part for each rank and takes 2 (N - 1) hops. At hop h every rank sends part (rank - h) mod N to its
// successor: in the first N - 1 hops the sum so far, encoded, to which the successor adds its own values; the rank that
// does so last rounds the sum to the message's type, and in the other N - 1 hops that travels on as it is.
//
//     step g:  receive  hop g-1   wait for it, add and encode, or round, or take as it is
//              send     hop g     what that gave, or, at the first hop of a chunk, this rank's own values; publish;
//                                 give the predecessor credit for hop g-1, whose slot has been read
//
// A hop is a round, and its slot the successor's scatter slot of that round for what comes from this rank. It
// overwrites that of hop g-4, so it waits for the successor's credit for that; the first four hops of a call overwrite
// slots of calls before, whatever their algorithms were. Having ended those, this rank knows that all it sent was read,
// but for the last two rounds of an exchange between domains (the hierarchical form), whose slots hops 2 and 3
// overwrite: they wait for the credit for hop 0, which the successor gives in this call, having ended those. No
// circle: a credit for a hop needs only earlier hops. A call ends with credit for every hop, so what comes after finds
// no slot unread.
//
// A rank needs flags of its neighbours only, data (the scatter plane) of the predecessor and credit (the gather plane)
// of the successor. The last ones of a call go to all: flags are compared by distance (reached(), overwritten()), and
// one that rested for more than 2^31 rounds would look overwritten, for nearly 2^32 like one that has come. They run
// ahead of nothing: a rank that looks for them in a later call waits for later rounds.
#ifndef LLM_ALLREDUCE_PROTOCOL_RING_H_
#define LLM_ALLREDUCE_PROTOCOL_RING_H_

#include "protocol/peers.h"

namespace lar {

struct Ring {
  int rank;
  int world_size;

  LAR_HOST_DEVICE int successor() const { return rank + 1 < world_size ? rank + 1 : 0; }
  LAR_HOST_DEVICE int predecessor() const { return rank > 0 ? rank - 1 : world_size - 1; }

  LAR_HOST_DEVICE int hops_of_chunk() const { return 2 * (world_size - 1); }

  // What a rank receives at a hop of a chunk: a sum to which its own values are still to be added (and which is
  // complete then), or a rounded one (which goes no further).
  LAR_HOST_DEVICE bool is_sum(int hop) const { return hop < world_size - 1; }
  LAR_HOST_DEVICE bool is_complete(int hop) const { return hop == world_size - 2; }
  LAR_HOST_DEVICE bool is_last(int hop) const { return hop == hops_of_chunk() - 1; }
  LAR_HOST_DEVICE int received_part(int hop) const { return (rank - 1 - hop + 2 * world_size) % world_size; }

  // The hop whose credit hop `hop` of a call waits for; negative: none.
  LAR_HOST_DEVICE static int64_t credit_for(int64_t hop) {
    if (hop >= LAR_SLOTS) return hop - LAR_SLOTS;
    return hop >= 2 ? 0 : -1;
  }

  // Whom a rank tells that a hop's data has been sent, and that a hop's slot has been read.
  template <typename Hop>
  LAR_HOST_DEVICE OneOrAllPeers receivers_of_data(Hop hop, Hop hops) const {
    return {hop == hops - 1 ? -1 : successor()};
  }
  template <typename Hop>
  LAR_HOST_DEVICE OneOrAllPeers receivers_of_credit(Hop hop, Hop hops) const {
    return {hop == hops - 1 ? -1 : predecessor()};
  }
};

// Calls the steps above in order: has_arrived(hop), has_credit(hop), receive(hop), begin(hop), tell_data(hop, peers),
// tell_credit(hop, peers). False as soon as one that waits is.
template <typename Hop, typename Steps>
LAR_HOST_DEVICE bool run_ring(const Ring& ring, Hop hops, const Steps& steps) {
#pragma unroll 1
  for (Hop step = 0; step <= hops; ++step) {
    if (step > 0 && !steps.has_arrived(step - 1)) return false;
    if (step < hops && Ring::credit_for(step) >= 0 && !steps.has_credit(static_cast<Hop>(Ring::credit_for(step))))
      return false;
    if (step > 0) steps.receive(step - 1);
    if (step < hops && step % ring.hops_of_chunk() == 0) steps.begin(step);
    if (step < hops) steps.tell_data(step, ring.receivers_of_data(step, hops));
    if (step > 0) steps.tell_credit(step - 1, ring.receivers_of_credit(step - 1, hops));
  }
  return steps.has_credit(hops - 1);
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_RING_H_
