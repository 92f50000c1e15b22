// TVM FFI binding: tensors in, a bound fill or comparison out. Arguments were checked, in words that
// name them, by sglang_nsa_plugin/fill_args.py and shadow.py; here they are only packed. What is bound
// holds pointers, no tensors: whoever binds keeps the tensors alive.
#include <tvm/ffi/container/array.h>
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
  const int64_t words = is_int64(*tensor) ? 2 : 1;
  return IndexVector{data_of<const int32_t>(*tensor), (*tensor).stride(0) * words, words == 2};
}

IndexTable index_table(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return IndexTable{};
  const TensorView& t = *tensor;
  const int64_t words = is_int64(t) ? 2 : 1;
  return IndexTable{data_of<const int32_t>(t), t.stride(0) * words, t.stride(1) * words, t.size(0),
                    t.size(1)};
}

OutputVector output_vector(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return OutputVector{};
  return OutputVector{data_of<int32_t>(*tensor), (*tensor).stride(0)};
}

PageTable page_table(const MaybeTensor& tensor, int64_t page_size, const IndexTable& tokens) {
  PageTable table{};
  table.page_size = divisor_of(page_size);
  if (!tensor.has_value()) return table;
  const TensorView& t = *tensor;
  table.data = data_of<int32_t>(t);
  table.row_stride = t.stride(0);
  table.column_stride = t.stride(1);
  table.columns =
      static_cast<uint32_t>(minimum(t.size(1), ceil_div(tokens.columns, page_size)));
  table.moves = moves_of(table, tokens);
  return table;
}

Schedule schedule_of(const MaybeTensor& tensor, int64_t rows, bool last_take_more) {
  if (!tensor.has_value()) return Schedule{};
  const TensorView& t = *tensor;
  return Schedule{data_of<int32_t>(t),      t.stride(0),       t.stride(1),
                  divisor_of(t.size(0) - 1), longest_row(rows), last_take_more};
}

#ifdef NSA_WITH_CUDA
constexpr bool kHasCuda = true;

void check(int error, const char* what) {
  if (error == 0) return;
  TVM_FFI_THROW(RuntimeError) << what << ": the kernel launch failed: " << cuda_error_text(error);
}

template <typename Bound>
ffi::Function launcher(int (*launch)(const Bound&, void*), const Bound& bound, int device) {
  const auto call =
      std::make_shared<RepeatedCall>([launch, bound](void* stream) { return launch(bound, stream); });
  return ffi::Function::FromTyped([call, device](int64_t stream) {
    const ffi::CUDADeviceGuard guard(device);
    check((*call)(reinterpret_cast<void*>(stream)), "draft-extend metadata fill");
  });
}

ffi::Function bind_on_cuda(const Fill& fill, int device, int64_t max_blocks) {
  const int multiprocessors = multiprocessors_of(device);
  if (fill.is_ragged) {
    return launcher(fill_ragged_on_cuda, ragged_fill(fill, multiprocessors, max_blocks), device);
  }
  return launcher(fill_static_on_cuda, static_fill(fill, multiprocessors), device);
}

ffi::Function bind_comparison_on_cuda(const Comparison& all, int device) {
  return ffi::Function::FromTyped([all, device](int64_t stream) {
    const ffi::CUDADeviceGuard guard(device);
    check(compare_on_cuda(all, reinterpret_cast<void*>(stream)), "shadow check");
  });
}
#else
constexpr bool kHasCuda = false;

ffi::Function bind_on_cuda(const Fill&, int, int64_t) {
  TVM_FFI_THROW(RuntimeError) << "draft-extend metadata fill: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}

ffi::Function bind_comparison_on_cuda(const Comparison&, int) {
  TVM_FFI_THROW(RuntimeError) << "shadow check: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}
#endif

ffi::Function bind_on_cpu(const Fill& fill) {
  return ffi::Function::FromTyped([fill](int64_t) { fill_on_cpu(fill); });
}

ffi::Function bind_comparison_on_cpu(const Comparison& all) {
  return ffi::Function::FromTyped([all](int64_t) { compare_on_cpu(all); });
}

// Returns a function of one argument, the address of the stream to launch on (CPU: not used).
// `max_blocks` limits the grid of a ragged fill; 0 leaves it to the shapes and the GPU.
ffi::Function bind(int64_t max_blocks, TensorView seq_lens, MaybeTensor req_pool_indices,
                   MaybeTensor req_to_token, MaybeTensor extend_lens, int64_t static_extend_len,
                   int64_t index_topk, int64_t page_size, TensorView cache_seqlens,
                   TensorView cu_seqlens_k, TensorView seqlens_expanded,
                   TensorView nsa_cache_seqlens, TensorView nsa_cu_seqlens_k, MaybeTensor ctx_lens,
                   MaybeTensor page_table_1, MaybeTensor real_page_table, MaybeTensor row_count,
                   MaybeTensor mqa_schedule, bool schedule_last_take_more, MaybeTensor enabled) {
  Fill fill{};
  fill.seq_lens = index_vector(seq_lens);
  fill.req_pool_indices = index_vector(req_pool_indices);
  fill.req_to_token = index_table(req_to_token);
  fill.extend_lens = index_vector(extend_lens);
  fill.static_extend_len = static_extend_len;
  fill.is_ragged = extend_lens.has_value();
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
  fill.token_table = page_table(page_table_1, 1, fill.req_to_token);
  fill.page_table = page_table(real_page_table, page_size, fill.req_to_token);
  fill.schedule = schedule_of(mqa_schedule, fill.rows, schedule_last_take_more);
  fill.enabled = enabled.has_value() ? data_of<int32_t>(*enabled) : nullptr;

  const DLDevice device = seq_lens.device();
  return device.device_type == kDLCPU ? bind_on_cpu(fill)
                                      : bind_on_cuda(fill, device.device_id, max_blocks);
}

Pair pair(const ffi::Tensor& ours, const ffi::Tensor& theirs, int64_t page_size) {
  const auto data = [](const ffi::Tensor& t) { return data_of<const int32_t>(TensorView(t)); };
  return Pair{data(ours),       data(theirs),    ours.size(0),     ours.size(1),    ours.stride(0),
              ours.stride(1), theirs.stride(0), theirs.stride(1), page_size};
}

// Compares each of `ours` with the same of `theirs`, matrices of one shape. Returns a function of the
// stream, like bind.
ffi::Function bind_comparison(TensorView report, TensorView lengths, ffi::Array<ffi::Tensor> ours,
                              ffi::Array<ffi::Tensor> theirs, ffi::Array<int64_t> page_sizes) {
  Comparison all{};
  all.pair_count = static_cast<int>(ours.size());
  if (all.pair_count > kMostPairs) {
    TVM_FFI_THROW(ValueError) << "comparison: at most " << kMostPairs << " pairs, got "
                              << all.pair_count;
  }
  for (int p = 0; p < all.pair_count; ++p) all.pairs[p] = pair(ours[p], theirs[p], page_sizes[p]);
  all.lengths = data_of<const int32_t>(lengths);
  all.requests = lengths.size(0);
  all.report = data_of<int64_t>(report);
  const DLDevice device = report.device();
  return device.device_type == kDLCPU ? bind_comparison_on_cpu(all)
                                      : bind_comparison_on_cuda(all, device.device_id);
}

bool has_cuda() { return kHasCuda; }

}  // namespace
}  // namespace nsa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, nsa::bind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_comparison, nsa::bind_comparison);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, nsa::has_cuda);
