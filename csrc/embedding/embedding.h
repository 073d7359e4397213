// The embedding: rows of a table by their number, and the gradient of the table.
//
//   y[i] = weight[ids[i]]                      forward
//   dweight[v] = sum over i with ids[i] = v of dy[i], in the order of i, in float32; rounded once     backward
//
// ids: (count). weight: (vocabulary, cols), rows contiguous. y, dy: (count, cols), y packed.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct EmbeddingForward {
  const void* ids;  // int64 or int32
  bool wide_ids;    // int64
  const void* weight;
  void* y;
  int64_t count, vocabulary, cols;
  int64_t weight_stride;  // elements between rows
  DType type;
};

// `keys` are the ids in ascending order, `order` where each of them stood: equal ids in the order of their places.
struct EmbeddingBackward {
  const void* dy;
  const int64_t* keys;
  const int64_t* order;
  void* dweight;          // packed, filled with zeros by the caller; only rows that occur are written
  float* workspace;       // CUDA: embedding_backward_workspace_cuda(...) floats
  int64_t count, vocabulary, cols;
  int64_t dy_stride;
  int64_t padding;        // this row gets no gradient; -1: none
  DType type;
};

// Throws std::invalid_argument where an id is out of range.
void embedding_forward_cpu(const EmbeddingForward& p);
void embedding_backward_cpu(const EmbeddingBackward& p);

// An id out of range gives a row of NaN, and no gradient: looking for one would wait for the device.
void embedding_forward_cuda(const EmbeddingForward& p, void* stream);
int64_t embedding_backward_workspace_cuda(int64_t count, int64_t cols);
void embedding_backward_cuda(const EmbeddingBackward& p, void* stream);

}  // namespace fastlm
