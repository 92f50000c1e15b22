// TVM FFI binding: tensors in, a bound fill out. Arguments were checked, in words that name them, by
// sglang_nsa_plugin/fill_args.py; here they are only packed. The bound fill holds pointers, no
// tensors: whoever binds keeps the tensors alive.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "launch.h"

#ifdef NSA_WITH_CUDA
#include <tvm/ffi/extra/cuda/device_guard.h>
#endif

namespace nsa {
namespace {

namespace ffi = tvm::ffi;
using ffi::TensorView;
using MaybeTensor = ffi::Optional<TensorView>;

template <typename T>
T* data_of(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

bool is_int64(const TensorView& tensor) { return tensor.dtype().bits == 64; }

IndexVector index_vector(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return IndexVector{};
  return IndexVector{data_of<void>(*tensor), (*tensor).stride(0), is_int64(*tensor)};
}

IndexTable index_table(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return IndexTable{};
  const TensorView& t = *tensor;
  return IndexTable{data_of<void>(t), t.stride(0), t.stride(1), t.size(0), t.size(1), is_int64(t)};
}

OutputVector output_vector(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return OutputVector{};
  return OutputVector{data_of<int32_t>(*tensor), (*tensor).stride(0)};
}

PageTable page_table(const MaybeTensor& tensor, int64_t page_size) {
  if (!tensor.has_value()) return PageTable{nullptr, 0, 0, 0, page_size};
  const TensorView& t = *tensor;
  return PageTable{data_of<int32_t>(t), t.stride(0), t.stride(1), t.size(1), page_size};
}

#ifdef NSA_WITH_CUDA
constexpr bool kHasCuda = true;

ffi::Function bind_on_cuda(const Fill& fill, int device, int64_t max_blocks) {
  const Grid grid = grid_for(fill, device, max_blocks);
  return ffi::Function::FromTyped([fill, grid](int64_t stream) {
    const ffi::CUDADeviceGuard guard(grid.device);
    const int error = fill_on_cuda(fill, grid, reinterpret_cast<void*>(stream));
    if (error != 0) {
      TVM_FFI_THROW(RuntimeError) << "draft-extend metadata fill: the kernel launch failed: "
                                  << cuda_error_text(error);
    }
  });
}
#else
constexpr bool kHasCuda = false;

ffi::Function bind_on_cuda(const Fill&, int, int64_t) {
  TVM_FFI_THROW(RuntimeError) << "draft-extend metadata fill: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}
#endif

ffi::Function bind_on_cpu(const Fill& fill) {
  return ffi::Function::FromTyped([fill](int64_t) { fill_on_cpu(fill); });
}

// Returns a function of one argument, the address of the stream to launch on (CPU: not used).
// `max_blocks` limits the grid; 0 leaves it to the shapes and the GPU.
ffi::Function bind(int64_t max_blocks, TensorView seq_lens, MaybeTensor req_pool_indices,
                   MaybeTensor req_to_token, MaybeTensor extend_lens, int64_t static_extend_len,
                   int64_t index_topk, int64_t page_size, TensorView cache_seqlens,
                   TensorView cu_seqlens_k, TensorView seqlens_expanded,
                   TensorView nsa_cache_seqlens, TensorView nsa_cu_seqlens_k, MaybeTensor ctx_lens,
                   MaybeTensor page_table_1, MaybeTensor real_page_table, MaybeTensor row_count,
                   MaybeTensor enabled) {
  Fill fill{};
  fill.seq_lens = index_vector(seq_lens);
  fill.req_pool_indices = index_vector(req_pool_indices);
  fill.req_to_token = index_table(req_to_token);
  fill.extend_lens = index_vector(extend_lens);
  fill.static_extend_len = static_extend_len;
  fill.requests = seq_lens.size(0);
  fill.rows = seqlens_expanded.size(0);
  fill.index_topk = index_topk;
  fill.cache_seqlens = output_vector(cache_seqlens);
  fill.cu_seqlens_k = output_vector(cu_seqlens_k);
  fill.seqlens_expanded = output_vector(seqlens_expanded);
  fill.nsa_cache_seqlens = output_vector(nsa_cache_seqlens);
  fill.nsa_cu_seqlens_k = output_vector(nsa_cu_seqlens_k);
  fill.ctx_lens = output_vector(ctx_lens);
  fill.row_count = output_vector(row_count);
  fill.tables[0] = page_table(page_table_1, 1);
  fill.tables[1] = page_table(real_page_table, page_size);
  fill.enabled = enabled.has_value() ? data_of<int32_t>(*enabled) : nullptr;

  const DLDevice device = seq_lens.device();
  return device.device_type == kDLCPU ? bind_on_cpu(fill)
                                      : bind_on_cuda(fill, device.device_id, max_blocks);
}

bool has_cuda() { return kHasCuda; }

}  // namespace
}  // namespace nsa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, nsa::bind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, nsa::has_cuda);
