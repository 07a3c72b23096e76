// The functions of the CUDA runtime that the library calls, as far as it calls them. What is not supported fails
// loudly: here, or because it cannot be linked.
#include "runtime.h"

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <unordered_map>

#include "kernels.h"
#include "machine.h"
#include "report.h"

namespace emulator {
namespace {

int current_device = 0;
int pinned_on = -1;
std::atomic<bool> holds_launches{false};
std::atomic<int> held{0};

// As a launch does where its stream's queue is full.
void wait_while_held() {
  if (!holds_launches.load()) return;
  ++held;
  while (holds_launches.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  --held;
}

std::unordered_map<const void*, BindKernel>& kernels() {
  static std::unordered_map<const void*, BindKernel> all;
  return all;
}

Stream* stream_of(cudaStream_t handle) {
  auto* stream = reinterpret_cast<Stream*>(handle);
  if (!machine.has(stream)) fail("a stream that emulator_stream() has not made; there is no default stream here");
  return stream;
}

}  // namespace

void add_kernel(const void* kernel, BindKernel bind) { kernels()[kernel] = bind; }

BindKernel find_kernel(const void* kernel) {
  const auto found = kernels().find(kernel);
  return found == kernels().end() ? nullptr : found->second;
}

void hold_launches(bool hold) { holds_launches.store(hold); }
int held_launches() { return held.load(); }
int current_device_of_runtime() { return current_device; }
int device_that_pinned() { return pinned_on; }

}  // namespace emulator

using emulator::machine;

struct CUevent_st {
  emulator::Event event;
};

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::Machine::kDevices) return cudaErrorInvalidDevice;
  emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError(void) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = machine.device(device).multiprocessors;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    default:
      std::fprintf(stderr, "emulator: no device attribute %d\n", static_cast<int>(attribute));
      return cudaErrorNotSupported;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (!emulator::find_kernel(kernel)) return cudaErrorInvalidDeviceFunction;
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int, size_t) {
  if (!emulator::find_kernel(kernel)) return cudaErrorInvalidDeviceFunction;
  *blocks = machine.device(emulator::current_device).blocks_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** parameters) {
  emulator::wait_while_held();
  emulator::Stream* stream = emulator::stream_of(config->stream);
  if (stream->device->broken) return cudaErrorLaunchFailure;
  if (stream->device->number != emulator::current_device) return cudaErrorInvalidResourceHandle;
  const emulator::BindKernel bind = emulator::find_kernel(kernel);
  if (!bind) emulator::fail("a kernel that kernel_address() was not asked for");
  auto grid = std::make_unique<emulator::Grid>();
  grid->blocks = config->gridDim;
  grid->threads = config->blockDim;
  const bool is_flat = grid->blocks.y == 1 && grid->blocks.z == 1 && grid->threads.y == 1 && grid->threads.z == 1;
  if (!is_flat || config->dynamicSmemBytes != 0) emulator::fail("grids have one dimension and no dynamic memory here");
  if (grid->blocks.x < 1 || grid->threads.x < 1 || grid->threads.x > 1024) return cudaErrorInvalidConfiguration;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      grid->may_start_early = attribute.val.programmaticStreamSerializationAllowed != 0;
    else if (attribute.id == cudaLaunchAttributeCooperative)
      grid->is_cooperative = attribute.val.cooperative != 0;
    else
      emulator::fail("a launch attribute that is not known here");
  }
  if (grid->is_cooperative &&
      static_cast<int>(grid->blocks.x) > stream->device->multiprocessors * stream->device->blocks_per_multiprocessor)
    return cudaErrorCooperativeLaunchTooLarge;
  grid->body = bind(kernel, parameters);
  machine.launch(stream, std::move(grid));
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{};
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  emulator::Stream* stream = emulator::stream_of(handle);
  event->event = {stream->launched, stream};
  return stream->device->broken ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  if (event->event.stream && machine.has(event->event.stream))
    machine.wait_for(emulator::stream_of(handle), event->event);
  return cudaSuccess;
}

// Nothing is ever captured here.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                unsigned) {
  return cudaErrorNotSupported;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaHostRegister(void*, size_t, unsigned) {
  emulator::pinned_on = emulator::current_device;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void*) {
  emulator::pinned_on = emulator::current_device;
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure (emulated: a kernel has trapped)";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    default: {
      static char text[64];
      std::snprintf(text, sizeof(text), "CUDA error %d (emulated)", static_cast<int>(error));
      return text;
    }
  }
}

}  // extern "C"
