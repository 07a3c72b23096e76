// What one lane of one rank handles of a message, in units: vectors of elements as they are, or packets.
#ifndef LLM_ALLREDUCE_PROTOCOL_PIECES_H_
#define LLM_ALLREDUCE_PROTOCOL_PIECES_H_

#include "host/layout.h"

namespace lar {

// Units [first, first + span).
struct Piece {
  int64_t first;
  int64_t span;  // not positive when the message ends before this piece
};

// A message cut into chunks; each has `parts` parts, of which each lane has a piece of `units` units.
struct Cut {
  int64_t total;  // units of the message
  int64_t units;
  int parts;
  int lanes;
  int lane;

  LAR_HOST_DEVICE int64_t chunks() const { return ceil_div(total, units * lanes * parts); }

  LAR_HOST_DEVICE Piece piece(int64_t chunk, int part) const {
    const int64_t first = ((chunk * parts + part) * lanes + lane) * units;
    const int64_t left = total - first;
    return {first, left < units ? left : units};
  }
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_PROTOCOL_PIECES_H_
