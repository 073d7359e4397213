// What happens to the tile of c that a block has made, eight columns of a row at a time: gemm.h says what.
//
// A tile is read back from shared memory row by row, so that global memory is read and written in 16-byte pieces of whole
// rows, and a thread's columns are the same in every row: the sums of dpre's columns stay in its registers.
#pragma once
#include "common/cuda/vector.h"
#include "gemm/gemm.h"
#include "gemm/operand_tile.h"
#include "mlp/activation_cuda.h"

namespace fastlm::cuda {

// The epilogue as a kernel gets it.
struct EpilogueTask {
  Epilogue e;
  int64_t m, cols;     // of c; for a gated activate, cols of one half
  bool gated;
  bool vectors;        // every row of every matrix may be read in 16-byte pieces
  float* column_sums;  // (tiles of rows, columns of pre); null: not wanted
};

FASTLM_DEVICE int64_t pre_columns(const EpilogueTask& t) { return t.gated ? 2 * t.cols : t.cols; }

// Eight elements at p + i; elements from `count` on read as zero, and are not written.
template <class T>
FASTLM_DEVICE Vector<T> load_some(const void* p, int64_t i, bool vectors, int count) {
  const T* from = static_cast<const T*>(p) + i;
  if (vectors && count == kVector) return load_vector(from);
  Vector<T> r;
#pragma unroll
  for (int j = 0; j < kVector; j++) r.v[j] = j < count ? from[j] : from_float<T>(0.0f);
  return r;
}

template <class T>
FASTLM_DEVICE void store_some(void* p, int64_t i, bool vectors, int count, const float (&v)[kVector]) {
  T* to = static_cast<T*>(p) + i;
  if (vectors && count == kVector) return store_vector(to, vector_from_float<T>(v));
#pragma unroll
  for (int j = 0; j < kVector; j++) {
    if (j < count) to[j] = from_float<T>(v[j]);
  }
}

// v += bias, rounded to T.
template <class T>
FASTLM_DEVICE void add_bias_and_round(const EpilogueTask& task, int64_t col, int count, float (&v)[kVector]) {
  if (task.e.bias != nullptr) {
    float bias[kVector];
    to_floats(load_some<T>(task.e.bias, col, task.vectors, count), bias);
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] += bias[j];
  }
#pragma unroll
  for (int j = 0; j < kVector; j++) v[j] = to_float(from_float<T>(v[j]));
}

template <class T>
FASTLM_DEVICE void finish_store(const EpilogueTask& task, int64_t row, int64_t col, int count, float (&v)[kVector]) {
  const Epilogue& e = task.e;
  const int64_t at = row * e.out_stride + col;
  if (e.scale != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] *= *e.scale;
  }
  if (e.bias != nullptr) {
    float bias[kVector];
    to_floats(load_some<T>(e.bias, col, task.vectors, count), bias);
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] += bias[j];
  }
  if (e.out_type != DType::f32) return store_some<T>(e.out, at, task.vectors, count, v);
  if (e.accumulate) {
    const Vector<float> old = load_some<float>(e.out, at, task.vectors, count);
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] += old.v[j];
  }
  store_some<float>(e.out, at, task.vectors, count, v);
}

// `up` is the second half of pre, where the activation is gated.
template <class T>
FASTLM_DEVICE void finish_activate(const EpilogueTask& task, int64_t row, int64_t col, int count, float (&v)[kVector],
                                   float (&up)[kVector]) {
  const Epilogue& e = task.e;
  const int64_t pre = row * (task.gated ? 2 * task.cols : task.cols) + col;
  add_bias_and_round<T>(task, col, count, v);
  if (e.pre != nullptr) store_some<T>(e.pre, pre, task.vectors, count, v);
  if (task.gated) {
    add_bias_and_round<T>(task, task.cols + col, count, up);
    if (e.pre != nullptr) store_some<T>(e.pre, pre + task.cols, task.vectors, count, up);
  }
  with_activation(e.activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] = decltype(act)::value(v[j]);
  });
  if (task.gated) {
#pragma unroll
    for (int j = 0; j < kVector; j++) v[j] *= up[j];
  }
  store_some<T>(e.out, row * task.cols + col, task.vectors, count, v);
}

// pre's eight columns, and of a gated activation the eight that they gate.
template <class T>
struct PreActivation {
  Vector<T> h, up;
};

template <class T>
FASTLM_DEVICE PreActivation<T> load_pre(const EpilogueTask& task, int64_t row, int64_t col, int count) {
  PreActivation<T> r = {};
  const int64_t at = row * (task.gated ? 2 * task.cols : task.cols) + col;
  r.h = load_some<T>(task.e.pre, at, task.vectors, count);
  if (task.gated) r.up = load_some<T>(task.e.pre, at + task.cols, task.vectors, count);
  return r;
}

