// A call of a CPU rank as its peers see it: what it is, and whether theirs is the same.
//
// Each rank numbers its calls and writes what the newest are into its own workspace, before anything else of a call. A
// peer reads the record of its own call's number there. A record is written again eight calls later. Peers are ahead of
// each other by less, but for calls without elements, in which nobody waits; then there is nothing to compare.
#ifndef LLM_ALLREDUCE_CPU_CALL_H_
#define LLM_ALLREDUCE_CPU_CALL_H_

#include "host/layout.h"

namespace lar::cpu {

class Call {
 public:
  Call(const lar_workspace& workspace, const lar_call& call)
      : workspace_(workspace), mine_{0, call.kind, call.message.dtype, call.message.count} {}

  // Tells the peers. LAR_OK, or why the group is broken.
  int begin();

  const lar_workspace& workspace() const { return workspace_; }

  // False, with both calls on record, when `peer` makes another call of this number.
  bool agrees_with(int peer) const;

  // Puts on record why the group is broken, once; always false.
  bool fail(lar_reason reason, lar_phase phase, int peer, uint32_t round, uint32_t seen, int64_t waited_ns) const;

  // The status of a call in a broken group.
  int broken() const;

 private:
  const lar_workspace& workspace_;
  lar_call_record mine_;
};

}  // namespace lar::cpu

#endif  // LLM_ALLREDUCE_CPU_CALL_H_
