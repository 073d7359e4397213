// The Python module fastlm._C: every function that it exports, on one screen.
//
// Tensors come as addresses (0: there is none), element types as the codes of DType, the CUDA stream as an address.
// Shapes, devices and dtypes were checked in Python, where the tensors are; here only what costs nothing.
// Functions named *_torch take the tensors themselves (common/torch_tensor.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "common/build_info.h"
#include "common/cpu.h"
#include "common/dlpack.h"
#include "common/error.h"
#include "common/parallel.h"
#include "common/pool.h"
#include "common/torch_tensor.h"
#include "common/vector_math.h"
#include "cross_entropy/cross_entropy.h"
#include "decode_attention/append.h"
#include "decode_attention/decode_attention.h"
#include "embedding/embedding_torch.h"
#include "gemm/gemm.h"
#include "gpt/decode.h"
#include "gpt/row_linear.h"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_torch.h"
#include "linear/column_sums.h"
#include "linear/narrow.h"
#include "linear/packed.h"
#include "linear/skinny.h"
#include "lstm/lstm.h"
#include "mlp/mlp.h"
#include "optimizer/adamw.h"
#include "optimizer/adamw_torch.h"
#include "optimizer/grad_norm.h"
#include "rotary/rotary.h"
#include "sampling/sample.h"

namespace py = pybind11;
using namespace fastlm;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype(int64_t code) {
  if (code < 0 || code > 2) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + "; wanted 0 (float32), 1 (float16) or 2 (bfloat16)");
  }
  return static_cast<DType>(code);
}

void layer_norm_forward(bool on_cuda, Address x, Address residual, Address weight, Address bias, Address y, Address h,
                        Address mean, Address rstd, int64_t rows, int64_t cols, int64_t x_stride,
                        int64_t residual_stride, float eps, bool rms, int x_type, int h_type, int w_type,
                        Address stream) {
  const LayerNormForward p{at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias),
                           at<void>(y), at<void>(h),        at<float>(mean),  at<float>(rstd),
                           rows,        cols,               x_stride,         residual_stride,
                           eps,         rms,                dtype(x_type),    dtype(h_type),
                           dtype(w_type)};
  py::gil_scoped_release release;
  on_cuda ? layer_norm_forward_cuda(p, at<void>(stream)) : layer_norm_forward_cpu(p);
}

int64_t layer_norm_backward_workspace(bool on_cuda, int64_t rows, int64_t cols, int sms) {
  return on_cuda ? layer_norm_backward_workspace_cuda(rows, cols, sms) : layer_norm_backward_workspace_cpu(rows, cols);
}

void layer_norm_backward(bool on_cuda, Address dy, Address dh_in, Address h, Address weight, Address mean, Address rstd,
                         Address dx, Address dresidual, Address dweight, Address dbias, Address workspace, int64_t rows,
                         int64_t cols, int64_t dy_stride, int64_t dh_in_stride, int64_t h_stride, bool rms, int x_type,
                         int h_type, int w_type, int sms, Address stream) {
  const LayerNormBackward p{at<void>(dy),      at<void>(dh_in), at<void>(h),       at<void>(weight), at<float>(mean),
                            at<float>(rstd),   at<void>(dx),    at<void>(dresidual), at<void>(dweight), at<void>(dbias),
                            at<float>(workspace), rows,         cols,              dy_stride,        dh_in_stride,
                            h_stride,          rms,             dtype(x_type),     dtype(h_type),    dtype(w_type)};
  py::gil_scoped_release release;
  on_cuda ? layer_norm_backward_cuda(p, sms, at<void>(stream)) : layer_norm_backward_cpu(p);
}

Activation activation(int64_t code) {
  if (code < 0 || code > 6) throw std::invalid_argument("activation code " + std::to_string(code) + "; wanted 0 to 6");
  return static_cast<Activation>(code);
}

