// Generations of in-band slots: which of them a call uses, and which it clears. Shared by CUDA and CPU ranks.
//
// A slot is filled with a marker word before it is used. The sender stores its vectors; the reader polls the vectors
// themselves until no word is the marker any more. An epoch counts in-band calls, 32 bits that may wrap: the numbers of
// generations divide 2^32.
//
// Pushed: the reader restores the marker behind what it has read. There are two generations, used by turns. Calls of
// all algorithms share them, bytes and count alike: in each call the slots of its algorithm are all that there is. That
// is enough as long as of every call that is counted, whatever its algorithm:
//   1. it ends on a rank only when that rank has cleared all that peers put into its slots in this call;
//   2. in it every rank takes, from every peer, something that depends on what that peer sent in this very call.
// What this rank cleared in call e is written next in call e+2. The peer that writes, perhaps not the one that wrote
// there before, has ended call e+1, in which (2) it took something that depends on what this rank sent in call e+1, and
// this rank sent nothing of call e+1 before call e, clears included (1), had ended (on GPUs the kernel boundary, or
// griddepcontrol.wait, which includes it). All that was written in call e had been read before it was cleared.
//
// Of 1: every vector that is pushed is polled, by the lane that clears it. Of 2:
//   - ONESHOT, whether values, packets or rows are sent: every rank polls all that every peer has sent.
//   - TWOSHOT, the same: a result depends on the partials of all ranks. Parts may be fewer than ranks; but a call is
//     never empty, so there is one owner at least, who takes partials of all peers, and everyone else takes its result.
//   - Inputs read in place, or results stored into outputs (LAR_PULL, LAR_PLACE): every lane waits for the flags of all
//     peers, numbered by calls. LAR_PLACE with inputs read in place uses no slots and is not counted.
//   - LAR_MULTICAST: as above, in memory of its own (device/multicast.cuh) and, TWOSHOT, in the scatter slots.
//     LAR_IN_SWITCH uses no slots and has a count of its own.
//
// Shared: what is stored once and read by all, a reader cannot clear. Each algorithm has slots and a count of its own,
// because a rank must know how much lies in an old generation. It clears in call e what was in its own workspace in
// call e-2, once everything that peers wait for is on its way. It may: it has ended call e-1, in which it took what
// depends on something that every peer sent in that call, and no peer sent anything of call e-1 before its own call
// e-2, reads included, had ended. Four generations are enough: a peer stores to or polls that one again in call e+2. It
// has then ended call e+1, in which it took what depends on something this rank sent after its call e, clears included,
// had ended.
//
// Every lane has a copy of the epoch, all alike between calls: a block must not read what another writes. Lane 0 counts
// for the lanes that a call leaves out.
#ifndef LLM_ALLREDUCE_PROTOCOL_GENERATIONS_H_
#define LLM_ALLREDUCE_PROTOCOL_GENERATIONS_H_

#include "host/layout.h"

namespace lar {

constexpr bool divides_epochs(uint32_t generations) { return (generations & (generations - 1)) == 0; }
static_assert(divides_epochs(LAR_PUSH_SLOTS) && divides_epochs(LAR_SHARED_SLOTS), "a wrap must not skip a generation");

LAR_HOST_DEVICE uint32_t pushed_generation(uint32_t epoch) { return epoch % LAR_PUSH_SLOTS; }
LAR_HOST_DEVICE uint32_t shared_generation(uint32_t epoch) { return epoch % LAR_SHARED_SLOTS; }
LAR_HOST_DEVICE uint32_t cleared_generation(uint32_t epoch) { return (epoch - 2) % LAR_SHARED_SLOTS; }

// Slots of peers lie in the order of the ranks that follow their holder. From 1 to world_size - 1: how many places
// after `rank` comes `peer`; and where, among the slots that `holder` has, those of the rank `step` places on lie.
LAR_HOST_DEVICE int step_to(int rank, int peer, int world_size) {
  return peer > rank ? peer - rank : peer - rank + world_size;
}
LAR_HOST_DEVICE int slot_of_step(int step) { return step - 1; }

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_GENERATIONS_H_
