#include "gpt/decode.h"

#include <cstring>

#include "attention/attention.h"
#include "common/error.h"
#include "layer_norm/layer_norm.h"
#include "linear/skinny.h"
#include "rotary/rotary.h"

namespace fastlm {
namespace {

// What lives between two kernels, one buffer a name.
struct Buffers {
  explicit Buffers(const Decode& p)
      : element(size_of(p.type)),
        qkv_width((p.heads + 2 * p.kv_heads) * p.head_dim),
        fc_width(is_gated(p.activation) ? 2 * p.mlp_size : p.mlp_size),
        normed(p.rows * p.width * element),
        branch(p.rows * p.width * element),
        qkv(p.rows * qkv_width * element),
        attended(p.rows * p.heads * p.head_dim * element),
        pre(p.rows * fc_width * element),
        hidden(p.rows * p.mlp_size * element),
        statistics(2 * p.rows),
        lse(p.rows * p.heads) {}
  int64_t element, qkv_width, fc_width;
  std::vector<char> normed, branch, qkv, attended, pre, hidden;
  std::vector<float> statistics, lse;
};

// y = norm(h), h += branch first where there is one.
void norm(const Decode& p, Buffers& b, const DecodeNorm& weights, bool add_branch, void* y) {
  float* const mean = b.statistics.data();
  layer_norm_forward_cpu({add_branch ? b.branch.data() : p.h, add_branch ? p.h : nullptr, weights.weight, weights.bias, y,
                          add_branch ? p.h : nullptr, p.rms ? nullptr : mean, mean + p.rows, p.rows, p.width, p.width,
                          p.width, p.eps, p.rms, p.type, p.type, p.type});
}

void linear(const Decode& p, const void* x, int64_t depth, const DecodeLinear& weights, int64_t width, void* y) {
  skinny_linear_cpu({x, weights.weight, weights.bias, y, p.rows, width, depth, depth, depth, p.type});
}

// RMS norm over each of `heads` heads of every row, in place. `first`: the first of them in a row of the projection.
void norm_heads(const Decode& p, Buffers& b, const void* weight, int64_t first, int64_t heads) {
  if (weight == nullptr) return;
  for (int64_t row = 0; row < p.rows; ++row) {
    char* const x = b.qkv.data() + (row * b.qkv_width + first * p.head_dim) * b.element;
    layer_norm_forward_cpu({x, nullptr, weight, nullptr, x, nullptr, nullptr, nullptr, heads, p.head_dim, p.head_dim,
                            p.head_dim, p.eps, true, p.type, p.type, p.type});
  }
}

void rotate(const Decode& p, Buffers& b) {
  const int64_t queries = p.heads * p.head_dim, pairs = p.head_dim / 2;
  char* const k = b.qkv.data() + queries * b.element;
  const auto part = [&](char* x, int64_t heads) {
    return RotaryTensor{x, x, b.qkv_width, b.qkv_width, p.head_dim, b.qkv_width, b.qkv_width, p.head_dim, heads};
  };
  Rotary r{};
  r.tensors[0] = part(b.qkv.data(), p.heads);
  r.tensors[1] = part(k, p.kv_heads);
  r.cos = p.cos;
  r.sin = p.sin;
  r.table_rows = 1;
  r.table_batch = p.table_of_each_row ? pairs : 0;
  r.batch = p.rows;
  r.rows = 1;
  r.width = p.head_dim;
  r.pairs = pairs;
  r.type = p.type;
  rotary_cpu(r);
}

// Appends the group's new keys and values to its cache, and attends. `first`: the group's first row in the batch.
void attention(const Decode& p, Buffers& b, const DecodeGroup& group, int64_t layer, int64_t first) {
  const int64_t kv_width = p.kv_heads * p.head_dim, query_width = p.heads * p.head_dim;
  char* const qkv = b.qkv.data() + first * b.qkv_width * b.element;
  for (int64_t row = 0; row < group.rows; ++row) {
    const char* const k = qkv + (row * b.qkv_width + query_width) * b.element;
    const int64_t at = (row * group.capacity + group.length) * kv_width * b.element;
    std::memcpy(static_cast<char*>(group.keys[layer]) + at, k, kv_width * b.element);
    std::memcpy(static_cast<char*>(group.values[layer]) + at, k + kv_width * b.element, kv_width * b.element);
  }
  AttentionInputs a{};
  a.q = qkv;
  a.k = group.keys[layer];
  a.v = group.values[layer];
  a.q_strides = {b.qkv_width, b.qkv_width, p.head_dim};
  a.k_strides = a.v_strides = {group.capacity * kv_width, kv_width, p.head_dim};
  a.alibi_slopes = p.alibi_slopes;
  a.batch = group.rows;
  a.rows = 1;
  a.columns = group.length + 1;
  a.heads = p.heads;
  a.kv_heads = p.kv_heads;
  a.width = p.head_dim;
  a.window_left = p.window_left;
  a.window_right = 0;
  a.scale = p.scale;
  a.softcap = p.softcap;
  a.dropout_scale = 1.0f;
  a.type = p.type;
  attention_forward_cpu(a, b.attended.data() + first * query_width * b.element, b.lse.data() + first * p.heads);
}

}  // namespace

void decode_cpu(const Decode& p) {
  int64_t rows = 0;
  for (int64_t g = 0; g < p.group_count; ++g) {
    check(p.groups[g].length < p.groups[g].capacity, "decode: wanted room for one token more in the cache");
    rows += p.groups[g].rows;
  }
  check(rows == p.rows && rows <= kSkinnyRows, "decode: wanted as many rows as in the caches, and at most 16");
  if (rows == 0) return;
  Buffers b(p);
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const DecodeBlock& block = p.blocks[layer];
    norm(p, b, block.norm_1, layer > 0, b.normed.data());
    linear(p, b.normed.data(), p.width, block.qkv, b.qkv_width, b.qkv.data());
    norm_heads(p, b, block.q_norm, 0, p.heads);
    norm_heads(p, b, block.k_norm, p.heads, p.kv_heads);
    if (p.cos != nullptr) rotate(p, b);
    int64_t first = 0;
    for (int64_t g = 0; g < p.group_count; ++g) {
      attention(p, b, p.groups[g], layer, first);
      first += p.groups[g].rows;
    }
    linear(p, b.attended.data(), p.heads * p.head_dim, block.proj, p.width, b.branch.data());
    norm(p, b, block.norm_2, true, b.normed.data());
    linear(p, b.normed.data(), p.width, block.fc, b.fc_width, b.pre.data());
    activation_forward_cpu({b.pre.data(), nullptr, b.hidden.data(), p.rows, p.mlp_size, p.activation, p.type});
    linear(p, b.hidden.data(), p.mlp_size, block.mlp_proj, p.width, b.branch.data());
  }
  norm(p, b, p.norm, p.layers > 0, p.out);
}

}  // namespace fastlm