void activation_forward(Address pre, Address bias, Address hidden, int64_t rows, int64_t cols, int act, int type) {
  const ActivationForward p{at<void>(pre), at<void>(bias), at<void>(hidden), rows, cols, activation(act), dtype(type)};
  py::gil_scoped_release release;
  activation_forward_cpu(p);
}

void activation_backward(Address pre, Address dhidden, Address dpre, Address hidden, Address dbias, Address workspace,
                         int64_t rows, int64_t cols, int act, int type, int dbias_type) {
  const ActivationBackward p{at<void>(pre),   at<void>(dhidden),    at<void>(dpre), at<void>(hidden),
                             at<void>(dbias), at<float>(workspace), rows,           cols,
                             activation(act), dtype(type),          dtype(dbias_type)};
  py::gil_scoped_release release;
  activation_backward_cpu(p);
}

// Addresses: a, b, bias, scale, out, pre, hidden, dbias. Sizes: m, n, k, the strides of a, b and out. Flags: a transposed,
// b transposed, accumulate. Codes: kind, activation, type, types of out and dbias.
Gemm gemm_call(const std::array<Address, 8>& address, const std::array<int64_t, 6>& size, const std::array<bool, 3>& flag,
               const std::array<int64_t, 5>& code, Address workspace, int sms, bool wgmma) {
  if (code[0] < 0 || code[0] > 2) throw std::invalid_argument("epilogue code " + std::to_string(code[0]) + "; wanted 0 to 2");
  const Epilogue epilogue{static_cast<EpilogueKind>(code[0]), activation(code[1]), at<void>(address[2]),
                          at<float>(address[3]), at<void>(address[4]), size[5], dtype(code[3]), flag[2],
                          at<void>(address[5]), at<void>(address[6]), at<void>(address[7]), dtype(code[4])};
  return {{at<void>(address[0]), size[3], flag[0]}, {at<void>(address[1]), size[4], flag[1]}, size[0], size[1], size[2],
          dtype(code[2]), epilogue, at<float>(workspace), sms, wgmma};
}

int64_t gemm_workspace(const std::array<Address, 8>& address, const std::array<int64_t, 6>& size,
                       const std::array<bool, 3>& flag, const std::array<int64_t, 5>& code, int sms, bool wgmma) {
  return gemm_workspace_cuda(gemm_call(address, size, flag, code, 0, sms, wgmma));
}

void gemm(const std::array<Address, 8>& address, const std::array<int64_t, 6>& size, const std::array<bool, 3>& flag,
          const std::array<int64_t, 5>& code, Address workspace, int sms, bool wgmma, Address stream) {
  const Gemm p = gemm_call(address, size, flag, code, workspace, sms, wgmma);
  py::gil_scoped_release release;
  gemm_cuda(p, at<void>(stream));
}

void activation_backward_on_cuda(Address pre, Address dhidden, Address dpre, Address hidden, Address dbias,
                                 Address workspace, int64_t rows, int64_t cols, int act, int type, int dbias_type,
                                 Address stream) {
  const ActivationBackward p{at<void>(pre),   at<void>(dhidden),    at<void>(dpre), at<void>(hidden),
                             at<void>(dbias), at<float>(workspace), rows,           cols,
                             activation(act), dtype(type),          dtype(dbias_type)};
  py::gil_scoped_release release;
  activation_backward_cuda(p, at<void>(stream));
}

// Addresses and sizes in the order of lstm.h.
void lstm_forward(const std::array<Address, 8>& a, int64_t batch, int64_t steps, int64_t hidden) {
  const LstmForward p{at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]),
                      at<float>(a[5]), at<float>(a[6]), at<float>(a[7]), batch,           steps, hidden};
  py::gil_scoped_release release;
  lstm_forward_cpu(p);
}

void lstm_backward(const std::array<Address, 10>& a, int64_t batch, int64_t steps, int64_t hidden) {
  const LstmBackward p{at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]),
                       at<float>(a[5]), at<float>(a[6]), at<float>(a[7]), at<float>(a[8]), at<float>(a[9]),
                       batch,           steps,           hidden};
  py::gil_scoped_release release;
  lstm_backward_cpu(p);
}

