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
// lies together. Where chunks are shared out their pages are copied with them, of any size and stride.
enum class Tokens { kNone, kSmallChunks, kChunks, kSharedChunks };

// The page table of a static width, where 32 bits are enough: a stride in bytes makes an address one
// instruction, pages of a power of two of tokens make a page's number one. See Fill about the order.
struct Pages {
  const int32_t* enabled;
  const char* lengths;
  const char* pool_rows;

  uint32_t length_stride;
  uint32_t pool_row_stride;
  uint32_t pool_size;
  bool has_high_words;  // of pool rows
  const char* tokens;
  char* table;
  uint32_t most_tokens;  // of a request that the table has pages for
  uint32_t page_shift;   // a page has 2^page_shift tokens
  uint32_t page_stride;  // from the first token of a page to that of the next
  uint32_t token_row_stride;
  uint32_t request_stride;  // in the table, from the first row of a request to that of the next
  uint32_t row_stride;
  uint32_t rows;  // of a request
};

// A fill of a static width with what is known when it is bound; see Fill about the order.
struct StaticFill {
  int pages_begin;  // the first block of each role but that of requests
  int rows_begin;
  int schedule_begin;
  Divisor parts;  // blocks that share one request's pages
  Pages pages;

  int tokens_begin;
  uint32_t few_chunks;  // so many at most are halved
  Divisor requests;
  Divisor extend_len;
  Fill fill;
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
