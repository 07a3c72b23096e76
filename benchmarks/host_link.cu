// What PCIe carries to and from pinned host memory, without and with the protocol of an all-reduce over two ranks. All
// GPUs at once, as many as the argument says, from one process. A line of JSON for each shape that is tried:
// benchmarks/host_link.py compiles this, runs it and keeps the fastest.
//
//   stores, loads      each GPU stores a message to host memory of its own, loads 2 * (N - 1) / N from the next one's
//   both               some blocks store, others load, at the same time, and nobody waits for anybody
//   engines            the same as "both" by the GPUs' copy engines
//   exchange           some blocks store tiles, each with a flag behind it; others wait for that, load the tile, add;
//                      two GPUs only
//
// "both" is what an all-reduce over N ranks must move at least, and so the least that it can take: in two steps a rank
// stores the N - 1 parts of the others and the sum of its own, and loads N - 1 parts and N - 1 sums.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

constexpr int kMostGpus = 8;
constexpr int kVectors = 4;  // of a thread at once, where nothing else is said
constexpr int kRepeats = 7;
constexpr int64_t kMostBytes = int64_t{16} << 20;
constexpr int kFlagWords = 8;  // a flag in a sector of its own

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

__device__ void store(uint4* to, const uint4& raw) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y), "r"(raw.z),
               "r"(raw.w));
}

__device__ uint4 load(const uint4* from) {
  uint4 raw;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(from));
  return raw;
}

__device__ void release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ void acquire(const uint32_t* flag, uint32_t value) {
  uint32_t seen = 0;
  for (int64_t polls = 0; static_cast<int32_t>(seen - value) < 0; ++polls) {
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    if (polls > 3000000) __trap();  // seconds
  }
}

__device__ uint32_t add(uint32_t a, uint32_t b) {
  const float2 x = __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(a));
  const float2 y = __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(b));
  const __nv_bfloat162 sum = __floats2bfloat162_rn(x.x + y.x, x.y + y.y);
  return reinterpret_cast<const uint32_t&>(sum);
}

struct Shape {
  int storing, loading;  // blocks
  int threads, vectors;  // vectors of a thread
};

// The first `storing` blocks store so many vectors, the others load.
__global__ void move_kernel(const uint4* message, uint4* output, uint4* mine, const uint4* theirs, int64_t stored,
                            int64_t loaded, int storing) {
  const bool stores = static_cast<int>(blockIdx.x) < storing;
  const int64_t block = stores ? blockIdx.x : blockIdx.x - storing;
  const int64_t blocks = stores ? storing : gridDim.x - storing;
  const int64_t tile = int64_t{blockDim.x} * kVectors;
  uint32_t seen = 0;
  for (int64_t i = block * tile + threadIdx.x; i < (stores ? stored : loaded); i += blocks * tile) {
    uint4 raw[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      raw[j] = stores ? message[i + j * blockDim.x] : load(theirs + i + j * blockDim.x);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (stores) store(mine + i + j * blockDim.x, raw[j]);
      seen ^= raw[j].x ^ raw[j].y ^ raw[j].z ^ raw[j].w;
    }
  }
  if (!stores && seen == 0x9e3779b9u) output[threadIdx.x].x = seen;  // so that the loads are not left out
}

// Two slots by turns are enough: whoever stores to one again has ended the call between, and so has had all flags of it
// from the peer, who had ended the call before.
template <int kCount>
__global__ void exchange_kernel(const uint4* message, uint4* output, char* mine, const char* theirs, uint32_t* flags,
                                const uint32_t* their_flags, const uint32_t* calls, int call, int tiles, int storing) {
  const uint32_t epoch = *calls + call + 1;
  const int64_t slot = epoch % 2 * kMostBytes;
  const int64_t first_flag = epoch % 2 * (kMostBytes / 1024);
  const int64_t tile = int64_t{blockDim.x} * kCount;
  const bool stores = static_cast<int>(blockIdx.x) < storing;
  const int blocks = stores ? storing : gridDim.x - storing;
  for (int t = stores ? blockIdx.x : blockIdx.x - storing; t < tiles; t += blocks) {
    const int64_t at = t * tile + threadIdx.x;
    uint4 own[kCount], others[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) own[j] = message[at + j * blockDim.x];
    if (stores) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) store(reinterpret_cast<uint4*>(mine + slot) + at + j * blockDim.x, own[j]);
      __syncthreads();
      if (threadIdx.x == 0) release(flags + (first_flag + t) * kFlagWords, epoch);
      continue;
    }
    if (threadIdx.x == 0) acquire(their_flags + (first_flag + t) * kFlagWords, epoch);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      others[j] = load(reinterpret_cast<const uint4*>(theirs + slot) + at + j * blockDim.x);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      output[at + j * blockDim.x] = {add(own[j].x, others[j].x), add(own[j].y, others[j].y), add(own[j].z, others[j].z),
                                     add(own[j].w, others[j].w)};
  }
}

