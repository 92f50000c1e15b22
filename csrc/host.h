// The entry points: binding.cc packs a fill or a comparison once and calls these to run it.
// An `int` that is returned is a cudaError_t.
#pragma once

#include "compare.h"
#include "kpool.h"
#include "params.h"

namespace nsa {

void fill_on_cpu(const Fill& fill);
void fill_kpool_on_cpu(const KPoolFill& fill);
void compare_on_cpu(const Comparison& all);

#ifdef NSA_WITH_CUDA
// Compute the grid; launch nothing. `max_blocks` of 0 sets no further limit.
StaticFill static_fill(const Fill& fill, int sms);
RaggedFill ragged_fill(const Fill& fill, int sms, int64_t max_blocks);
KPoolLaunch kpool_launch(const KPoolFill& fill, int sms);

// One kernel launch on `stream`, on the current device.
int fill_static_on_cuda(const StaticFill& launch, void* stream);
int fill_ragged_on_cuda(const RaggedFill& launch, void* stream);
int fill_kpool_on_cuda(const KPoolLaunch& launch, void* stream);

// Two kernel launches on `stream`, on the current device.
int compare_on_cuda(const Comparison& all, void* stream);

// One launch of an empty kernel on `stream`, on the current device. Unlike the others it is
// programmatic.
int no_op_on_cuda(void* stream);

// The number of SMs of a device.
int query_sms(int device, int* sms);
const char* cuda_error_text(int error);
#endif

}  // namespace nsa
