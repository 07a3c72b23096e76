// The C ABI of the all-reduce kernels: plain structs, raw pointers, a stream. No torch, no Python.
//
// Every function returns 0 on success, a positive cudaError_t when CUDA refused, or a negative lar_status.
#ifndef LLM_ALLREDUCE_H_
#define LLM_ALLREDUCE_H_

#include <stdint.h>

#include "llm_allreduce/call.h"
#include "llm_allreduce/kinds.h"
#include "llm_allreduce/layout.h"
#include "llm_allreduce/limits.h"
#include "llm_allreduce/workspace.h"

#if defined(_WIN32)
#error "llm_allreduce_plugin needs POSIX shared memory and Linux's CUDA stack"
#endif
#define LAR_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lar_status {
  LAR_OK = 0,
  LAR_ERROR_INVALID_ARGUMENT = -1,
  LAR_ERROR_TIMEOUT = -2,       // a peer did not arrive in time; lar_failure says which
  LAR_ERROR_MISMATCH = -3,      // CPU ranks: a peer makes another call; lar_failure says which
  LAR_ERROR_INTERRUPTED = -4,   // CPU ranks: lar_workspace.should_leave ended a wait
  LAR_ERROR_CLOSED = -5,        // the workspace is closed
  LAR_ERROR_BUSY = -6,          // CPU ranks: another thread is in a call of this workspace
  LAR_ERROR_NOT_RESIDENT = -7,  // blocks that wait for each other would not all run at the same time on this GPU
  LAR_ERROR_NO_MEMORY = -8,     // the host has none, or the process as many mappings as it may have
} lar_status;

// LAR_ERROR_INVALID_ARGUMENT when a slot would hold less than one vector. One rank, of a host with no other, has
// flagged slots alone.
LAR_EXPORT int lar_layout_init(lar_layout* layout, const lar_layout_sizes* sizes);

// So many bytes of memory that one store reaches everywhere, on granularity of vectors. `in_switch`: inputs, too.
// LAR_ERROR_INVALID_ARGUMENT when a slot would hold less than one vector.
LAR_EXPORT int lar_multicast_layout_init(lar_multicast_layout* layout, int32_t world_size, int64_t bytes,
                                         int32_t in_switch);

// Elements of a sum that LAR_REDUCE (`parts` 1) or LAR_REDUCE_SCATTER (`parts`: ranks of the host) makes of a message.
LAR_EXPORT int64_t lar_sum_elements(int64_t count, int32_t parts);

// Loads all kernels for `world_size` onto the current device. Otherwise each is loaded when it is first launched, which
// may wait for kernels that run: for ever, if they wait for a rank of the same process.
LAR_EXPORT int lar_load_kernels_cuda(int32_t world_size);

// Sums the messages of all ranks in rank order, in fp32, rounded once; a call of any kind that is registered
// (csrc/host/registry.h). On a CPU rank `stream` is ignored, and the call has ended when this returns.
//
// With a wire format, everything that is summed travels in it: what ranks send their owners, and the sums on their way
// back. Every rank takes the decoded sums, the owner too, so all have the same bits. 16-bit elements on GPUs, 2 to 8
// ranks.
//
// LAR_ERROR_INVALID_ARGUMENT when no kernel has this kind, or the call does not fit the workspace;
// LAR_ERROR_NOT_RESIDENT; on CPU ranks, why the group is broken.
LAR_EXPORT int lar_all_reduce(const lar_workspace* workspace, const lar_call* call, void* stream);

// The same LAR_RMS_NORM of a message that has been summed already: no rank waits for another. `device`: LAR_CPU, where
// `stream` is ignored, or any GPU. message.output may be message.input. LAR_ERROR_INVALID_ARGUMENT for what no kernel
// takes.
LAR_EXPORT int lar_rms_norm(const lar_message* message, const lar_norm* norm, int32_t device, void* stream);

