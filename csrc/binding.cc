// The TVM FFI binding: tensors in, a bound fill or comparison out. sglang_nsa_plugin/fill_args.py
// and shadow.py have validated the arguments; here they are packed. What is bound holds addresses,
// no tensors: the caller keeps the tensors alive.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <memory>
#include <string_view>
#include <utility>

#include "build_id.h"
#include "fill.h"
#include "host.h"

#ifdef NSA_WITH_CUDA
#include <tvm/ffi/extra/cuda/device_guard.h>

#include "graph_launch.h"
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

void require(bool holds, const char* rule, int64_t value) {
  if (!holds) TVM_FFI_THROW(ValueError) << rule << ", got " << value;
}

IndexVector index_vector(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return IndexVector{};
  const int64_t words = is_int64(*tensor) ? 2 : 1;
  return IndexVector{data_of<const int32_t>(*tensor), (*tensor).stride(0) * words, words == 2};
}

LengthVector length_vector(const TensorView& seq_lens, int64_t offset) {
  const IndexVector vector = index_vector(seq_lens);
  return LengthVector{vector.data, vector.stride, static_cast<uint32_t>(offset)};
}

IndexTable index_table(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return IndexTable{};
  const TensorView& t = *tensor;
  require(t.size(0) <= INT32_MAX, "req_to_token: rows must be fewer than 2**31", t.size(0));
  const int64_t words = is_int64(t) ? 2 : 1;
  return IndexTable{data_of<const int32_t>(t), t.stride(0) * words, t.stride(1) * words, t.size(0),
                    t.size(1)};
}

OutputVector output_vector(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return OutputVector{};
  return OutputVector{data_of<int32_t>(*tensor), (*tensor).stride(0)};
}

// [bs, q] of more than one column: a fill by request.
bool has_columns(const MaybeTensor& ctx_lens) {
  return ctx_lens.has_value() && (*ctx_lens).ndim() == 2 && (*ctx_lens).size(1) > 1;
}

OutputTable output_table(const TensorView& t) {
  return OutputTable{data_of<int32_t>(t), t.stride(0), t.stride(1)};
}

PageTable page_table(const MaybeTensor& tensor, int64_t page_size, const IndexTable& tokens) {
  PageTable table{};
  table.page_size = divisor_of(page_size);
  if (!tensor.has_value()) return table;
  const TensorView& t = *tensor;
  table.data = data_of<int32_t>(t);
  table.row_stride = t.stride(0);
  table.column_stride = t.stride(1);
  table.columns = static_cast<uint32_t>(minimum(t.size(1), ceil_div(tokens.columns, page_size)));
  table.copy_width = copy_width_of(table, tokens);
  return table;
}

Schedule schedule_of(const MaybeTensor& tensor, int64_t rows, bool last_take_more) {
  if (!tensor.has_value()) return Schedule{};
  const TensorView& t = *tensor;
  return Schedule{data_of<int32_t>(t),       t.stride(0),       t.stride(1),
                  divisor_of(t.size(0) - 1), longest_row(rows), last_take_more};
}

#ifdef NSA_WITH_CUDA
constexpr bool kHasCuda = true;

void require_success(int error, const char* what) {
  if (error == 0) return;
  TVM_FFI_THROW(RuntimeError) << what << ": " << cuda_error_text(error);
}

template <typename Bound>
ffi::Function launcher(int (*launch)(const Bound&, void*), const Bound& bound, int device,
                       const char* failed) {
  const auto graphed = std::make_shared<GraphedLaunch>(
      [launch, bound](void* stream) { return launch(bound, stream); });
  return ffi::Function::FromTyped([graphed, device, failed](int64_t stream) {
    const ffi::CUDADeviceGuard guard(device);
    require_success((*graphed)(reinterpret_cast<void*>(stream)), failed);
  });
}

ffi::Function bind_on_cuda(const Fill& fill, int device, int64_t max_blocks) {
  int sms = 0;
  require_success(query_sms(device, &sms),
                  "draft-extend metadata fill: the GPU's number of SMs cannot be read");
  const char* failed = "draft-extend metadata fill: the kernel launch failed";
  if (fill.is_ragged)
    return launcher(fill_ragged_on_cuda, ragged_fill(fill, sms, max_blocks), device, failed);
  return launcher(fill_static_on_cuda, static_fill(fill, sms), device, failed);
}

