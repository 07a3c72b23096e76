// TWOSHOT that stores its results into the outputs of all ranks: no slots for them, and no copy out of those. Shared by
// CUDA and CPU ranks.
//
//     announce   tell every peer where my output lies, and that it may be written
//     scatter    store my partials into their owners' scatter slots
//     admit      wait until every peer has said the same of its output
//     reduce     take the partials of my part, sum ranks 0..N-1 in order, round once, store the result into every
//                output, where its rank has said that it lies, and tell that rank so
//     settle     wait until every owner has told me
//
// An output holds any bits, so nothing in it can say that it is there: flags must. What they stand for:
//   - "may be written" is the first thing that a rank stores in a call, once all that it did before has ended, reads of
//     what the output held included (on GPUs griddepcontrol.wait; a CPU rank's reads come before its call). It is
//     counted by calls, so that one of an earlier call opens nothing.
//   - "is written" comes behind the results: the flag's release must cover them. Bulk copies are another proxy's, so
//     they are waited for to the end, writes included, and a proxy fence stands before the release.
// Outputs lie in registered memory, at places that may differ from rank to rank and from call to call: a word beside
// the first flag says where, in vectors from the start of that memory. The next call overwrites it, when the rank has
// ended this one, with flags of every owner that has read it.
//
// Where peers see the inputs, too, nothing is scattered: owners read them in place. Then "may be written" also says
// that the input is there, for which all that wrote it has ended before the call, and "is written" that its owner has
// read it: behind settle() it may be overwritten. Ranks must do so together; slots are not touched.
//
// Some results may travel in band beside the others, through the gather slots of the other two-shots, in time that
// flags need: what lies there is its own news.
//
// Both flags are told by lane: lane b of an owner writes what lane b of that owner has summed, and tells lane b of its
// peers.
//
// Nobody waits in a circle: to announce and to scatter a rank waits for nobody. Every lane announces before it waits;
// lanes with one task, of which the first ones only scatter, start in the order of their numbers, and of all lanes that
// reduce the lowest that has not ended waits for those of the same number, for which there is room on every rank.
//
// Scatter slots are those of the other in-band calls, and counted with them. The proof of protocol/generations.h holds:
// a peer that stores into what this rank cleared in call e has ended call e+1, in which it took something of this
// rank's call e+1, flags where it stores into outputs. With flags (CPU ranks) that of protocol/two_shot.h does:
// settle() is its drain() without a copy.
#ifndef LLM_ALLREDUCE_PROTOCOL_PLACE_H_
#define LLM_ALLREDUCE_PROTOCOL_PLACE_H_

#include "protocol/two_shot.h"

namespace lar {

// From the start of registered memory to an output in it.
inline int64_t distance_in_vectors(const void* from, const void* to) {
  return (static_cast<const char*>(to) - static_cast<const char*>(from)) / LAR_VECTOR_BYTES;
}

// The word in which `announcer` says to `reader`, for one lane, where its output lies.
LAR_HOST_DEVICE uint32_t* where_word(const lar_workspace& workspace, int reader, int announcer, int lane) {
  return flag_row(workspace.base[reader], workspace.layout, FlagPlane::kPlaceWhere, lane) + announcer;
}

// Calls steps.announce(), scatter(chunk), admit() once, reduce(chunk) and settle(chunk), with as many chunks in flight
// as in run_two_shot(). Without chunks nobody waits. False as soon as one of them is.
template <typename Steps>
LAR_HOST_DEVICE bool run_place(int64_t chunks, const Steps& steps) {
  if (chunks == 0) return true;
  steps.announce();
#pragma unroll 1
  for (int64_t step = 0; step < chunks + 2; ++step) {
    if (step < chunks && !steps.scatter(step)) return false;
    if (step == 0 && !steps.admit()) return false;
    if (step >= 1 && step <= chunks && !steps.reduce(step - 1)) return false;
    if (step >= 2 && !steps.settle(step - 2)) return false;
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_PLACE_H_
