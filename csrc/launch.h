// The ways to run a fill and a comparison. The binding checks and packs; these only run.
#pragma once

#include <functional>
#include <memory>

#include "compare.h"
#include "fill.h"

namespace nsa {

void fill_on_cpu(const Fill& fill);
void compare_on_cpu(const Comparison& all);

#ifdef NSA_WITH_CUDA
// How the token table is copied, if there is one. Each way has a kernel of its own, so that what is run
// lies together.
enum class Tokens { kNone, kSmallChunks, kChunks, kSharedChunks };

// A fill of a static width with what is known when it is bound; see Fill about the order.
struct StaticFill {
  int pages_begin;  // the first block of each role but that of requests
  int tokens_begin;
  int parts;            // blocks that share one request's pages
  uint32_t few_chunks;  // so many at most are halved
  Divisor requests;
  int rows_begin;
  Fill fill;
  Divisor extend_len;
  int schedule_begin;
  int blocks;
  Tokens tokens;
};

struct RaggedFill {
  Fill fill;
  int blocks;
};

// Never launch anything. `max_blocks` of 0 means no further limit.
StaticFill static_fill(const Fill& fill, int multiprocessors);
RaggedFill ragged_fill(const Fill& fill, int multiprocessors, int64_t max_blocks);

// One kernel launch on `stream`, on the current device; returns a cudaError_t.
int fill_static_on_cuda(const StaticFill& launch, void* stream);
int fill_ragged_on_cuda(const RaggedFill& launch, void* stream);

// Two kernel launches on `stream`, on the current device; returns a cudaError_t.
int compare_on_cuda(const Comparison& all, void* stream);

// A call that launches kernels on a stream, again and again. After a few calls it goes on as a CUDA
// graph, whose launch takes half of the host's time. On a stream that is captured it stays as it is.
class RepeatedCall {
 public:
  explicit RepeatedCall(std::function<int(void*)> call);
  ~RepeatedCall();
  int operator()(void* stream);  // returns a cudaError_t

 private:
  struct Graph;
  std::function<int(void*)> call_;
  std::unique_ptr<Graph> graph_;
};

int multiprocessors_of(int device);
const char* cuda_error_text(int error);
#endif

}  // namespace nsa