void skinny_linear(Address x, Address weight, Address bias, Address y, int64_t rows, int64_t cols, int64_t depth,
                   int64_t x_stride, int64_t weight_stride, int type) {
  const SkinnyLinear p{at<void>(x), at<void>(weight), at<void>(bias), at<void>(y), rows,
                       cols,        depth,            x_stride,       weight_stride, dtype(type)};
  py::gil_scoped_release release;
  skinny_linear_cpu(p);
}

void narrow_linear(Address x, Address weight, Address bias, Address y, Address workspace, int64_t rows, int64_t cols,
                   int64_t depth, int64_t x_stride, int64_t weight_stride, int64_t y_stride, int x_type, int weight_type,
                   int y_type) {
  const NarrowLinear p{at<void>(x), at<void>(weight), at<void>(bias), at<void>(y),   at<float>(workspace),
                       rows,        cols,             depth,          x_stride,      weight_stride,
                       y_stride,    dtype(x_type),    dtype(weight_type), dtype(y_type)};
  py::gil_scoped_release release;
  narrow_linear_cpu(p);
}

void packed_product(Address a, int64_t a_stride, bool a_transposed, int a_type, Address b, int64_t b_stride, bool b_transposed,
                    int b_type, Address bias, Address out, int64_t rows, int64_t cols, int64_t depth, int64_t out_stride,
                    int out_type, bool accumulate) {
  const PackedProduct p{{at<void>(a), a_stride, a_transposed, dtype(a_type)},
                        {at<void>(b), b_stride, b_transposed, dtype(b_type)},
                        at<void>(bias),
                        at<void>(out),
                        rows,
                        cols,
                        depth,
                        out_stride,
                        dtype(out_type),
                        accumulate};
  py::gil_scoped_release release;
  packed_product_cpu(p);
}

// `weights`: addresses, fourteen a block in the order of DecodeBlock, then the last norm's two. `caches`: for each group of
// sequences its rows, length and capacity, then for each block the addresses of its keys, then of its values.
// `sizes`: width, heads, kv_heads, head_dim, mlp_size, window_left. `addresses`: alibi_slopes, cos, sin, h, out.
void decode(const std::vector<int64_t>& weights, const std::vector<std::vector<int64_t>>& caches,
            const std::array<int64_t, 6>& sizes, const std::array<Address, 5>& addresses, bool table_of_each_row, bool rms,
            float eps, float scale, float softcap, int act, int type) {
  const int64_t layers = static_cast<int64_t>(weights.size()) / 14;
  const auto weight = [&](int64_t i) { return at<void>(static_cast<Address>(weights.at(i))); };
  std::vector<DecodeBlock> blocks;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t i = 14 * l;
    const auto pair = [&](int64_t k) { return DecodeLinear{weight(i + k), weight(i + k + 1)}; };
    const auto norm = [&](int64_t k) { return DecodeNorm{weight(i + k), weight(i + k + 1)}; };
    blocks.push_back({norm(0), pair(2), weight(i + 4), weight(i + 5), pair(6), norm(8), pair(10), pair(12)});
  }
  std::vector<std::vector<void*>> stores;
  for (const std::vector<int64_t>& cache : caches) {
    if (static_cast<int64_t>(cache.size()) != 3 + 2 * layers) throw std::invalid_argument("decode: wanted keys and values of each block");
    std::vector<void*>& store = stores.emplace_back();
    for (int64_t i = 0; i < 2 * layers; ++i) store.push_back(at<void>(static_cast<Address>(cache[3 + i])));
  }
  std::vector<DecodeGroup> groups;
  int64_t rows = 0;
  for (size_t g = 0; g < caches.size(); ++g) {
    groups.push_back({caches[g][0], caches[g][1], caches[g][2], stores[g].data(), stores[g].data() + layers});
    rows += caches[g][0];
  }
  const Decode p{blocks.data(), layers, {weight(14 * layers), weight(14 * layers + 1)},
                 groups.data(), static_cast<int64_t>(groups.size()),
                 rows, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                 rms, eps, scale, softcap, sizes[5],
                 at<float>(addresses[0]), at<float>(addresses[1]), at<float>(addresses[2]), table_of_each_row,
                 activation(act), dtype(type), at<void>(addresses[3]), at<void>(addresses[4])};
  py::gil_scoped_release release;
  decode_cpu(p);
}

