// An empty kernel with programmatic launch, for the place right before a deep graph:
// docs/kernel.md, "How closely a graph's nodes follow one another".
#include <cuda_runtime_api.h>

#include "host.h"

namespace nsa {

// It ends after what comes before it on the stream, so that what comes after it may rely on that.
static __global__ void no_op_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

int no_op_on_cuda(void* stream) {
  cudaLaunchAttribute programmatic{};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(1);
  launch.blockDim = dim3(32);
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &programmatic;
  launch.numAttrs = 1;
  const cudaError_t error =
      cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(no_op_kernel), nullptr);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it as its own
  return error;
}

}  // namespace nsa
