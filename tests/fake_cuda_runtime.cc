// GraphedLaunch of csrc/graph_launch.cc over a CUDA runtime that is faked: prints what it called,
// one letter for each call. Its argument says which function fails: none, instantiate or create;
// or, as `threads`, that four threads launch at once.
//   p plain launch   g graph launch   c launch that is recorded   i graph instantiated
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "graph_launch.h"

namespace {

std::string failing, calls;
bool is_captured = false;
int objects = 0;
std::atomic<int> launching{0}, overlaps{0};  // of launches of the executable graph
cudaError_t last_error = cudaSuccess;
const auto kRecorder = reinterpret_cast<cudaStream_t>(2);

cudaError_t result_of(const std::string& function) {
  if (failing == function) last_error = cudaErrorMemoryAllocation;
  return failing == function ? cudaErrorMemoryAllocation : cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const cudaError_t error = result_of("create");
  if (error == cudaSuccess) *stream = kRecorder, ++objects;
  return error;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(3);
  ++objects;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  const cudaError_t error = result_of("instantiate");
  if (error == cudaSuccess) *executable = reinterpret_cast<cudaGraphExec_t>(4), ++objects;
  calls += 'i';
  return error;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return --objects, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return --objects, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return --objects, cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  if (++launching > 1) ++overlaps;
  if (failing == "threads") std::this_thread::sleep_for(std::chrono::microseconds(200));
  --launching;
  calls += 'g';
  return cudaSuccess;
}

}  // extern "C"

int main(int, char** arguments) {
  failing = arguments[1];
  int errors = 0;
  {
    nsa::GraphedLaunch launch([](void* stream) {
      calls += stream == kRecorder ? 'c' : 'p';
      return static_cast<int>(last_error);  // as cudaGetLastError() after a launch
    });
    if (failing == "threads") {
      std::vector<std::thread> threads;
      for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
          for (int i = 0; i < 25; ++i) launch(nullptr);
        });
      }
      for (std::thread& thread : threads) thread.join();
    } else {
      for (int i = 0; i < 7; ++i) errors += launch(nullptr) != cudaSuccess;
      is_captured = true;
      errors += launch(nullptr) != cudaSuccess;
    }
  }
  std::printf("%s errors=%d left=%d overlaps=%d\n", calls.c_str(), errors, objects,
              overlaps.load());
}