void cross_entropy_block(Address logits, Address targets, Address loss, Address lse, Address dloss, int64_t rows,
                         int64_t cols, float label_smoothing, float z_loss, float softcap, float scale, bool gradient,
                         int type) {
  const CrossEntropyBlock p{at<void>(logits), at<int64_t>(targets), at<float>(loss), at<float>(lse), at<float>(dloss),
                            rows,             cols,                 label_smoothing, z_loss,         softcap,
                            scale,            gradient,             dtype(type)};
  py::gil_scoped_release release;
  cross_entropy_block_cpu(p);
}

void cross_entropy_block_on_cuda(Address logits, Address targets, Address loss, Address lse, Address dloss, int64_t rows,
                                 int64_t cols, int64_t stride, int64_t ignore_index, float label_smoothing, float z_loss,
                                 float softcap, bool gradient, int type, Address stream) {
  const CrossEntropyBlock p{at<void>(logits), at<int64_t>(targets), at<float>(loss), at<float>(lse), at<float>(dloss),
                            rows,             cols,                 label_smoothing, z_loss,         softcap,
                            1.0f,             gradient,             dtype(type)};
  py::gil_scoped_release release;
  cross_entropy_block_cuda(p, {stride, ignore_index}, at<void>(stream));
}

// Addresses: q, k, v, alibi_slopes, cu_seqlens, rng_state. Sizes: the strides (batch, row, head) of q, k and v, the batch
// stride of alibi_slopes, the number of packed sequences, B, T, S, H, H_kv, D, window_left, window_right, max_seqlen.
AttentionInputs attention_inputs(const std::array<Address, 6>& address, const std::array<int64_t, 21>& size, float scale,
                                 float softcap, uint32_t dropout_threshold, float dropout_scale, int type) {
  const auto strides = [&](int i) { return Strides{size[i], size[i + 1], size[i + 2]}; };
  return {at<void>(address[0]), at<void>(address[1]), at<void>(address[2]), strides(0), strides(3), strides(6),
          at<float>(address[3]), size[9], at<int32_t>(address[4]), size[10], at<int64_t>(address[5]),
          dropout_threshold, dropout_scale, size[11], size[12], size[13], size[14], size[15], size[16], size[17],
          size[18], size[19], scale, softcap, dtype(type), size[20] != 0};
}

void attention_forward(bool on_cuda, Address out, Address lse, const std::array<Address, 6>& address,
                       const std::array<int64_t, 21>& size, float scale, float softcap, uint32_t dropout_threshold,
                       float dropout_scale, int type, Address stream) {
  const AttentionInputs p =
      attention_inputs(address, size, scale, softcap, dropout_threshold, dropout_scale, type);
  py::gil_scoped_release release;
  on_cuda ? attention_forward_cuda(p, at<void>(out), at<float>(lse), at<void>(stream))
          : attention_forward_cpu(p, at<void>(out), at<float>(lse));
}

int64_t attention_backward_workspace_of(const std::array<Address, 6>& address, const std::array<int64_t, 21>& size,
                                        float scale, float softcap, uint32_t dropout_threshold, float dropout_scale, int type) {
  return attention_backward_workspace(attention_inputs(address, size, scale, softcap, dropout_threshold, dropout_scale, type));
}

