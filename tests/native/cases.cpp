// The CPU kernels on sizes that bring out their edges: a program for sanitizers, emulated processors and instructions.
//
//   cases small [FILE]  small odd sizes; every buffer has exactly its size
//   cases large [FILE]  sizes at which each op shares its work out among threads, which is checked (with threads.cpp)
//
// Every result must be finite; FILE gets them all, to be compared with another build's. What the results should be is the
// business of the ops' own tests.
#include "cases.h"

#include <cstdio>

#include "attention/attention.h"
#include "common/parallel.h"
#include "cross_entropy/cross_entropy.h"
#include "decode_attention/decode_attention.h"
#include "embedding/embedding.h"
#include "gpt/decode.h"
#include "layer_norm/layer_norm.h"
#include "linear/column_sums.h"
#include "linear/narrow.h"
#include "linear/packed.h"
#include "linear/skinny.h"
#include "lstm/lstm.h"
#include "mlp/mlp.h"
#include "optimizer/adamw.h"
#include "optimizer/grad_norm.h"
#include "rotary/rotary.h"
#include "sampling/sample.h"
#include "sanitize_values.h"

// How many loops have run on several threads so far; threads.cpp counts.
__attribute__((weak)) long shared_loops();

namespace {

using namespace fastlm;

constexpr DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;

std::FILE* file = nullptr;

// For each result a line "name type elements", and the elements as float32.
void record(const std::string& name, std::initializer_list<const Tensor*> results) {
  static const char* const types[] = {"f32", "f16", "bf16"};
  for (const Tensor* t : results) {
    std::vector<float> values;
    for (int64_t i = 0; i < t->numel; i++) {
      values.push_back((*t)[i]);
      if (!std::isfinite(values.back())) throw std::runtime_error(name + ": element " + std::to_string(i) + " is not finite");
    }
    if (file == nullptr) continue;
    std::fprintf(file, "%s %s %lld\n", name.c_str(), types[static_cast<int>(t->type)], static_cast<long long>(t->numel));
    std::fwrite(values.data(), sizeof(float), values.size(), file);
  }
}

void layer_norm(int64_t rows, int64_t cols, DType x, DType h, DType w, bool rms, bool residual) {
  const int64_t n = rows * cols;
  Tensor in(n, x, 1), add(n, h, 2), weight(cols, w, 3), bias(cols, w, 4), y(n, x), sum(n, h), mean(rows, f32), rstd(rows, f32);
  float* const means = rms ? nullptr : mean.floats();
  layer_norm_forward_cpu({in.data, residual ? add.data : nullptr, weight.data, rms ? nullptr : bias.data, y.data,
                          residual ? sum.data : nullptr, means, rstd.floats(), rows, cols, cols, cols, 1e-5f, rms, x, h, w});
  Tensor dx(n, x), dr(n, h), dw(cols, w), db(cols, w), workspace(layer_norm_backward_workspace_cpu(rows, cols), f32);
  layer_norm_backward_cpu({y.data, residual ? add.data : nullptr, residual ? sum.data : in.data, weight.data, means, rstd.floats(),
                           dx.data, residual ? dr.data : nullptr, dw.data, rms ? nullptr : db.data, workspace.floats(), rows, cols,
                           cols, cols, cols, rms, x, residual ? h : x, w});
  record("layer_norm", {&y, &sum, &rstd, &dx, &dr, &dw, &db});
}

struct Options {
  bool causal = false, dropout = false, alibi = false, packed = false;
  int64_t left = -1;
  float softcap = 0.0f;
};

void attention(DType type, int64_t rows, int64_t columns, int64_t heads, int64_t kv_heads, int64_t width, const Options& o) {
  const int64_t queries = rows * heads * width, keys = columns * kv_heads * width, state[] = {3, 5};
  const int32_t cu_seqlens[] = {0, 3, 3, static_cast<int32_t>(rows)};
  const float slopes[] = {0.5f, 0.25f};
  Tensor q(queries, type, 1), k(keys, type, 2), v(keys, type, 3), out(queries, type), dout(queries, type, 4);
  Tensor dq(queries, type), dk(keys, type), dv(keys, type), lse(heads * rows, f32), dlse(heads * rows, f32, 5);
  AttentionInputs p{};
  p.q = q.data, p.k = k.data, p.v = v.data;
  p.q_strides = {queries, heads * width, width};
  p.k_strides = p.v_strides = {keys, kv_heads * width, width};
  p.alibi_slopes = o.alibi ? slopes : nullptr;
  p.cu_seqlens = o.packed ? cu_seqlens : nullptr;
  p.sequences = o.packed ? 3 : 0;
  p.rng_state = o.dropout ? state : nullptr;
  p.dropout_threshold = 1u << 30;
  p.dropout_scale = 4.0f / 3.0f;
  p.batch = 1, p.rows = rows, p.columns = columns, p.heads = heads, p.kv_heads = kv_heads, p.width = width;
  p.window_left = o.left, p.window_right = o.causal ? 0 : -1, p.max_seqlen = rows;
  p.scale = 0.25f, p.softcap = o.softcap, p.type = type;
  attention_forward_cpu(p, out.data, lse.floats());
  attention_backward_cpu(p, {out.data, lse.floats(), dout.data, p.q_strides, dlse.floats(), dq.data, dk.data, dv.data,
                             heads * width, kv_heads * width});
  record("attention", {&out, &lse, &dq, &dk, &dv});
}

void decode_attention(DType type, int64_t rows, int64_t width, int64_t page, int64_t capacity = 150) {
  const int64_t batch = 2, heads = 2, pages = page == 0 ? 0 : batch * capacity / page;
  const int32_t lengths[] = {static_cast<int32_t>(capacity), 3};
  std::vector<int32_t> table;
  for (int64_t i = 0; i < pages; i++) table.push_back(static_cast<int32_t>(pages - 1 - i));
  Tensor q(batch * rows * heads * width, type, 1), out(q.numel, type), k(batch * capacity * width, type, 2), v(k.numel, type, 3);
  Tensor workspace(decode_attention_workspace(batch, rows, heads, width, capacity), f32);
  DecodeAttention p{};
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data, p.workspace = workspace.floats();
  p.k_strides[0] = p.v_strides[0] = (page == 0 ? capacity : page) * width;
  p.k_strides[1] = p.v_strides[1] = p.k_strides[2] = p.v_strides[2] = width;
  p.lengths = lengths, p.table = page == 0 ? nullptr : table.data();
  p.batch = batch, p.rows = rows, p.heads = heads, p.kv_heads = 1, p.width = width, p.capacity = capacity;
  p.pages = pages, p.page = page, p.table_width = page == 0 ? 0 : capacity / page;
  p.window = -1, p.scale = 0.25f, p.type = type;
  decode_attention_cpu(p);
  record("decode_attention", {&out});
}

void activation(int64_t rows, int64_t cols, Activation a, DType type) {
  const int64_t wide = is_gated(a) ? 2 * cols : cols;
  Tensor pre(rows * wide, type, 1), bias(wide, type, 2), hidden(rows * cols, type), again(rows * cols, type);
  Tensor dhidden(rows * cols, type, 3), dpre(rows * wide, type), dbias(wide, type);
  Tensor workspace(activation_backward_workspace_cpu(rows, wide), f32);
  activation_forward_cpu({pre.data, bias.data, hidden.data, rows, cols, a, type});
  activation_backward_cpu({pre.data, dhidden.data, dpre.data, again.data, dbias.data, workspace.floats(), rows, cols, a, type, type});
  record("activation", {&pre, &hidden, &again, &dpre, &dbias});
}

void cross_entropy(int64_t rows, int64_t cols, float softcap, DType type) {
  Tensor logits(rows * cols, type, 1), loss(rows, f32), lse(rows, f32);
  std::vector<int64_t> targets;
  for (int64_t row = 0; row < rows; row++) targets.push_back(row % 2 == 0 ? cols - 1 : 0);
  cross_entropy_block_cpu({logits.data, targets.data(), loss.floats(), lse.floats(), nullptr, rows, cols, 0.1f, 0.01f, softcap, 0.5f,
                           true, type});
  record("cross_entropy", {&logits, &loss, &lse});
}

// A tensor of some odd length and one of another type.
void optimizer(int64_t numel, DType p_type, DType g_type, bool amsgrad) {
  Tensor param(numel, p_type, 1), grad(numel, g_type, 2), m(numel, f32, 3), v(numel, f32), largest(numel, f32), shadow(numel, bf16);
  Tensor other(3, f32, 1), other_grad(3, bf16, 2), other_m(3, f32, 3), other_v(3, f32);
  for (int64_t i = 0; i < numel; i++) v.set(i, 0.5f), largest.set(i, 0.25f);
  for (int64_t i = 0; i < 3; i++) other_v.set(i, 0.5f);
  const AdamWTensor tensors[] = {{param.data, grad.data, m.floats(), v.floats(), amsgrad ? largest.floats() : nullptr, shadow.data,
                                  numel, p_type, g_type},
                                 {other.data, other_grad.data, other_m.floats(), other_v.floats(), nullptr, nullptr, 3, f32, bf16}};
  adamw_step_cpu(tensors, 2, {0.1, 0.9, 0.99, 1e-8, 0.1, 3, 0.5f, false});
  const int64_t chunks = (numel + kGradNormChunk - 1) / kGradNormChunk;
  const GradNormTensor table[] = {{grad.data, numel, 0, static_cast<int64_t>(g_type)},
                                  {other_grad.data, 3, chunks, static_cast<int64_t>(bf16)}};
  std::vector<double> sums(static_cast<size_t>(chunks) + 1);
  Tensor norm(1, f32), scale(1, f32);
  grad_norm_cpu(table, 2, chunks + 1, sums.data(), 1.0f, norm.floats(), scale.floats());
  record("optimizer", {&param, &m, &v, &largest, &shadow, &other, &norm, &scale});
}

void column_sums(int64_t rows, int64_t cols, DType type) {
  const int64_t stride = cols + 3;
  Tensor x((rows - 1) * stride + cols, type, 1), sums(cols, f32), workspace(column_sums_workspace_cpu(rows, cols), f32);
  column_sums_cpu({x.data, sums.data, workspace.floats(), rows, cols, stride, type, f32});
  record("column_sums", {&sums});
}

void skinny_linear(int64_t rows, int64_t cols, int64_t depth, DType type) {
  Tensor x(rows * (depth + 3) - 3, type, 1), weight(cols * (depth + 5) - 5, type, 2), bias(cols, type, 3), y(rows * cols, type);
  skinny_linear_cpu({x.data, weight.data, bias.data, y.data, rows, cols, depth, depth + 3, depth + 5, type});
  record("skinny_linear", {&y});
}

void narrow_linear(int64_t rows, int64_t cols, int64_t depth, DType x_type, DType weight_type, DType y_type) {
  Tensor x(rows * (depth + 3) - 3, x_type, 1), weight(cols * (depth + 5) - 5, weight_type, 2), bias(cols, weight_type, 3);
  Tensor y(rows * (cols + 2) - 2, y_type), workspace(narrow_linear_workspace_cpu(rows, depth), f32);
  narrow_linear_cpu({x.data, weight.data, bias.data, y.data, workspace.floats(), rows, cols, depth, depth + 3, depth + 5,
                     cols + 2, x_type, weight_type, y_type});
  record("narrow_linear", {&y});
}

void packed_product(int64_t rows, int64_t cols, int64_t depth, DType a_type, DType b_type, DType out_type) {
  for (int way = 0; way < 4; way++) {
    const bool a_turned = way & 1, b_turned = way & 2, add = way == 3 && out_type == f32;
    const int64_t a_stride = (a_turned ? rows : depth) + 3, b_stride = (b_turned ? depth : cols) + 5;
    Tensor a((a_turned ? depth : rows) * a_stride - 3, a_type, 1), b((b_turned ? cols : depth) * b_stride - 5, b_type, 2);
    Tensor bias(cols, b_type, 3), out(rows * (cols + 2) - 2, out_type, 4);
    packed_product_cpu({{a.data, a_stride, a_turned, a_type}, {b.data, b_stride, b_turned, b_type}, add ? nullptr : bias.data,
                        out.data, rows, cols, depth, cols + 2, out_type, add});
    record("packed_product", {&out});
  }
}

void lstm(int64_t batch, int64_t steps, int64_t hidden) {
  const int64_t one = batch * hidden, all = one * steps;
  Tensor gates(4 * all, f32, 1), h0(one, f32, 2), c0(one, f32, 3), weight(4 * hidden * hidden, f32, 4), y(all, f32), c(all, f32);
  Tensor activations(4 * all, f32), forward(lstm_forward_workspace_cpu(batch, hidden), f32);
  lstm_forward_cpu({gates.floats(), h0.floats(), c0.floats(), weight.floats(), y.floats(), c.floats(), activations.floats(),
                    forward.floats(), batch, steps, hidden});
  Tensor dy(all, f32, 5), dc(one, f32, 6), dgates(4 * all, f32), dh0(one, f32), dc0(one, f32);
  Tensor backward(lstm_backward_workspace_cpu(batch, hidden), f32);
  lstm_backward_cpu({dy.floats(), dc.floats(), c0.floats(), c.floats(), activations.floats(), weight.floats(), dgates.floats(),
                     dh0.floats(), dc0.floats(), backward.floats(), batch, steps, hidden});
  record("lstm", {&y, &c, &activations, &dgates, &dh0, &dc0});
}

void embedding_and_sample(int64_t cols, DType type) {
  const int64_t count = 5, vocabulary = 7, ids[] = {6, 0, 3, 3, 6}, keys[] = {0, 3, 3, 6, 6}, order[] = {1, 2, 3, 0, 4};
  Tensor weight(vocabulary * cols, type, 1), y(count * cols, type), dweight(vocabulary * cols, type);
  embedding_forward_cpu({ids, true, weight.data, y.data, count, vocabulary, cols, cols, type});
  embedding_backward_cpu({y.data, keys, order, dweight.data, nullptr, count, vocabulary, cols, cols, -1, type});
  const int64_t state[] = {3, 5};
  int64_t drawn[7];
  sample_cpu({weight.data, drawn, state, vocabulary, cols, cols, false, 0.8f, cols / 2, 0.9, -4.0f, type});
  for (const int64_t id : drawn) {
    if (id < 0 || id >= cols) throw std::runtime_error("sample: " + std::to_string(id));
  }
  record("embedding", {&y, &dweight});
}

void rotary(int64_t rows, int64_t heads, int64_t width, bool interleaved, DType type) {
  const int64_t row = heads * width, pairs = width / 2;
  Tensor x(rows * row, type, 1), y(rows * row, type), cos(rows * pairs, f32, 2), sin(rows * pairs, f32, 3);
  Rotary p{};
  p.tensors[0] = {x.data, y.data, rows * row, row, width, rows * row, row, width, heads};
  p.cos = cos.floats(), p.sin = sin.floats(), p.table_rows = rows;
  p.batch = 1, p.rows = rows, p.width = width, p.pairs = pairs, p.interleaved = interleaved, p.type = type;
  rotary_cpu(p);
  record("rotary", {&y});
}

// Two layers, two groups of sequences; a head of `width` numbers, which rotary positions turn.
void decode(int64_t width, bool rms, Activation a, DType type) {
  const int64_t heads = 2, c = heads * width, mlp = 2 * c + 1, rows = 3, qkv = (heads + 2) * width, fc = is_gated(a) ? 2 * mlp : mlp;
  Tensor scale(c, type, 1), shift(c, type, 2), w_qkv(qkv * c, type, 3), w_proj(c * c, type, 4), w_fc(fc * c, type, 5);
  Tensor w_out(c * mlp, type, 6), b_qkv(qkv, type, 7), b_fc(fc, type, 8), h(rows * c, type, 9), out(rows * c, type);
  Tensor cos(width / 2, f32, 1), sin(width / 2, f32, 2), k1(2 * 5 * width, type, 1), v1(k1.numel, type, 2), k2(width, type), v2(width, type);
  const DecodeNorm norm{scale.data, rms ? nullptr : shift.data};
  const void *const q_norm = rms ? scale.data : nullptr, *const k_norm = rms ? shift.data : nullptr;
  const DecodeBlock block{norm, {w_qkv.data, b_qkv.data}, q_norm, k_norm, {w_proj.data, nullptr}, norm, {w_fc.data, b_fc.data}, {w_out.data, nullptr}};
  const DecodeBlock blocks[] = {block, block};
  void *const keys_1[] = {k1.data, k1.data}, *const values_1[] = {v1.data, v1.data};
  void *const keys_2[] = {k2.data, k2.data}, *const values_2[] = {v2.data, v2.data};
  const DecodeGroup groups[] = {{2, 4, 5, keys_1, values_1}, {1, 0, 1, keys_2, values_2}};
  Decode p{};
  p.blocks = blocks, p.layers = 2, p.norm = norm, p.groups = groups, p.group_count = 2;
  p.rows = rows, p.width = c, p.heads = heads, p.kv_heads = 1, p.head_dim = width, p.mlp_size = mlp;
  p.rms = rms, p.eps = 1e-5f, p.scale = 0.25f, p.window_left = -1, p.cos = cos.floats(), p.sin = sin.floats();
  p.activation = a, p.type = type, p.h = h.data, p.out = out.data;
  decode_cpu(p);
  record("decode", {&h, &out});
}

// Calls body, which must share its work out where there are threads.
template <class Body>
void shared(const char* name, const Body& body) {
  const long before = shared_loops == nullptr ? 0 : shared_loops();
  body();
  if (max_threads() > 1 && shared_loops() == before) throw std::runtime_error(std::string(name) + " ran on one thread");
}

void small_cases() {
  conversions();
  vector_functions();
  layer_norm(3, 7, f32, f32, f32, false, false);
  layer_norm(9, 67, bf16, f32, f32, true, true);
  layer_norm(2, 129, f16, f16, f16, false, true);
  Options plain, causal, everything, packed;
  causal.causal = true;
  everything.dropout = everything.alibi = true;
  everything.left = 9;
  everything.softcap = 3.0f;
  packed.causal = packed.packed = true;
  attention(f32, 5, 7, 2, 1, 9, plain);
  attention(bf16, 37, 37, 2, 1, 24, causal);
  attention(bf16, 21, 75, 2, 1, 9, plain);
  attention(bf16, 71, 131, 2, 2, 34, everything);
  attention(bf16, 3, 67, 1, 1, 66, causal);
  attention(f16, 21, 41, 2, 2, 40, everything);
  attention(f32, 19, 19, 1, 1, 17, packed);
  attention(f32, 1, 700, 2, 1, 33, causal);
  decode_attention(f32, 2, 9, 0);
  decode_attention(bf16, 1, 40, 15);
  for (const Activation a : {Activation::gelu_tanh, Activation::gelu, Activation::relu, Activation::relu2, Activation::silu,
                             Activation::swiglu, Activation::geglu}) {
    activation(5, 37, a, f32);
    activation(3, 19, a, bf16);
    activation(1, 1, a, f16);
  }
  cross_entropy(3, 301, 0.0f, f32);
  cross_entropy(2, 37, 5.0f, bf16);
  cross_entropy(1, 2, 0.0f, f16);
  optimizer(37, f32, f32, false);
  optimizer(4099, bf16, bf16, true);
  optimizer(5, f16, f32, true);
  column_sums(1, 1, f32);
  column_sums(71, 37, bf16);
  column_sums(131, 67, f16);
  skinny_linear(1, 37, 33, f32);
  skinny_linear(7, 19, 67, bf16);
  skinny_linear(2, 6, 32, bf16);
  skinny_linear(16, 5, 9, f16);
  narrow_linear(1, 1, 1, f32, f32, f32);
  narrow_linear(17, 13, 5, f32, f32, f32);
  narrow_linear(33, 50, 411, f32, f32, f32);
  narrow_linear(19, 49, 33, bf16, bf16, bf16);
  narrow_linear(40, 12, 400, f32, bf16, f32);
  narrow_linear(5, 61, 9, f16, f16, f16);
  packed_product(1, 1, 1, f32, f32, f32);
  packed_product(17, 13, 5, f32, f32, f32);
  packed_product(61, 50, 203, f32, f32, f32);
  packed_product(12, 32, 9, f32, f32, f32);
  packed_product(19, 49, 33, bf16, bf16, bf16);
  packed_product(40, 12, 200, f32, bf16, f32);
  packed_product(5, 61, 9, f16, f16, f16);
  lstm(3, 4, 7);
  lstm(5, 2, 33);
  embedding_and_sample(37, f32);
  embedding_and_sample(9, bf16);
  rotary(5, 3, 10, false, f32);
  rotary(3, 2, 34, true, bf16);
  decode(6, false, Activation::gelu_tanh, f32);
  decode(18, true, Activation::swiglu, bf16);
}

void large_cases() {
  Options causal;
  causal.causal = true;
  for (const DType type : {f32, bf16}) {
    shared("layer_norm", [&] { layer_norm(90, 768, type, type, type, false, true); });
    shared("attention", [&] { attention(type, 150, 150, 4, 4, 32, causal); });
    shared("attention of one head", [&] { attention(type, 330, 330, 1, 1, 32, causal); });
    shared("attention of few rows", [&] { attention(type, 2, 3000, 4, 2, 64, causal); });
    shared("decode_attention", [&] { decode_attention(type, 1, 64, 0, 9000); });
    shared("activation", [&] { activation(70, 1024, Activation::swiglu, type); });
    shared("cross_entropy", [&] { cross_entropy(20, 3001, 0.0f, type); });
    shared("optimizer", [&] { optimizer(200003, type, type, false); });
    shared("column_sums", [&] { column_sums(300, 301, type); });
    shared("skinny_linear", [&] { skinny_linear(4, 301, 768, type); });
    shared("narrow_linear", [&] { narrow_linear(70, 301, 768, type, type, type); });
    shared("packed_product", [&] { packed_product(110, 601, 200, type, type, type); });
    shared("embedding_and_sample", [&] { embedding_and_sample(20011, type); });
    shared("rotary", [&] { rotary(70, 12, 64, false, type); });
    shared("decode", [&] { decode(128, false, Activation::gelu_tanh, type); });
  }
  shared("lstm", [] { lstm(32, 3, 96); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  if (argc > 2) file = std::fopen(argv[2], "wb");
  if ((which != "small" && which != "large") || (argc > 2 && file == nullptr)) {
    std::printf("usage: cases small|large [FILE]\n");
    return 2;
  }
  try {
    which == "small" ? small_cases() : large_cases();
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return file == nullptr ? 0 : std::fclose(file);
}