// sums[0] += the gradient of h, sums[1] += that of up.
template <class T>
FASTLM_DEVICE void finish_activate_backward(const EpilogueTask& task, int64_t row, int64_t col, int count,
                                            const PreActivation<T>& pre, float (&v)[kVector], float (&sums)[2][kVector]) {
  const Epilogue& e = task.e;
  const int64_t at = row * (task.gated ? 2 * task.cols : task.cols) + col;
  float h[kVector], value[kVector], dup[kVector];
  to_floats(pre.h, h);
  with_activation(e.activation, [&](auto act) {
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      const ValueSlope s = decltype(act)::both(h[j]);
      value[j] = s.value;
      dup[j] = v[j] * s.value;
      v[j] *= s.slope;
    }
  });
  if (task.gated) {
    float up[kVector];
    to_floats(pre.up, up);
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      value[j] *= up[j];
      v[j] *= up[j];
      sums[1][j] += dup[j];
    }
    store_some<T>(e.out, at + task.cols, task.vectors, count, dup);
  }
#pragma unroll
  for (int j = 0; j < kVector; j++) sums[0][j] += v[j];
  store_some<T>(e.out, at, task.vectors, count, v);
  if (e.hidden != nullptr) store_some<T>(e.hidden, row * task.cols + col, task.vectors, count, value);
}

// The sums over the block's threads that have the same columns, in the order of their rows.
FASTLM_DEVICE void store_column_sums(const EpilogueTask& task, int64_t tile, int64_t col0, int width,
                                     const float (&sums)[2][kVector], float* scratch) {
  const int vectors = width / kVector, groups = kGemmThreads / vectors;
  float* mine = scratch + threadIdx.x / vectors * 2 * width + threadIdx.x % vectors * kVector;
#pragma unroll
  for (int j = 0; j < kVector; j++) {
    mine[j] = sums[0][j];
    mine[width + j] = sums[1][j];
  }
  __syncthreads();
  const int64_t pre_cols = task.gated ? 2 * task.cols : task.cols;
  for (int i = threadIdx.x; i < (task.gated ? 2 : 1) * width; i += kGemmThreads) {
    float sum = 0.0f;
    for (int g = 0; g < groups; g++) sum += scratch[g * 2 * width + i];
    const int64_t col = col0 + i % width;
    if (col < task.cols) task.column_sums[tile * pre_cols + i / width * task.cols + col] = sum;
  }
}

constexpr int kColumnSumsBytes = 2 * kGemmThreads * kVector * static_cast<int>(sizeof(float));

// A thread's part of some rows: eight columns from `column` on of the rows `first`, first + step and so on below `end`.
struct Share {
  int column, first, step, end;
};

// Row row0 + r and column col0 + c of the product are r and c of the share. load(r, c, v, up) gives c's eight columns from c
// on, of row r, and those of the second half of pre where a gated activation is to be made. Added to `sums`: the columns of
// dpre, of each half.
template <class T, bool kActivations, class Load>
FASTLM_DEVICE void finish_rows(const EpilogueTask& task, const Share& share, int64_t row0, int64_t col0, Load load,
                               float (&sums)[2][kVector]) {
  const int c = share.column, step = share.step;
  const int64_t col = col0 + c;
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{kVector}, task.cols - col)));
  const int end = count == 0 ? 0 : static_cast<int>(min(int64_t{share.end}, task.m - row0));
  int r = share.first;
  float v[kVector], up[kVector];
  if (!kActivations || task.e.kind == EpilogueKind::store) {
#pragma unroll 1
    for (; r < end; r += step) {
      load(r, c, v, up);
      finish_store<T>(task, row0 + r, col, count, v);
    }
    return;
  }
  if constexpr (kActivations) {
    if (task.e.kind == EpilogueKind::activate) {
#pragma unroll 1
      for (; r < end; r += step) {
        load(r, c, v, up);
        finish_activate<T>(task, row0 + r, col, count, v, up);
      }
      return;
    }
    PreActivation<T> next = {};
    if (r < end) next = load_pre<T>(task, row0 + r, col, count);
#pragma unroll 1
    for (; r < end; r += step) {  // the next row's pre is on its way while this one's is worked on
      const PreActivation<T> pre = next;
      if (r + step < end) next = load_pre<T>(task, row0 + r + step, col, count);
      load(r, c, v, up);
      finish_activate_backward<T>(task, row0 + r, col, count, pre, v, sums);
    }
  }
}

// A tile of `width` columns (a multiple of eight) by a block of kGemmThreads. `tile`: its number among the tiles of rows.
// `scratch`: kColumnSumsBytes of shared memory, which may be what load reads.
template <class T, bool kActivations, class Load>
FASTLM_DEVICE void finish_tile(const EpilogueTask& task, int64_t tile, int64_t row0, int rows, int64_t col0, int width,
                               Load load, float* scratch) {
  float sums[2][kVector] = {};
  const int vectors = width / kVector, thread = threadIdx.x;
  const Share share{thread % vectors * kVector, thread / vectors, kGemmThreads / vectors, rows};
  finish_rows<T, kActivations>(task, share, row0, col0, load, sums);
  if (!kActivations || task.column_sums == nullptr) return;
  __syncthreads();
  store_column_sums(task, tile, col0, width, sums, scratch);
}

}  // namespace fastlm::cuda
