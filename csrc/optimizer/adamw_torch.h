// The rows of adamw.h's tables from torch's tensors, without a call of Python for each address.
#pragma once
#include <string>
#include <vector>

#include "common/torch_tensor.h"
#include "optimizer/adamw.h"

namespace fastlm {

// A tensor without gaps in a dtype of the kernels.
struct PackedTensor {
  DLTensor t;
  DType type;
  int64_t numel = 1;

  // False for any other.
  bool read(PyObject* object) {
    if (!torch_tensors.read(object, &t) || t.dtype.lanes != 1) return false;
    if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) type = DType::bf16;
    else if (t.dtype.code == kDLFloat && t.dtype.bits == 16) type = DType::f16;
    else if (t.dtype.code == kDLFloat && t.dtype.bits == 32) type = DType::f32;
    else return false;
    for (int d = t.ndim - 1; d >= 0; --d) {
      if (t.shape[d] != 1 && t.strides[d] != numel) return false;
      numel *= t.shape[d];
    }
    return true;
  }
  bool is_like(const PackedTensor& other) const {
    return t.ndim == other.t.ndim && std::equal(t.shape, t.shape + t.ndim, other.t.shape) &&
           t.device.type == other.t.device.type && t.device.id == other.t.device.id;
  }
  int64_t address() const { return reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset); }
};

// (params, grads, exp_avgs, exp_avg_sqs: lists of one length; elements of a chunk on the GPU, or 0) -> (bytes, chunks): the
// int64 of an AdamWRow for each tensor, or with 0 those of an AdamWTensor. None where a tensor is not packed, or breaks the
// contract, or is on another device than the first.
inline pybind11::object adamw_table_torch(PyObject* const* arguments) {
  constexpr int kTensors = 4;
  for (int i = 0; i < kTensors; ++i) {
    if (!PyList_CheckExact(arguments[i]) || PyList_GET_SIZE(arguments[i]) != PyList_GET_SIZE(arguments[0])) return pybind11::none();
  }
  const int64_t chunk = PyLong_AsLongLong(arguments[kTensors]), count = PyList_GET_SIZE(arguments[0]);
  std::string table;
  int64_t chunks = 0;
  PackedTensor first;
  for (int64_t k = 0; k < count; ++k) {
    PackedTensor p[kTensors];
    for (int i = 0; i < kTensors; ++i) {
      if (!p[i].read(PyList_GET_ITEM(arguments[i], k)) || !p[i].is_like(p[0]) || (i > 1 && p[i].type != DType::f32)) return pybind11::none();
    }
    if (k == 0) first = p[0];
    if (p[0].t.device.type != first.t.device.type || p[0].t.device.id != first.t.device.id) return pybind11::none();
    if ((p[0].t.device.type == kDLCPU) != (chunk == 0)) return pybind11::none();
    const int64_t addresses = p[0].address() | p[1].address() | p[2].address() | p[3].address();
    const int64_t row[] = {p[0].address(), p[1].address(), p[2].address(), p[3].address(), 0, 0, p[0].numel,
                           static_cast<int64_t>(p[0].type), static_cast<int64_t>(p[1].type), chunks, addresses % 16 == 0};
    table.append(reinterpret_cast<const char*>(row), (chunk == 0 ? 9 : 11) * sizeof(int64_t));
    if (chunk > 0) chunks += (p[0].numel + chunk - 1) / chunk;
  }
  return pybind11::make_tuple(pybind11::bytes(table), chunks);
}

// (steps: a list of CPU tensors of one float32 each, whether to add 1 to each) -> what they hold before that. None, and
// nothing is added, where they do not all hold the same.
inline pybind11::object adamw_steps_torch(PyObject* const* arguments) {
  if (!PyList_CheckExact(arguments[0])) return pybind11::none();
  const int64_t count = PyList_GET_SIZE(arguments[0]);
  std::vector<float*> steps(count);
  for (int64_t k = 0; k < count; ++k) {
    PackedTensor p;
    if (!p.read(PyList_GET_ITEM(arguments[0], k)) || p.type != DType::f32 || p.numel != 1 || p.t.device.type != kDLCPU) {
      return pybind11::none();
    }
    steps[k] = reinterpret_cast<float*>(p.address());
    if (*steps[k] != *steps[0]) return pybind11::none();
  }
  if (count == 0) return pybind11::none();
  const float step = *steps[0];
  if (arguments[1] == Py_True) {
    for (float* p : steps) *p = step + 1;
  }
  return pybind11::int_(static_cast<int64_t>(step));
}

}  // namespace fastlm
