// lstm.h on the CPU.
#include "lstm/lstm.h"

#include <algorithm>

#include "common/error.h"
#include "common/parallel.h"
#include "common/simd_math.h"
#include "common/small_product.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kGates = 4;
// Units of a block, forward: a register of each gate. Backward: two registers, so that a small layer still has blocks for
// every thread.
constexpr int64_t kUnits = Vec::size, kPanel = 2 * Vec::size;
// A thread gets at least this many multiplications of a step: below, waking it costs more.
constexpr int64_t kStepGrain = 1 << 18;

int64_t blocks_of(int64_t hidden, int64_t units) { return (hidden + units - 1) / units; }
int64_t grain(int64_t multiplications_of_a_block) {
  return std::max<int64_t>(1, kStepGrain / std::max<int64_t>(1, multiplications_of_a_block));
}

// Calls body(access, i) for the vectors of n columns, n at most a block.
template <class Body>
inline void over_units(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) body(Whole{}, i);
  if (i < n) body(Rest{n - i}, i);
}

// Block u of W as product() reads it: row k has, for each gate, the weights from unit k to the block's units; zero past the end.
void pack_forward(const float* weight, int64_t hidden, int64_t u, float* packed) {
  const int64_t first = u * kUnits, units = std::min(kUnits, hidden - first);
  for (int64_t k = 0; k < hidden; ++k) {
    for (int64_t gate = 0; gate < kGates; ++gate) {
      float* out = packed + (k * kGates + gate) * kUnits;
      for (int64_t i = 0; i < kUnits; ++i) out[i] = i < units ? weight[(gate * hidden + first + i) * hidden + k] : 0.0f;
    }
  }
}

// The pass over one block of a step: `product` has W h_{t-1}, (B, 4 kUnits), or is null.
void forward_units(const LstmForward& p, int64_t t, int64_t first, const float* product) {
  const int64_t hidden = p.hidden, units = std::min(kUnits, hidden - first);
  over_units(units, [&](auto at, int64_t i) {
    const int64_t unit = first + i;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.steps + t;
      Vec z[kGates];
      for (int64_t gate = 0; gate < kGates; ++gate) {
        z[gate] = at.load(p.gates + row * kGates * hidden + gate * hidden + unit);
        if (product != nullptr) z[gate] += load(product + (b * kGates + gate) * kUnits);
      }
      const Vec in = logistic(z[0]), forget = logistic(z[1]), cell = tanh(z[2]), out = logistic(z[3]);
      const float* before = t == 0 ? p.c0 + b * hidden : p.c + (row - 1) * hidden;
      const Vec c = fma(forget, at.load(before + unit), in * cell);
      float* activations = p.activations + row * kGates * hidden + unit;
      at.store(activations, in);
      at.store(activations + hidden, forget);
      at.store(activations + 2 * hidden, cell);
      at.store(activations + 3 * hidden, out);
      at.store(p.c + row * hidden + unit, c);
      at.store(p.y + row * hidden + unit, out * tanh(c));
    }
  });
}

// Panel v of W as product() reads it: row j (a unit of a gate) has the weights to it from the panel's units.
void pack_backward(const float* weight, int64_t hidden, int64_t v, float* packed) {
  const int64_t first = v * kPanel, units = std::min(kPanel, hidden - first);
  for (int64_t j = 0; j < kGates * hidden; ++j) {
    for (int64_t i = 0; i < kPanel; ++i) packed[j * kPanel + i] = i < units ? weight[j * hidden + first + i] : 0.0f;
  }
}

// The pass over one panel of a step backward: `dh` has W^T dgates_{t+1}, (B, kPanel), or is null at the last step. The
// gradient of the cell lies in dc0 on its way through the steps.
void backward_units(const LstmBackward& p, int64_t t, int64_t first, const float* dh) {
  const int64_t hidden = p.hidden, units = std::min(kPanel, hidden - first);
  const Vec one = set1(1.0f);
  over_units(units, [&](auto at, int64_t i) {
    const int64_t unit = first + i;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = b * p.steps + t;
      const float* activations = p.activations + row * kGates * hidden + unit;
      const Vec in = at.load(activations), forget = at.load(activations + hidden);
      const Vec cell = at.load(activations + 2 * hidden), out = at.load(activations + 3 * hidden);
      const Vec squashed = tanh(at.load(p.c + row * hidden + unit));
      const Vec before = at.load((t == 0 ? p.c0 + b * hidden : p.c + (row - 1) * hidden) + unit);
      Vec d = at.load(p.dy + row * hidden + unit);
      if (dh != nullptr) d += load(dh + b * kPanel + i);
      float* dc_of_row = p.dc0 + b * hidden + unit;
      const Vec dc = at.load(dc_of_row) + d * out * (one - squashed * squashed);
      float* dgates = p.dgates + row * kGates * hidden + unit;
      at.store(dgates, dc * cell * in * (one - in));
      at.store(dgates + hidden, dc * before * forget * (one - forget));
      at.store(dgates + 2 * hidden, dc * in * (one - cell * cell));
      at.store(dgates + 3 * hidden, d * squashed * out * (one - out));
      at.store(dc_of_row, dc * forget);
    }
  });
}

}  // namespace

