// The CUDA kernel for a static width: one launch writes every metadata tensor of a fill.
//
// The kernel runs for two microseconds and every instruction once, so what counts is how many loads wait
// for one another and how much code has to be fetched. Nothing is scanned that arithmetic can tell: row t
// belongs to request t / q. Each block has one role, and none waits for another:
//   - requests: cache_seqlens and cu_seqlens_k of as many requests as a block has threads,
//   - rows: the lengths of as many rows; what lies before them a block sums up for itself,
//   - DeepGEMM's schedule: one block,
//   - pages: each request has `parts` blocks, whose warps take its live pages in turns,
//   - tokens: a block for each chunk that a request can have; where those would be too many, blocks share
//     out the chunks that are live, in their order, so that what is written at one time lies together.
// The grid is fixed when the fill is bound, so the launch can be captured in a CUDA graph and replayed
// while lengths change; nothing is read back by the host. NOTES.md says what was measured.
#include "pages.cuh"
#include "tables.cuh"

namespace nsa {
namespace {

constexpr int kResidentBlocks = 6;  // of a multiprocessor
// Fewer where blocks share out chunks: kSharedVectors need more registers.
constexpr int kResidentSharingBlocks = 4;
// Blocks that copy pages, and tokens, for each multiprocessor. Tokens have more than are resident: blocks
// that begin as others end keep what is written at one time together.
constexpr int64_t kPageBlocks = 2;
constexpr int64_t kTokenBlocks = 16;
// Chunks for each multiprocessor that are so few that they are halved: more of them then have a part.
constexpr int64_t kFewChunks = 2;

// ---- lengths

// Calls add(r, L) for each request below `end` that is this thread's, loading four lengths at a time.
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

__device__ void fill_rows(const StaticFill& launch, uint32_t block) {
  const Fill& fill = launch.fill;
  const Divisor q = launch.extend_len;
  const uint32_t topk = static_cast<uint32_t>(fill.index_topk);
  const uint32_t begin = block * kThreads;
  const uint32_t row = begin + threadIdx.x;
  const uint32_t r = divide(row, q);
  const bool enabled = is_enabled(fill);
  const uint32_t behind = q.value - 1 - (row - r * q.value);
  const uint32_t expanded = row < fill.rows ? expanded_length(length_of(fill, r), behind) : 0;
  uint32_t before = 0;
  for_each_request_before(divide_up(begin, q), fill, [&](uint32_t other, int32_t length) {
    const uint32_t rows = min(q.value, begin - other * q.value);
    if (expanded_length(length, q.value - 1) >= topk) {
      before += rows * topk;
      return;
    }
    for (uint32_t j = 0; j < rows; ++j) before += min(expanded_length(length, q.value - 1 - j), topk);
  });
  const uint32_t sum = scan_block(min(expanded, topk), before);
  if (enabled && row < fill.rows) store_row(fill, row, expanded, sum);
}

// Each thread adds up the segments of `per` neighbouring requests; then each processor looks for the thread
// whose requests hold its first segment, and walks through their rows.
__device__ void fill_schedule(const StaticFill& launch) {
  __shared__ uint32_t ends[kThreads];
  const Fill& fill = launch.fill;
  const Schedule& schedule = fill.schedule;
  const uint32_t q = static_cast<uint32_t>(fill.static_extend_len);
  const uint32_t per = (static_cast<uint32_t>(fill.requests) + kThreads - 1) / kThreads;
  const bool enabled = is_enabled(fill);
  uint32_t own = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < per; ++i) {
    const uint32_t r = threadIdx.x * per + i;
    const int32_t length = r < fill.requests ? length_of(fill, r) : 0;
    for (uint32_t behind = 0; behind < q; ++behind) {
      own += segments_of(schedule, expanded_length(length, behind));
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
    const uint32_t holder = find_alone(ends, start);
    uint32_t skipped = start - (holder == 0 ? 0 : ends[holder - 1]);
    uint32_t row = holder * per * q;
    for (bool found = false; !found;) {
      const int32_t length = length_of(fill, divide(row, launch.extend_len));
      for (uint32_t behind = q; behind > 0 && !found;) {
        const uint32_t segments = segments_of(schedule, expanded_length(length, --behind));
        found = skipped < segments;
        if (found) break;
        skipped -= segments;
        ++row;
      }
    }
    store_schedule(schedule, p, row, skipped);
  }
}

// ---- page tables

__device__ Copy copy_of(const StaticFill& launch, const PageTable& table, uint32_t r) {
  const Fill& fill = launch.fill;
  const uint32_t q = static_cast<uint32_t>(fill.static_extend_len);
  return copy_of(fill, table, length_of(fill, r), pool_row_of(fill, r), r * q, q);
}

template <uint32_t kInFlight>
__device__ void fill_tokens(const StaticFill& launch, uint32_t block) {
  const PageTable& table = launch.fill.token_table;
  const uint32_t chunk = divide(block, launch.requests);
  const bool enabled = is_enabled(launch.fill);
  const Copy copy = copy_of(launch, table, block - chunk * launch.requests.value);
  const uint32_t begin = chunk * kTokensOfBlock<kInFlight> + warp() * kTokensOfWarp<kInFlight>;
  if (enabled) copy_tokens<kInFlight>(copy, table, begin, [] {});
}

__device__ void fill_shared_tokens(const StaticFill& launch, uint32_t block) {
  __shared__ uint32_t ends[kThreads];
  __shared__ int32_t lengths[kThreads], pool_rows[kThreads];
  const Fill& fill = launch.fill;
  const uint32_t requests = launch.requests.value;  // not 0 where there are chunks
  const bool enabled = is_enabled(fill);
  const uint32_t q = static_cast<uint32_t>(fill.static_extend_len);
  const uint32_t blocks = gridDim.x - launch.tokens_begin;
  uint32_t next = block;  // of this block's parts of chunks, counted from the first of the requests at hand
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
    const uint32_t parts = chunks > launch.few_chunks ? 1 : 2;  // of a chunk
#pragma unroll 1
    for (; next < parts * chunks; next += blocks) {
      const uint32_t t = find(ends, next / parts);
      const uint32_t part = next - parts * (t == 0 ? 0 : ends[t - 1]);
      const uint32_t row = (first + t) * q;
      if (parts == 1) {
        copy_part<kSharedVectors>(fill, lengths[t], pool_rows[t], row, q, part);
      } else {
        copy_part<kSharedVectors / 2>(fill, lengths[t], pool_rows[t], row, q, part);
      }
    }
    next -= parts * chunks;
    __syncthreads();  // the next requests overwrite these
  }
}

template <Tokens kTokens>
__device__ void fill_tables(const StaticFill& launch, int block) {
  if constexpr (kTokens == Tokens::kSharedChunks) {
    fill_shared_tokens(launch, block - launch.tokens_begin);
  } else if (kTokens == Tokens::kNone || block < launch.tokens_begin) {
    fill_pages(launch, block - launch.pages_begin);
  } else {
    fill_tokens<kTokens == Tokens::kSmallChunks ? 1 : kVectors>(launch, block - launch.tokens_begin);
  }
}

template <Tokens kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == Tokens::kSharedChunks ? kResidentSharingBlocks
                                                                           : kResidentBlocks)
    fill_static_kernel(const __grid_constant__ StaticFill launch) {
  const int block = blockIdx.x;
  if (block >= launch.pages_begin) {
    fill_tables<kTokens>(launch, block);
  } else if (block < launch.rows_begin) {
    fill_requests(launch.fill, block);
  } else if (block < launch.schedule_begin) {
    fill_rows(launch, block - launch.rows_begin);
  } else {
    fill_schedule(launch);
  }
}

