// A two-shot in stages, for PCIe: all lanes of a GPU send to one peer at a time, and one peer at a time sends to it.
// Stores of all GPUs to all others at once meet in the switches and host bridges and hold each other up; one stream out
// and one in at any instant keep the rate of the links.
//
// Round by round, of which each moves one chunk of every lane and part:
//
//     scatter, stage k = 1..N-1   store my partials of the part of rank r+k into its scatter slot
//     reduce                      sum ranks 0..N-1 in order, round once, store to the output and to a slot of my own
//     gather, stage k = 1..N-1    copy that slot to rank r+k; drain what rank r-k+1 sent in the stage before
//
// Stages are counted over all calls. Rank r's stage s, to rank t and from rank f, begins when
//   - all its lanes have ended stage s-1: each arrives at a barrier of the grid with a release of system scope, so that
//     its stores have arrived at their target by then. The last lane to arrive tells the target so (kStageData), waits
//     until f' of stage s-1 has told the same to this rank, and opens stage s to the other lanes.
//   - t has granted it (kStageGrant), which t does once its own inbound stage s-1 is complete.
// So a GPU's streams out follow each other because its own lanes end one before they begin the next, and its streams in
// because it lets the next begin when it has all of the last. What waits in stage s waits for something of stage s-1 or
// for a grant that its peer gives before it waits itself, so no circle of waits is possible. A stage costs two flights
// of a flag.
//
// Why one slot for each source is enough, without generations:
//   - scatter of a round overwrites what its target reduced in the round before, and gather what it drained: the target
//     grants the stage after all its lanes have arrived at the end of a later stage, behind those reads.
//   - the slot of my own results is a lane's alone: it writes and reads its own piece.
// Why staged calls may take all generations of the flagged slots as one slot, and may follow other flagged calls and be
// followed by them: the grant of the first stage is given by everyone to everyone, so that no rank stores anything
// before all have ended their calls before, each of which has drained its rank's slots. A last grant is given likewise,
// so that no rank leaves the call before all have drained their slots. The others' counts of rounds stay as they are.
//
// All lanes must be resident together: there are few, which is enough for PCIe.
#ifndef LLM_ALLREDUCE_DEVICE_STAGED_LANE_CUH_
#define LLM_ALLREDUCE_DEVICE_STAGED_LANE_CUH_

#include "device/lane.cuh"
#include "device/payload.cuh"
#include "device/two_shot_lane.cuh"

namespace lar {

// The stages of one call as this rank sees them: for one warp of each block, and within it, where nothing else is said,
// for its first thread.
class Stages {
 public:
  __device__ __forceinline__ Stages(const lar_workspace& workspace, const WaitLimit& limit, int64_t rounds)
      : workspace_(workspace),
        limit_(limit),
        ranks_(workspace.layout.world_size),
        number_(static_cast<uint32_t>(rounds) * 2 * (ranks_ - 1)),
        epoch_(*epoch_word(workspace.local, workspace.layout, EpochPlane::kStaged, 0)) {}

  // For the warp: waits until the first stage may begin. False, here and below, when a wait has expired.
  __device__ __forceinline__ bool begin() const {
    bool begun = true;
    if (blockIdx.x == 0 && threadIdx.x % 32 == 0) count_beginning(limit_.begun);
    if (blockIdx.x == 0) begun = exchange_with_all(0);
    if (threadIdx.x % 32 == 0 && begun) {
      if (blockIdx.x == 0) {
        open(0);
      } else {
        begun = wait_open(0);
      }
    }
    return __all_sync(kWarp, begun);
  }

  // Ends `stage`, 0 .. number-1 in this call, for this lane; waits until the next may begin and this one's inbound
  // stream is complete.
  __device__ __forceinline__ bool pass(uint32_t stage) const {
    if (!arrive()) return wait_open(stage + 1);
    lar_stage_times& times = *stage_times(workspace_.local, workspace_.layout, round(stage));
    times.sent = global_timer_ns();
    const int source = peer(-step(stage));
    store_release_system(word_at(peer(step(stage)), FlagPlane::kStageData, workspace_.rank), round(stage));
    if (!wait(FlagPlane::kStageData, source, stage)) return false;
    times.received = global_timer_ns();
    if (stage + 1 < number_ && !exchange_grants(stage + 1)) return false;
    open(stage + 1);
    return true;
  }

