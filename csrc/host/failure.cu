// The record a wait leaves when it expires, and the texts of error codes.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include "host/layout.h"
#include "host/on_device.h"
#include "host/refusal.h"

namespace {
// One page of our own rather than cudaHostAlloc: it stays readable after the trap has ended the CUDA context.
constexpr size_t kPageBytes = 4096;
static_assert(sizeof(lar_failure) <= kPageBytes, "the record must fit its page");
}  // namespace

extern "C" int lar_failure_create(lar_failure** host_address, lar_failure** device_address, int32_t device) {
  const bool on_cpu = device == LAR_CPU;
  if (!host_address) return lar::refuse("host_address: null");
  if (!on_cpu && !device_address) return lar::refuse("device_address: null");
  void* page = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return LAR_ERROR_NO_MEMORY;
  *host_address = static_cast<lar_failure*>(page);
  if (on_cpu) return LAR_OK;
  void* mapped = nullptr;
  const lar::OnDevice current(device);
  const int status = current.error() != cudaSuccess ? current.error() : lar_host_register(page, kPageBytes, &mapped);
  *device_address = static_cast<lar_failure*>(mapped);
  if (status != LAR_OK) {
    munmap(page, kPageBytes);
    *host_address = nullptr;
  }
  return status;
}

extern "C" void lar_failure_destroy(lar_failure* host_address, int32_t device) {
  if (!host_address) return;
  if (device != LAR_CPU) {
    const lar::OnDevice current(device);
    lar_host_unregister(host_address);
  }
  munmap(host_address, kPageBytes);
}

extern "C" const char* lar_error_string(int code) {
  switch (code) {
    case LAR_OK:
      return "success";
    case LAR_ERROR_INVALID_ARGUMENT:
      return "invalid argument";
    case LAR_ERROR_TIMEOUT:
      return "a peer did not arrive in time";
    case LAR_ERROR_MISMATCH:
      return "a peer makes another call";
    case LAR_ERROR_INTERRUPTED:
      return "a wait was interrupted";
    case LAR_ERROR_CLOSED:
      return "the workspace is closed";
    case LAR_ERROR_BUSY:
      return "another thread is in a call of this workspace";
    case LAR_ERROR_NOT_RESIDENT:
      return "the GPU cannot run all blocks of the call at the same time";
    case LAR_ERROR_NO_MEMORY:
      return "no memory, or as many mappings as a process may have";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
