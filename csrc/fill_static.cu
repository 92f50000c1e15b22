// The CUDA kernel for a uniform batch: one launch writes every metadata tensor.
//
// The kernel runs for 2 µs and executes each instruction once, so the latency of dependent loads
// and the fetching of instructions dominate. The request of row t is computed (t / q), never
// searched for. Each block has one role, decided by its index, and waits for no other block:
//
//   block   0         rows_begin  schedule_begin  pages_begin        tokens_begin          blocks
//           | requests |   rows    |   schedule   |      pages        |      tokens        |
//           | 256 per  | 256 per   | 0 or 1 block | requests x blocks_| see below          |
//           | block    | block     |              | per_request       |                    |
//
//   requests  cache_seqlens and cu_seqlens_k, a request for each thread;
//   rows      seqlens_expanded, nsa_cache_seqlens, nsa_cu_seqlens_k and ctx_lens, a row for each
//             thread; a block sums up the requests before its own;
//   schedule  mqa_schedule;
//   pages     real_page_table: the warps of a request's blocks take its live pages in turns;
//   tokens    page_table_1, by TokenCopyMode. Where all of them can be resident at once, there is a
//             block for each chunk that a request can have. Else (kSharedChunks) a fixed number of
//             blocks shares out the live chunks in order, so that what is written at one time lies
//             together; those copy pages too, and there are no blocks for pages.
//
// The grid is fixed when the fill is bound. So the launch can be captured in a CUDA graph and
// replayed while lengths change, and the host reads nothing back. Fills by request, see fill.h,
// have kernels of their own. docs/kernel.md has the reasons and the measurements behind each
// constant.
#include "host.h"
#include "pages.cuh"
#include "tables.cuh"

