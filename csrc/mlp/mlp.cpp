// mlp.h on the CPU: one pass over memory forward and one backward.
#include "mlp/mlp.h"

#include <algorithm>

#include "common/error.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"
#include "mlp/activation.h"

namespace fastlm::FASTLM_ISA {
namespace {

// pre + bias, stored where there is a bias; as rounded.
template <class At, class T>
inline Vec add_bias(At at, T* pre, const T* bias) {
  if (bias == nullptr) return at.load(pre);
  at.store(pre, at.load(pre) + at.load(bias));
  return at.load(pre);
}

template <class Act, class T>
void forward_rows(const ActivationForward& p, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t cols = p.cols;
  for (int64_t row = begin; row < end; ++row) {
    T* hidden = static_cast<T*>(p.hidden) + row * cols;
    if (!is_gated(p.activation)) {
      T* pre = static_cast<T*>(p.pre) + row * cols;
      over_row(cols, [&](auto at, int64_t i, int) {
        fetch_ahead_to_write(pre + i);
        fetch_ahead_to_write(hidden + i);
        at.store(hidden + i, Act::value(add_bias(at, pre + i, bias ? bias + i : nullptr)));
      });
    } else {
      T* gate = static_cast<T*>(p.pre) + row * 2 * cols;
      T* up = gate + cols;
      over_row(cols, [&](auto at, int64_t i, int) {
        fetch_ahead_to_write(gate + i);
        fetch_ahead_to_write(up + i);
        fetch_ahead_to_write(hidden + i);
        const Vec g = add_bias(at, gate + i, bias ? bias + i : nullptr);
        const Vec u = add_bias(at, up + i, bias ? bias + cols + i : nullptr);
        at.store(hidden + i, Act::value(g) * u);
      });
    }
  }
}

// Rows begin .. end-1; their sums are added to `sums` (null: not wanted).
template <class Act, class T>
void backward_rows(const ActivationBackward& p, int64_t begin, int64_t end, float* sums) {
  const int64_t cols = p.cols;
  const auto finish = [&](auto at, T* dpre, Vec d, int64_t column) {
    at.store(dpre, d);
    if (sums != nullptr) at.store(sums + column, at.load(sums + column) + d);
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* dhidden = static_cast<const T*>(p.dhidden) + row * cols;
    T* hidden = p.hidden ? static_cast<T*>(p.hidden) + row * cols : nullptr;
    if (!is_gated(p.activation)) {
      const T* pre = static_cast<const T*>(p.pre) + row * cols;
      T* dpre = static_cast<T*>(p.dpre) + row * cols;
      over_row(cols, [&](auto at, int64_t i, int) {
        fetch_ahead(pre + i);
        fetch_ahead(dhidden + i);
        fetch_ahead_to_write(dpre + i);
        if (hidden != nullptr) fetch_ahead_to_write(hidden + i);
        const ValueSlope a = Act::both(at.load(pre + i));
        const Vec d = at.load(dhidden + i) * a.slope;
        if (hidden != nullptr) at.store(hidden + i, a.value);
        finish(at, dpre + i, d, i);
      });
    } else {
      const T* gate = static_cast<const T*>(p.pre) + row * 2 * cols;
      const T* up = gate + cols;
      T* dgate = static_cast<T*>(p.dpre) + row * 2 * cols;
      over_row(cols, [&](auto at, int64_t i, int) {
        fetch_ahead(gate + i);
        fetch_ahead(up + i);
        fetch_ahead(dhidden + i);
        fetch_ahead_to_write(dgate + i);
        fetch_ahead_to_write(dgate + cols + i);
        if (hidden != nullptr) fetch_ahead_to_write(hidden + i);
        const ValueSlope a = Act::both(at.load(gate + i));
        const Vec d = at.load(dhidden + i), u = at.load(up + i);
        if (hidden != nullptr) at.store(hidden + i, a.value * u);
        finish(at, dgate + i, d * u * a.slope, i);
        finish(at, dgate + cols + i, d * a.value, cols + i);
      });
    }
  }
}

}  // namespace

void activation_forward_cpu(const ActivationForward& p) {
  check(p.rows >= 0 && p.cols >= 0, "mlp: wanted rows >= 0 and cols >= 0");
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.cols));
  with_activation(p.activation, [&](auto act) {
    with_type(p.type, [&](auto t) {
      parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
        forward_rows<decltype(act), decltype(t)>(p, begin, end);
      });
    });
  });
}

void activation_backward_cpu(const ActivationBackward& p) {
  check(p.rows >= 0 && p.cols >= 0, "mlp backward: wanted rows >= 0 and cols >= 0");
  check((p.dbias == nullptr) == (p.workspace == nullptr), "mlp backward: dbias and workspace come together, got one");
  const int64_t pre_cols = is_gated(p.activation) ? 2 * p.cols : p.cols;
  const int64_t size = chunk_rows(p.rows, std::max<int64_t>(1, pre_cols));
  const int64_t chunks = chunk_count(p.rows, std::max<int64_t>(1, pre_cols));
  with_activation(p.activation, [&](auto act) {
    with_type(p.type, [&](auto t) {
      parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          float* sums = p.workspace ? p.workspace + c * pre_cols : nullptr;
          if (sums != nullptr) std::fill(sums, sums + pre_cols, 0.0f);
          backward_rows<decltype(act), decltype(t)>(p, c * size, std::min(p.rows, (c + 1) * size), sums);
        }
      });
    });
  });
  if (p.dbias == nullptr) return;
  with_type(p.dbias_type, [&](auto t) {
    parallel_for(pre_cols, 1 + kGrain / (chunks + 1), [&](int64_t begin, int64_t end) {
      add_chunks(p.workspace, chunks, pre_cols, begin, end, static_cast<decltype(t)*>(p.dbias));
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(activation_forward_cpu, (const ActivationForward& p), (p))
FASTLM_DISPATCH(activation_backward_cpu, (const ActivationBackward& p), (p))

#if defined(FASTLM_ISA_IS_BASELINE)
int64_t fastlm::activation_backward_workspace_cpu(int64_t rows, int64_t pre_cols) {
  return pre_cols * fastlm::FASTLM_ISA::chunk_count(rows, std::max<int64_t>(1, pre_cols));
}
#endif