ffi::Function bind_kpool_on_cuda(const KPoolFill& fill, int device) {
  int sms = 0;
  require_success(query_sms(device, &sms),
                  "k-pooling fill: the GPU's number of SMs cannot be read");
  return launcher(fill_kpool_on_cuda, kpool_launch(fill, sms), device,
                  "k-pooling fill: the kernel launch failed");
}

ffi::Function bind_comparison_on_cuda(const Comparison& all, int device) {
  return ffi::Function::FromTyped([all, device](int64_t stream) {
    const ffi::CUDADeviceGuard guard(device);
    require_success(compare_on_cuda(all, reinterpret_cast<void*>(stream)),
                    "shadow check: the kernel launch failed");
  });
}

ffi::Function bind_no_op(int64_t device) {
  return ffi::Function::FromTyped([device](int64_t stream) {
    const ffi::CUDADeviceGuard guard(static_cast<int>(device));
    require_success(no_op_on_cuda(reinterpret_cast<void*>(stream)),
                    "empty kernel before a replay: the kernel launch failed");
  });
}
#else
constexpr bool kHasCuda = false;

ffi::Function bind_on_cuda(const Fill&, int, int64_t) {
  TVM_FFI_THROW(RuntimeError) << "draft-extend metadata fill: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}

ffi::Function bind_kpool_on_cuda(const KPoolFill&, int) {
  TVM_FFI_THROW(RuntimeError) << "k-pooling fill: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}

ffi::Function bind_comparison_on_cuda(const Comparison&, int) {
  TVM_FFI_THROW(RuntimeError) << "shadow check: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}

ffi::Function bind_no_op(int64_t) {
  TVM_FFI_THROW(RuntimeError)
      << "empty kernel before a replay: this library was built without CUDA";
  TVM_FFI_UNREACHABLE();
}
#endif

ffi::Function bind_on_cpu(const Fill& fill) {
  return ffi::Function::FromTyped([fill](int64_t) { fill_on_cpu(fill); });
}

ffi::Function bind_comparison_on_cpu(const Comparison& all) {
  return ffi::Function::FromTyped([all](int64_t) { compare_on_cpu(all); });
}

// What `bind` takes after max_blocks, in this order: the fields of FillArgs that have these names.
// kernels/compiled.py asks for the names, so that neither side counts positions.
constexpr std::string_view kParameters[] = {
    "seq_lens",     "length_offset",      "req_pool_indices",  "req_to_token",
    "extend_lens",  "index_topk",         "page_size",         "cache_seqlens",
    "cu_seqlens_k", "seqlens_expanded",   "nsa_cache_seqlens", "nsa_cu_seqlens_k",
    "ctx_lens",     "page_table_1",       "real_page_table",   "row_count",
    "mqa_schedule", "mqa_remainder_last", "enabled",
};

// The same of `bind_kpool` and KPoolArgs.
constexpr std::string_view kKPoolParameters[] = {
    "seq_lens",       "length_offset",      "req_pool_indices",  "req_to_token",
    "extend_lens",    "accept_lens",        "index_kpool",       "index_topk",
    "page_size",      "server_page_size",   "nsa_cache_seqlens", "nsa_cu_seqlens_k",
    "write_requests", "write_start",        "tail_start",        "write_locs",
    "write_counts",   "row_seqlens",        "kpool_seqlens",     "kpool_page_table",
    "kpool_schedule", "mqa_remainder_last", "enabled",
};

template <size_t kCount>
constexpr int size_of(const std::string_view (&)[kCount]) {
  return static_cast<int>(kCount);
}

template <size_t kCount>
ffi::Array<ffi::String> array_of(const std::string_view (&texts)[kCount]) {
  ffi::Array<ffi::String> array;
  for (const std::string_view text : texts) array.push_back(ffi::String(text.data(), text.size()));
  return array;
}

ffi::Array<ffi::String> parameters() { return array_of(kParameters); }
ffi::Array<ffi::String> kpool_parameters() { return array_of(kKPoolParameters); }

// The values of parameters by their names.
class Arguments {
 public:
  template <size_t kCount>
  Arguments(const std::string_view (&names)[kCount], const ffi::AnyView* values)
      : names_(names), count_(kCount), values_(values) {}

  const ffi::AnyView& operator[](std::string_view name) const {
    const std::string_view* found = std::find(names_, names_ + count_, name);
    if (found == names_ + count_) TVM_FFI_THROW(KeyError) << "no parameter is named " << name;
    return values_[found - names_];
  }
  TensorView tensor(std::string_view name) const { return (*this)[name].cast<TensorView>(); }
  MaybeTensor maybe(std::string_view name) const { return (*this)[name].cast<MaybeTensor>(); }
  int64_t number(std::string_view name) const { return (*this)[name].cast<int64_t>(); }

 private:
  const std::string_view* names_;
  size_t count_;
  const ffi::AnyView* values_;
};

Fill pack(const Arguments& arguments) {
  Fill fill{};
  const TensorView seq_lens = arguments.tensor("seq_lens");
  const TensorView nsa_cache_seqlens = arguments.tensor("nsa_cache_seqlens");
  fill.seq_lens = length_vector(seq_lens, arguments.number("length_offset"));
  fill.req_pool_indices = index_vector(arguments.maybe("req_pool_indices"));
  fill.req_to_token = index_table(arguments.maybe("req_to_token"));
  if (const auto rows_per_request = arguments["extend_lens"].as<int64_t>()) {
    fill.rows_per_request = *rows_per_request;
  } else {
    fill.is_ragged = true;
    fill.extend_lens = index_vector(arguments.tensor("extend_lens"));
  }
  fill.requests = seq_lens.size(0);
  fill.rows = nsa_cache_seqlens.size(0);
  fill.index_topk = arguments.number("index_topk");
  fill.cache_seqlens = output_vector(arguments.tensor("cache_seqlens"));
  fill.cu_seqlens_k = output_vector(arguments.tensor("cu_seqlens_k"));
  fill.seqlens_expanded = output_vector(arguments.maybe("seqlens_expanded"));
  fill.nsa_cache_seqlens = output_vector(nsa_cache_seqlens);
  fill.nsa_cu_seqlens_k = output_vector(arguments.tensor("nsa_cu_seqlens_k"));
  const MaybeTensor ctx_lens = arguments.maybe("ctx_lens");
  if (has_columns(ctx_lens)) {
    fill.ctx_lens_by_request = output_table(*ctx_lens);
  } else {
    fill.ctx_lens = output_vector(ctx_lens);
  }
  fill.row_count = output_vector(arguments.maybe("row_count"));
  fill.page_table_1 = page_table(arguments.maybe("page_table_1"), 1, fill.req_to_token);
  fill.real_page_table = page_table(arguments.maybe("real_page_table"),
                                    arguments.number("page_size"), fill.req_to_token);
  fill.schedule = schedule_of(arguments.maybe("mqa_schedule"), fill.rows,
                              arguments["mqa_remainder_last"].cast<bool>());
  const MaybeTensor enabled = arguments.maybe("enabled");
  fill.enabled = enabled.has_value() ? data_of<int32_t>(*enabled) : nullptr;
  return fill;
}

// Takes max_blocks and the values of kParameters. Returns a function of one argument, the address
// of the stream to launch on, which the CPU does not use. `max_blocks` limits the grid of a ragged
// fill; 0 leaves it to the shapes and the GPU.
ffi::Function bind(const ffi::AnyView* values, int count) {
  require(count == 1 + size_of(kParameters), "bind: takes max_blocks and the parameters", count);
  const Arguments arguments(kParameters, values + 1);
  const Fill fill = pack(arguments);
  const DLDevice device = arguments.tensor("seq_lens").device();
  if (device.device_type == kDLCPU) return bind_on_cpu(fill);
  return bind_on_cuda(fill, device.device_id, values[0].cast<int64_t>());
}

WideVector wide_vector(const TensorView& tensor) {
  return WideVector{data_of<int64_t>(tensor), tensor.stride(0)};
}

WideTable wide_table(const TensorView& tensor) {
  return WideTable{data_of<int64_t>(tensor), tensor.stride(0), tensor.stride(1)};
}

KPoolFill pack_kpool(const Arguments& arguments) {
  KPoolFill fill{};
  const TensorView seq_lens = arguments.tensor("seq_lens");
  const TensorView write_locs = arguments.tensor("write_locs");
  const int64_t tokens_per_page = arguments.number("page_size") * arguments.number("index_kpool");
  fill.seq_lens = length_vector(seq_lens, arguments.number("length_offset"));
  fill.req_pool_indices = index_vector(arguments.maybe("req_pool_indices"));
  fill.accept_lens = index_vector(arguments.maybe("accept_lens"));
  fill.req_to_token = index_table(arguments.maybe("req_to_token"));
  fill.rows_per_request = divisor_of(arguments.number("extend_lens"));
  fill.index_kpool = divisor_of(arguments.number("index_kpool"));
  fill.page_size = divisor_of(arguments.number("page_size"));
  fill.server_page_size = divisor_of(arguments.number("server_page_size"));
  fill.tokens_per_page = divisor_of(tokens_per_page);
  fill.pages = static_cast<uint32_t>(ceil_div(fill.req_to_token.columns, tokens_per_page));
  fill.index_topk = static_cast<uint32_t>(arguments.number("index_topk"));
  fill.requests = seq_lens.size(0);
  fill.rows = fill.requests * fill.rows_per_request.value;
  fill.locs_per_request = static_cast<uint32_t>(write_locs.size(1));
  fill.nsa_cache_seqlens = output_vector(arguments.maybe("nsa_cache_seqlens"));
  fill.nsa_cu_seqlens_k = output_vector(arguments.maybe("nsa_cu_seqlens_k"));
  fill.write_requests = wide_vector(arguments.tensor("write_requests"));
  fill.write_start = output_vector(arguments.maybe("write_start"));
  fill.tail_start = output_vector(arguments.maybe("tail_start"));
  fill.write_locs = wide_table(write_locs);
  fill.write_counts = output_vector(arguments.maybe("write_counts"));
  fill.row_seqlens = output_vector(arguments.maybe("row_seqlens"));
  fill.kpool_seqlens = output_vector(arguments.maybe("kpool_seqlens"));
  fill.kpool_page_table =
      page_table(arguments.maybe("kpool_page_table"), tokens_per_page, fill.req_to_token);
  fill.schedule = schedule_of(arguments.maybe("kpool_schedule"), fill.rows,
                              arguments["mqa_remainder_last"].cast<bool>());
  const MaybeTensor enabled = arguments.maybe("enabled");
  fill.enabled = enabled.has_value() ? data_of<int32_t>(*enabled) : nullptr;
  return fill;
}

// Takes the values of kKPoolParameters, and returns what bind does.
ffi::Function bind_kpool(const ffi::AnyView* values, int count) {
  require(count == size_of(kKPoolParameters), "bind_kpool: takes the parameters", count);
  const Arguments arguments(kKPoolParameters, values);
  const KPoolFill fill = pack_kpool(arguments);
  const DLDevice device = arguments.tensor("seq_lens").device();
  if (device.device_type == kDLCPU) {
    return ffi::Function::FromTyped([fill](int64_t) { fill_kpool_on_cpu(fill); });
  }
  return bind_kpool_on_cuda(fill, device.device_id);
}

Pair pair(const ffi::Tensor& ours, const ffi::Tensor& theirs, int64_t page_size) {
  require(ours.size(0) < kMostCells, "comparison: rows must be fewer than 2**28", ours.size(0));
  require(ours.size(1) < kMostCells, "comparison: columns must be fewer than 2**28", ours.size(1));
  Pair pair{};
  pair.ours = data_of<const int32_t>(TensorView(ours));
  pair.theirs = data_of<const int32_t>(TensorView(theirs));
  pair.rows = ours.size(0);
  pair.columns = ours.size(1);
  pair.our_row_stride = ours.stride(0);
  pair.our_column_stride = ours.stride(1);
  pair.their_row_stride = theirs.stride(0);
  pair.their_column_stride = theirs.stride(1);
  pair.page_size = page_size;
  return pair;
}

// Compares each of `ours` with the same of `theirs`, matrices of one shape. Returns a function of
// the stream, like bind.
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

// Of the sources that this library was built from, see CMakeLists.txt.
ffi::String csrc_id() { return NSA_CSRC_ID; }
ffi::String packer_id() { return NSA_PACKER_ID; }

}  // namespace
}  // namespace nsa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(parameters, nsa::parameters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kpool_parameters, nsa::kpool_parameters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_comparison, nsa::bind_comparison);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind_no_op, nsa::bind_no_op);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_cuda, nsa::has_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(csrc_id, nsa::csrc_id);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packer_id, nsa::packer_id);

// By hand, because the macro exports functions of few arguments that are known by their position.
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_bind(void*, const TVMFFIAny* args, int32_t count,
                                                 TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  *reinterpret_cast<tvm::ffi::Any*>(result) =
      nsa::bind(reinterpret_cast<const tvm::ffi::AnyView*>(args), count);
  TVM_FFI_SAFE_CALL_END();
}

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_bind_kpool(void*, const TVMFFIAny* args, int32_t count,
                                                       TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  *reinterpret_cast<tvm::ffi::Any*>(result) =
      nsa::bind_kpool(reinterpret_cast<const tvm::ffi::AnyView*>(args), count);
  TVM_FFI_SAFE_CALL_END();
}