  // For the warp, once the lane has drained: nobody leaves before everyone has.
  __device__ __forceinline__ void leave() const {
    const bool last = threadIdx.x % 32 == 0 && arrive();
    if (!__any_sync(kWarp, last) || !exchange_with_all(number_)) return;
    if (last) *epoch_word(workspace_.local, workspace_.layout, EpochPlane::kStaged, 0) = round(number_);
  }

 private:
  static constexpr uint32_t kWarp = 0xffffffffu;

  // As peers count it, over all calls. round(number_) is that of leaving.
  __device__ __forceinline__ uint32_t round(uint32_t stage) const { return epoch_ + stage + 1; }

  __device__ __forceinline__ int step(uint32_t stage) const { return static_cast<int>(stage % (ranks_ - 1)) + 1; }

  __device__ __forceinline__ int peer(int step) const { return (workspace_.rank + ranks_ + step) % ranks_; }

  __device__ __forceinline__ lar_phase phase(uint32_t stage) const {
    return stage < number_ && stage / (ranks_ - 1) % 2 == 0 ? LAR_PHASE_SCATTER : LAR_PHASE_GATHER;
  }

  // Lane 0's row: one word for each rank that writes there.
  __device__ __forceinline__ uint32_t* word_at(int holder, FlagPlane plane, int writer) const {
    return flag_row(workspace_.base[holder], workspace_.layout, plane, 0) + writer;
  }

  __device__ __forceinline__ bool wait(FlagPlane plane, int writer, uint32_t stage) const {
    return wait_for_round(limit_, word_at(workspace_.rank, plane, writer), round(stage), blockIdx.x, writer,
                          phase(stage));
  }

  // Lets the source of `stage` begin, and waits until its target lets this rank.
  __device__ __forceinline__ bool exchange_grants(uint32_t stage) const {
    store_release_system(word_at(peer(-step(stage)), FlagPlane::kStageGrant, workspace_.rank), round(stage));
    return wait(FlagPlane::kStageGrant, peer(step(stage)), stage);
  }

  // For the warp: grants `stage` to every rank, and waits until every rank has granted it to this one.
  __device__ __forceinline__ bool exchange_with_all(uint32_t stage) const {
    const int first = threadIdx.x % 32;
    bool granted = true;
    __syncwarp();  // here and below: what one thread has acquired, another releases
    for (int other = first; other < ranks_; other += 32)
      if (other != workspace_.rank)
        store_release_system(word_at(other, FlagPlane::kStageGrant, workspace_.rank), round(stage));
    for (int other = first; granted && other < ranks_; other += 32)
      if (other != workspace_.rank) granted = wait(FlagPlane::kStageGrant, other, stage);
    __syncwarp();
    return __all_sync(kWarp, granted);
  }

  // At the barrier of the grid; true for the last. The block's stores have arrived once this releases: the barrier
  // before it orders them, and releases are cumulative.
  __device__ __forceinline__ bool arrive() const {
    uint32_t* arrivals = arrivals_word(workspace_.local, workspace_.layout);
    if (increment_acquire_release_system(arrivals) + 1 != gridDim.x) return false;
    *arrivals = 0;  // seen by the next to arrive: they wait for open(), or for the next kernel
    return true;
  }

  __device__ __forceinline__ uint32_t* open_word() const {
    return epoch_word(workspace_.local, workspace_.layout, EpochPlane::kStageOpen, 0);
  }

  __device__ __forceinline__ void open(uint32_t stage) const {
    if (stage < number_) stage_times(workspace_.local, workspace_.layout, round(stage))->began = global_timer_ns();
    store_release_system(open_word(), round(stage));
  }

  // The lane that opens waits for two peers, one after the other, and is the one to say which did not arrive: the
  // others wait long enough to let it.
  __device__ __forceinline__ bool wait_open(uint32_t stage) const {
    WaitLimit longer = limit_;
    longer.timeout_ns *= 3;
    longer.first_timeout_ns *= 3;
    return wait_for_round(longer, open_word(), round(stage), blockIdx.x, peer(step(stage)), phase(stage));
  }

  const lar_workspace& workspace_;
  const WaitLimit& limit_;
  const int ranks_;
  const uint32_t number_;
  const uint32_t epoch_;
};

// `Units`: see TwoShotLane. The releaser's warp goes through the stages.
template <typename Units>
class StagedLane {
 public:
  __device__ __forceinline__ StagedLane(const FlagsArguments& arguments, const Units& units)
      : workspace_(arguments.workspace),
        slots_(workspace_.layout.flagged),
        units_(units),
        ranks_(workspace_.layout.world_size),
        cut_{units.total(), arguments.chunk_vectors * LAR_VECTOR_BYTES / Units::unit_bytes(), ranks_,
             static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)},
        rounds_(cut_.chunks()),
        stages_(workspace_, arguments.limit, rounds_) {}

