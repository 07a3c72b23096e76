// The steps of TWOSHOT by flags, each lane alone on its share of every part, with three chunks in flight. Shared by
// CUDA and CPU ranks.
//
//     step s:  scatter  chunk s      store my partials into their owners' scatter slots, publish
//              reduce   chunk s-1    wait, sum ranks 0..N-1 in order, round once, store to all, publish
//              drain    chunk s-2    wait, copy the other owners' results to the output
//
// Why a ring of four slots needs no barrier (three would do; four keeps the index a mask, which survives the
// wrap of the 32-bit epoch):
//   - scatter(s) overwrites chunk s-4 at its owner. The owner read that chunk before it published its result,
//     and this lane has drained the result of chunk s-3 already.
//   - reduce(s-1) overwrites chunk s-5 in the gather slots. A peer drains chunk s-5 before it publishes
//     scatter(s-2), and this lane has just seen every peer publish scatter(s-1).
// Whoever releases the flags goes through the same steps, so a flag never runs ahead of what it stands for.
// A call ends with everything drained, so the first chunks of the next call are safe by the same argument. It does not
// matter in whose workspace a slot lies: in a shared layout an owner stores its results once, in its own.
#ifndef LLM_ALLREDUCE_PROTOCOL_TWO_SHOT_H_
#define LLM_ALLREDUCE_PROTOCOL_TWO_SHOT_H_

#include "protocol/pieces.h"

namespace lar {

// Calls steps.scatter(chunk), steps.reduce(chunk) and steps.drain(chunk) in order. False as soon as one of them is.
template <typename Steps>
LAR_HOST_DEVICE bool run_two_shot(int64_t chunks, const Steps& steps) {
#pragma unroll 1
  for (int64_t step = 0; step < chunks + 2; ++step) {
    if (step < chunks && !steps.scatter(step)) return false;
    if (step >= 1 && step <= chunks && !steps.reduce(step - 1)) return false;
    if (step >= 2 && !steps.drain(step - 2)) return false;
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_TWO_SHOT_H_
