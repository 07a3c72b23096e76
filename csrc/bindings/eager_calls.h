// Eager all-reduces in one step from a tensor to a launch: what Python would otherwise do bit by bit in every call.
#ifndef LLM_ALLREDUCE_BINDINGS_EAGER_CALLS_H_
#define LLM_ALLREDUCE_BINDINGS_EAGER_CALLS_H_

#include <nanobind/nanobind.h>

#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/plan.h"

// The plans of a communicator by size and type of the message. Knows no tensor library: it sees tensors through DLPack,
// and has outputs made by the function that it is given.
class EagerCalls {
 public:
  // `api`: the capsule of DLPack's C exchange interface. `tensor_type`: tensors of this very type are taken, none of a
  // derived one. `device`: a CUDA device, or LAR_CPU. `empty_strided`: of shape, strides and type, on the current
  // device. `current_stream`: of a device's index; not asked on a CPU.
  EagerCalls(const nb::object& api, nb::object tensor_type, int device, nb::object empty_strided,
             nb::object current_stream)
      : tensor_type_(std::move(tensor_type)),
        empty_strided_(std::move(empty_strided)),
        current_stream_(std::move(current_stream)),
        on_cpu_(device == LAR_CPU),
        device_index_(on_cpu_ ? 0 : device),
        stream_argument_(nb::int_(device_index_)) {
    auto* table = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), dlpack::kCapsuleName));
    if (!table) throw nb::python_error();
    while (table && table->major != dlpack::kMajorVersion) table = table->previous;
    if (!table || !table->tensor_of_object)
      throw std::invalid_argument("api: does not offer what is needed of version 1 of DLPack's exchange interface");
    api_ = table;
  }
  EagerCalls(const EagerCalls&) = delete;
  EagerCalls& operator=(const EagerCalls&) = delete;

  // From now on, messages like this run by `plan`. `dtype`: as `empty_strided` takes it. `must_be_aligned`: only inputs
  // that start on a vector. `refused`: called with the status of a call that was refused, and raises.
  void keep(int64_t count, int type_code, nb::object dtype, nb::object plan, bool must_be_aligned, nb::object refused) {
    auto* held = nb::cast<Plan*>(plan);
    entries_[key(count, type_code)] = {held,
                                       std::move(plan),
                                       std::move(dtype),
                                       std::move(refused),
                                       must_be_aligned ? uintptr_t{LAR_VECTOR_BYTES - 1} : uintptr_t{0},
                                       {},
                                       {}};
  }
  void forget(int64_t count, int type_code) { entries_.erase(key(count, type_code)); }
  void clear() { entries_.clear(); }
  size_t size() const { return entries_.size(); }

  const nb::object& empty_strided() const { return empty_strided_; }
  void set_empty_strided(nb::object function) { empty_strided_ = std::move(function); }

  // Where a tensor lies, as calls see it: address, elements, number of its type, whether it is contiguous. None: it is
  // not of this device, or not one of the types that are summed, or no plain tensor.
  using Seen = std::tuple<uint64_t, int64_t, int, bool>;
  std::optional<Seen> see(nb::handle object) const {
    dlpack::Tensor tensor;
    if (!find(object, &tensor)) return std::nullopt;
    const int code = type_code_of(tensor.dtype);
    if (code < 0) return std::nullopt;
    return Seen{reinterpret_cast<uint64_t>(tensor.data), elements_of(tensor), code, is_contiguous(tensor)};
  }

  // The sum of a tensor; None where nothing is kept for such a one, which other ways must then do.
  nb::object operator()(nb::handle object) {
    dlpack::Tensor input;
    if (!find(object, &input)) return nb::none();
    const int code = type_code_of(input.dtype);
    if (code < 0 || !is_contiguous(input)) return nb::none();
    const auto found = entries_.find(key(elements_of(input), code));
    if (found == entries_.end()) return nb::none();
    Entry& entry = found->second;
    if (reinterpret_cast<uintptr_t>(input.data) & entry.alignment_mask) return nb::none();
    // Held here: as soon as Python runs, another thread may let go of the entry.
    const nb::object arguments = entry.arguments_of(input);
    const nb::object plan_object = entry.plan_object;
    const nb::object refused = entry.refused;
    Plan& plan = *entry.plan;
    const nb::object empty_strided = empty_strided_;
    nb::object output = nb::steal(PyObject_CallObject(empty_strided.ptr(), arguments.ptr()));
    if (!output.is_valid()) throw nb::python_error();
    dlpack::Tensor made;
    if (!find(output, &made)) return nb::none();  // the caller's current device is another
    uint64_t stream = 0;
    if (!on_cpu_) {
      const nb::object number =
          nb::steal(PyObject_CallFunctionObjArgs(current_stream_.ptr(), stream_argument_.ptr(), nullptr));
      if (!number.is_valid()) throw nb::python_error();
      stream = PyLong_AsUnsignedLongLong(number.ptr());
      if (PyErr_Occurred()) throw nb::python_error();
    }
    const int status = plan(reinterpret_cast<uint64_t>(input.data), reinterpret_cast<uint64_t>(made.data), stream);
    if (status != LAR_OK) refused(status);
    return output;
  }

 private:
  struct Entry {
    Plan* plan;
    nb::object plan_object;
    nb::object dtype;
    nb::object refused;
    uintptr_t alignment_mask;
    // Of the last message, which the next is likely to have, too.
    std::vector<int64_t> sizes;  // shape, then strides
    nb::object arguments;

    // For the output of a message like this.
    const nb::object& arguments_of(const dlpack::Tensor& tensor) {
      const auto dims = static_cast<size_t>(tensor.ndim);
      const size_t bytes = dims * sizeof(int64_t);
      if (arguments.is_valid() && sizes.size() == 2 * dims && std::memcmp(sizes.data(), tensor.shape, bytes) == 0 &&
          std::memcmp(sizes.data() + dims, tensor.strides, bytes) == 0)
        return arguments;
      sizes.assign(tensor.shape, tensor.shape + dims);
      sizes.insert(sizes.end(), tensor.strides, tensor.strides + dims);
      arguments = nb::make_tuple(tuple_of(tensor.shape, dims), tuple_of(tensor.strides, dims), dtype);
      return arguments;
    }
  };

  static nb::object tuple_of(const int64_t* values, size_t number) {
    nb::object made = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(number)));
    for (size_t i = 0; i < number; ++i)
      PyTuple_SetItem(made.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(values[i]));
    return made;
  }

  static uint64_t key(int64_t count, int type_code) {
    return static_cast<uint64_t>(count) << 2 | static_cast<uint64_t>(type_code);
  }

  // lar_dtype, or -1.
  static int type_code_of(dlpack::DataType type) {
    if (type.lanes != 1) return -1;
    if (type.code == dlpack::kBfloat) return type.bits == 16 ? LAR_BFLOAT16 : -1;
    if (type.code != dlpack::kFloat) return -1;
    return type.bits == 16 ? LAR_FLOAT16 : type.bits == 32 ? LAR_FLOAT32 : -1;
  }

  static int64_t elements_of(const dlpack::Tensor& tensor) {
    int64_t elements = 1;
    for (int32_t i = 0; i < tensor.ndim; ++i) elements *= tensor.shape[i];
    return elements;
  }

  // As torch says it: strides of dimensions of size 1 do not count, and an empty tensor is.
  static bool is_contiguous(const dlpack::Tensor& tensor) {
    int64_t stride = 1;
    bool dense = true;
    for (int32_t i = tensor.ndim; i-- > 0;) {
      if (tensor.shape[i] == 0) return true;
      if (tensor.shape[i] != 1) dense &= tensor.strides[i] == stride;
      stride *= tensor.shape[i];
    }
    return dense;
  }

  // A tensor of this device; false for anything else.
  bool find(nb::handle object, dlpack::Tensor* tensor) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != tensor_type_.ptr()) return false;
    if (api_->tensor_of_object(object.ptr(), tensor) != 0) {
      PyErr_Clear();  // one without memory of its own, as of a trace
      return false;
    }
    return tensor->device_type == (on_cpu_ ? dlpack::kCpu : dlpack::kCuda) && tensor->device_index == device_index_ &&
           tensor->byte_offset == 0;
  }

  const nb::object tensor_type_;
  nb::object empty_strided_;
  const nb::object current_stream_;
  const bool on_cpu_;
  const int device_index_;
  const nb::object stream_argument_;
  const dlpack::ExchangeApi* api_ = nullptr;
  std::unordered_map<uint64_t, Entry> entries_;
};

#endif  // LLM_ALLREDUCE_BINDINGS_EAGER_CALLS_H_