// gradients: out, lse, dout, dlse, dq, dk, dv. strides: dout's (batch, row, head), the row's of dq, that of dk and dv.
// workspace: CUDA only
void attention_backward(bool on_cuda, const std::array<Address, 7>& gradients, const std::array<int64_t, 5>& strides,
                        const std::array<Address, 6>& address, const std::array<int64_t, 21>& size, float scale,
                        float softcap, uint32_t dropout_threshold, float dropout_scale, int type, Address workspace,
                        Address stream) {
  const AttentionInputs p =
      attention_inputs(address, size, scale, softcap, dropout_threshold, dropout_scale, type);
  const AttentionGradients g{at<void>(gradients[0]), at<float>(gradients[1]),
                             at<void>(gradients[2]), {strides[0], strides[1], strides[2]},
                             at<float>(gradients[3]), at<void>(gradients[4]),
                             at<void>(gradients[5]), at<void>(gradients[6]), strides[3], strides[4]};
  py::gil_scoped_release release;
  on_cuda ? attention_backward_cuda(p, g, at<float>(workspace), at<void>(stream)) : attention_backward_cpu(p, g);
}

// Addresses: q, k, their results (the same, or others), cos, sin, positions. Sizes: for q and for k the strides (batch, row,
// head) of the input and of the result and the heads, then the tables' rows and the elements between the tables of two
// batch entries, those between their positions, B, T, D, pairs.
void rotary(bool on_cuda, const std::array<Address, 7>& address, const std::array<int64_t, 21>& size,
            bool wide_positions, bool interleaved, bool inverse, int type, Address stream) {
  const auto tensor = [&](int i) {
    const int64_t* s = &size[7 * i];
    return RotaryTensor{at<void>(address[i]), at<void>(address[2 + i]), s[0], s[1], s[2], s[3], s[4], s[5], s[6]};
  };
  const Rotary p{{tensor(0), tensor(1)}, at<float>(address[4]), at<float>(address[5]), size[14],    size[15],
                 at<void>(address[6]),   wide_positions,        size[16],              size[17],    size[18],
                 size[19],               size[20],              interleaved,           inverse,     dtype(type)};
  py::gil_scoped_release release;
  on_cuda ? rotary_cuda(p, at<void>(stream)) : rotary_cpu(p);
}

void embedding_forward(bool on_cuda, Address ids, bool wide_ids, Address weight, Address y, int64_t count,
                       int64_t vocabulary, int64_t cols, int64_t weight_stride, int type, Address stream) {
  const EmbeddingForward p{at<void>(ids), wide_ids, at<void>(weight), at<void>(y), count, vocabulary,
                           cols,          weight_stride, dtype(type)};
  py::gil_scoped_release release;
  on_cuda ? embedding_forward_cuda(p, at<void>(stream)) : embedding_forward_cpu(p);
}

int64_t embedding_backward_workspace(bool on_cuda, int64_t count, int64_t cols) {
  return on_cuda ? embedding_backward_workspace_cuda(count, cols) : 0;
}

void embedding_backward(bool on_cuda, Address dy, Address keys, Address order, Address dweight, Address workspace,
                        int64_t count, int64_t vocabulary, int64_t cols, int64_t dy_stride, int64_t padding, int type,
                        Address stream) {
  const EmbeddingBackward p{at<void>(dy), at<int64_t>(keys), at<int64_t>(order), at<void>(dweight), at<float>(workspace),
                            count,        vocabulary,        cols,               dy_stride,         padding,
                            dtype(type)};
  py::gil_scoped_release release;
  on_cuda ? embedding_backward_cuda(p, at<void>(stream)) : embedding_backward_cpu(p);
}

// Addresses: q, k, v, lengths, table, alibi_slopes, out, workspace. Sizes: the strides (entry, row, head) of k and v, the batch
// stride of alibi_slopes, B, T, H, H_kv, D, the capacity, pages, tokens of a page, the table's width, window.
void decode_attention(bool on_cuda, const std::array<Address, 8>& address, const std::array<int64_t, 17>& size, float scale,
                      float softcap, int type, Address stream) {
  const DecodeAttention p{at<void>(address[0]),      at<void>(address[1]), at<void>(address[2]),
                          {size[0], size[1], size[2]}, {size[3], size[4], size[5]}, at<int32_t>(address[3]),
                          at<int32_t>(address[4]),   at<float>(address[5]), size[6], at<void>(address[6]),
                          at<float>(address[7]),     size[7], size[8], size[9], size[10], size[11], size[12],
                          size[13], size[14], size[15], size[16], scale, softcap, dtype(type)};
  py::gil_scoped_release release;
  on_cuda ? decode_attention_cuda(p, at<void>(stream)) : decode_attention_cpu(p);
}

