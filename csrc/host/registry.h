// Which kernel runs a call of which kind: the only place that maps one to the other.
//
// Every csrc/kernels/*.cu adds rows for its kernels, every csrc/cpu/*.cpp one for what a CPU rank runs, and every
// csrc/host/exchange_*.cu the function that launches kernels of its exchange. lar_all_reduce() looks a call up here,
// and lar_load_kernels_cuda() loads what a group may need.
#ifndef LLM_ALLREDUCE_HOST_REGISTRY_H_
#define LLM_ALLREDUCE_HOST_REGISTRY_H_

#include "llm_allreduce.h"

namespace lar {

// In band, an algorithm has several kernels, which store the same vectors in the same places. In the same call, ranks
// may run kAny and kShort, or kAny and kBulk: block b of the one waits only for block b of the other. kSplit must run
// on all or none: its blocks wait for vectors in another order, and where a grid is not resident as a whole, ranks with
// different orders could wait for each other in a circle.
enum class Form : uint8_t {
  kAny,    // any message
  kShort,  // whole aligned vectors, one to a thread: no loop and nothing to skip
  kSplit,  // lanes with one task each
  kWide,   // of rows: kShort with blocks of up to LAR_MAX_WIDE_THREADS
  kBulk,   // whole aligned vectors, several to a thread: every lane sends its own by bulk copies
  kPull,   // whole aligned vectors; inputs are read in place. On all ranks or none
};

// World sizes that a kernel is compiled for; 0: any, at run time.
struct Row {
  lar_kind kind;
  lar_dtype dtype;
  int32_t world_size;
  Form form;
  const void* kernel;
  int32_t most_threads;   // in lar_launch.threads
  int32_t extra_threads;  // of a block, beside those
  bool resident;          // all blocks wait for each other, so all must run at the same time
};

using CpuFunction = int (*)(const lar_workspace&, const lar_call&);
using ExchangeFunction = int (*)(const lar_workspace&, const lar_call&, void* stream);

// To be called before main(), through Registration.
void add_row(const Row& row);
void add_cpu(lar_kind kind, CpuFunction function);
void add_exchange(lar_exchange exchange, ExchangeFunction function);

// Calls `add` when the library is loaded.
struct Registration {
  template <typename Add>
  explicit Registration(Add add) {
    add();
  }
};

// The kernel of a call, compiled for its world size or for any; null: there is none.
const Row* find_row(lar_kind kind, lar_dtype dtype, int32_t world_size, Form form);

constexpr bool operator==(lar_kind a, lar_kind b) {
  return a.algorithm == b.algorithm && a.exchange == b.exchange && a.wire == b.wire && a.epilogue == b.epilogue;
}

constexpr lar_kind kind_of(lar_algorithm algorithm, lar_exchange exchange, lar_wire wire = LAR_WIRE_RAW,
                           lar_epilogue epilogue = LAR_STORE) {
  return {static_cast<uint8_t>(algorithm), static_cast<uint8_t>(exchange), static_cast<uint8_t>(wire),
          static_cast<uint8_t>(epilogue)};
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_REGISTRY_H_
