#include "fiber.h"

#include <setjmp.h>
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
// Stacks begin at different lines of the cache: where all begin at the same, each pushes the others out.
constexpr size_t kColours = 64;
constexpr size_t kColourBytes = 128;
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

// Leaves one stack for another: what a function must keep lies on the stack that is left, and `from` says where. Tens
// of millions of times in a run of the tests, for which swapcontext(), with its call of the operating system, is too
// slow.
extern "C" void emulator_switch(void** from, void* to);

#if defined(__x86_64__)

asm(R"(
.text
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

// What emulator_switch() goes on with: six registers, `body` to return to, and no caller of that.
void* new_stack(char*, char* end, void (*body)()) {
  auto** top = reinterpret_cast<void**>(end);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#else

extern "C" void emulator_switch(void** from, void* to) {
  jmp_buf here;
  *from = &here;
  if (_setjmp(here) == 0) _longjmp(*static_cast<jmp_buf*>(to), 1);
}

ucontext_t maker;
void* made;
void (*body_of_made)();

void first() {
  jmp_buf here;
  made = &here;
  void (*const body)() = body_of_made;
  if (_setjmp(here) == 0) setcontext(&maker);
  body();
}

void* new_stack(char* begin, char* end, void (*body)()) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = begin;
  context.uc_stack.ss_size = static_cast<size_t>(end - begin);
  context.uc_link = nullptr;
  makecontext(&context, &first, 0);
  body_of_made = body;
  swapcontext(&maker, &context);
  return made;
}

#endif

void* outside = nullptr;  // what whoever has resumed the fiber that runs goes on with
Fiber* starting = nullptr;

}  // namespace

Fiber::~Fiber() {
  if (stack_) give_back(stack_);
}

void Fiber::prepare(Body body, void* argument) {
  body_ = body;
  argument_ = argument;
}

void Fiber::enter() {
  Fiber* fiber = starting;
  fiber->body_(fiber->argument_);
  fiber->pause();
}

void Fiber::start() {
  stack_ = take_stack();
  const size_t colour = reinterpret_cast<uintptr_t>(stack_) / kStackBytes % kColours;
  rest_ = new_stack(stack_, stack_ + kStackBytes - colour * kColourBytes, &Fiber::enter);
  starting = this;
}

void Fiber::resume() {
  if (!rest_) start();
  emulator_switch(&outside, rest_);
}

void Fiber::pause() { emulator_switch(&rest_, outside); }

}  // namespace emulator
