#include "graph_launch.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <utility>

namespace nsa {
namespace {

// A fill that is bound for one step, or called to warm up before a capture, is not worth a graph.
constexpr int kPlainLaunches = 4;

// A stream that cannot be asked counts as captured: the plain launch meets the error and returns
// it.
bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const bool is_known = cudaStreamIsCapturing(stream, &status) == cudaSuccess;
  if (!is_known) cudaGetLastError();
  return !is_known || status != cudaStreamCaptureStatusNone;
}

// Records the launch on a stream of its own and instantiates the graph; null where that fails.
// Relaxed capture: other captures, of this thread or another, are not disturbed and do not disturb.
cudaGraphExec_t make_executable(const GraphedLaunch::Launch& launch) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) return nullptr;
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  if (error == cudaSuccess) {
    const int launched = launch(stream);
    error = cudaStreamEndCapture(stream, &graph);
    if (launched != cudaSuccess) error = static_cast<cudaError_t>(launched);
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // or the next launch would report this error as its own
  return error == cudaSuccess ? executable : nullptr;
}

}  // namespace

struct GraphedLaunch::Graph {
  std::mutex mutex;  // two threads must not launch an executable graph at once
  int plain_launches = 0;
  bool is_tried = false;
  cudaGraphExec_t executable = nullptr;

  ~Graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
  }
};

GraphedLaunch::GraphedLaunch(Launch launch)
    : launch_(std::move(launch)), graph_(std::make_unique<Graph>()) {}

GraphedLaunch::~GraphedLaunch() = default;

int GraphedLaunch::operator()(void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (is_captured(on)) return launch_(stream);
  const std::lock_guard<std::mutex> lock(graph_->mutex);
  if (graph_->plain_launches < kPlainLaunches) {
    ++graph_->plain_launches;
    return launch_(stream);
  }
  if (!graph_->is_tried) {
    graph_->is_tried = true;
    graph_->executable = make_executable(launch_);
  }
  if (graph_->executable == nullptr) return launch_(stream);
  return cudaGraphLaunch(graph_->executable, on);
}

}  // namespace nsa
