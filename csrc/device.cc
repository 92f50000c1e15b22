// What the host asks the CUDA runtime.
#include <cuda_runtime_api.h>

#include "host.h"

namespace nsa {

int query_sms(int device, int* sms) {
  const cudaError_t error = cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it as its own
  return error;
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace nsa
