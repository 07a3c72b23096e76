#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/norm.h"
#include "host/capture.h"
#include "host/check.h"
#include "host/registry.h"

namespace lar {
namespace {

// What a row is found by, in one word.
uint64_t key(lar_kind kind, lar_dtype dtype, int32_t world_size, Form form) {
  uint64_t key = kind.algorithm;
  for (const uint64_t part : {uint64_t{kind.exchange}, uint64_t{kind.wire}, uint64_t{kind.epilogue},
                              static_cast<uint64_t>(dtype), static_cast<uint64_t>(form)})
    key = key << 8 | part;
  return key << 8 | static_cast<uint64_t>(world_size);
}

// With its key beside it: a row is looked for in every launch.
struct KeyedRow {
  uint64_t key;
  Row row;
};

// In functions, because rows come before the initialization of this file's variables.
std::vector<KeyedRow>& rows() {
  static std::vector<KeyedRow> all;
  return all;
}

std::vector<std::pair<lar_kind, CpuFunction>>& cpu_functions() {
  static std::vector<std::pair<lar_kind, CpuFunction>> all;
  return all;
}

constexpr int kExchanges = 16;
ExchangeFunction* exchanges() {
  static ExchangeFunction all[kExchanges];
  return all;
}

// The rows by rising key.
const std::vector<KeyedRow>& sorted_rows() {
  static std::once_flag sorted;
  std::call_once(sorted, [] {
    std::sort(rows().begin(), rows().end(), [](const KeyedRow& a, const KeyedRow& b) { return a.key < b.key; });
  });
  return rows();
}

const Row* find(uint64_t wanted) {
  const std::vector<KeyedRow>& all = sorted_rows();
  const auto at = std::lower_bound(all.begin(), all.end(), wanted,
                                   [](const KeyedRow& row, uint64_t other) { return row.key < other; });
  return at != all.end() && at->key == wanted ? &at->row : nullptr;
}

// Rows are normed behind the sum, where it lies: CPU ranks have nothing to win by doing both at once.
int call_cpu(const lar_workspace& workspace, const lar_call& call) {
  lar_kind summing = call.kind;
  summing.epilogue = LAR_STORE;
  for (const auto& [kind, function] : cpu_functions()) {
    if (!(kind == summing)) continue;
    const int status = function(workspace, call);
    if (status != LAR_OK || !call.norm || call.message.count == 0) return status;
    lar_message sums = call.message;
    sums.input = sums.output;
    cpu::rms_norm(sums, *call.norm);
    return LAR_OK;
  }
  return refuse("kind: CPU ranks have no function of it");
}

}  // namespace

void add_row(const Row& row) { rows().push_back({key(row.kind, row.dtype, row.world_size, row.form), row}); }

void add_cpu(lar_kind kind, CpuFunction function) { cpu_functions().emplace_back(kind, function); }

void add_exchange(lar_exchange exchange, ExchangeFunction function) { exchanges()[exchange] = function; }

const Row* find_row(lar_kind kind, lar_dtype dtype, int32_t world_size, Form form) {
  const Row* fixed = find(key(kind, dtype, world_size, form));
  return fixed ? fixed : find(key(kind, dtype, 0, form));
}

}  // namespace lar

extern "C" int lar_all_reduce(const lar_workspace* workspace, const lar_call* call, void* stream) {
  using namespace lar;
  if (!workspace || !call) return refuse("workspace, call: null");
  if (const int status = check_call(*workspace, *call); status != LAR_OK) return status;
  if (workspace->device == LAR_CPU) return call_cpu(*workspace, *call);
  const ExchangeFunction launch = call->kind.exchange < kExchanges ? exchanges()[call->kind.exchange] : nullptr;
  if (!launch) return refuse("exchange: there is none of this number");
  return call->message.count == 0 ? LAR_OK : launch(*workspace, *call, stream);
}

extern "C" int lar_load_kernels_cuda(int32_t world_size) {
  using namespace lar;
  if (!supported_world_size(world_size) && world_size != 1) return refuse("world_size: not supported");
  const OutsideCapture outside;
  for (const KeyedRow& keyed : sorted_rows()) {
    const Row& row = keyed.row;
    if (find_row(row.kind, row.dtype, world_size, row.form) != &row) continue;
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, row.kernel); error != cudaSuccess) return error;
  }
  return LAR_OK;
}