namespace nsa {
// Not unnamed, where nvcc puts a hash of the path of this file into names. Static kernels compile
// to the same machine code as in an unnamed namespace; others did not.
inline namespace static_kernel {

constexpr int kResidentBlocksPerSm = 6;
// Fewer where blocks share out chunks: kSharedVectorsInFlight takes more registers.
constexpr int kResidentSharingBlocksPerSm = 4;
constexpr int64_t kPageBlocksPerSm = 2;
// More blocks than are resident: those that begin as others end keep what is written at one time
// together.
constexpr int64_t kTokenBlocksPerSm = 16;
// With up to this many chunks for each SM they are copied in halves, which more blocks can share.
constexpr int64_t kFewChunksPerSm = 2;

// ---- lengths

// Calls add(r, L) for each request below `end` that is this thread's, loading four lengths at a
// time.
template <typename Add>
__device__ void for_each_request_before(uint32_t end, const Fill& fill, Add add) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (uint32_t r = threadIdx.x; r < end; r += kAtOnce * kThreads) {
    int32_t lengths[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t at = r + i * kThreads;
      lengths[i] = length_of(fill, at < end ? at : r);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (r + i * kThreads < end) add(r + i * kThreads, lengths[i]);
    }
  }
}

__device__ void fill_requests(const Fill& fill, uint32_t block) {
  const uint32_t begin = block * kThreads;
  const uint32_t r = begin + threadIdx.x;
  const bool enabled = is_enabled(fill);
  const int32_t length = r < fill.requests ? length_of(fill, r) : 0;
  uint32_t before = 0;
  for_each_request_before(begin, fill, [&](uint32_t, int32_t other) { before += other; });
  const uint32_t sum = scan_block(length, before);
  if (!enabled) return;
  if (r < fill.requests) store_request(fill, r, length, sum);
  if (r == 0) {
    store_sum_starts(fill);
    store(fill.row_count, 0, fill.rows);
  }
}

template <bool kByRequest>
__device__ void fill_rows(const StaticFill& launch, uint32_t block) {
  const Fill& fill = launch.fill;
  const Divisor q = launch.rows_per_request;
  const uint32_t topk = static_cast<uint32_t>(fill.index_topk);
  const uint32_t begin = block * kThreads;
  const uint32_t row = begin + threadIdx.x;
  const uint32_t r = divide(row, q);
  const bool enabled = is_enabled(fill);
  const uint32_t rows_after = q.value - 1 - (row - r * q.value);
  const uint32_t expanded = row < fill.rows ? expanded_length(length_of(fill, r), rows_after) : 0;
  uint32_t before = 0;
  for_each_request_before(divide_up(begin, q), fill, [&](uint32_t other, int32_t length) {
    const uint32_t rows = min(q.value, begin - other * q.value);
    if (expanded_length(length, q.value - 1) >= topk) {
      before += rows * topk;
      return;
    }
    for (uint32_t j = 0; j < rows; ++j) {
      before += min(expanded_length(length, q.value - 1 - j), topk);
    }
  });
  const uint32_t sum = scan_block(min(expanded, topk), before);
  if (enabled && row < fill.rows) {
    store_row(fill, row, expanded, sum);
    if constexpr (kByRequest) store_context(fill, r, row - r * q.value, length_of(fill, r));
  }
}

// Segments up to the end of each thread's requests. Outside the template, or the array would lie
// elsewhere in shared memory and change the other kernels' code.
__device__ auto& schedule_ends() {
  __shared__ uint32_t ends[kThreads];
  return ends;
}

// Each thread adds up the segments of `per_thread` neighbouring requests. Then each processor finds
// the thread whose requests hold its first segment, and walks through their rows or, by request,
// through the requests.
template <bool kByRequest>
__device__ void fill_schedule(const StaticFill& launch) {
  auto& ends = schedule_ends();
  const Fill& fill = launch.fill;
  const Schedule& schedule = fill.schedule;
  const uint32_t q = static_cast<uint32_t>(fill.rows_per_request);
  const uint32_t per_thread = (static_cast<uint32_t>(fill.requests) + kThreads - 1) / kThreads;
  const bool enabled = is_enabled(fill);
  uint32_t own = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < per_thread; ++i) {
    const uint32_t r = threadIdx.x * per_thread + i;
    const int32_t length = r < fill.requests ? length_of(fill, r) : 0;
    if constexpr (kByRequest) {
      own += segments_of_request(schedule, length, q);
    } else {
      for (uint32_t rows_after = 0; rows_after < q; ++rows_after) {
        own += segments_of(schedule, expanded_length(length, rows_after));
      }
    }
  }
  ends[threadIdx.x] = scan_block(own, 0);
  __syncthreads();
  if (!enabled) return;
  const uint32_t total = ends[kThreads - 1];
#pragma unroll 1
  for (uint32_t p = threadIdx.x; p <= schedule.processors.value; p += kThreads) {
    const uint32_t start = schedule_start(schedule, total, p);
    if (start >= total) {
      store_schedule(schedule, p, fill.rows, 0);
      continue;
    }
    const uint32_t holder = find_by_thread<true>(start, [&](uint32_t i) { return ends[i]; });
    uint32_t skipped = start - (holder == 0 ? 0 : ends[holder - 1]);
    uint32_t row = holder * per_thread * q;
    if constexpr (kByRequest) {
      for (uint32_t r = holder * per_thread;; ++r, row += q) {
        const uint32_t segments = segments_of_request(schedule, length_of(fill, r), q);
        if (skipped < segments) break;
        skipped -= segments;
      }
      skipped = divide(skipped, launch.rows_per_request);
    } else {
      for (bool found = false; !found;) {
        const int32_t length = length_of(fill, divide(row, launch.rows_per_request));
        for (uint32_t rows_after = q; rows_after > 0 && !found;) {
          const uint32_t segments = segments_of(schedule, expanded_length(length, --rows_after));
          found = skipped < segments;
          if (found) break;
          skipped -= segments;
          ++row;
        }
      }
    }
    store_schedule(schedule, p, row, skipped);
  }
}

// ---- page tables

// A block of kChunks or kSmallChunks: the first chunks of all requests come first.
template <uint32_t kInFlight>
__device__ void fill_tokens(const StaticFill& launch, uint32_t block) {
  const Fill& fill = launch.fill;
  const PageTable& table = fill.page_table_1;
  const uint32_t chunk = divide(block, launch.requests);
  const bool enabled = is_enabled(fill);
  const uint32_t r = block - chunk * launch.requests.value;
  const uint32_t q = static_cast<uint32_t>(fill.rows_per_request);
  const RequestCopy copy =
      request_copy(fill, table, length_of(fill, r), pool_row_of(fill, r), r * q, q);
  const uint32_t begin = chunk * kTokensPerBlock<kInFlight> + warp() * kTokensPerWarp<kInFlight>;
  if (enabled) copy_tokens<kInFlight>(copy, table, begin, [] {});
}

