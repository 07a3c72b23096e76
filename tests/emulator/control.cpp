// What tests ask of the emulator, beside the ABI of the library: plain C, for ctypes.
#include <cstring>
#include <string>

#include "machine.h"

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

// Nanoseconds of the emulated clock.
EMULATOR_EXPORT int64_t emulator_now() { return machine.now_ns(); }
