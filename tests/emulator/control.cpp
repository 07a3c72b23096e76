// What tests ask of the emulator, beside the ABI of the library: plain C, for ctypes.
#include <cstring>
#include <string>

#include "host/registry.h"
#include "machine.h"
#include "runtime.h"

using emulator::machine;

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Forgets all streams and what they were given. `seed`: of who runs when.
EMULATOR_EXPORT void emulator_reset(uint64_t seed) { machine.reset(seed); }

// A new stream of a device, as cudaStream_t.
EMULATOR_EXPORT void* emulator_stream(int device) { return machine.add_stream(device); }

// How many blocks a device has room for.
EMULATOR_EXPORT void emulator_limit(int device, int multiprocessors, int blocks_per_multiprocessor) {
  machine.device(device).multiprocessors = multiprocessors;
  machine.device(device).blocks_per_multiprocessor = blocks_per_multiprocessor;
}

// This is host memory, until the next reset: stores to it may be under way when their kernel has ended.
EMULATOR_EXPORT void emulator_host_memory(const char* first, size_t bytes) { machine.add_host_memory(first, bytes); }

// Runs until all streams have done all that they were given. 0; 1: some device has trapped, now or earlier; 2: it
// cannot end, for the reason in `text`.
EMULATOR_EXPORT int emulator_run(char* text, size_t bytes) {
  const std::string error = machine.run();
  std::strncpy(text, error.c_str(), bytes - 1);
  text[bytes - 1] = '\0';
  if (!error.empty()) return 2;
  for (int i = 0; i < emulator::Machine::kDevices; ++i)
    if (machine.device(i).broken) return 1;
  return 0;
}

EMULATOR_EXPORT int emulator_is_broken(int device) { return machine.device(device).broken; }

// Which of the errors that were patched into the sources is made: emulator::mutation.
EMULATOR_EXPORT void emulator_mutate(int number) { emulator::mutation = number; }

// While this is set, a launch does not return, as where a stream's queue is full; and how many threads are in one.
EMULATOR_EXPORT void emulator_hold_launches(int hold) { emulator::hold_launches(hold != 0); }
EMULATOR_EXPORT int emulator_held_launches() { return emulator::held_launches(); }

// The runtime's current device, and the one that was current when host memory was last pinned or let go; -1: never.
EMULATOR_EXPORT int emulator_current_device() { return emulator::current_device_of_runtime(); }
EMULATOR_EXPORT int emulator_device_that_pinned() { return emulator::device_that_pinned(); }

// Nanoseconds of the emulated clock.
EMULATOR_EXPORT int64_t emulator_now() { return machine.now_ns(); }

// The row of the registry that runs such a call: {world size, threads at most, threads beside, resident}. 0: none.
EMULATOR_EXPORT int emulator_row(int algorithm, int exchange, int wire, int epilogue, int dtype, int world_size,
                                 int form, int* found) {
  const lar_kind kind = lar::kind_of(static_cast<lar_algorithm>(algorithm), static_cast<lar_exchange>(exchange),
                                     static_cast<lar_wire>(wire), static_cast<lar_epilogue>(epilogue));
  const lar::Row* row = lar::find_row(kind, static_cast<lar_dtype>(dtype), world_size, static_cast<lar::Form>(form));
  if (!row) return 0;
  const int values[] = {row->world_size, row->most_threads, row->extra_threads, row->resident};
  std::memcpy(found, values, sizeof(values));
  return 1;
}
