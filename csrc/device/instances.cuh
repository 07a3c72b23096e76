// The kernels that are compiled: over types, world sizes and epilogues, each combination once.
#ifndef LLM_ALLREDUCE_DEVICE_INSTANCES_CUH_
#define LLM_ALLREDUCE_DEVICE_INSTANCES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "device/kernel_address.cuh"
#include "device/lane.cuh"
#include "device/sink/store.cuh"
#include "host/registry.h"

namespace lar {

template <typename... T>
struct Types {};

template <typename T>
struct Type {
  using type = T;
};

// 0: any, at run time.
template <int... kWorldSize>
struct Worlds {};

// Every kernel of whole messages has all of them.
using Epilogues = Types<Store>;

template <typename T>
constexpr lar_dtype dtype_of() {
  if (std::is_same_v<T, float>) return LAR_FLOAT32;
  return std::is_same_v<T, __half> ? LAR_FLOAT16 : LAR_BFLOAT16;
}

namespace detail {

template <typename T, typename World, typename... Epilogue, typename Add>
void for_each_epilogue(Types<Epilogue...>, Add add) {
  (add(Type<T>{}, World{}, Type<Epilogue>{}), ...);
}

template <typename Epilogues, typename T, int... kWorldSize, typename Add>
void for_each_world(Worlds<kWorldSize...>, Add add) {
  (for_each_epilogue<T, std::integral_constant<int, kWorldSize>>(Epilogues{}, add), ...);
}

template <typename Epilogues, typename Worlds, typename... T, typename Add>
void for_each_type(Types<T...>, Add add) {
  (for_each_world<Epilogues, T>(Worlds{}, add), ...);
}

}  // namespace detail

// Calls add(Type<T>, integral_constant<world size>, Type<Epilogue>) for each combination.
template <typename Types, typename Worlds, typename Epilogues, typename Add>
void for_each_instance(Add add) {
  detail::for_each_type<Epilogues, Worlds>(Types{}, add);
}

// The exact in-band kernels of an algorithm that pushes: calls body(Type<T>, integral_constant<world size>,
// Type<Epilogue>, add) for each combination, where add(form, kernel) adds a row.
template <typename Body>
void add_exact_in_band(lar_algorithm algorithm, lar_exchange exchange, Body body) {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<2, 4, 8, 0>, Epilogues>(
      [&](auto type, auto world, auto epilogue) {
        using T = typename decltype(type)::type;
        using Epilogue = typename decltype(epilogue)::type;
        body(type, world, epilogue, [&](Form form, auto kernel) {
          add_row({kind_of(algorithm, exchange, LAR_WIRE_RAW, Epilogue::kEpilogue), dtype_of<T>(),
                   decltype(world)::value, form, kernel_address(kernel), LAR_MAX_THREADS, 0, false});
        });
      });
}

// Those of one that stores once, in memory that all ranks share: the same, where add(kernel) adds a row.
template <typename Body>
void add_exact_shared(lar_algorithm algorithm, Body body) {
  for_each_instance<Types<float, __half, __nv_bfloat16>, Worlds<2, 0>, Epilogues>([&](auto type, auto world,
                                                                                      auto epilogue) {
    using T = typename decltype(type)::type;
    using Epilogue = typename decltype(epilogue)::type;
    body(type, world, epilogue, [&](auto kernel) {
      add_row({kind_of(algorithm, LAR_SHARED, LAR_WIRE_RAW, Epilogue::kEpilogue), dtype_of<T>(), decltype(world)::value,
               Form::kAny, kernel_address(kernel), LAR_MAX_FLAGGED_THREADS, kReleaserThreads, false});
    });
  });
}

}  // namespace lar

#endif  // LLM_ALLREDUCE_DEVICE_INSTANCES_CUH_
