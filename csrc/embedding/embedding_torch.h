// embedding.h on CPU tensors of torch (common/torch_tensor.h).
#pragma once
#include "common/torch_tensor.h"
#include "embedding/embedding.h"

namespace fastlm {

// (ids, weight) -> y. None: see torch_tensor.h.
inline pybind11::object embedding_forward_torch(PyObject* const* arguments) {
  constexpr int kDims = OwnedTensor<DLManagedTensorVersioned>::kDims;
  const auto ids = Integers::of(arguments[0]);
  const auto weight = Rows::of(arguments[1]);
  if (!ids || !weight || weight->dims != 2 || ids->dims >= kDims) return pybind11::none();
  int64_t shape[kDims];
  *std::copy(ids->shape, ids->shape + ids->dims, shape) = weight->cols;
  const TorchTensors::New y = torch_tensors.make(shape, ids->dims + 1, weight->type);
  const EmbeddingForward p{ids->data,     ids->wide,    weight->data,   y.data,      ids->count,
                           weight->count, weight->cols, weight->stride, weight->type};
  {
    pybind11::gil_scoped_release release;
    embedding_forward_cpu(p);
  }
  return y.object;
}

}  // namespace fastlm