// Wire formats. Values travel in packets of `values` values in `bytes` bytes; what the last packet lacks counts as
// zero. Packets lie at multiples of 16 bytes on the device. LAR_FLOAT32 values are taken too, which only tests need.
LAR_EXPORT const char* lar_wire_name(lar_wire);  // null: there is none of this number
LAR_EXPORT int lar_packet_size(lar_wire, int32_t* values, int32_t* bytes);
LAR_EXPORT int lar_encode_cpu(lar_wire, lar_dtype, const void* values, int64_t count, void* packets);
LAR_EXPORT int lar_decode_cpu(lar_wire, lar_dtype, const void* packets, int64_t count, void* values);
LAR_EXPORT int lar_encode_cuda(lar_wire, lar_dtype, const void* values, int64_t count, void* packets, void* stream);
LAR_EXPORT int lar_decode_cuda(lar_wire, lar_dtype, const void* packets, int64_t count, void* values, void* stream);

// Proof that peers see each other's bytes. Each rank writes a word made from `nonce` into every peer's probe
// area; after a barrier of the caller's, each rank checks what peers wrote here and, by loading from each peer,
// what it wrote there. `verdict` (device memory): per peer, bit 0 = its write arrived, bit 1 = its memory reads.
LAR_EXPORT int lar_probe_write_cuda(const lar_workspace*, uint32_t nonce, void* stream);
LAR_EXPORT int lar_probe_check_cuda(const lar_workspace*, uint32_t nonce, int32_t* verdict, void* stream);

// Keeps the calls of one workspace from overlapping when they come on different streams, and makes `device`
// current around a call. Wrap every CUDA call: begin, the call, end (also after a failed call). Calls that go into one
// graph are ordered by edges of that graph, in the order in which they come, on whatever branches.
typedef struct lar_stream_order lar_stream_order;
LAR_EXPORT int lar_stream_order_create(lar_stream_order** order, int device);
LAR_EXPORT void lar_stream_order_destroy(lar_stream_order* order);
typedef struct lar_call_order {
  uint64_t capture;     // a number for the capture that the call goes into; 0: none
  int32_t starts_late;  // for lar_workspace.starts_late
} lar_call_order;
LAR_EXPORT int lar_stream_order_begin(lar_stream_order* order, void* stream, lar_call_order* call);
LAR_EXPORT int lar_stream_order_end(lar_stream_order* order, void* stream);

// lar_call_order.capture of a call on `stream`; 0 also where CUDA says nothing.
LAR_EXPORT uint64_t lar_capture_of(void* stream);

// Pins `bytes` of host memory at `address`, whole pages, and tells where the current device sees them.
LAR_EXPORT int lar_host_register(void* address, int64_t bytes, void** device_address);
LAR_EXPORT int lar_host_unregister(void* address);

// Host memory for a lar_failure that outlives a broken CUDA context, and where `device` sees it, whichever device is
// current. `device`: LAR_CPU, where `device_address` may be null, or a GPU. LAR_ERROR_NO_MEMORY.
LAR_EXPORT int lar_failure_create(lar_failure** host_address, lar_failure** device_address, int32_t device);
LAR_EXPORT void lar_failure_destroy(lar_failure* host_address, int32_t device);

// The text of any code that a function above returned.
LAR_EXPORT const char* lar_error_string(int code);

// After a function above has returned LAR_ERROR_INVALID_ARGUMENT to this thread: what was wrong, as "field: condition",
// such as "chunk_vectors: more than a slot holds". Before any has: "". The text stays valid for ever, and is that of
// the thread's last refusal: other results do not change it.
LAR_EXPORT const char* lar_refusal(void);

// The CUDA release that the kernels were compiled with, 1000 times the major number and 10 times the minor: 13000.
LAR_EXPORT int lar_cuda_release(void);

// The version of this ABI; bumped when a struct or a function changes.
LAR_EXPORT int lar_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif  // LLM_ALLREDUCE_H_