void sample(bool on_cuda, Address logits, Address ids, Address rng_state, int64_t rows, int64_t vocabulary,
            int64_t stride, bool state_a_row, float temperature, int64_t top_k, double top_p, float log_min_p, int type,
            Address stream) {
  const Sample p{at<void>(logits), at<int64_t>(ids), at<int64_t>(rng_state), rows,  vocabulary, stride, state_a_row,
                 temperature,      top_k,            top_p,                  log_min_p, dtype(type)};
  py::gil_scoped_release release;
  on_cuda ? sample_cuda(p, at<void>(stream)) : sample_cpu(p);
}

// `function`: the code of a VectorFunction; n floats from `in` to `out`.
void vector_math(int64_t function, Address in, Address out, int64_t n) {
  if (function < 0 || function > 4) throw std::invalid_argument("wanted a function from 0 to 4, got " + std::to_string(function));
  vector_math_cpu(static_cast<VectorFunction>(function), at<float>(in), at<float>(out), n);
}

// `table`: nine int64 a tensor, in the order of AdamWTensor: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, shadow
// (addresses), numel, param's dtype code, grad's. Any contiguous buffer of int64: array.array("q"), a NumPy array.
void adamw_step(const py::buffer& table, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step, float grad_scale, bool maximize) {
  constexpr int64_t kFields = 9;
  const py::buffer_info info = table.request();
  if (info.itemsize != 8 || info.size % kFields != 0 || !PyBuffer_IsContiguous(info.view(), 'C')) {
    throw std::invalid_argument("adamw_step: wanted a contiguous buffer of 9 int64 a tensor, got " +
                                std::to_string(info.size) + " items of " + std::to_string(info.itemsize) + " bytes");
  }
  const int64_t count = info.size / kFields;
  std::vector<AdamWTensor> tensors(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* row = static_cast<const int64_t*>(info.ptr) + k * kFields;
    tensors[k] = {at<void>(row[0]), at<void>(row[1]), at<float>(row[2]), at<float>(row[3]),
                  at<float>(row[4]), at<void>(row[5]), row[6], dtype(row[7]), dtype(row[8])};
  }
  py::gil_scoped_release release;
  adamw_step_cpu(tensors.data(), count, {lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize});
}

// A DLPack capsule: an uninitialised, contiguous CPU tensor in memory of the pool.
py::capsule pooled_tensor(const py::tuple& shape, int type) {
  using Tensor = OwnedTensor<DLManagedTensor>;
  int64_t sizes[Tensor::kDims];
  if (shape.size() > Tensor::kDims) {
    throw std::invalid_argument("wanted at most 8 dimensions, got " + std::to_string(shape.size()));
  }
  for (size_t d = 0; d < shape.size(); ++d) sizes[d] = shape[d].cast<int64_t>();
  return py::capsule(Tensor::make(sizes, static_cast<int>(shape.size()), dtype(type)), "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;  // a consumer took it, and renamed it
    auto* const tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    tensor->deleter(tensor);
  });
}

py::dict pool_state_dict() {
  const PoolState state = pool_state();
  py::dict d;
  d["limit"] = state.limit;
  d["unused"] = state.unused;
  d["used"] = state.used;
  d["fresh"] = state.fresh;
  d["reused"] = state.reused;
  return d;
}

