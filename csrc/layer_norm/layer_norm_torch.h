// layer_norm.h on CPU tensors of torch: results are made here, and Python is not asked for an address or a stride.
#pragma once
#include "common/torch_tensor.h"
#include "layer_norm/layer_norm.h"

namespace fastlm {

// (x, weight, bias or None, residual or None, eps, rms, whether a backward pass follows)
// -> y; (y, h) with a residual; with a backward pass always (y, h or None, statistics). None: see torch_tensor.h.
inline pybind11::object layer_norm_forward_torch(PyObject* const* arguments) {
  const auto x = Rows::of(arguments[0]), weight = Rows::of(arguments[1]);
  std::optional<Rows> bias, residual;
  if (!x || !weight || !rows_or_none(arguments[2], &bias) || !rows_or_none(arguments[3], &residual)) return pybind11::none();
  if (!weight->is_vector(x->cols)) return pybind11::none();
  if (bias && (!bias->is_vector(x->cols) || bias->type != weight->type)) return pybind11::none();
  if (residual && !(residual->has_shape_of(*x) && (residual->type == x->type || residual->type == DType::f32))) {
    return pybind11::none();
  }
  if (!PyFloat_CheckExact(arguments[4]) || PyFloat_AS_DOUBLE(arguments[4]) < 0) return pybind11::none();
  const float eps = static_cast<float>(PyFloat_AS_DOUBLE(arguments[4]));
  const bool rms = arguments[5] == Py_True, recorded = arguments[6] == Py_True;

  const TorchTensors::New y = torch_tensors.make(x->shape, x->dims, x->type);
  TorchTensors::New h, statistics;
  if (residual) h = torch_tensors.make(x->shape, x->dims, residual->type);
  float *mean = nullptr, *rstd = nullptr;
  if (recorded) {
    int64_t shape[OwnedTensor<DLManagedTensorVersioned>::kDims] = {rms ? 1 : 2};
    std::copy(x->shape, x->shape + x->dims - 1, shape + 1);
    statistics = torch_tensors.make(shape, x->dims, DType::f32);
    rstd = static_cast<float*>(statistics.data);
    if (!rms) mean = rstd, rstd += x->count;
  }
  const LayerNormForward p{x->data, residual ? residual->data : nullptr, weight->data, bias ? bias->data : nullptr,
                           y.data,  h.data,  mean,      rstd,
                           x->count, x->cols, x->stride, residual ? residual->stride : 0,
                           eps,     rms,     x->type,   residual ? residual->type : x->type, weight->type};
  {
    pybind11::gil_scoped_release release;
    layer_norm_forward_cpu(p);
  }
  if (!recorded && !residual) return y.object;
  const pybind11::object second = residual ? h.object : pybind11::none();
  if (!recorded) return pybind11::make_tuple(y.object, second);
  return pybind11::make_tuple(y.object, second, statistics.object);
}

// (dy, dh or None, h, weight, statistics, has_bias, has_residual) -> (dx, dweight, dbias or None, dresidual or None).
// None: see torch_tensor.h. RMS norm is told by the statistics' first dimension.
inline pybind11::object layer_norm_backward_torch(PyObject* const* arguments) {
  const auto dy = Rows::of(arguments[0]), h = Rows::of(arguments[2]), weight = Rows::of(arguments[3]),
             statistics = Rows::of(arguments[4]);
  std::optional<Rows> dh;
  if (!dy || !h || !weight || !statistics || !rows_or_none(arguments[1], &dh)) return pybind11::none();
  const bool has_bias = arguments[5] == Py_True, has_residual = arguments[6] == Py_True;
  const bool rms = statistics->shape[0] == 1;
  if (!h->has_shape_of(*dy) || !weight->is_vector(dy->cols) || (dh && !(dh->has_shape_of(*h) && dh->type == h->type)) ||
      statistics->type != DType::f32 || !statistics->packed() ||
      statistics->count * statistics->cols != (rms ? 1 : 2) * dy->count) {
    return pybind11::none();
  }
  const bool wide = has_residual && h->type != dy->type;
  const TorchTensors::New dx = torch_tensors.make(dy->shape, dy->dims, dy->type),
                          dweight = torch_tensors.make(weight->shape, 1, weight->type);
  TorchTensors::New dbias, dresidual;
  if (has_bias) dbias = torch_tensors.make(weight->shape, 1, weight->type);
  if (wide) dresidual = torch_tensors.make(h->shape, h->dims, h->type);
  float* const mean = static_cast<float*>(statistics->data);
  const int64_t floats = layer_norm_backward_workspace_cpu(dy->count, dy->cols);
  const Scratch workspace(static_cast<size_t>(floats) * sizeof(float));
  const LayerNormBackward p{dy->data,   dh ? dh->data : nullptr, h->data, weight->data, rms ? nullptr : mean,
                            rms ? mean : mean + dy->count, dx.data, dresidual.data, dweight.data, dbias.data,
                            static_cast<float*>(workspace.data()), dy->count, dy->cols,
                            dy->stride, dh ? dh->stride : 0, h->stride, rms, dy->type, h->type, weight->type};
  {
    pybind11::gil_scoped_release release;
    layer_norm_backward_cpu(p);
  }
  const pybind11::object none = pybind11::none();
  return pybind11::make_tuple(dx.object, dweight.object, has_bias ? dbias.object : none,
                              !has_residual ? none : wide ? dresidual.object : dx.object);
}

}  // namespace fastlm
