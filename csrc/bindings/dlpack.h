// What is used here of DLPack's C exchange interface, version 1 (github.com/dmlc/dlpack, dlpack.h): how a tensor
// library tells another, in C, where a tensor lies. torch has it from 2.10 on. Its layout is fixed by that version.
#ifndef LLM_ALLREDUCE_BINDINGS_DLPACK_H_
#define LLM_ALLREDUCE_BINDINGS_DLPACK_H_

#include <cstdint>

namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // What a Python object is, without owning it: valid as long as the object is. 0, or another number with an error set.
  int (*tensor_of_object)(void* object, Tensor* tensor);
  void* current_stream;
};

}  // namespace dlpack

#endif  // LLM_ALLREDUCE_BINDINGS_DLPACK_H_