// Addresses: both caches, k, v, at. Strides: of each cache the sequence's and the row's, of k and of v the sequence's.
void cache_append_on_cuda(const std::array<Address, 5>& address, const std::array<int64_t, 6>& stride, int64_t batch,
                          int64_t capacity, int64_t cols, int type, Address stream) {
  const CacheAppend p{at<void>(address[0]),    at<void>(address[1]),    at<void>(address[2]), at<void>(address[3]),
                      at<int64_t>(address[4]), {stride[0], stride[1]}, {stride[2], stride[3]}, stride[4], stride[5],
                      batch,                   capacity,               cols,                   dtype(type)};
  py::gil_scoped_release release;
  cache_append_cuda(p, at<void>(stream));
}

// Addresses: x, residual, h, norm_weight, norm_bias, weight, bias, y. act: -1 for none.
void row_linear_on_cuda(const std::array<Address, 8>& a, int64_t cols, int64_t outputs, float eps, bool rms, int act, int type,
                        bool programmatic, Address stream) {
  const RowLinear p{at<void>(a[0]), at<void>(a[1]), at<void>(a[2]), at<void>(a[3]),
                    at<void>(a[4]), at<void>(a[5]), at<void>(a[6]), at<void>(a[7]),
                    cols,           outputs,        eps,            rms,
                    act >= 0,       activation(act >= 0 ? act : 0), dtype(type), programmatic};
  py::gil_scoped_release release;
  row_linear_cuda(p, at<void>(stream));
}

int64_t column_sums_workspace(bool on_cuda, int64_t rows, int64_t cols) {
  return on_cuda ? column_sums_workspace_cuda(rows, cols) : column_sums_workspace_cpu(rows, cols);
}

void column_sums(bool on_cuda, Address x, Address sums, Address workspace, int64_t rows, int64_t cols, int64_t stride,
                 int type, int sums_type, Address stream) {
  const ColumnSums p{at<void>(x), at<void>(sums), at<float>(workspace), rows, cols, stride, dtype(type), dtype(sums_type)};
  py::gil_scoped_release release;
  on_cuda ? column_sums_cuda(p, at<void>(stream)) : column_sums_cpu(p);
}

// rows: the address of AdamWRow on the device. grad_scale_on_device: of a float there, or 0.
void adamw_step_on_cuda(Address rows, int64_t count, int64_t chunks, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step, float grad_scale, bool maximize, Address grad_scale_on_device,
                        Address stream) {
  check(step >= 1, "adamw: steps are counted from 1");
  const AdamWStep s{lr, beta1, beta2, eps, weight_decay, step, grad_scale, maximize};
  py::gil_scoped_release release;
  adamw_step_cuda(at<AdamWRow>(rows), count, chunks, s, at<float>(grad_scale_on_device), at<void>(stream));
}

// `table`: four int64 a tensor, in the order of GradNormTensor. result: norm and scale.
void grad_norm(const py::buffer& table, int64_t chunks, Address sums, float max_norm, Address result) {
  const py::buffer_info info = table.request();
  check(info.itemsize == 8 && info.size % 4 == 0, "grad_norm: wanted a buffer of 4 int64 a tensor");
  py::gil_scoped_release release;
  grad_norm_cpu(static_cast<const GradNormTensor*>(info.ptr), info.size / 4, chunks, at<double>(sums), max_norm,
                at<float>(result), at<float>(result) + 1);
}

void grad_norm_on_cuda(Address tensors, int64_t count, int64_t chunks, Address sums, float max_norm, Address result,
                       Address stream) {
  py::gil_scoped_release release;
  grad_norm_cuda(at<GradNormTensor>(tensors), count, chunks, at<double>(sums), max_norm, at<float>(result),
                 at<float>(result) + 1, at<void>(stream));
}