  __device__ __forceinline__ void run() const {
    if (!__syncthreads_and(is_worker() || stages_.begin())) return;
    const int steps = ranks_ - 1;
#pragma unroll 1
    for (int64_t round = 0; round < rounds_; ++round) {
      // One turn to a stage, and one to drain what the last has brought.
#pragma unroll 1
      for (int turn = 0; turn <= 2 * steps; ++turn) {
        const bool is_stage = turn < 2 * steps;
        if (turn == steps) {
          if (is_worker()) reduce(round);
          __syncthreads();  // a thread copies what others have summed
        }
        if (is_worker() && turn < steps) scatter(round, peer(turn + 1));
        if (is_worker() && turn >= steps && is_stage) copy_result(round, peer(turn - steps + 1));
        __syncthreads();
        bool goes_on = true;
        if (is_worker()) {
          // The stage before is complete, and its slot nobody's but mine: this fills the time that flags fly.
          if (turn > steps) drain(round, peer(steps - turn));
        } else {
          if (is_stage && threadIdx.x % 32 == 0)
            goes_on = stages_.pass(static_cast<uint32_t>(round) * 2 * steps + turn);
          __syncwarp();
        }
        if (!__syncthreads_and(goes_on)) return;
      }
    }
    if (!is_worker()) stages_.leave();
  }

 private:
  // The part of one owner (device/two_shot_lane.cuh says what is asked of pieces).
  struct OnePiece {
    static constexpr bool kIsOne = true;
    static constexpr int count = 1;
    const Piece piece;
    char* const at;
    const int64_t most;

    __device__ __forceinline__ Piece of(int) const { return piece; }
    __device__ __forceinline__ char* slot(int) const { return at; }
  };

  using BlockRoles = Lane<Roles::kWorkersAndReleaser>;

  __device__ __forceinline__ static bool is_worker() { return !BlockRoles::is_releaser(); }

  __device__ __forceinline__ int peer(int step) const {
    const int at = workspace_.rank + step;
    return at < 0 ? at + ranks_ : at < ranks_ ? at : at - ranks_;
  }

  // This lane's piece of the slot, with `holder`, for what comes from `source`.
  __device__ __forceinline__ char* slot(int64_t region, int holder, int source) const {
    return static_cast<char*>(workspace_.base[holder]) + region + source * slots_.staged_bytes +
           blockIdx.x * cut_.units * Units::unit_bytes();
  }

  __device__ __forceinline__ char* result_slot(int holder, int owner) const {
    return slot(slots_.gather_offset, holder, owner);
  }

  __device__ __forceinline__ void scatter(int64_t round, int owner) const {
    units_.pack(OnePiece{cut_.piece(round, owner), slot(slots_.scatter_offset, owner, workspace_.rank), cut_.units});
  }

  __device__ __forceinline__ void reduce(int64_t round) const {
    const int rank = workspace_.rank;
    const char* first_source = slot(slots_.scatter_offset, rank, 0);
    char* const result = result_slot(rank, rank);
    units_.reduce(
        cut_.piece(round, rank), rank, ranks_, [&](int source) { return first_source + source * slots_.staged_bytes; },
        [&](auto store) { store(result); });
  }

  __device__ __forceinline__ void copy_result(int64_t round, int reader) const {
    const int rank = workspace_.rank;
    const char* from = result_slot(rank, rank);
    char* const to = result_slot(reader, rank);
    const int64_t spans[] = {cut_.piece(round, rank).span * (Units::unit_bytes() / LAR_VECTOR_BYTES)};
    move_vectors(
        spans, BlockRoles::workers(), [&](int, int64_t i) { return load_slot(from, i); },
        [&](int, int64_t i, const uint4& raw) { store_slot(to, i, raw); });
  }

  __device__ __forceinline__ void drain(int64_t round, int owner) const {
    units_.unpack(OnePiece{cut_.piece(round, owner), result_slot(workspace_.rank, owner), cut_.units});
  }

  const lar_workspace& workspace_;
  const lar_slots& slots_;
  const Units& units_;
  const int ranks_;
  const Cut cut_;
  const int64_t rounds_;
  const Stages stages_;
};

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_STAGED_LANE_CUH_
