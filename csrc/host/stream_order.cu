// Calls on one workspace must not overlap on the device: they share slots and epochs. On one stream they never
// do. When an eager call comes on another stream than the last, it is made to wait for the last one here.
//
// Calls that are captured into one graph are ordered by edges of it. On one stream the graph has them anyway. A call on
// another branch gets an edge from the last call, and with it must not start early: a kernel that may start before its
// predecessor has ended can promise that of the one before it on its stream only. Which graph is replayed when is the
// caller's to order.
//
// An event behind every call costs host time. Behind calls on the default stream, where eager
// programs run, it is recorded only once another stream asks: that stream never ends and is never captured.
#include <cuda_runtime.h>

#include <vector>

#include "host/capture.h"
#include "host/layout.h"
#include "host/on_device.h"

namespace {

bool is_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

// What a stream is being captured into.
struct Capture {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaGraphNode_t* nodes = nullptr;  // behind which the stream's next one comes
  size_t number = 0;

  bool is_active() const { return status == cudaStreamCaptureStatusActive; }
};

cudaError_t ask(cudaStream_t stream, Capture* capture) {
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  const cudaGraphEdgeData* edges = nullptr;
  return cudaStreamGetCaptureInfo(stream, &capture->status, &capture->id, &graph, &capture->nodes, &edges,
                                  &capture->number);
#else
  return cudaStreamGetCaptureInfo_v2(stream, &capture->status, &capture->id, &graph, &capture->nodes, &capture->number);
#endif
}

cudaError_t add_edges(cudaStream_t stream, std::vector<cudaGraphNode_t>& from) {
#if CUDART_VERSION >= 13000
  return cudaStreamUpdateCaptureDependencies(stream, from.data(), nullptr, from.size(),
                                             cudaStreamAddCaptureDependencies);
#else
  return cudaStreamUpdateCaptureDependencies(stream, from.data(), from.size(), cudaStreamAddCaptureDependencies);
#endif
}

}  // namespace

struct lar_stream_order {
  int device = 0;
  int callers_device = 0;
  cudaEvent_t last_call = nullptr;
  cudaStream_t last_stream = nullptr;
  bool called = false;
  bool recorded = false;  // last_call stands behind the last call
  bool capturing = false;
  // The last captured call: of which capture, on which stream, and the nodes that it has ended with.
  unsigned long long capture = 0;
  cudaStream_t captured_stream = nullptr;
  std::vector<cudaGraphNode_t> captured_nodes;
};

extern "C" int lar_stream_order_create(lar_stream_order** order, int device) {
  const lar::OnDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  auto* created = new lar_stream_order;
  created->device = device;
  const cudaError_t error = cudaEventCreateWithFlags(&created->last_call, cudaEventDisableTiming);
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

namespace {

// Orders an eager call behind the last one.
cudaError_t follow(lar_stream_order* order, cudaStream_t stream) {
  if (!order->called || stream == order->last_stream) return cudaSuccess;
  if (!order->recorded) {
    if (const cudaError_t error = cudaEventRecord(order->last_call, order->last_stream); error != cudaSuccess)
      return error;
    order->recorded = true;
  }
  return cudaStreamWaitEvent(stream, order->last_call, 0);
}

// Orders a captured call behind the last one of the same capture.
cudaError_t follow_in_graph(lar_stream_order* order, cudaStream_t stream, const Capture& capture,
                            lar_call_order* call) {
  if (capture.id != order->capture) order->captured_nodes.clear();
  order->capture = capture.id;
  call->capture = capture.id;
  if (order->captured_nodes.empty() || stream == order->captured_stream) return cudaSuccess;
  call->starts_late = 1;
  return add_edges(stream, order->captured_nodes);
}

}  // namespace

extern "C" uint64_t lar_capture_of(void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Capture capture;
  if (is_default(stream) || ask(stream, &capture) != cudaSuccess || !capture.is_active()) return 0;
  return capture.id;
}

extern "C" int lar_stream_order_begin(lar_stream_order* order, void* stream_handle, lar_call_order* call) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  *call = {0, 0};
  order->capturing = false;
  if (const cudaError_t error = cudaGetDevice(&order->callers_device); error != cudaSuccess) return error;
  if (order->callers_device != order->device)
    if (const cudaError_t error = cudaSetDevice(order->device); error != cudaSuccess) return error;
  Capture capture;
  cudaError_t error = is_default(stream) ? cudaSuccess : ask(stream, &capture);
  order->capturing = capture.is_active();
  if (error == cudaSuccess)
    error = order->capturing ? follow_in_graph(order, stream, capture, call) : follow(order, stream);
  if (error != cudaSuccess && order->callers_device != order->device) cudaSetDevice(order->callers_device);
  return error;
}

extern "C" int lar_stream_order_end(lar_stream_order* order, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  cudaError_t error = cudaSuccess;
  if (order->capturing) {
    Capture capture;
    error = ask(stream, &capture);
    if (error == cudaSuccess && capture.is_active() && capture.id == order->capture) {
      order->captured_stream = stream;
      order->captured_nodes.assign(capture.nodes, capture.nodes + capture.number);
    }
  } else {
    order->last_stream = stream;
    order->called = true;
    order->recorded = false;
    if (!is_default(stream)) {
      error = cudaEventRecord(order->last_call, stream);
      order->recorded = error == cudaSuccess;
    }
  }
  if (order->callers_device != order->device) cudaSetDevice(order->callers_device);
  return error;
}
