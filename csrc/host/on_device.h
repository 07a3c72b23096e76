// The caller's current device, and another for a while.
#ifndef LLM_ALLREDUCE_HOST_ON_DEVICE_H_
#define LLM_ALLREDUCE_HOST_ON_DEVICE_H_

#include <cuda_runtime.h>

namespace lar {

// While one lives, `device` is current in this thread; what was so before is so again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&callers_)) {
    if (error_ != cudaSuccess || callers_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(callers_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int callers_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_ON_DEVICE_H_