py::dict build_info_dict() {
  const BuildInfo info = build_info();
  const auto or_none = [](const std::string& s) -> py::object { return s.empty() ? py::none() : py::object(py::str(s)); };
  py::dict d;
  d["version"] = info.version;
  d["git_commit"] = or_none(info.git_commit);
  d["compiler"] = info.compiler;
  d["cpu_isas"] = info.cpu_isas;
  d["cuda"] = or_none(info.cuda);
  d["cuda_archs"] = info.cuda_archs;
  d["cuda_reason"] = or_none(info.cuda_reason);
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastlm's compiled kernels, called through fastlm.ops.";
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward_workspace", &layer_norm_backward_workspace);
  m.def("layer_norm_backward", &layer_norm_backward);
  define_positional<adamw_steps_torch, 2>(m, "adamw_steps_torch");
  define_positional<adamw_table_torch, 5>(m, "adamw_table_torch");
  define_positional<embedding_forward_torch, 2>(m, "embedding_forward_torch");
  define_positional<layer_norm_forward_torch, 7>(m, "layer_norm_forward_torch");
  define_positional<layer_norm_backward_torch, 7>(m, "layer_norm_backward_torch");
  m.def("activation_forward", &activation_forward);
  m.def("activation_backward", &activation_backward);
  m.def("activation_backward_workspace", &activation_backward_workspace_cpu);
  m.def("activation_backward_cuda", &activation_backward_on_cuda);
  m.def("activation_backward_workspace_cuda", &activation_backward_workspace_cuda);
  m.def("gemm", &gemm);
  m.def("gemm_workspace", &gemm_workspace);
  m.def("narrow_linear", &narrow_linear);
  m.def("packed_product", &packed_product);
  m.def("narrow_linear_workspace", &narrow_linear_workspace_cpu);
  m.def("skinny_linear", &skinny_linear);
  m.def("column_sums_workspace", &column_sums_workspace);
  m.def("column_sums", &column_sums);
  m.def("decode", &decode);
  m.def("lstm_forward", &lstm_forward);
  m.def("lstm_forward_workspace", &lstm_forward_workspace_cpu);
  m.def("lstm_backward", &lstm_backward);
  m.def("lstm_backward_workspace", &lstm_backward_workspace_cpu);
  m.def("cross_entropy_block", &cross_entropy_block);
  m.def("cross_entropy_block_cuda", &cross_entropy_block_on_cuda);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward_workspace", &attention_backward_workspace_of);
  m.def("attention_backward", &attention_backward);
  m.def("rotary", &rotary);
  m.def("embedding_forward", &embedding_forward);
  m.def("embedding_backward_workspace", &embedding_backward_workspace);
  m.def("embedding_backward", &embedding_backward);
  m.def("cache_append_cuda", &cache_append_on_cuda);
  m.def("row_linear_cuda", &row_linear_on_cuda);
  m.def("row_linear_takes", [](int64_t cols, int type) { return row_linear_takes(cols, dtype(type)); });
  m.def("decode_attention", &decode_attention);
  m.def("decode_attention_workspace", &decode_attention_workspace);
  m.def("sample", &sample);
  m.def("adamw_step", &adamw_step);
  m.def("adamw_step_cuda", &adamw_step_on_cuda);
  m.def("grad_norm", &grad_norm);
  m.def("grad_norm_cuda", &grad_norm_on_cuda);

  m.def("connect_torch", [](py::type tensor, py::type parameter) { return torch_tensors.connect(tensor, parameter); });
  m.def("pooled_tensor", &pooled_tensor);
  m.def("pool_state", &pool_state_dict);
  m.def("pool_set_limit", &pool_set_limit);
  m.def("pool_release", &pool_release);

  m.def("build_info", &build_info_dict, "What was built: version, git_commit, compiler, cpu_isas, cuda, cuda_archs, cuda_reason.");
  m.def("cpu_name", &cpu_name);
  m.def("cpu_features", &cpu_features);
  m.def("cpu_isas", &supported_isas, "The instruction sets of this build that the processor can run.");
  m.def("cpu_isa", [] { return cpu_isa_name(cpu_isa()); }, "The instruction set in use (FASTLM_CPU_ISA forces one).");
  m.def("vector_math", &vector_math, "simd_math.h on an array, for the tests.");
  m.def("max_threads", &max_threads, "The threads that a CPU kernel may use: torch.get_num_threads().");
}