// A block of kSharedChunks. Requests are taken kThreads at a time; every block counts their chunks.
__device__ void fill_shared_tokens(const StaticFill& launch, uint32_t block) {
  __shared__ uint32_t ends[kThreads];  // chunks up to the end of each request
  __shared__ int32_t lengths[kThreads], pool_rows[kThreads];
  const Fill& fill = launch.fill;
  const uint32_t requests = launch.requests.value;  // not 0 where there are chunks
  const bool enabled = is_enabled(fill);
  const uint32_t q = static_cast<uint32_t>(fill.rows_per_request);
  const uint32_t blocks = gridDim.x - launch.tokens_begin;
  uint32_t next = block;  // this block's next piece, counted from the first of these requests
#pragma unroll 1
  for (uint32_t first = 0; first < requests; first += kThreads) {
    const uint32_t r = first + threadIdx.x;
    const int32_t length = r < requests ? length_of(fill, r) : 0;
    pool_rows[threadIdx.x] = r < requests ? static_cast<int32_t>(pool_row_of(fill, r)) : -1;
    lengths[threadIdx.x] = length;
    ends[threadIdx.x] = scan_block(chunks_of(fill, length), 0);
    __syncthreads();
    if (!enabled) return;
    const uint32_t chunks = ends[kThreads - 1];
    const uint32_t pieces_per_chunk = chunks > launch.few_chunks ? 1 : 2;
#pragma unroll 1
    for (; next < pieces_per_chunk * chunks; next += blocks) {
      const uint32_t t = find_by_warp(ends, next / pieces_per_chunk);
      const uint32_t piece = next - pieces_per_chunk * (t == 0 ? 0 : ends[t - 1]);
      const uint32_t row = (first + t) * q;
      if (pieces_per_chunk == 1) {
        copy_piece<kSharedVectorsInFlight>(fill, lengths[t], pool_rows[t], row, q, piece);
      } else {
        copy_piece<kSharedVectorsInFlight / 2>(fill, lengths[t], pool_rows[t], row, q, piece);
      }
    }
    next -= pieces_per_chunk * chunks;
    __syncthreads();  // the next requests overwrite these
  }
}

// ---- the kernel

template <TokenCopyMode kMode>
__device__ void fill_tables(const StaticFill& launch, int block) {
  if constexpr (kMode == TokenCopyMode::kSharedChunks) {
    fill_shared_tokens(launch, block - launch.tokens_begin);
  } else if (kMode == TokenCopyMode::kNone || block < launch.tokens_begin) {
    fill_pages(launch, block - launch.pages_begin);
  } else {
    constexpr uint32_t kInFlight = kMode == TokenCopyMode::kSmallChunks ? 1 : kVectorsInFlight;
    fill_tokens<kInFlight>(launch, block - launch.tokens_begin);
  }
}

// Table blocks are the most, so they are asked for first, by one comparison.
template <TokenCopyMode kMode, bool kByRequest>
static __global__ void __launch_bounds__(kThreads, kMode == TokenCopyMode::kSharedChunks
                                                       ? kResidentSharingBlocksPerSm
                                                       : kResidentBlocksPerSm)
    fill_static_kernel(const __grid_constant__ StaticFill launch) {
  const int block = blockIdx.x;
  if (block >= launch.pages_begin) {
    fill_tables<kMode>(launch, block);
  } else if (block < launch.rows_begin) {
    fill_requests(launch.fill, block);
  } else if (block < launch.schedule_begin) {
    fill_rows<kByRequest>(launch, block - launch.rows_begin);
  } else {
    fill_schedule<kByRequest>(launch);
  }
}

