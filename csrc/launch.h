// The two ways to run a fill and a comparison. The binding checks and packs; these only run.
#pragma once

#include "compare.h"
#include "fill.h"

namespace nsa {

void fill_on_cpu(const Fill& fill);
void compare_on_cpu(const Comparison& all);

#ifdef NSA_WITH_CUDA
struct Grid {
  int device;
  int blocks;
};

// As many blocks as the largest batch of these shapes can use, at most a few for each
// multiprocessor. `max_blocks` of 0 means no further limit. Never launches anything.
Grid grid_for(const Fill& fill, int device, int64_t max_blocks);

// One kernel launch on `stream`; returns a cudaError_t.
int fill_on_cuda(const Fill& fill, const Grid& grid, void* stream);

// Two kernel launches on `stream`, on the current device; returns a cudaError_t.
int compare_on_cuda(const Comparison& all, void* stream);

const char* cuda_error_text(int error);
#endif

}  // namespace nsa
