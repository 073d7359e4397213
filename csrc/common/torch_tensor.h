// torch's tensors, read and made in C++ by the functions that torch exports as DLPack's exchange API (torch 2.10 and later):
// no torch header, and none of the Python calls that an address, a stride or a new tensor costs else.
//
// An op's function on tensors is a convenience for the plain call. It returns None for everything out of the ordinary (another
// dtype, a subclass, rows that are not contiguous, a broken contract), and Python, which has the words for it, goes the long way.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "common/dlpack.h"
#include "common/dtype.h"

namespace fastlm {

class TorchTensors {
 public:
  // `tensor_type`: torch.Tensor; `parameter_type`: torch.nn.Parameter. Whether this torch has the functions.
  bool connect(pybind11::type tensor_type, pybind11::type parameter_type) {
    constexpr const char* kCapsule = "dlpack_exchange_api";
    api_ = nullptr;
    const pybind11::object capsule = pybind11::getattr(tensor_type, "__dlpack_c_exchange_api__", pybind11::none());
    if (!PyCapsule_IsValid(capsule.ptr(), kCapsule)) return false;
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
    while (api != nullptr && api->version.major != 1) api = api->previous;
    if (api == nullptr || api->tensor_from_py_object == nullptr) return false;
    tensor_type_ = tensor_type.release().ptr();  // for the life of the process
    parameter_type_ = parameter_type.release().ptr();
    api_ = api;
    return true;
  }

  // Fills in `out`, whose shape and strides are the tensor's own. False for what is no plain tensor in memory.
  bool read(PyObject* object, DLTensor* out) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (api_ == nullptr || (type != tensor_type_ && type != parameter_type_)) return false;
    if (api_->tensor_from_py_object(object, out) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // A new tensor, and where its numbers go.
  struct New {
    pybind11::object object;
    void* data = nullptr;
  };
  New make(const int64_t* shape, int dims, DType type) const {
    DLManagedTensorVersioned* const managed = OwnedTensor<DLManagedTensorVersioned>::make(shape, dims, type);
    void* const data = managed->tensor.data;
    void* object = nullptr;
    if (api_->managed_to_py_object(managed, &object) != 0) throw pybind11::error_already_set();
    return {pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object)), data};
  }

 private:
  const DLPackExchangeAPI* api_ = nullptr;
  PyObject *tensor_type_ = nullptr, *parameter_type_ = nullptr;
};

inline TorchTensors torch_tensors;

// A tensor (..., C) on the CPU in a dtype of the kernels, as equally distant rows of contiguous numbers.
struct Rows {
  void* data;
  const int64_t* shape;
  int dims;
  DType type;
  int64_t count, cols, stride;

  // Nothing for other tensors, and for empty ones.
  static std::optional<Rows> of(PyObject* object) {
    DLTensor t;
    if (!torch_tensors.read(object, &t)) return std::nullopt;
    if (t.device.type != kDLCPU || t.ndim < 1 || t.ndim > OwnedTensor<DLManagedTensorVersioned>::kDims) return std::nullopt;
    const auto is = [&](uint8_t code, uint8_t bits) { return t.dtype.code == code && t.dtype.bits == bits && t.dtype.lanes == 1; };
    Rows r{static_cast<char*>(t.data) + t.byte_offset, t.shape, t.ndim, DType::f32, 1, t.shape[t.ndim - 1], t.shape[t.ndim - 1]};
    if (is(kDLFloat, 16)) {
      r.type = DType::f16;
    } else if (is(kDLBfloat, 16)) {
      r.type = DType::bf16;
    } else if (!is(kDLFloat, 32)) {
      return std::nullopt;
    }
    if (t.data == nullptr || r.cols == 0 || (t.strides[t.ndim - 1] != 1 && r.cols != 1)) return std::nullopt;
    for (int d = t.ndim - 2; d >= 0; --d) {
      if (t.shape[d] == 1) continue;
      if (r.count == 1) r.stride = t.strides[d];
      if (t.strides[d] != r.count * r.stride) return std::nullopt;  // the leading dimensions do not fold into one
      r.count *= t.shape[d];
    }
    if (r.count == 0) return std::nullopt;
    return r;
  }

  // A vector of `n` numbers.
  bool is_vector(int64_t n) const { return dims == 1 && cols == n; }
  bool has_shape_of(const Rows& other) const { return dims == other.dims && std::equal(shape, shape + dims, other.shape); }
  bool packed() const { return stride == cols || count == 1; }
};

// A packed CPU tensor of int64 or int32.
struct Integers {
  const void* data;
  const int64_t* shape;
  int dims;
  bool wide;  // int64
  int64_t count;

  // Nothing for other tensors, and for empty ones.
  static std::optional<Integers> of(PyObject* object) {
    DLTensor t;
    if (!torch_tensors.read(object, &t) || t.device.type != kDLCPU || t.data == nullptr) return std::nullopt;
    if (t.dtype.code != kDLInt || t.dtype.lanes != 1 || (t.dtype.bits != 64 && t.dtype.bits != 32)) return std::nullopt;
    int64_t count = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
      if (t.shape[d] != 1 && t.strides[d] != count) return std::nullopt;
      count *= t.shape[d];
    }
    if (count == 0) return std::nullopt;
    return Integers{static_cast<char*>(t.data) + t.byte_offset, t.shape, t.ndim, t.dtype.bits == 64, count};
  }
};

// The argument is None, or a tensor as Rows::of takes it. False for anything else.
inline bool rows_or_none(PyObject* object, std::optional<Rows>* out) {
  if (object == Py_None) return true;
  *out = Rows::of(object);
  return out->has_value();
}

// A Python function of a fixed number of positional arguments, called without the steps by which pybind11 finds out which
// of several overloads fits: `function` takes the arguments and returns an object. Exceptions are pybind11's.
template <pybind11::object (*function)(PyObject* const*), int kArguments>
PyObject* positional(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) {
    PyErr_Format(PyExc_TypeError, "wanted %d arguments, got %zd", kArguments, count);
    return nullptr;
  }
  try {
    return function(arguments).release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <pybind11::object (*function)(PyObject* const*), int kArguments>
void define_positional(pybind11::module_& module, const char* name) {
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&positional<function, kArguments>)),
                            METH_FASTCALL, nullptr};
  module.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlm
