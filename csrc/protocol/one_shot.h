// The steps of ONESHOT by flags, each lane alone, with two chunks in flight. Shared by CUDA and CPU ranks.
//
//     step s:  push    chunk s      store my chunk into slot [round][my rank] of every peer, publish
//              reduce  chunk s-1    wait, sum the chunks of ranks 0..N-1 in that order, round once, store to the output
//
// Why four generations and no barrier at the end: push(s) overwrites chunk s-4. A peer publishes s-2 only after all its
// threads have reduced s-4 (program order and the barrier in publish()), and this lane has seen every peer publish s-2
// before it reduced that chunk, one step ago.
#ifndef LLM_ALLREDUCE_PROTOCOL_ONE_SHOT_H_
#define LLM_ALLREDUCE_PROTOCOL_ONE_SHOT_H_

#include "protocol/pieces.h"

namespace lar {

// Calls steps.push(chunk) and steps.reduce(chunk) in order. False as soon as one of them is.
template <typename Steps>
LAR_HOST_DEVICE bool run_one_shot(int64_t chunks, const Steps& steps) {
#pragma unroll 1
  for (int64_t step = 0; step <= chunks; ++step) {
    if (step < chunks && !steps.push(step)) return false;
    if (step > 0 && !steps.reduce(step - 1)) return false;
  }
  return true;
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_ONE_SHOT_H_
