// The GEMM's host side: checks, plan, workspace, launches; and the sum of the bias gradient's parts.
#include "common/error.h"
#include "gemm/gemm_kernel_sm90.h"
#include "linear/sum_parts.h"

namespace fastlm {
namespace cuda {

FASTLM_GEMM_TYPE(extern, __nv_bfloat16)
FASTLM_GEMM_TYPE(extern, __half)
FASTLM_GEMM_TYPE(extern, float)
FASTLM_WGMMA_TYPE(extern, __nv_bfloat16)
FASTLM_WGMMA_TYPE(extern, __half)

namespace {

template <class F>
void with_type(DType t, F&& f) {
  if (t == DType::bf16) f(__nv_bfloat16());
  else if (t == DType::f16) f(__half());
  else f(float());
}

bool address_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether a matrix may be copied 16 bytes at a time; `half`: rows from there on are a second part of it.
bool operand_aligned(const Matrix& p, int64_t half, DType type) {
  return address_aligned(p.data) && p.stride * size_of(type) % 16 == 0 && (!p.transposed || half * size_of(type) % 16 == 0);
}

bool epilogue_aligned(const Epilogue& e, int64_t cols, DType type) {
  const int64_t out = e.kind == EpilogueKind::store ? e.out_stride * size_of(e.out_type) : 0;
  const bool rows = e.kind == EpilogueKind::store ? out % 16 == 0 : cols * size_of(type) % 16 == 0;
  return rows && cols % 4 == 0 && address_aligned(e.bias) && address_aligned(e.out) && address_aligned(e.pre) &&
         address_aligned(e.hidden);
}

EpilogueTask epilogue_task(const Epilogue& e, int64_t m, int64_t cols, DType type) {
  const bool gated = e.kind != EpilogueKind::store && is_gated(e.activation);
  return {e, m, cols, gated, epilogue_aligned(e, cols, type), nullptr};
}

int64_t columns_of(const Gemm& p) { return is_gated_product(p.epilogue) ? p.n / 2 : p.n; }

GemmPlan plan_of(const Gemm& p) {
  const int64_t cols = columns_of(p);
  const bool aligned = operand_aligned(p.a, 0, p.type) && operand_aligned(p.b, cols == p.n ? 0 : cols, p.type);
  return plan_gemm(p, aligned, cols % kVector == 0 && epilogue_aligned(p.epilogue, cols, p.type));
}

// The parts of dbias: one a tile of rows, or a strip of one, of the GEMM or, where k is split, of the kernel that finishes it.
int64_t column_parts(const GemmPlan& plan, int64_t m) {
  if (plan.splits > 1) return ceil_div(m, kFinishSize);
  return plan.wgmma ? plan.tiles_m * kWgmmaStrips : plan.tiles_m;
}

int64_t partials_size(const GemmPlan& plan, const Gemm& p) { return plan.splits > 1 ? plan.splits * p.m * p.n : 0; }

void check_gemm(const Gemm& p) {
  const Epilogue& e = p.epilogue;
  check(p.m >= 0 && p.n >= 0 && p.k >= 0, "gemm: wanted sizes >= 0");
  check(!p.a.transposed || p.b.transposed, "gemm: a is transposed and b is not; wanted another combination");
  check(!p.a.transposed || e.kind == EpilogueKind::store, "gemm: a is transposed, so nothing but the product can be stored");
  check(!is_gated_product(e) || p.n % 2 == 0, "gemm: a gated activation of an odd number of columns");
  check(e.kind != EpilogueKind::store || e.out_type == DType::f32 || (e.out_type == p.type && !e.accumulate),
        "gemm: out must be of the operands' type, or float32, and float32 where it is added to");
  check(p.sms > 0, "gemm: wanted the number of multiprocessors");
}

}  // namespace
}  // namespace cuda

int64_t gemm_workspace_cuda(const Gemm& p) {
  using namespace cuda;
  check_gemm(p);
  // Addresses decide about the plan, and are not known yet: room for any.
  int64_t most = 0;
  for (const auto [aligned, whole] : {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
    const GemmPlan plan = plan_gemm(p, aligned, whole);
    const int64_t pre_cols = is_gated(p.epilogue.activation) ? 2 * p.n : p.n;
    const int64_t columns = p.epilogue.kind == EpilogueKind::activate_backward ? column_parts(plan, p.m) * pre_cols : 0;
    most = std::max(most, partials_size(plan, p) + columns);
  }
  return most;
}

void gemm_cuda(const Gemm& p, void* stream) {
  using namespace cuda;
  check_gemm(p);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Epilogue& e = p.epilogue;
  const int64_t cols = columns_of(p);
  const GemmPlan plan = plan_of(p);
  EpilogueTask task = epilogue_task(e, p.m, cols, p.type);
  float* columns = p.workspace + partials_size(plan, p);
  if (e.dbias != nullptr) task.column_sums = columns;
  if (p.m > 0 && p.n > 0) {
    GemmTask product{p.a, p.b, p.m, p.n, p.k, plan.tiles_m, plan.tiles_n, plan.split_k, nullptr, task};
    if (plan.splits > 1) product.partials = p.workspace;
    with_type(p.type, [&](auto t) {
      using T = decltype(t);
      if constexpr (sizeof(T) == 2) {
        if (plan.wgmma) run_wgmma<T>(product, plan, p.sms, cuda_stream);
      }
      if (!plan.wgmma) run_gemm<T>(product, plan, cuda_stream);
      if (plan.splits > 1) run_finish<T>(task, {p.workspace, plan.splits, p.n, nullptr}, cuda_stream);
    });
  }
  if (e.dbias != nullptr && p.n > 0) {
    run_sum_columns(columns, column_parts(plan, p.m), task.gated ? 2 * cols : cols, e.dbias, e.dbias_type, cuda_stream);
  }
}

int64_t activation_backward_workspace_cuda(int64_t rows, int64_t pre_cols) {
  return cuda::ceil_div(rows, cuda::kFinishSize) * pre_cols;
}

void activation_backward_cuda(const ActivationBackward& p, void* stream) {
  using namespace cuda;
  check(p.rows >= 0 && p.cols >= 0, "mlp backward: wanted rows >= 0 and cols >= 0");
  check(p.dbias == nullptr || p.workspace != nullptr || p.rows == 0, "mlp backward: dbias without a workspace");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Epilogue e{};
  e.kind = EpilogueKind::activate_backward;
  e.activation = p.activation;
  e.out = p.dpre;
  e.pre = const_cast<void*>(p.pre);
  e.hidden = p.hidden;
  EpilogueTask task = epilogue_task(e, p.rows, p.cols, p.type);
  task.vectors = task.vectors && address_aligned(p.dhidden);
  task.column_sums = p.dbias != nullptr ? p.workspace : nullptr;
  if (p.rows > 0 && p.cols > 0) {
    with_type(p.type, [&](auto t) { run_finish<decltype(t)>(task, {nullptr, 0, 0, p.dhidden}, cuda_stream); });
  }
  if (p.dbias != nullptr && p.cols > 0) {
    run_sum_columns(p.workspace, ceil_div(p.rows, kFinishSize), task.gated ? 2 * p.cols : p.cols, p.dbias, p.dbias_type, cuda_stream);
  }
}

}  // namespace fastlm