template <bool kByRequest>
auto kernel_of(TokenCopyMode mode) {
  switch (mode) {
    case TokenCopyMode::kNone:
      return fill_static_kernel<TokenCopyMode::kNone, kByRequest>;
    case TokenCopyMode::kSmallChunks:
      return fill_static_kernel<TokenCopyMode::kSmallChunks, kByRequest>;
    case TokenCopyMode::kChunks:
      return fill_static_kernel<TokenCopyMode::kChunks, kByRequest>;
    default:
      return fill_static_kernel<TokenCopyMode::kSharedChunks, kByRequest>;
  }
}

// ---- the grid

// No more blocks than leave each warp some pages of the table.
int64_t page_blocks_per_request(const Fill& fill, int64_t sms) {
  if (fill.real_page_table.data == nullptr) return 0;
  const int64_t useful = maximum(ceil_div(fill.real_page_table.columns, kPagesPerWarp), 1);
  return clamp(sms * kPageBlocksPerSm / maximum(fill.requests, 1), 1, useful);
}

// Chunks of `chunk_tokens` tokens that page_table_1 can have.
int64_t most_chunks(const Fill& fill, uint32_t chunk_tokens) {
  return fill.requests * ceil_div(fill.page_table_1.columns, chunk_tokens);
}

// Small chunks spread few tokens over more SMs, as long as all their blocks are resident.
TokenCopyMode token_copy_mode_of(const Fill& fill, int64_t blocks_per_request, int64_t resident) {
  if (blocks_per_request > 0 && !fits_page_copy(fill, blocks_per_request * kPagesPerBlock)) {
    return TokenCopyMode::kSharedChunks;
  }
  if (fill.page_table_1.data == nullptr) return TokenCopyMode::kNone;
  if (most_chunks(fill, kTokensPerBlock<1>) <= resident) return TokenCopyMode::kSmallChunks;
  if (most_chunks(fill, kTokensPerBlock<kVectorsInFlight>) <= resident) {
    return TokenCopyMode::kChunks;
  }
  return TokenCopyMode::kSharedChunks;
}

int token_blocks(const Fill& fill, TokenCopyMode mode, int64_t sms) {
  switch (mode) {
    case TokenCopyMode::kNone:
      return 0;
    case TokenCopyMode::kSmallChunks:
      return static_cast<int>(most_chunks(fill, kTokensPerBlock<1>));
    case TokenCopyMode::kChunks:
      return static_cast<int>(most_chunks(fill, kTokensPerBlock<kVectorsInFlight>));
    default:
      return static_cast<int>(
          minimum(fill.requests * chunks_of(fill, INT32_MAX), sms * kTokenBlocksPerSm));
  }
}

}  // namespace static_kernel

StaticFill static_fill(const Fill& fill, int sms) {
  StaticFill launch{};
  launch.fill = fill;
  launch.rows_per_request = divisor_of(maximum(fill.rows_per_request, 1));
  launch.requests = divisor_of(maximum(fill.requests, 1));
  launch.rows_begin = static_cast<int>(maximum(ceil_div(fill.requests, kThreads), 1));
  launch.schedule_begin = launch.rows_begin + static_cast<int>(ceil_div(fill.rows, kThreads));
  launch.pages_begin = launch.schedule_begin + (fill.schedule.data != nullptr);

  const int64_t blocks_per_request = page_blocks_per_request(fill, sms);
  launch.token_copy_mode = token_copy_mode_of(fill, blocks_per_request, sms * kResidentBlocksPerSm);
  launch.few_chunks = static_cast<uint32_t>(sms * kFewChunksPerSm);
  launch.tokens_begin = launch.pages_begin;
  if (blocks_per_request > 0 && launch.token_copy_mode != TokenCopyMode::kSharedChunks) {
    launch.blocks_per_request = divisor_of(blocks_per_request);
    launch.page_copy = page_copy_of(fill);
    launch.tokens_begin += static_cast<int>(fill.requests * blocks_per_request);
  }
  launch.blocks = launch.tokens_begin + token_blocks(fill, launch.token_copy_mode, sms);
  return launch;
}

int fill_static_on_cuda(const StaticFill& launch, void* stream) {
  const TokenCopyMode mode = launch.token_copy_mode;
  const auto kernel = is_by_request(launch.fill) ? kernel_of<true>(mode) : kernel_of<false>(mode);
  kernel<<<launch.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}

}  // namespace nsa