void lstm_forward_workspace(int64_t batch, int64_t hidden, int64_t* floats) {
  *floats = blocks_of(hidden, kUnits) * kGates * kUnits * (hidden + batch);
}

void lstm_backward_workspace(int64_t batch, int64_t hidden, int64_t* floats) {
  *floats = blocks_of(hidden, kPanel) * kPanel * (kGates * hidden + batch);
}

void lstm_forward_cpu(const LstmForward& p) {
  check(p.batch >= 0 && p.steps >= 1 && p.hidden >= 1, "lstm: wanted B >= 0, T >= 1 and H >= 1");
  check(p.weight != nullptr || p.steps == 1, "lstm: without a weight there is one step");
  const int64_t blocks = blocks_of(p.hidden, kUnits), width = kGates * kUnits;
  float *const packed = p.workspace, *const products = p.workspace + blocks * p.hidden * width;
  if (p.weight != nullptr) {
    parallel_for(blocks, grain(p.hidden * width), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) pack_forward(p.weight, p.hidden, u, packed + u * p.hidden * width);
    });
  }
  for (int64_t t = 0; t < p.steps; ++t) {
    const float* h = t == 0 ? p.h0 : p.y + (t - 1) * p.hidden;
    const int64_t h_stride = t == 0 ? p.hidden : p.steps * p.hidden;
    parallel_for(blocks, grain(p.batch * p.hidden * width), [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        float* z = p.weight == nullptr ? nullptr : products + u * p.batch * width;
        if (z != nullptr) {
          product<Layout::rows>(p.batch, width, p.hidden, h, h_stride, packed + u * p.hidden * width, width, z, width,
                                false);
        }
        forward_units(p, t, u * kUnits, z);
      }
    });
  }
}

void lstm_backward_cpu(const LstmBackward& p) {
  check(p.batch >= 0 && p.steps >= 1 && p.hidden >= 1, "lstm backward: wanted B >= 0, T >= 1 and H >= 1");
  const int64_t hidden = p.hidden, rows = kGates * hidden, panels = blocks_of(hidden, kPanel);
  float *const packed = p.workspace, *const products = p.workspace + panels * rows * kPanel;
  parallel_for(panels, grain(rows * kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) pack_backward(p.weight, hidden, v, packed + v * rows * kPanel);
  });
  if (p.dc_last == nullptr) {
    std::fill(p.dc0, p.dc0 + p.batch * hidden, 0.0f);
  } else {
    std::copy(p.dc_last, p.dc_last + p.batch * hidden, p.dc0);
  }
  // Step t multiplies the gradients of the gates at t + 1; step -1 gives dh0.
  for (int64_t t = p.steps - 1; t >= -1; --t) {
    parallel_for(panels, grain(p.batch * rows * kPanel), [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        float* dh = t == p.steps - 1 ? nullptr : products + v * p.batch * kPanel;
        if (dh != nullptr) {
          product<Layout::rows>(p.batch, kPanel, rows, p.dgates + (t + 1) * rows, p.steps * rows,
                                packed + v * rows * kPanel, kPanel, dh, kPanel, false);
        }
        if (t >= 0) {
          backward_units(p, t, v * kPanel, dh);
          continue;
        }
        const int64_t first = v * kPanel, units = std::min(kPanel, hidden - first);
        for (int64_t b = 0; b < p.batch; ++b) {
          std::copy(dh + b * kPanel, dh + b * kPanel + units, p.dh0 + b * hidden + first);
        }
      }
    });
  }
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(lstm_forward_cpu, (const LstmForward& p), (p))
FASTLM_DISPATCH(lstm_backward_cpu, (const LstmBackward& p), (p))
FASTLM_DISPATCH(lstm_forward_workspace, (int64_t batch, int64_t hidden, int64_t* floats), (batch, hidden, floats))
FASTLM_DISPATCH(lstm_backward_workspace, (int64_t batch, int64_t hidden, int64_t* floats), (batch, hidden, floats))

#if defined(FASTLM_ISA_IS_BASELINE)
int64_t fastlm::lstm_forward_workspace_cpu(int64_t batch, int64_t hidden) {
  int64_t floats = 0;
  lstm_forward_workspace(batch, hidden, &floats);
  return floats;
}
int64_t fastlm::lstm_backward_workspace_cpu(int64_t batch, int64_t hidden) {
  int64_t floats = 0;
  lstm_backward_workspace(batch, hidden, &floats);
  return floats;
}
#endif