__host__ __device__ float element(int64_t index, int gpu) { return static_cast<float>((index * 7 + gpu * 3) % 61); }

__global__ void check_kernel(const __nv_bfloat16* output, int64_t count, uint32_t* wrong) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    if (!(__bfloat162float(output[i]) == element(i, 0) + element(i, 1))) atomicAdd(wrong, 1u);
}

__global__ void count_kernel(uint32_t* calls, int more) { *calls += more; }

struct Gpu {
  cudaStream_t stream, second;
  cudaEvent_t begin, end, joined;
  uint4 *message, *output;
  char* host;  // four slots
  uint32_t *flags, *calls, *wrong;
};
Gpu gpus[kMostGpus];
int gpu_count = 2;

const Gpu& next_of(int gpu) { return gpus[(gpu + 1) % gpu_count]; }
int64_t loaded_bytes(int64_t bytes) { return bytes * 2 * (gpu_count - 1) / gpu_count; }

using Launch = std::function<void(int gpu, int call)>;

// Microseconds of a call in a graph of so many, on the slower GPU: the median.
float time_graph(int calls, const Launch& launch) {
  cudaGraphExec_t graphs[kMostGpus];
  for (int g = 0; g < gpu_count; ++g) {
    cudaGraph_t graph;
    CHECK(cudaSetDevice(g));
    CHECK(cudaStreamBeginCapture(gpus[g].stream, cudaStreamCaptureModeThreadLocal));
    for (int call = 0; call < calls; ++call) launch(g, call);
    count_kernel<<<1, 1, 0, gpus[g].stream>>>(gpus[g].calls, calls);
    CHECK(cudaGetLastError());
    CHECK(cudaStreamEndCapture(gpus[g].stream, &graph));
    CHECK(cudaGraphInstantiate(&graphs[g], graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  std::vector<float> times;
  for (int repeat = 0; repeat <= kRepeats; ++repeat) {
    for (int g = 0; g < gpu_count; ++g) {
      CHECK(cudaSetDevice(g));
      CHECK(cudaEventRecord(gpus[g].begin, gpus[g].stream));
      CHECK(cudaGraphLaunch(graphs[g], gpus[g].stream));
      CHECK(cudaEventRecord(gpus[g].end, gpus[g].stream));
    }
    float slowest = 0;
    for (int g = 0; g < gpu_count; ++g) {
      float ms = 0;
      CHECK(cudaSetDevice(g));
      CHECK(cudaEventSynchronize(gpus[g].end));
      CHECK(cudaEventElapsedTime(&ms, gpus[g].begin, gpus[g].end));
      slowest = std::max(slowest, ms);
    }
    if (repeat > 0) times.push_back(slowest * 1e3f / calls);  // the first one warms up
  }
  for (int g = 0; g < gpu_count; ++g) CHECK(cudaGraphExecDestroy(graphs[g]));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void say(const char* what, int64_t bytes, const Shape& shape, float us, int64_t wrong) {
  std::printf(
      "{\"what\": \"%s\", \"bytes\": %lld, \"storing_blocks\": %d, \"loading_blocks\": %d, \"threads\": %d, "
      "\"vectors\": %d, \"us\": %.2f, \"wrong\": %lld}\n",
      what, static_cast<long long>(bytes), shape.storing, shape.loading, shape.threads, shape.vectors, us,
      static_cast<long long>(wrong));
  std::fflush(stdout);
}

void open_gpus() {
  for (int g = 0; g < gpu_count; ++g) {
    Gpu& gpu = gpus[g];
    CHECK(cudaSetDevice(g));
    CHECK(cudaStreamCreate(&gpu.stream));
    CHECK(cudaStreamCreate(&gpu.second));
    CHECK(cudaEventCreate(&gpu.begin));
    CHECK(cudaEventCreate(&gpu.end));
    CHECK(cudaEventCreateWithFlags(&gpu.joined, cudaEventDisableTiming));
    CHECK(cudaMalloc(&gpu.message, kMostBytes));
    CHECK(cudaMalloc(&gpu.output, 2 * kMostBytes));
    CHECK(cudaMalloc(&gpu.calls, sizeof(uint32_t)));
    CHECK(cudaMalloc(&gpu.wrong, sizeof(uint32_t)));
    CHECK(cudaMemset(gpu.calls, 0, sizeof(uint32_t)));
    const int64_t flag_bytes = 2 * (kMostBytes / 1024) * kFlagWords * sizeof(uint32_t);
    CHECK(cudaHostAlloc(&gpu.host, 4 * kMostBytes, cudaHostAllocPortable | cudaHostAllocMapped));
    CHECK(cudaHostAlloc(&gpu.flags, flag_bytes, cudaHostAllocPortable | cudaHostAllocMapped));
    std::fill_n(gpu.host, 4 * kMostBytes, char{0});
    std::fill_n(reinterpret_cast<char*>(gpu.flags), flag_bytes, char{0});
    std::vector<__nv_bfloat16> values(kMostBytes / sizeof(__nv_bfloat16));
    for (size_t i = 0; i < values.size(); ++i) values[i] = __float2bfloat16(element(i, g));
    CHECK(cudaMemcpy(gpu.message, values.data(), kMostBytes, cudaMemcpyHostToDevice));
  }
}

// Elements that are not the sum on both GPUs, whose outputs are poisoned behind it.
int64_t wrong_elements(int64_t bytes) {
  uint32_t wrong = 0;
  for (int g = 0; g < gpu_count; ++g) {
    uint32_t here = 0;
    CHECK(cudaSetDevice(g));
    CHECK(cudaMemset(gpus[g].wrong, 0, sizeof(here)));
    check_kernel<<<64, 256>>>(reinterpret_cast<const __nv_bfloat16*>(gpus[g].output), bytes / 2, gpus[g].wrong);
    CHECK(cudaMemcpy(&here, gpus[g].wrong, sizeof(here), cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(gpus[g].output, 0xff, kMostBytes));
    CHECK(cudaDeviceSynchronize());
    wrong += here;
  }
  return wrong;
}

void time_moves(int64_t bytes) {
  for (int threads : {128, 512, 1024})
    for (int storing : {0, 1, 2, 4, 8, 16, 32, 64})
      for (int loading : {0, 2, 4, 8, 16, 32, 64, 128}) {
        const Shape shape{storing, loading, threads, kVectors};
        if (storing + loading == 0 || loaded_bytes(bytes) / 16 % (threads * kVectors) != 0) continue;
        const float us = time_graph(10, [&](int g, int) {
          move_kernel<<<storing + loading, threads, 0, gpus[g].stream>>>(
              gpus[g].message, gpus[g].output, reinterpret_cast<uint4*>(gpus[g].host),
              reinterpret_cast<const uint4*>(next_of(g).host + 2 * kMostBytes), bytes / 16, loaded_bytes(bytes) / 16,
              storing);
        });
        say(loading == 0 ? "stores" : storing == 0 ? "loads" : "both", bytes, shape, us, 0);
      }
}

void time_engines(int64_t bytes) {
  const float us = time_graph(10, [&](int g, int call) {
    Gpu& gpu = gpus[g];
    if (call == 0) {
      CHECK(cudaEventRecord(gpu.joined, gpu.stream));
      CHECK(cudaStreamWaitEvent(gpu.second, gpu.joined, 0));
    }
    CHECK(cudaMemcpyAsync(gpu.host, gpu.message, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    CHECK(cudaMemcpyAsync(gpu.output, next_of(g).host + 2 * kMostBytes, loaded_bytes(bytes), cudaMemcpyHostToDevice,
                          gpu.second));
    if (call == 9) {
      CHECK(cudaEventRecord(gpu.joined, gpu.second));
      CHECK(cudaStreamWaitEvent(gpu.stream, gpu.joined, 0));
    }
  });
  say("engines", bytes, {0, 0, 0, 0}, us, 0);
}

template <int kCount>
void time_exchange(int64_t bytes) {
  for (int threads : {64, 128, 256, 512})
    for (int storing : {1, 2, 4, 8, 16, 32, 64})
      for (int loading : {4, 8, 16, 32, 64, 132}) {
        const int64_t tiles = bytes / 16 / (threads * kCount);
        const bool is_sensible = loading <= 8 * storing && storing <= 2 * loading && loading <= 2 * tiles;
        // Nor fewer threads than it takes to keep the links busy.
        if (tiles < storing || !is_sensible || int64_t{storing} * threads * kCount * 16 < bytes / 256) continue;
        const float us = time_graph(bytes >= kMostBytes ? 4 : 12, [&](int g, int call) {
          exchange_kernel<kCount><<<storing + loading, threads, 0, gpus[g].stream>>>(
              gpus[g].message, gpus[g].output, gpus[g].host, gpus[1 - g].host, gpus[g].flags, gpus[1 - g].flags,
              gpus[g].calls, call, static_cast<int>(tiles), storing);
        });
        say("exchange", bytes, {storing, loading, threads, kCount}, us, wrong_elements(bytes));
      }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) gpu_count = std::atoi(arguments[1]);
  if (gpu_count < 2 || gpu_count > kMostGpus) return 2;
  open_gpus();
  for (int64_t bytes = 256 << 10; bytes <= kMostBytes; bytes *= 2) {
    time_moves(bytes);
    time_engines(bytes);
    if (gpu_count > 2) continue;
    time_exchange<1>(bytes);
    time_exchange<2>(bytes);
    time_exchange<4>(bytes);
    time_exchange<8>(bytes);
  }
}
