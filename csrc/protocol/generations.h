// Generations of in-band slots: which of them a call uses, and which it clears. Shared by CUDA and CPU ranks.
//
// A slot is filled with a marker word before it is used. The sender stores its vectors; the reader polls the vectors
// themselves until no word is the marker any more. An epoch counts the in-band calls of an algorithm, 32 bits that may
// wrap: the numbers of generations divide 2^32.
//
// Pushed: the reader restores the marker behind what it has read. Two generations, used by turns, are enough: what this
// rank cleared in call e is written next in call e+2. The peer that writes has ended call e+1, in which it took a value
// that depends on what this rank sent in call e+1, and this rank sent nothing of call e+1 before call e, clears
// included, had ended (on GPUs the kernel boundary, or griddepcontrol.wait, which includes it).
//
// Shared: what is stored once and read by all, a reader cannot clear. Instead, a rank clears in call e what was in its
// own workspace in call e-2, once everything that peers wait for is on its way. It may: it has ended call e-1, in which
// it took what depends on something that every peer sent in that call, and no peer sent anything of call e-1 before its
// own call e-2, reads included, had ended. Four generations are enough: a peer stores to or polls that one again in
// call e+2. It has then ended call e+1, in which it took what depends on something this rank sent after its call e,
// clears included, had ended.
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
