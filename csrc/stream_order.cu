// Calls on one workspace must not overlap on the device: they share slots and epochs. On one stream they never
// do. When an eager call comes on another stream than the last, it is made to wait for the last one here.
// Captured calls are ordered by the graph they become part of.
//
// An event behind every call costs host time. Behind calls on the default stream, where eager
// programs run, it is recorded only once another stream asks: that stream never ends and is never captured.
#include <cuda_runtime.h>

#include "common.h"
#include "device/capture.h"

namespace {
bool is_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }
}  // namespace

struct lar_stream_order {
  int device = 0;
  int callers_device = 0;
  cudaEvent_t last_call = nullptr;
  cudaStream_t last_stream = nullptr;
  bool called = false;
  bool recorded = false;  // last_call stands behind the last call
  bool capturing = false;
};

extern "C" int lar_stream_order_create(lar_stream_order** order, int device) {
  int callers_device = 0;
  if (const cudaError_t error = cudaGetDevice(&callers_device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return error;
  auto* created = new lar_stream_order;
  created->device = device;
  const cudaError_t error = cudaEventCreateWithFlags(&created->last_call, cudaEventDisableTiming);
  cudaSetDevice(callers_device);
  if (error != cudaSuccess) {
    delete created;
    return error;
  }
  *order = created;
  return LAR_OK;
}

extern "C" void lar_stream_order_destroy(lar_stream_order* order) {
  if (!order) return;
  const lar::OutsideCapture outside;
  cudaEventDestroy(order->last_call);
  delete order;
}

extern "C" int lar_stream_order_begin(lar_stream_order* order, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  order->capturing = false;
  if (const cudaError_t error = cudaGetDevice(&order->callers_device); error != cudaSuccess) return error;
  if (order->callers_device != order->device)
    if (const cudaError_t error = cudaSetDevice(order->device); error != cudaSuccess) return error;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = is_default(stream) ? cudaSuccess : cudaStreamIsCapturing(stream, &status);
  order->capturing = status != cudaStreamCaptureStatusNone;
  if (error == cudaSuccess && !order->capturing && order->called && stream != order->last_stream) {
    if (!order->recorded) error = cudaEventRecord(order->last_call, order->last_stream);
    order->recorded = error == cudaSuccess;
    if (order->recorded) error = cudaStreamWaitEvent(stream, order->last_call, 0);
  }
  if (error != cudaSuccess && order->callers_device != order->device) cudaSetDevice(order->callers_device);
  return error;
}

extern "C" int lar_stream_order_end(lar_stream_order* order, void* stream_handle, int* capturing) {
  if (capturing) *capturing = order->capturing ? 1 : 0;
  cudaError_t error = cudaSuccess;
  if (!order->capturing) {
    order->last_stream = static_cast<cudaStream_t>(stream_handle);
    order->called = true;
    order->recorded = false;
    if (!is_default(order->last_stream)) {
      error = cudaEventRecord(order->last_call, order->last_stream);
      order->recorded = error == cudaSuccess;
    }
  }
  if (order->callers_device != order->device) cudaSetDevice(order->callers_device);
  return error;
}