auto kernel_of(Tokens tokens) {
  switch (tokens) {
    case Tokens::kNone:
      return fill_static_kernel<Tokens::kNone>;
    case Tokens::kSmallChunks:
      return fill_static_kernel<Tokens::kSmallChunks>;
    case Tokens::kChunks:
      return fill_static_kernel<Tokens::kChunks>;
    default:
      return fill_static_kernel<Tokens::kSharedChunks>;
  }
}

// Blocks that share one request's pages: no more than have pages of the table for one warp.
int64_t parts_of(const Fill& fill, int64_t multiprocessors) {
  if (fill.page_table.data == nullptr) return 0;
  const int64_t useful = maximum(ceil_div(fill.page_table.columns, kPagesOfWarp), 1);
  return clamp(multiprocessors * kPageBlocks / maximum(fill.requests, 1), 1, useful);
}

// Chunks of so many tokens that the token table can have.
int64_t most_chunks(const Fill& fill, uint32_t chunk_tokens) {
  return fill.requests * ceil_div(fill.token_table.columns, chunk_tokens);
}

// Few tokens spread over more multiprocessors in small chunks, as long as all their blocks are resident.
Tokens tokens_of(const Fill& fill, int64_t parts, int64_t resident) {
  if (parts > 0 && !fits_pages(fill, parts * kPagesOfBlock)) return Tokens::kSharedChunks;
  if (fill.token_table.data == nullptr) return Tokens::kNone;
  if (most_chunks(fill, kTokensOfBlock<1>) <= resident) return Tokens::kSmallChunks;
  if (most_chunks(fill, kTokensOfBlock<kVectors>) <= resident) return Tokens::kChunks;
  return Tokens::kSharedChunks;
}

int token_blocks(const Fill& fill, Tokens tokens, int64_t multiprocessors) {
  switch (tokens) {
    case Tokens::kNone:
      return 0;
    case Tokens::kSmallChunks:
      return static_cast<int>(most_chunks(fill, kTokensOfBlock<1>));
    case Tokens::kChunks:
      return static_cast<int>(most_chunks(fill, kTokensOfBlock<kVectors>));
    default:
      return static_cast<int>(minimum(fill.requests * chunks_of(fill, INT32_MAX),
                                      multiprocessors * kTokenBlocks));
  }
}

}  // namespace

StaticFill static_fill(const Fill& fill, int multiprocessors) {
  StaticFill launch{};
  launch.fill = fill;
  launch.extend_len = divisor_of(maximum(fill.static_extend_len, 1));
  launch.requests = divisor_of(maximum(fill.requests, 1));
  launch.rows_begin = static_cast<int>(maximum(ceil_div(fill.requests, kThreads), 1));
  launch.schedule_begin = launch.rows_begin + static_cast<int>(ceil_div(fill.rows, kThreads));
  launch.pages_begin = launch.schedule_begin + (fill.schedule.data != nullptr);

  const int64_t parts = parts_of(fill, multiprocessors);
  launch.tokens = tokens_of(fill, parts, multiprocessors * kResidentBlocks);
  launch.few_chunks = static_cast<uint32_t>(multiprocessors * kFewChunks);
  launch.tokens_begin = launch.pages_begin;
  if (parts > 0 && launch.tokens != Tokens::kSharedChunks) {
    launch.parts = divisor_of(parts);
    launch.pages = pages_of(fill);
    launch.tokens_begin += static_cast<int>(fill.requests * parts);
  }
  launch.blocks = launch.tokens_begin + token_blocks(fill, launch.tokens, multiprocessors);
  return launch;
}

int fill_static_on_cuda(const StaticFill& launch, void* stream) {
  kernel_of(launch.tokens)<<<launch.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}

}  // namespace nsa
