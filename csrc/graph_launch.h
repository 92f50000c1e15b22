// A kernel launch that becomes a CUDA graph of its own.
#pragma once

#include <functional>
#include <memory>

namespace nsa {

// Launches kernels on a stream, again and again. After a few calls it goes on as a CUDA graph,
// whose launch takes half of the host's time. While its stream is captured, and where no graph can
// be made, it launches plainly.
class GraphedLaunch {
 public:
  using Launch = std::function<int(void* stream)>;

  explicit GraphedLaunch(Launch launch);
  ~GraphedLaunch();
  int operator()(void* stream);  // returns a cudaError_t

 private:
  struct Graph;
  Launch launch_;
  std::unique_ptr<Graph> graph_;
};

}  // namespace nsa
