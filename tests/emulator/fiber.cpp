#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "report.h"

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;  // of address space; pages that nobody touches cost nothing
constexpr size_t kStacksAtOnce = 256;
constexpr char kEnd[] = "the end of this stack";  // at its lowest address: a stack grows downwards

std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    void* memory = mmap(nullptr, kStackBytes * kStacksAtOnce, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stacks of more threads");
    for (size_t i = 0; i < kStacksAtOnce; ++i) free_stacks.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  std::memcpy(stack, kEnd, sizeof(kEnd));
  return stack;
}

void give_back(char* stack) {
  if (std::memcmp(stack, kEnd, sizeof(kEnd)) != 0) fail("a thread has overflown its stack: make kStackBytes larger");
  free_stacks.push_back(stack);
}

jmp_buf outside;  // of whoever has resumed the fiber that runs

}  // namespace

Fiber::~Fiber() {
  if (stack_) give_back(stack_);
}

void Fiber::prepare(Body body, void* argument) {
  body_ = body;
  argument_ = argument;
}

void Fiber::enter(unsigned high, unsigned low) {
  auto* fiber = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
  fiber->body_(fiber->argument_);
  _longjmp(outside, 1);
}

// Only the first time: setting a context takes a call of the operating system, and a jump none.
void Fiber::start() {
  started_ = true;
  stack_ = take_stack();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::enter), 2, static_cast<unsigned>(address >> 32),
              static_cast<unsigned>(address));
  setcontext(&context);
}

void Fiber::resume() {
  if (_setjmp(outside) != 0) return;
  if (started_) _longjmp(inside_, 1);
  start();
}

void Fiber::pause() {
  if (_setjmp(inside_) == 0) _longjmp(outside, 1);
}

}  // namespace emulator
