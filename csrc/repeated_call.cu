// A bound call that becomes a CUDA graph of its own once it has come a few times.
#include <mutex>

#include "launch.h"

namespace nsa {
namespace {

// Not worth a graph: a fill that is bound for one step, or called to warm up before it is captured.
constexpr int kPlainCalls = 4;

// An error counts as captured: the plain launch meets it, too, and returns it.
bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const bool is_known = cudaStreamIsCapturing(stream, &status) == cudaSuccess;
  if (!is_known) cudaGetLastError();
  return !is_known || status != cudaStreamCaptureStatusNone;
}

// Records the call on a stream of its own and makes it executable. Relaxed: neither a capture of this
// thread on another stream nor one of another thread is in the way.
cudaError_t make_executable(const std::function<int(void*)>& call, cudaGraphExec_t* executable) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  if (error == cudaSuccess) {
    const auto launched = static_cast<cudaError_t>(call(stream));
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    error = launched != cudaSuccess ? launched : ended;
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(executable, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // what is returned is not to be met again by the next launch
  return error;
}

}  // namespace

struct RepeatedCall::Graph {
  std::mutex mutex;  // an executable graph is not for two threads at once
  int plain_calls = 0;
  cudaGraphExec_t executable = nullptr;

  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
  }
};

RepeatedCall::RepeatedCall(std::function<int(void*)> call)
    : call_(std::move(call)), graph_(std::make_unique<Graph>()) {}

RepeatedCall::~RepeatedCall() = default;

int RepeatedCall::operator()(void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (is_captured(on)) return call_(stream);
  const std::lock_guard<std::mutex> lock(graph_->mutex);
  if (graph_->plain_calls < kPlainCalls) {
    ++graph_->plain_calls;
    return call_(stream);
  }
  if (graph_->executable == nullptr) {
    const cudaError_t error = make_executable(call_, &graph_->executable);
    if (error != cudaSuccess) return error;
  }
  return cudaGraphLaunch(graph_->executable, on);
}

}  // namespace nsa
