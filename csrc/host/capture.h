// Calls that have nothing to do with a graph that happens to be captured meanwhile.
#ifndef LLM_ALLREDUCE_HOST_CAPTURE_H_
#define LLM_ALLREDUCE_HOST_CAPTURE_H_

#include <cuda_runtime.h>

namespace lar {

// While one lives, this thread may set up and tear down although some stream is being captured in global mode. Python
// collects garbage whenever it likes, so a forgotten workspace may end in the middle of a capture, which would
// otherwise be invalidated by that.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_HOST_CAPTURE_H_
